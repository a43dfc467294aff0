"""K-step gradient tracking, through the adaptive optimiser.

    tau times   the optimiser is given g(x) + c        the gradient shift, c
    z           = the mean over the tau steps of what it was given
    then        x+ = M x^half,   c <- c + M z - z      both in one message

c starts at zero; c_i is how the mean gradient of all differs from the own one, so that each peer steps as if it saw
everybody's data. Preserved: the mean of x; sum_i c_i = 0 while nothing is clipped or forgotten. Two vectors travel.

What is corrected are the roles that a round both trains and shares: a factor that rests is mixed and no more.

Options. `second_moments: q` also mixes Adam's second moments every q rounds (a third vector in those rounds; clamped
at zero, since Chebyshev matrices have negative entries), so that peers divide by the same; 0 never does. They travel as
a step divides by them, v / (1 - beta_2^steps), since peers may have done different numbers of steps. `clip` bounds
||c_i|| by so many times ||z_i||, and `decay` is the share of c that is forgotten in a round in which a message to the
peer was lost: then c no longer sums to zero. Losses alone leave the sum as it is, since a message is lost at both ends
of an edge or at none.

The learning rate should fall: the noise of Adam's steps sets the floor of the consensus error.

Source: Liu, Lin, Koloskova, Stich, "Decentralized Gradient Tracking with Local Steps", arXiv 2301.01313; checked is
that peers with different quadratics end at the optimum of all (tests/laws/test_corrections.py). Adam, second moments,
clip and decay are ours.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from dfl_lora.choices import PositiveFloat, Whole
from dfl_lora.corrections.local import BETA_2, Local
from dfl_lora.roles import ROLES

if TYPE_CHECKING:
    from torch import Tensor

    from dfl_lora.peers import Peer
    from dfl_lora.schedules import Phase
    from dfl_lora.tensors import Tensors

SECOND = "exp_avg_sq"


@dataclass(frozen=True)
class GradientTracking:
    """Sends x and z, and now and then the second moments v; shifts gradients by what the neighbours' tell."""

    second_moments: int
    clip: float | None
    decay: float
    memory: tuple[str, ...] = ("gradient_shift", "gradient_mean")

    def outgoing(self, peer: "Peer", phase: "Phase") -> "Tensors":
        corrected = phase.trained & phase.shared
        parts = {"z": peer.memory["gradient_mean"].select(corrected)}
        if self.averages(phase):
            v = peer.optimizer[SECOND].select(corrected)
            parts["v"] = v.with_flat(v.flat / grown(peer, v))
        return peer.adapter.select(phase.shared).join(**parts)

    def incoming(self, peer: "Peer", phase: "Phase", mixed: "Tensors") -> None:
        corrected = phase.trained & phase.shared
        z, c = (peer.memory[name].select(corrected) for name in ("gradient_mean", "gradient_shift"))
        kept = 1.0 - self.decay if peer.id in phase.lost else 1.0
        shift = c.with_flat(kept * c.flat + mixed.part("z", z.layout).flat - z.flat)
        if self.clip is not None and shift.norm() > (most := self.clip * z.norm()):
            shift.flat.mul_(most / shift.norm())
        peer.memory["gradient_shift"].assign(corrected, shift)
        peer.adapter.assign(phase.shared, mixed.part("x", peer.adapter.select(phase.shared).layout))
        if self.averages(phase):
            v = mixed.part("v", z.layout)
            peer.optimizer[SECOND].assign(corrected, v.with_flat(v.flat.clamp(min=0) * grown(peer, v)))

    def averages(self, phase: "Phase") -> bool:
        """Tells whether second moments are mixed in this round."""
        return self.second_moments > 0 and phase.round % self.second_moments == 0


def grown(peer: "Peer", v: "Tensors") -> "Tensor":
    """Returns 1 - beta_2^steps, of the steps on each role: what a step divides second moments by."""
    result = v.flat.new_empty(v.flat.shape)
    for e in v.layout.entries:
        result[e.start : e.stop] = 1 - BETA_2 ** max(int(peer.counters[ROLES.index(e.role)]), 1)
    return result


def k_gt(
    local: Local,
    *,
    second_moments: Annotated[Whole, Field(ge=0)] = 0,
    clip: PositiveFloat | None = None,
    decay: Annotated[float, Field(ge=0, le=1, strict=True)] = 0.0,
) -> GradientTracking:
    """Gradients are shifted towards the mean of all; Adam's second moments are mixed every so many rounds, 0 never."""
    return GradientTracking(second_moments, clip, decay)
