"""Networks: how frames reach neighbours. Nothing else differs between a simulation and a real peer."""

from collections.abc import Mapping
from typing import Protocol

from dfl_lora.codecs.frames import Frame
from dfl_lora.graphs import Graph

Arrived = Mapping[int, Mapping[int, Frame | None]]
"""receiver -> sender -> frame; None is bytes that were no frame, an absent sender is a message that was lost."""


class Network(Protocol):
    """One exchange: the hosted peers' frames go out, their neighbours' frames come in."""

    def exchange(self, round: int, k: int, graph: Graph, outgoing: Mapping[int, Frame]) -> Arrived:
        """Delivers exchange number k of a round; `outgoing` has one frame for each hosted peer."""
        ...
