"""Networks: how frames reach neighbours. Nothing else differs between a simulation and a real peer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from dfl_lora.codecs.frames import Frame
from dfl_lora.graphs import Graph


@dataclass(frozen=True)
class Undone:
    """An exchange on an edge that `peer` took in and `neighbour`, as it turned out, did not: its flow is taken back."""

    peer: int
    neighbour: int
    round: int
    exchange: int
    own: Frame
    theirs: Frame


@dataclass(frozen=True)
class Arrived:
    """What an exchange brought.

    `frames` is receiver -> sender -> frame: None is bytes that were no frame, an absent sender is a message that was
    lost. `undone` are earlier exchanges that only this end took in; `waited_s` is the time in which nothing was left to
    do but wait for neighbours that were not so far.
    """

    frames: Mapping[int, Mapping[int, Frame | None]]
    undone: Sequence[Undone] = ()
    waited_s: float = 0.0


class Network(Protocol):
    """One exchange: the hosted peers' frames go out, their neighbours' frames come in."""

    def exchange(self, round: int, k: int, graph: Graph, outgoing: Mapping[int, Frame]) -> Arrived:
        """Delivers exchange number k of a round; `outgoing` has one frame for each hosted peer."""
        ...
