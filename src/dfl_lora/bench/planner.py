"""The plan: which part may take how long, and how often an arm is repeated, so that the whole ends in time."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from time import perf_counter


@dataclass
class Plan:
    """Parts in their order, each with a weight; what a part leaves goes to those after it, in proportion."""

    total_s: float
    weights: Mapping[str, float]
    now: Callable[[], float] = perf_counter
    begun: float = field(init=False)

    def __post_init__(self) -> None:
        self.begun = self.now()

    @property
    def left_s(self) -> float:
        """Seconds to the end; negative when it is over."""
        return self.total_s - (self.now() - self.begun)

    def share_s(self, part: str) -> float:
        """Returns the seconds a part that begins now may take."""
        order = list(self.weights)
        coming = sum(self.weights[name] for name in order[order.index(part) :])
        return max(0.0, self.left_s * self.weights[part] / coming)


def repeats(costs: Mapping[str, float], budget_s: float, wanted: int) -> dict[str, int]:
    """Returns how often each arm is timed: at least once, at most `wanted` times, within the budget.

    costs: seconds of one round of each arm. What is left after the first pass goes to passes over the arms, the
    cheapest first, so that one dear arm does not lower the repeats of all.
    """
    counts = dict.fromkeys(costs, 1)
    left = budget_s - sum(costs.values())
    for _ in range(wanted - 1):
        for name in sorted(costs, key=costs.__getitem__):
            if costs[name] <= left:
                counts[name] += 1
                left -= costs[name]
    return counts
