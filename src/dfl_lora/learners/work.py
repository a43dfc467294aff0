"""The local work of a round: how many steps, at which learning rate, on which rows, with which optimiser."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import cos, pi
from typing import Literal

from dfl_lora.data.batches import Order, Shard

Scheduler = Literal["cosine", "linear", "constant"]
OptimizerName = Literal["adam", "adamw", "sgd"]

FLOOR = 0.02
"""Decays end at 2 % of the learning rate: Adam's noise sets the floor of the consensus error, so it must fall."""


@dataclass(frozen=True)
class LocalWork:
    """What each peer does in a round; exactly one of `steps` and `epochs` is given."""

    rounds: int
    batch_size: int
    """Rows that are read at a time."""
    accumulation: int = 1
    """How many times so many rows make a step."""
    steps: int | None = None
    epochs: int | None = None
    optimizer: OptimizerName = "adam"
    learning_rate: float = 1e-3
    scheduler: Scheduler = "cosine"
    max_grad_norm: float | None = None
    shuffle: bool = True
    lora_dropout: float = 0.0
    base_dropout: bool = False
    seed: int = 0

    @property
    def order(self) -> Order:
        return Order(self.seed, self.rows_of_step, self.shuffle)

    @property
    def rows_of_step(self) -> int:
        return self.batch_size * self.accumulation

    def steps_of(self, shard: Shard) -> int:
        """Returns the number of local steps of a peer in each round."""
        if self.steps is not None:
            return self.steps
        return (self.epochs or 1) * shard.num_batches(self.rows_of_step)

    @property
    def adaptive(self) -> bool:
        return self.optimizer != "sgd"

    def rate_in(self, round: int) -> float:
        """Returns the learning rate in the middle of a round."""
        return self.learning_rate_at(round, 1, 2)

    def learning_rate_at(self, round: int, step: int, steps: int) -> float:
        """Returns the learning rate of local step `step` of `steps` in a round, both counted from 0 and 1."""
        progress = min((round - 1 + step / steps) / self.rounds, 1.0)
        falling = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + cos(pi * progress)) / 2}[self.scheduler]
        return self.learning_rate * (FLOOR + (1 - FLOOR) * falling)


@dataclass(frozen=True)
class PeerData:
    """The rows of the hosted peers, by id; validation may be the same rows for all."""

    train: Mapping[int, Shard]
    validation: Mapping[int, Shard]
