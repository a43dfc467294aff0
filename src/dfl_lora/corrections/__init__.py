"""Corrections against the drift towards the own data: one file each, one row in the table.

A correction says what leaves a peer (`outgoing`) and what stays (`incoming`, in place). Of the local
steps it may ask two vectors in and one out, by naming them in `memory` (see `peers.Peer`). It corrects the roles that
a round both trains and shares; the other shared ones are mixed and no more. A row is a function of what is known of
the local work, and its options are those of the recipe. No torch here: a recipe is read without it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from dfl_lora.corrections.d2 import d2
from dfl_lora.corrections.k_gt import k_gt
from dfl_lora.corrections.led import led
from dfl_lora.corrections.none import none
from dfl_lora.corrections.quasi_global import quasi_global

if TYPE_CHECKING:
    from dfl_lora.peers import Peer
    from dfl_lora.schedules import Phase
    from dfl_lora.tensors import Tensors


class Correction(Protocol):
    """What leaves and what stays; `memory` names the vectors it keeps in each peer, zero at the start."""

    @property
    def memory(self) -> Sequence[str]: ...

    def outgoing(self, peer: "Peer", phase: "Phase") -> "Tensors":
        """Returns the message of a peer after its local steps; it may be a view."""
        ...

    def incoming(self, peer: "Peer", phase: "Phase", mixed: "Tensors") -> None:
        """Takes the combined message into the peer, in place."""
        ...


CORRECTIONS: Mapping[str, Callable[..., Correction]] = {
    "none": none,
    "led": led,
    "k_gt": k_gt,
    "quasi_global": quasi_global,
    "d2": d2,
}
