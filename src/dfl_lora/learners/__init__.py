"""Learners: how the hosted peers do their local steps and are evaluated."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from dfl_lora.metrics import Answers
from dfl_lora.peers import Peers
from dfl_lora.schedules import Phase


@dataclass(frozen=True)
class Progress:
    """What the local steps of one peer were: the mean loss, steps, real tokens, steps skipped as non-finite."""

    loss: float
    steps: int
    tokens: int
    skipped: int


class Learner(Protocol):
    """Local steps and evaluation; a learner keeps nothing between rounds that is not in the peers."""

    def train(self, peers: Peers, phase: Phase, round: int) -> Mapping[int, Progress]:
        """Does the local steps of one round in place, on the roles the phase trains; by peer id."""
        ...

    def evaluate(self, peers: Peers) -> Mapping[int, Answers]:
        """Returns each peer's answers on its validation rows; by peer id."""
        ...
