"""Local exact diffusion: peers with different data end at the optimum of all, where gossip ends near it.

    tau times   x <- x - eta (g(x) + c)                the step shift, -c
    then        x+ = (x^half + M x^half) / 2,          c <- c + (x^half - x+) / (eta tau)

M x is what the mixer makes of an exchange; c starts at zero. The paper has one eta and keeps eta tau c; where it falls,
what cancels a gradient must fall with it, or the shifts outweigh the last steps and peers run apart. One vector
travels, as in plain gossip. Preserved: the mean of x; sum_i c_i = 0, since M keeps the mean and a message is lost at
both ends of an edge or at none. At a fixed point all x_i agree, and the sum of all gradients is zero.

Limits: one W. c takes for granted that the next round mixes as the last one did. Where W changes from round to round
the distances of peers may grow: without any gradient by 1.13 in a cycle of base(k=1) over 7 peers, by 4.4 over 100.
Such recipes are refused; `k_gt` has no such limit.

Source: Alghunaim, "Local Exact-Diffusion for Decentralized Optimization and Learning", arXiv 2302.00620; that one step
of it is exact diffusion, and that fixed point, are what was checked (tests/laws/test_corrections.py).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dfl_lora.corrections.local import Local

if TYPE_CHECKING:
    from dfl_lora.peers import Peer
    from dfl_lora.schedules import Phase
    from dfl_lora.tensors import Tensors


@dataclass(frozen=True)
class ExactDiffusion:
    """Takes a share of the mix, and shifts every later step by what the whole of it moved; `d2` takes all of it."""

    local: Local
    share: float
    memory: tuple[str, ...] = ("step_shift",)

    def outgoing(self, peer: "Peer", phase: "Phase") -> "Tensors":
        return peer.adapter.select(phase.shared)

    def incoming(self, peer: "Peer", phase: "Phase", mixed: "Tensors") -> None:
        corrected, x = phase.trained & phase.shared, peer.adapter.select(phase.shared)
        moved = x.with_flat(mixed.flat - x.flat).select(corrected)
        moved.flat.mul_(self.share)
        taken = x.select(corrected)
        taken = taken.with_flat(taken.flat + moved.flat)
        shift, time = peer.memory["step_shift"].select(corrected), self.local.time(peer.id, phase.round)
        peer.memory["step_shift"].assign(corrected, shift.with_flat(shift.flat + moved.flat / time))
        peer.adapter.assign(phase.shared, mixed)
        peer.adapter.assign(corrected, taken)


def led(local: Local) -> ExactDiffusion:
    """Local exact diffusion: each local step is shifted by what the rounds so far took away. One vector a message."""
    return ExactDiffusion(local, 0.5)
