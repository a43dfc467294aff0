"""Shares: how unequal the rows of the peers are, from the rows n_ic of each label c at each peer i.

    sizes              n_i = sum_c n_ic: mean, smallest, largest, and the ratio of the last two
    label skew         mean over peers of 1/2 sum_c |p_ic - p_c|, the total variation distance between a peer's
                       label shares p_ic = n_ic / n_i and everyone's: 0 where all are alike, below 1 always
    effective labels   mean over peers of exp(-sum_c p_ic log p_ic): as many equally frequent labels have that entropy

Peers without rows have no shares, and rows without labels (one column of counts) have no skew.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan

import numpy as np


@dataclass(frozen=True)
class Sizes:
    """Rows per peer; the ratio is None where a peer has none."""

    mean: float
    min: int
    max: int
    ratio: float | None


@dataclass(frozen=True)
class Shares:
    """How unequal peers are; None where there are no labels."""

    sizes: Sizes
    label_skew: float | None
    effective_labels: float | None

    def __str__(self) -> str:
        ratio = "" if self.sizes.ratio is None else f" (ratio {short(self.sizes.ratio)})"
        text = f"Rows: mean {short(self.sizes.mean)}, {self.sizes.min:,} to {self.sizes.max:,}{ratio}"
        if self.label_skew is None:
            return text
        return f"{text}; label skew {self.label_skew:.3g}, effective labels {self.effective_labels:.3g}"


def short(value: float) -> str:
    """Returns a number of about three digits; a word where it is not known."""
    if isnan(value):
        return "unknown"
    return f"{value:,.0f}" if value >= 999.5 else f"{value:.3g}"


def shares(counts: Sequence[Sequence[float]]) -> Shares:
    """Returns the statistics of the rows of each label at each peer [peers][labels]."""
    table = np.array(counts, dtype=np.float64).reshape(len(counts), -1)
    sizes = table.sum(axis=1)
    smallest, largest = int(sizes.min()), int(sizes.max())
    of_rows = Sizes(float(sizes.mean()), smallest, largest, largest / smallest if smallest else None)
    if table.shape[1] < 2 or not largest:
        return Shares(of_rows, None, None)
    own = table[sizes > 0] / sizes[sizes > 0, None]  # [peers, labels]
    skew = abs(own - table.sum(axis=0) / sizes.sum()).sum(axis=1) / 2
    entropy = -(own * np.log(own, out=np.zeros_like(own), where=own > 0)).sum(axis=1)
    return Shares(of_rows, float(skew.mean()), float(np.exp(entropy).mean()))
