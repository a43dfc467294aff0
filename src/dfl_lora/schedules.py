"""Schedules: what is trained and what is shared in a round.

lora         trains and shares A, B and the head; the mean of the products BA moves when A and B are
             averaged apart (cross terms).
freeze_a     DFL-LoRA (ConLoRA, FFA-LoRA arXiv 2403.12313): A is drawn once from the run seed and never
             trained, so sum_j w_ij (B_j A) = (sum_j w_ij B_j) A holds exactly.
alternating  phases of `period` rounds train B alone, then A alone (B first: while B = 0, A has no gradient).
             mix=both shares both factors in every round (ADF arXiv 2511.18291, TAD arXiv 2602.00451);
             mix=trained only the one that is trained (RoLoRA arXiv 2502.01755): what mixing left of the other's
             differences stays until its turn.
share_a      FedSA: both factors are trained, A alone is shared; B stays with its peer.
core         B C A with common and frozen A and B: C [r, r] alone is trained and shared (models/core.py).
The head is shared (trained and mixed), private (trained, never leaves) or frozen.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from dfl_lora.choices import Positive
from dfl_lora.roles import Roles

Head = Literal["shared", "private", "frozen"]
A, B, CORE = Roles({"A"}), Roles({"B"}), Roles({"core"})


@dataclass(frozen=True)
class Phase:
    """What happens to which roles in one round, who is absent (neither steps nor exchanges), and who lost a message."""

    round: int
    trained: Roles
    shared: Roles
    absent: frozenset[int] = frozenset()
    lost: frozenset[int] = frozenset()
    """Known when what came back is taken in: the peers to which a neighbour's message did not come."""


Schedule = Callable[[int], Phase]


def phase(t: int, trained: Roles, shared: Roles, head: Head) -> Phase:
    """Returns a phase of the given factors and what the recipe says of the head."""
    trained = trained if head == "frozen" else trained | {"head"}
    return Phase(t, trained, shared | {"head"} if head == "shared" else shared)


def lora(head: Head) -> Schedule:
    """LoRA: trains and shares A and B."""
    return lambda t: phase(t, A | B, A | B, head)


def freeze_a(head: Head) -> Schedule:
    """DFL-LoRA: A is drawn once and frozen, so products mix exactly."""
    return lambda t: phase(t, B, B, head)


def alternating(head: Head, *, period: Positive = 1, mix: Literal["both", "trained"] = "both") -> Schedule:
    """Trains B alone for `period` rounds, then A alone for as many, and so on; mix says which of them are shared."""

    def schedule(t: int) -> Phase:
        trained = (B, A)[(t - 1) // period % 2]
        return phase(t, trained, A | B if mix == "both" else trained, head)

    return schedule


def share_a(head: Head) -> Schedule:
    """FedSA: trains A and B, shares A alone."""
    return lambda t: phase(t, A | B, A, head)


def core(head: Head) -> Schedule:
    """Trains and shares the [r, r] matrix between two common and frozen factors, so products mix exactly."""
    return lambda t: phase(t, CORE, CORE, head)


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "lora": lora,
    "freeze_a": freeze_a,
    "alternating": alternating,
    "share_a": share_a,
    "core": core,
}


def ever_trained(schedule: Schedule, rounds: int) -> Roles:
    """Returns the roles that any round trains: the others are one common frozen copy."""
    return Roles().union(*(schedule(t).trained for t in range(1, max(rounds, 1) + 1)))
