"""Mixing where all peers are in memory: x <- W x in place and row by row, with no copy of x.

On an edge between peers lo < hi runs one flow f = w (x_hi - x_lo): lo adds it and hi subtracts it. These are the terms
of `combine.mean`, and each row takes them in the order of its neighbours' ids, so both end with the same bits.

Rows have their turn in the order of ids. Until then a row is as it was, so at its turn its flows to higher rows are
computed, the kept flows from lower rows are subtracted, and its own are added. What is kept between turns are the flows
that cross from rows that are done to rows that are not: three on a ring. Columns go in blocks, narrow enough for a few
rows of a block to stay in the cache, and each thread takes blocks: a block's bits depend on nothing else.
"""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, nan
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dfl_lora.graphs import Graph
from dfl_lora.mixing import Mixing

WIDTH = 73_728
"""Columns of a block at most: the fastest of 12,288 to 73,728, measured on cores with 512 KiB of cache each."""
NARROW = 1_024
"""Blocks of fewer columns cost more than going peer by peer, unless there are no more columns."""
KEPT = 256 * 2**20
"""Bytes that all threads may keep of flows."""

Turn = tuple[int, tuple[int, ...], tuple[tuple[int, float, int], ...]]
"""A row, the places of the flows to subtract, and (row, weight, place) of those to compute and add."""


@dataclass(frozen=True)
class Sweep:
    """The turns of all rows that have neighbours, the flows kept at a time, and the messages that would travel."""

    turns: tuple[Turn, ...]
    num_kept: int
    num_messages: int

    def blocks(self, spans: Iterable[slice], itemsize: int) -> list[slice] | None:
        """Returns the blocks of columns; None where so many flows are kept that blocks would be too narrow."""
        threads, blocks = torch.get_num_threads(), list[slice]()
        most = min(WIDTH, KEPT // (itemsize * max(self.num_kept, 1) * threads))
        for span in spans:
            size = span.stop - span.start
            if most < min(size, NARROW):
                return None
            number = ceil(size / most)
            if size >= NARROW * threads:
                number = ceil(number / threads) * threads
            width = ceil(size / number)
            blocks += [slice(a, min(a + width, span.stop)) for a in range(span.start, span.stop, width)]
        return blocks


@lru_cache(maxsize=4)
def sweep_of(graph: Graph, mixing: Mixing, absent: frozenset[int]) -> Sweep | None:
    """Returns the sweep of W on a graph; None where W is not symmetric to the bit."""
    weights = weights_of(graph, mixing)
    if weights is None:
        return None
    upper = dict[int, list[tuple[int, float, int]]]()
    lower = dict[int, list[int]]()
    free, num_kept, turns = list[int](), 0, list[Turn]()
    for lo, hi in sorted(graph.edges):
        if lo not in absent and hi not in absent:
            upper.setdefault(lo, []).append((hi, weights[lo, hi], -1))
            lower.setdefault(hi, [])
    for row in sorted({*upper, *lower}):
        begun = []
        for hi, weight, _ in upper.pop(row, ()):
            if not free:
                free.append(num_kept)
                num_kept += 1
            place = free.pop()
            begun.append((hi, weight, place))
            lower[hi].append(place)
        ended = lower.pop(row, [])
        free += ended
        turns.append((row, tuple(ended), tuple(begun)))
    return Sweep(tuple(turns), num_kept, 2 * sum(len(begun) for _, _, begun in turns))


@lru_cache(maxsize=4)
def weights_of(graph: Graph, mixing: Mixing) -> dict[tuple[int, int], float] | None:
    """Returns the weight of each edge; None where its two ends differ."""
    rows = [mixing(graph, i).weights for i in range(graph.num_peers)]
    weights = {(lo, hi): rows[lo].get(hi, nan) for lo, hi in graph.edges}
    return weights if all(weights[lo, hi] == rows[hi].get(lo) for lo, hi in graph.edges) else None


def finite(x: Tensor, spans: Iterable[slice], absent: frozenset[int]) -> bool:
    """Tells whether the rows of all who are present are finite; sums read x once, and overflow is looked into."""
    for span in spans:
        doubtful = (~torch.isfinite(x[:, span].sum(1))).nonzero().flatten().tolist()
        if not all(row in absent or bool(torch.isfinite(x[row, span]).all()) for row in doubtful):
            return False
    return True


def apply(sweep: Sweep, x: Tensor, blocks: Sequence[slice]) -> None:
    """Mixes the columns of x [N, P] in place, the blocks shared out to as many threads as torch uses."""
    matrix: NDArray[Any] = x.numpy()
    weights = {weight: np.array(weight, matrix.dtype) for _, _, begun in sweep.turns for _, weight, _ in begun}
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        for _ in threads.map(lambda block: mix_block(sweep, matrix[:, block], weights), blocks):
            pass


def mix_block(sweep: Sweep, x: NDArray[Any], weights: Mapping[float, NDArray[Any]]) -> None:
    """Mixes one block [N, c] in place.

    Threads wait for each other between operations, so these are few and short to call: weights are arrays already, and
    results go to the last argument.
    """
    rows, kept = list(x), list(np.empty((sweep.num_kept, x.shape[1]), dtype=x.dtype))
    add, subtract, multiply = np.add, np.subtract, np.multiply
    for row, ended, begun in sweep.turns:
        own = rows[row]
        for other, weight, place in begun:
            flow = kept[place]
            subtract(rows[other], own, flow)
            multiply(flow, weights[weight], flow)
        for place in ended:
            subtract(own, kept[place], own)
        for _, _, place in begun:
            add(own, kept[place], own)
