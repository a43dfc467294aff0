"""Peers with quadratics of their own: f_i(x) = sum_k h_ik (x_k - b_ik)^2 / 2, whose common optimum is known."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dfl_lora.corrections.local import Local
from dfl_lora.graphs import Graph
from dfl_lora.learners import Progress
from dfl_lora.metrics import Answers
from dfl_lora.networks import Network
from dfl_lora.networks.memory import MemoryNetwork
from dfl_lora.peers import Peers
from dfl_lora.rounds import Method, rounds
from dfl_lora.schedules import SCHEDULES, Phase
from dfl_lora.streams import torch_stream
from dfl_lora.tensors import Layout, Tensors

LAYOUT = Layout.of({"q.A": ("A", (1, 4)), "q.B": ("B", (3, 1)), "head": ("head", (2,))})


@dataclass(frozen=True)
class Quadratics:
    """Local steps of plain gradient descent, with what a correction may ask of them."""

    curvature: Tensor  # [n, P]
    centres: Tensor  # [n, P]
    tau: int = 3
    rate: float = 0.1
    falls: float = 1.0  # by which a round multiplies the rate

    @staticmethod
    def drawn(num_peers: int, tau: int = 3, rate: float = 0.1) -> "Quadratics":
        curvature = 0.5 + torch.rand(num_peers, LAYOUT.size, generator=torch_stream(3), dtype=torch.float64)
        centres = torch.randn(num_peers, LAYOUT.size, generator=torch_stream(4), dtype=torch.float64)
        return Quadratics(curvature, centres, tau, rate)

    @property
    def optimum(self) -> Tensor:
        """Of the sum of all: [P]."""
        return (self.curvature * self.centres).sum(0) / self.curvature.sum(0)

    @property
    def local(self) -> Local:
        return Local(lambda i: self.tau, lambda t: self.rate * self.falls**t, adaptive=False)

    def gradients(self, x: Tensor) -> Tensor:
        return self.curvature * (x - self.centres)

    def train(self, peers: Peers, phase: Phase, round: int) -> Mapping[int, Progress]:
        here = torch.tensor([i not in phase.absent for i in peers.ids])
        trained = torch.zeros(LAYOUT.size, dtype=torch.bool)
        for span in LAYOUT.spans(phase.trained):
            trained[span] = True
        moving, memory = here[:, None] & trained, peers.memory
        total, rate = torch.zeros_like(peers.x), self.local.rate(round)
        for _ in range(self.tau):
            given = self.gradients(peers.x) + memory.get("gradient_shift", torch.zeros(()))
            total += torch.where(moving, given, 0)
            peers.x -= torch.where(moving, rate * given, 0)
            if "step_shift" in memory:
                peers.x += torch.where(moving, rate * memory["step_shift"], 0)
        if "gradient_mean" in memory:
            memory["gradient_mean"][here] = total[here] / self.tau
        return {}

    def evaluate(self, peers: Peers) -> Mapping[int, Answers]:
        return {}

    def peers(self, method: Method) -> Peers:
        """All at zero."""
        nothing = Tensors(torch.zeros(0, dtype=torch.float64), Layout.of({}))
        start = Tensors(torch.zeros(LAYOUT.size, dtype=torch.float64), LAYOUT)
        return Peers(range(len(self.centres)), start, nothing, memory=method.memory)

    def run(self, method: Method, num_rounds: int, network: Network | None = None) -> Peers:
        peers = self.peers(method)
        for record in rounds(peers, method, self, network or MemoryNetwork()):
            if record.round == num_rounds:
                break
        return peers


def method_on(graph: Graph, **axes: object) -> Method:
    """Returns LoRA with a shared head on a graph, and what else is given."""
    return Method(SCHEDULES["lora"]("shared"), lambda t: graph, **axes)  # type: ignore[arg-type]
