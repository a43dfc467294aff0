"""Laws on graphs, shapes, methods and losses that hypothesis draws: the mean, sums of corrections, and the server."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dfl_lora.codecs import CODECS
from dfl_lora.codecs.frames import Frame
from dfl_lora.corrections import CORRECTIONS
from dfl_lora.corrections.local import Local
from dfl_lora.graphs import GRAPHS, Graph
from dfl_lora.mixers import MIXERS
from dfl_lora.mixing import MIXINGS
from dfl_lora.networks import Arrived
from dfl_lora.networks.memory import MemoryNetwork
from dfl_lora.peers import Peers
from dfl_lora.rounds import Method, mix
from dfl_lora.schedules import SCHEDULES, ever_trained
from dfl_lora.tensors import Layout, Tensors

ROUNDS = 4
SUMS = {"led": "step_shift", "d2": "step_shift", "k_gt": "gradient_shift"}
"""Corrections whose vectors sum to zero over peers."""
LOCAL = Local(lambda i: 3, lambda t: 0.1, False)
every = {name: st.sampled_from(sorted(table)) for name, table in (
    ("schedule", SCHEDULES), ("mixing", MIXINGS), ("correction", CORRECTIONS), ("mixer", MIXERS.keys() - {"relay_sum"}),
)}  # fmt: skip


@dataclass(frozen=True)
class Losing:
    """A memory network that loses messages at both ends of an edge, as often as `share` says."""

    share: float
    seed: int

    def exchange(self, round: int, k: int, graph: Graph, outgoing: Mapping[int, Frame]) -> Arrived:
        drawn = torch.Generator().manual_seed(hash((self.seed, round, k)))
        lost = {e for e in sorted(graph.edges) if torch.rand(1, generator=drawn) < self.share}
        frames = MemoryNetwork().exchange(round, k, graph, outgoing).frames
        return Arrived(
            {i: {j: f for j, f in box.items() if (min(i, j), max(i, j)) not in lost} for i, box in frames.items()}
        )


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """Connected graphs of 2 to 9 peers: a random tree, and some edges more."""
    n = draw(st.integers(2, 9))
    tree = nx.random_labeled_tree(n, seed=draw(st.integers(0, 10**6)))
    pairs = st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)).filter(lambda e: e[0] < e[1])
    return Graph.of(n, [*tree.edges, *draw(st.lists(pairs, max_size=8))])


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """One to three modules of any shape, and perhaps a head."""
    shapes: dict[str, Any] = {}
    for name in draw(st.lists(st.sampled_from("qkv"), min_size=1, unique=True)):
        r, d_in, d_out = (draw(st.integers(1, most)) for most in (3, 5, 5))
        shapes |= {f"{name}.A": ("A", (r, d_in)), f"{name}.B": ("B", (d_out, r)), f"{name}.core": ("core", (r, r))}
    return Layout.of(shapes | ({"head": ("head", (draw(st.integers(1, 4)),))} if draw(st.booleans()) else {}))


def peers_of(method: Method, layout: Layout, num_peers: int, seed: int) -> Peers:
    start = Tensors(torch.zeros(layout.size, dtype=torch.float64), layout)
    trained = ever_trained(method.schedule, ROUNDS)
    peers = Peers(range(num_peers), start.select(trained), start.select(layout.roles - trained), memory=method.memory)
    peers.x.copy_(torch.randn(peers.x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    return peers


def local_steps(peers: Peers, seed: int) -> None:
    """Moves peers apart, and leaves what a learner would: numbers of their own."""
    drawn = torch.Generator().manual_seed(seed)
    peers.x.add_(torch.randn(peers.x.shape, generator=drawn, dtype=torch.float64), alpha=0.1)
    if "gradient_mean" in peers.memory:
        peers.memory["gradient_mean"].normal_(generator=drawn)


@given(
    graph=graphs(), layout=layouts(), schedule=every["schedule"], mixing=every["mixing"], mixer=every["mixer"],
    correction=every["correction"], codec=st.sampled_from(["fp32", "bf16", "int8"]), share=st.sampled_from([0, 0.3]),
    seed=st.integers(0, 10**6),
)  # fmt: skip
@settings(deadline=None, max_examples=150)
def test_the_mean_stays_and_corrections_sum_to_zero(
    graph: Graph, layout: Layout, schedule: str, mixing: str, mixer: str, correction: str, codec: str, share: float,
    seed: int,
) -> None:  # fmt: skip
    """Whatever is lost of messages, at both ends of an edge; also under codecs with errors."""
    weights = MIXINGS[mixing]
    method = Method(
        SCHEDULES[schedule]("shared"), lambda t: graph, mixing=weights, mixer=MIXERS[mixer](graph, weights, ROUNDS),
        correction=CORRECTIONS[correction](LOCAL), codec=CODECS[codec](seed),
    )  # fmt: skip
    peers, network = peers_of(method, layout, graph.num_peers, seed), Losing(share, seed)
    for t in range(1, ROUNDS + 1):
        local_steps(peers, seed + t)
        before = peers.x.mean(0)
        mix(peers, method.schedule(t), graph, t, method, network)
        assert torch.allclose(peers.x.mean(0), before, rtol=0, atol=1e-9)
        if correction in SUMS:
            total = peers.memory[SUMS[correction]].sum(0)
            assert torch.allclose(total, torch.zeros_like(total), rtol=0, atol=1e-9)


@given(layout=layouts(), num_peers=st.integers(2, 9), correction=every["correction"], schedule=every["schedule"],
       seed=st.integers(0, 10**6))  # fmt: skip
@settings(deadline=None, max_examples=40)
@pytest.mark.parametrize("mixer", ["plain", "chebyshev", "finite_time"])
def test_a_complete_graph_is_a_server(
    mixer: str, layout: Layout, num_peers: int, correction: str, schedule: str, seed: int
) -> None:
    """Whatever mixes and corrects, peers are where the server's average would bring them."""
    complete, found = GRAPHS["complete"](num_peers), []
    for name in (mixer, "exact"):
        made = MIXERS[name](complete, MIXINGS["metropolis"], ROUNDS)
        method = Method(
            SCHEDULES[schedule]("shared"), lambda t: complete, mixer=made, correction=CORRECTIONS[correction](LOCAL)
        )
        peers = peers_of(method, layout, num_peers, seed)
        for t in range(1, ROUNDS + 1):
            local_steps(peers, seed + t)
            mix(peers, method.schedule(t), complete, t, method, MemoryNetwork())
        found.append(peers.x)
    assert torch.allclose(*found, rtol=0, atol=1e-12)
