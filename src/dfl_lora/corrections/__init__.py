"""Corrections against the drift towards the own data: one file each, one row in the table.

A correction says what leaves a peer (`outgoing`) and what stays (`incoming`, in place). Of the local
steps it may ask two vectors in and one out, by naming them in `memory` (see `peers.Peer`).
"""

from collections.abc import Sequence
from typing import Protocol

from dfl_lora.corrections.none import NoCorrection
from dfl_lora.peers import Peer
from dfl_lora.schedules import Phase
from dfl_lora.tensors import Tensors


class Correction(Protocol):
    """What leaves and what stays; `memory` names the vectors it keeps in each peer, zero at the start."""

    @property
    def memory(self) -> Sequence[str]: ...

    def outgoing(self, peer: Peer, phase: Phase) -> Tensors:
        """Returns the message of a peer after its local steps; it may be a view."""
        ...

    def incoming(self, peer: Peer, phase: Phase, mixed: Tensors) -> None:
        """Takes the combined message into the peer, in place."""
        ...


CORRECTIONS: dict[str, Correction] = {"none": NoCorrection()}
