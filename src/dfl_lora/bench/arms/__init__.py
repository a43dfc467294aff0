"""Arms: ways to do the same round, each written as a competent user of its tools would."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from dfl_lora.bench.setting import Setting
from dfl_lora.recipe import Recipe

Adapter = Mapping[str, Tensor]
EVALUATION_ROWS = 64
"""Rows of an evaluation batch, in every arm that batches rectangles."""


class Arm(Protocol):
    """Peers that train, mix and are evaluated; an arm counts its rounds itself, from 1."""

    def train_round(self) -> Sequence[float]:
        """Does every peer's local steps; returns each peer's mean loss."""
        ...

    def mix(self) -> None:
        """Gossips once: x <- W x."""
        ...

    def evaluate(self) -> Sequence[float]:
        """Returns each peer's accuracy."""
        ...

    def adapters(self) -> Sequence[Adapter]:
        """Returns each peer's adapter by the layout's names."""
        ...

    def first_moments(self) -> Sequence[Adapter]:
        """Returns Adam's first moments of what is trained: after one step a tenth of the gradient."""
        ...

    @property
    def embeddings(self) -> Sequence[nn.Module]:
        """Where tokens enter: what passes there is what was processed."""
        ...


class Making(Protocol):
    """Makes an arm of a cell's recipe or its setting, in the precision of the base."""

    def __call__(self, recipe: Recipe, setting: Setting, dtype: str) -> Arm: ...


@dataclass(frozen=True)
class Kind:
    """A row of the table of arms."""

    name: str
    make: Making
    copies: bool = False
    """Whether it holds a base for every peer."""
    only: str | None = None
    """The method an arm is defined for; None: any."""
