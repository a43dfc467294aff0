"""No correction: plain gossip. x_i <- sum_j w_ij x_j^half, on the shared roles."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dfl_lora.corrections.local import Local

if TYPE_CHECKING:
    from dfl_lora.peers import Peer
    from dfl_lora.schedules import Phase
    from dfl_lora.tensors import Tensors


@dataclass(frozen=True)
class NoCorrection:
    """Sends the shared roles and takes the mix."""

    memory: tuple[str, ...] = ()

    def outgoing(self, peer: "Peer", phase: "Phase") -> "Tensors":
        return peer.adapter.select(phase.shared)

    def incoming(self, peer: "Peer", phase: "Phase", mixed: "Tensors") -> None:
        peer.adapter.assign(phase.shared, mixed)


def none(local: Local) -> NoCorrection:
    """Plain gossip."""
    return NoCorrection()
