"""Schedules: what is trained and what is shared in a round.

lora     trains and shares A, B and the head; the mean of the products BA moves when A and B are
         averaged apart (cross terms).
freeze_a DFL-LoRA (ConLoRA, FFA-LoRA arXiv 2403.12313): A is drawn once from the run seed and never
         trained, so sum_j w_ij (B_j A) = (sum_j w_ij B_j) A holds exactly.
The head is shared (trained and mixed), private (trained, never leaves) or frozen.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from dfl_lora.tensors import Roles

Head = Literal["shared", "private", "frozen"]


@dataclass(frozen=True)
class Phase:
    """What happens to which roles in one round."""

    round: int
    trained: Roles
    shared: Roles


Schedule = Callable[[int], Phase]


def of(factors: Roles, head: Head) -> Schedule:
    """Returns the schedule that trains and shares the given factors in every round."""
    trained: Roles = factors if head == "frozen" else factors | {"head"}
    shared: Roles = factors | {"head"} if head == "shared" else factors
    return lambda t: Phase(t, trained, shared)


def lora(head: Head) -> Schedule:
    return of(frozenset({"A", "B"}), head)


def freeze_a(head: Head) -> Schedule:
    return of(frozenset({"B"}), head)


SCHEDULES: dict[str, Callable[[Head], Schedule]] = {"lora": lora, "freeze_a": freeze_a}


def ever_trained(schedule: Schedule, rounds: int) -> Roles:
    """Returns the roles that any round trains: the others are one common frozen copy."""
    empty: Roles = frozenset()
    return empty.union(*(schedule(t).trained for t in range(1, max(rounds, 1) + 1)))
