"""Mixing where all peers are in memory: x <- W x in place and row by row, with no copy of x.

On an edge between peers lo < hi runs one flow f = w (x_hi - x_lo): lo adds it and hi subtracts it. These are the terms
of `combine.mean`, and each row takes them in the order of its neighbours' ids, so both end with the same bits.

Rows have their turn in the order of ids. Until then a row is as it was, so at its turn its flows to higher rows are
computed, the kept flows from lower rows are subtracted, and its own are added. What is kept between turns are the flows
that cross from rows that are done to rows that are not. Rows that follow each other and whose
neighbours lie the same steps away, as on a ring, share a turn: few operations on many rows. Columns go in blocks,
narrow enough for what a turn touches to stay in the cache, and each thread takes blocks: a block's bits depend on
nothing else.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
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

NUMBERS = 294_912
"""Numbers that one operation works on: the fastest of 36,864 to 294,912, with 512 KiB of cache a core."""
TOGETHER = 16
"""Rows that share a turn, at most."""
NARROW = 1_024
"""Blocks of fewer columns cost more than going peer by peer, unless there are no more columns."""
KEPT = 128 * 2**20
"""Bytes that each thread may keep of flows: whether a graph is mixed at once depends on no number of threads."""

Given = tuple[slice, slice]
"""Rows, and the places of the flows that they subtract."""
Begun = tuple[slice, float, slice]
"""The higher rows at the other ends, the weight, and the places of the flows to compute and add."""


@dataclass(frozen=True)
class Turn:
    """What the rows of one turn do; in `ended` each row finds its lower neighbours in the order of their ids."""

    rows: slice
    ended: tuple[Given, ...]
    begun: tuple[Begun, ...]


@dataclass(frozen=True)
class Sweep:
    """The turns of all rows that have neighbours, the flows kept at a time, and the messages that would travel."""

    turns: tuple[Turn, ...]
    num_kept: int
    num_messages: int

    def blocks(self, spans: Iterable[slice], itemsize: int) -> list[slice] | None:
        """Returns the blocks of columns; None where so many flows are kept that blocks would be too narrow."""
        threads, blocks = torch.get_num_threads(), list[slice]()
        num_rows = sum(turn.rows.stop - turn.rows.start for turn in self.turns)
        width = max(NARROW, NUMBERS * len(self.turns) // max(num_rows, 1))
        most = min(width, KEPT // (itemsize * max(self.num_kept, 1)))
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
    upper, lower = dict[int, list[tuple[int, float]]](), dict[int, list[int]]()
    for lo, hi in sorted(graph.edges):
        if lo not in absent and hi not in absent:
            upper.setdefault(lo, []).append((hi, weights[lo, hi]))
            lower.setdefault(hi, []).append(lo)
    places, turns = Places(), list[Turn]()
    for rows in together(upper, lower):
        first, last = rows[0], rows[-1]
        begun = [(slice(hi, hi + len(rows)), w, places.take(first, last, hi - first)) for hi, w in upper.get(first, ())]
        ended = [given for lo in lower.get(first, ()) for given in places.give(first, last, first - lo)]
        turns.append(Turn(slice(first, last + 1), tuple(ended), tuple(begun)))
    return Sweep(tuple(turns), places.size, 2 * sum(len(others) for others in upper.values()))


def together(upper: Mapping[int, list[tuple[int, float]]], lower: Mapping[int, list[int]]) -> Iterator[list[int]]:
    """Yields the rows of each turn: consecutive ones with the same steps to their neighbours and the same weights."""
    rows, before = list[int](), None
    for row in sorted({*upper, *lower}):
        steps = [(hi - row, w) for hi, w in upper.get(row, ())], [row - lo for lo in lower.get(row, ())]
        if rows and (row != rows[-1] + 1 or len(rows) == TOGETHER or steps != before):
            yield rows
            rows = []
        rows.append(row)
        before = steps
    if rows:
        yield rows


class Places:
    """Where flows are kept: those that one turn computes over one step lie side by side, until all are subtracted."""

    def __init__(self) -> None:
        self.size = 0
        self.free = dict[int, list[int]]()  # by size
        self.kept = dict[tuple[int, int], tuple[list[int], int]]()  # (row, step) -> [start, size, left], position

    def take(self, first: int, last: int, step: int) -> slice:
        """Returns the places of the flows from rows first to last to those `step` above."""
        size = last - first + 1
        free = self.free.setdefault(size, [])
        if not free:
            free.append(self.size)
            self.size += size
        group = [free.pop(), size, size]
        self.kept |= {(first + i, step): (group, i) for i in range(size)}
        return slice(group[0], group[0] + size)

    def give(self, first: int, last: int, step: int) -> Iterator[Given]:
        """Yields the rows, and the places, of the flows to rows first to last from those `step` below, and frees them.

        What is freed is taken no earlier than the next turn.
        """
        row = first
        while row <= last:
            group, position = self.kept.pop((row - step, step))
            number = min(last - row + 1, group[1] - position)
            for i in range(1, number):
                del self.kept[row + i - step, step]
            group[2] -= number
            if not group[2]:
                self.free[group[1]].append(group[0])
            yield slice(row, row + number), slice(group[0] + position, group[0] + position + number)
            row += number


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
    weights = {weight: np.array(weight, matrix.dtype) for turn in sweep.turns for _, weight, _ in turn.begun}
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        for _ in threads.map(lambda block: mix_block(sweep, matrix[:, block], weights), blocks):
            pass


def mix_block(sweep: Sweep, x: NDArray[Any], weights: Mapping[float, NDArray[Any]]) -> None:
    """Mixes one block [N, c] in place.

    Threads wait for each other between operations, so these are few and short to call: weights are arrays already, and
    results go to the last argument.
    """
    kept = np.empty((sweep.num_kept, x.shape[1]), dtype=x.dtype)
    add, subtract, multiply = np.add, np.subtract, np.multiply
    with np.errstate(all="ignore"):  # rows far apart: a flow may overflow, as it does peer by peer
        for turn in sweep.turns:
            own = x[turn.rows]
            for others, weight, places in turn.begun:
                flow = kept[places]
                subtract(x[others], own, flow)
                multiply(flow, weights[weight], flow)
            for rows, places in turn.ended:
                lower = x[rows]
                subtract(lower, kept[places], lower)
            for _, _, places in turn.begun:
                add(own, kept[places], own)
