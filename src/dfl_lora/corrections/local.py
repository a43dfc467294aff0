"""What a correction may know of the local steps: how many there are, and how long."""

from collections.abc import Callable
from dataclasses import dataclass

BETA_2 = 0.999
"""By which Adam forgets second moments in a step."""


@dataclass(frozen=True)
class Local:
    """The local work of a federation, as far as a correction may ask."""

    steps: Callable[[int], int]
    """tau_i: the local steps of a peer in each round."""
    rate: Callable[[int], float]
    """eta: the learning rate in the middle of a round."""
    adaptive: bool
    """Whether the optimiser divides by what it has seen (Adam), so that a step says nothing of a gradient's length."""

    def time(self, peer: int, round: int) -> float:
        """Returns eta tau, by which a round of a peer multiplies what it shifts each step by."""
        return self.rate(round) * self.steps(peer)
