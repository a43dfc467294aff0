"""Gossip over graphs that change from round to round."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from changing import NAMES, changing
from dfl_lora.blocked import sweep_of
from dfl_lora.codecs import CODECS
from dfl_lora.codecs.fp32 import Fp32
from dfl_lora.codecs.frames import Frame
from dfl_lora.corrections import CORRECTIONS
from dfl_lora.graphs import Graph
from dfl_lora.mixing import Matrix, matrix, metropolis, own
from dfl_lora.networks import Arrived, Undone
from dfl_lora.networks.memory import MemoryNetwork
from dfl_lora.participation import absence
from dfl_lora.peers import Peers
from dfl_lora.rounds import Method, mix, take_back
from dfl_lora.schedules import SCHEDULES
from dfl_lora.tensors import Layout, Tensors
from dfl_lora.topologies import base, one_peer_exponential
from quadratics import Quadratics

FACTORS = Layout.of({"q.A": ("A", (2, 4)), "q.B": ("B", (3, 2)), "head": ("head", (5,))})
CORE = Layout.of({"q.A": ("A", (2, 4)), "q.B": ("B", (3, 2)), "q.core": ("core", (2, 2)), "head": ("head", (5,))})
every_name = pytest.mark.parametrize("name", NAMES)


@dataclass(frozen=True)
class PeerByPeer:
    """A memory network that is not known to be one."""

    def exchange(self, round: int, k: int, graph: Graph, outgoing: Mapping[int, Frame]) -> Arrived:
        return MemoryNetwork().exchange(round, k, graph, outgoing)


def method_on(name: str, num_peers: int = 7, schedule: str = "lora") -> Method:
    topology, weights = changing(name, num_peers)
    return Method(SCHEDULES[schedule]("shared"), topology, mixing=weights)


def drawn(
    num_peers: int, dtype: torch.dtype = torch.float64, memory: Sequence[str] = (), layout: Layout = FACTORS
) -> Peers:
    """Peers of random numbers."""
    nothing = Tensors(torch.zeros(0, dtype=dtype), Layout.of({}))
    peers = Peers(range(num_peers), Tensors(torch.zeros(layout.size, dtype=dtype), layout), nothing, memory=memory)
    peers.x.copy_(torch.randn(peers.x.shape, generator=torch.Generator().manual_seed(7), dtype=dtype))
    return peers


def size(method: Method) -> int:
    return method.topology(1).num_peers


def mixed(peers: Peers, method: Method, rounds: range, network: object = None) -> Peers:
    """Mixes for some rounds, without local steps."""
    for t in rounds:
        phase = replace(method.schedule(t), absent=method.absence(t))
        mix(peers, phase, method.topology(t), t, method, network or MemoryNetwork())  # type: ignore[arg-type]
    return peers


@every_name
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_mean_stays_in_every_round(name: str, schedule: str) -> None:
    method = method_on(name, schedule=schedule)
    peers = drawn(size(method), layout=CORE if schedule == "core" else FACTORS)
    mean = peers.x.mean(0)
    for t in range(1, 13):
        mixed(peers, method, range(t, t + 1))
        assert torch.allclose(peers.x.mean(0), mean, rtol=0, atol=1e-14)


@every_name
@pytest.mark.parametrize("codec", CODECS)
def test_the_mean_stays_under_every_codec(name: str, codec: str) -> None:
    method = replace(method_on(name), codec=CODECS[codec](5))
    peers = drawn(size(method), memory=method.memory)
    mean = peers.x.mean(0)
    mixed(peers, method, range(1, 9))
    assert torch.allclose(peers.x.mean(0), mean, rtol=0, atol=1e-12)


@every_name
def test_a_round_applies_the_matrix_of_its_own_graph(name: str) -> None:
    method = method_on(name)
    peers = drawn(size(method))
    for t in range(4):
        expected = torch.from_numpy(matrix(method.topology(t), method.mixing)) @ peers.x
        mixed(peers, method, range(t, t + 1))
        assert torch.allclose(peers.x, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("topology", [base(5), base(7), base(7, k=2), base(12, k=2), one_peer_exponential(8)])
def test_all_are_at_the_mean_after_a_cycle_and_whenever_it_ends(topology: Callable[[int], Graph]) -> None:
    weights = own if topology(1).weights else metropolis
    method, cycle = Method(SCHEDULES["lora"]("shared"), topology, mixing=weights), topology.cycle  # type: ignore[attr-defined]
    for start in (0, 3 * cycle):
        peers = drawn(size(method))
        mean = peers.x.mean(0)
        mixed(peers, method, range(start + 1, start + cycle))
        assert (peers.x - mean).abs().max() > 1e-3
        mixed(peers, method, range(start + cycle, start + cycle + 1))
        assert torch.allclose(peers.x, mean.expand_as(peers.x), rtol=0, atol=1e-14)


@every_name
def test_mixing_at_once_is_mixing_peer_by_peer_to_the_bit_in_every_round(name: str) -> None:
    """More graphs than sweeps are kept, each with its own weights."""
    method = method_on(name, 12)
    at_once, one_by_one = drawn(size(method), torch.float32), drawn(size(method), torch.float32)
    for t in range(1, 25):
        graph, phase = method.topology(t), method.schedule(t)
        costs = [
            mix(p, phase, graph, t, method, network)
            for p, network in ((at_once, MemoryNetwork()), (one_by_one, PeerByPeer()))
        ]
        assert torch.equal(at_once.x, one_by_one.x)
        assert costs[0] == costs[1] and costs[0].messages == 2 * len(graph.edges)
    assert sweep_of.cache_info().currsize <= 4


def test_graphs_of_the_same_edges_and_other_weights_are_mixed_by_their_own() -> None:
    graphs = [Graph(2, frozenset({(0, 1)}), (weight,)) for weight in (0.5, 0.25, 0.5)]
    method = Method(SCHEDULES["lora"]("shared"), lambda t: graphs[t - 1], mixing=own)
    for t, weight in ((2, 0.25), (1, 0.5), (3, 0.5)):
        peers = drawn(2)
        expected = peers.x[0] + weight * (peers.x[1] - peers.x[0])
        mixed(peers, method, range(t, t + 1))
        assert torch.allclose(peers.x[0], expected, rtol=0, atol=1e-15)


@every_name
def test_absent_peers_stay_and_so_does_the_mean(name: str) -> None:
    method = method_on(name)
    method = replace(method, absence=absence(size(method), 0.6, 3))
    peers = drawn(size(method))
    mean = peers.x.mean(0)
    for t in range(1, 9):
        before, absent = peers.x.clone(), sorted(method.absence(t))
        mixed(peers, method, range(t, t + 1))
        assert torch.equal(peers.x[absent], before[absent])
        assert torch.allclose(peers.x.mean(0), mean, rtol=0, atol=1e-14)


def test_what_is_taken_back_had_the_weight_of_its_round() -> None:
    """In round 3 of base over five peers 0 and 4 meet with weight 4/5; in round 4 they do not meet."""
    method = Method(SCHEDULES["lora"]("shared"), base(5), mixing=own)
    peers, before, codec = drawn(5), drawn(5), Fp32()
    frames = [codec.encode(method.correction.outgoing(p, method.schedule(3)), p.memory, (p.id, 3, 0)) for p in before]
    mixed(peers, method, range(3, 4))
    take_back(peers, [Undone(0, 4, 3, 0, frames[0], frames[4]), Undone(4, 0, 3, 0, frames[4], frames[0])], method)
    assert torch.allclose(peers.x, before.x, rtol=0, atol=1e-15)


@every_name
def test_peers_with_different_data_end_at_the_optimum_of_all_by_gradient_tracking(name: str) -> None:
    method = method_on(name)
    of = Quadratics.drawn(size(method), rate=0.06)
    method = replace(method, correction=CORRECTIONS["k_gt"](of.local))
    assert float((of.run(method, 200).x - of.optimum).norm(dim=1).max()) < 1e-8


def growth(matrices: list[Matrix], share: float) -> float:
    """Returns by how much led (share 1/2) or d2 (1) lets distances grow in a cycle without any gradient.

    x and the shift s move as  u = x - s,  m = share (W - I) u,  x+ = u + m,  s+ = s - m.
    """
    n = len(matrices[0])
    identity, apart = np.eye(n), np.eye(n) - 1.0 / n
    cycle = np.kron(np.eye(2), apart)
    for w in matrices:
        m = share * (w - identity)
        cycle = np.block([[identity + m, -identity - m], [-m, identity + m]]) @ cycle
    return float(np.abs(np.linalg.eigvals(cycle)).max())


@pytest.mark.parametrize(
    ("n", "share", "factor"), [(7, 0.5, 1.13), (100, 0.5, 4.44), (3, 0.5, 0.78), (7, 1.0, 4.20), (16, 1.0, 3.00)]
)
def test_corrections_made_for_one_matrix_drift_apart_on_a_cycle(n: int, share: float, factor: float) -> None:
    """Why led and d2 are refused where the graph changes."""
    assert growth([matrix(graph, own) for graph in base(n).looked_at()], share) == pytest.approx(factor, abs=0.005)


def test_the_same_corrections_do_not_on_one_graph() -> None:
    w = (np.eye(7) + matrix(base(7).union, metropolis)) / 2
    assert growth([w], 0.5) < 1 and growth([w], 1.0) < 1
