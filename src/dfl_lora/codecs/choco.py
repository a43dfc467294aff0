"""CHOCO-SGD: the largest changes since the last message alone. Everybody knows the same of a peer: its replica, xhat.

    q_i = top_k(x_i - xhat_i),   xhat_j <- xhat_j + q_j,   x_i+ = x_i + gamma sum_j w_ij (xhat_j - xhat_i)

No replica of a neighbour is kept, only the gap d_i = sum_j w_ij (xhat_j - xhat_i), which an exchange moves by its flows
sum_j w_ij (q_j - q_i): two vectors, however many the neighbours. Replicas begin at the start of all peers (in the paper
at zero), so that what all know anyhow is never sent. Preserved: the mean of x, since the gaps sum to zero.

Limits: every message is needed, since a lost one is missing from the gap for ever, and one W. Real peers, where
messages can be lost, participation below 1 and mixers of several exchanges are refused. A peer that is not finite says
that nothing has changed, so that its neighbours go on beside the last of its replicas. Peers diverge at about gamma = 7
share. `led` and `d2` diverge on top of it at small shares: refused, as is a message of several vectors.

Source: Koloskova, Stich, Jaggi, "Decentralized Stochastic Optimization and Gossip Algorithms with Compressed
Communication", ICML 2019, arXiv 1902.00340; checked are that the gap is what replicas of all neighbours give, and that
gossip ends near where fp32's does (tests/laws/test_codecs_with_memory.py).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from dfl_lora.codecs import sparse
from dfl_lora.codecs.frames import Frame
from dfl_lora.tensors import Tensors


@dataclass(frozen=True)
class Choco:
    """Keeps xhat as `replica` and d as `gap`."""

    share: float
    gamma: float
    name: str = "choco"
    memory: tuple[str, ...] = ("replica", "gap")

    def encode(self, x: Tensors, memory: Mapping[str, Tensors], name: object) -> Frame:
        replica = memory["replica"].select(x.layout.roles)
        change = x.flat - replica.flat if x.is_finite() else torch.zeros_like(x.flat)
        frame, q = sparse.encode(self.name, self.share, x.with_flat(change))
        memory["replica"].assign(x.layout.roles, replica.with_flat(replica.flat + q))
        return frame

    def decode(self, frame: Frame, like: Tensors) -> Tensors | None:
        return sparse.decode(self.name, self.share, frame, like)

    def take(self, x: Tensors, add: Callable[[Tensors], Tensors], memory: Mapping[str, Tensors]) -> Tensors:
        """Adds the flows to the gap and returns x + gamma gap."""
        gap = add(memory["gap"].select(x.layout.roles))
        memory["gap"].assign(x.layout.roles, gap)
        return x.with_flat(x.flat + self.gamma * gap.flat)
