"""What the processor multiplies at best, measured between the arms: the roof of MFU and HFU."""

from statistics import median
from time import perf_counter

import torch

WIDTH = 4
"""A feed-forward layer is four times as wide as the hidden size."""
LEAST_S = 0.02
MOST_ROWS = 4096


def rate(rows: int, hidden: int, dtype: torch.dtype, repeats: int = 5) -> float:
    """Returns FLOP/s of [rows, d] x [d, 4d] and back, the products a feed-forward layer makes: the median of `repeats`.

    Each repeat takes at least 20 ms, so that a clock that changes or a neighbour on the machine shows.
    """
    rows = min(max(rows, 16), MOST_ROWS)
    x = torch.full((rows, hidden), 0.5, dtype=dtype)
    up = torch.full((hidden, WIDTH * hidden), 0.01, dtype=dtype)
    down = torch.full((WIDTH * hidden, hidden), 0.01, dtype=dtype)
    work = 2 * 2 * rows * hidden * WIDTH * hidden
    return median(once(x, up, down, work) for _ in range(repeats))


def once(x: torch.Tensor, up: torch.Tensor, down: torch.Tensor, work: int) -> float:
    count, start = 0, perf_counter()
    while (taken := perf_counter() - start) < LEAST_S:
        (x @ up) @ down
        count += 1
    return count * work / taken
