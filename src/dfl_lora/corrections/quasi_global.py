"""Quasi-global momentum: the momentum follows how far the whole round moved a peer, mixing included.

    in a round  the optimiser is given g(x) + beta m   the gradient shift, beta m
    then        x+ = M x^half,   m <- mu m + (1 - mu) d

where d is what the round, from x to x+, says of the gradient. With SGD d = (x - x+) / (eta tau), the paper's for tau
= 1. An adaptive optimiser's steps say nothing of a gradient's length: there d = ||z|| (x - x+) / ||x - x+||, z the mean
of what the optimiser was given (with SGD and no neighbours both are z). Nothing else travels. Preserved: the mean of x;
the momenta do not sum to zero and are meant not to. Where an exchange is taken back afterwards m decays once more.

Source: Lin, Karimireddy, Stich, Jaggi, "Quasi-Global Momentum", ICML 2021, arXiv 2102.04761; checked is that alone,
with one step a round and SGD, it is momentum as in the formula (tests/laws/test_corrections.py). The adaptive form is
ours.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from dfl_lora.corrections.local import Local

if TYPE_CHECKING:
    from dfl_lora.peers import Peer
    from dfl_lora.schedules import Phase
    from dfl_lora.tensors import Tensors

Fraction = Annotated[float, Field(ge=0, lt=1, strict=True)]


@dataclass(frozen=True)
class QuasiGlobal:
    """Shifts gradients by beta m, and keeps no other m."""

    local: Local
    beta: float
    mu: float
    memory: tuple[str, ...] = ("gradient_shift", "gradient_mean", "start")

    def outgoing(self, peer: "Peer", phase: "Phase") -> "Tensors":
        return peer.adapter.select(phase.shared)

    def incoming(self, peer: "Peer", phase: "Phase", mixed: "Tensors") -> None:
        peer.adapter.assign(phase.shared, mixed)
        roles = phase.trained & phase.shared
        x, start, z, shift = (
            own.select(roles)
            for own in (peer.adapter, *(peer.memory[name] for name in ("start", "gradient_mean", "gradient_shift")))
        )
        moved = x.with_flat(start.flat - x.flat)
        if self.local.adaptive:
            scale = z.norm() / max(moved.norm(), 1e-30)
        else:
            scale = 1.0 / self.local.time(peer.id, phase.round)
        m = shift.with_flat(self.mu * shift.flat + self.beta * (1 - self.mu) * scale * moved.flat)
        peer.memory["gradient_shift"].assign(roles, m)
        peer.memory["start"].flat.copy_(peer.adapter.flat)


def quasi_global(local: Local, *, beta: Fraction = 0.9, mu: Fraction = 0.9) -> QuasiGlobal:
    """Quasi-global momentum: beta weighs it in every gradient, mu is the share of it that a round keeps."""
    return QuasiGlobal(local, beta, mu)
