"""Mixing all peers at once ends with the bits, the bytes and the refusals of mixing peer by peer."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import ceil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dfl_lora import blocked
from dfl_lora.codecs.frames import Frame
from dfl_lora.graphs import GRAPHS, Graph
from dfl_lora.mixing import MIXINGS, Mixing, matrix
from dfl_lora.mixing import given as given_matrix
from dfl_lora.networks import Arrived
from dfl_lora.networks.memory import MemoryNetwork
from dfl_lora.peers import Peers
from dfl_lora.rounds import Method, Traffic, mix, mix_at_once
from dfl_lora.schedules import SCHEDULES, Schedule
from dfl_lora.tensors import Layout, Tensors

LAYOUT = Layout.of({"q.A": ("A", (2, 9)), "q.B": ("B", (5, 2)), "q.core": ("core", (2, 2)), "head": ("head", (3, 7))})
SHARED = {name: SCHEDULES[name]("shared") for name in SCHEDULES}


@dataclass(frozen=True)
class PeerByPeer:
    """A memory network that is not known to be one."""

    def exchange(self, round: int, k: int, graph: Graph, outgoing: Mapping[int, Frame]) -> Arrived:
        return MemoryNetwork().exchange(round, k, graph, outgoing)


@st.composite
def graphs(draw: Callable[..., int], most: int = 12) -> Graph:
    """Any graph of up to so many peers, connected or not."""
    n = draw(st.integers(1, most))
    pairs = [(i, j) for j in range(n) for i in range(j)]
    return Graph(n, frozenset(draw(st.sets(st.sampled_from(pairs))) if pairs else ()))


def drawn(num_peers: int, seed: int, dtype: torch.dtype, layout: Layout = LAYOUT) -> Peers:
    """Peers of random numbers: small and large ones, zeros of both signs, some equal at all peers."""
    g = torch.Generator().manual_seed(seed)
    nothing = Tensors(torch.zeros(0, dtype=dtype), Layout.of({}))
    peers = Peers(range(num_peers), Tensors(torch.zeros(layout.size, dtype=dtype), layout), nothing)
    scale = 10.0 ** torch.randint(-44, 30, (1, layout.size), generator=g)
    peers.x.copy_(torch.randn(peers.x.shape, generator=g, dtype=torch.float64) * scale)
    peers.x[:, ::5] = peers.x[:1, ::5].clone()
    peers.x[torch.rand(peers.x.shape, generator=g) < 0.2] *= 0.0
    return peers


def bits(peers: Peers) -> list[list[int]]:
    integers: list[list[int]] = peers.x.view(torch.int64 if peers.x.dtype == torch.float64 else torch.int32).tolist()
    return integers


def both(peers: Peers, method: Method, absent: frozenset[int] = frozenset(), t: int = 1) -> tuple[Peers, Traffic]:
    """Mixes at once and peer by peer, and returns the one result that both must have."""
    one_by_one = Peers(peers.ids, peers[0].adapter, peers.common)
    one_by_one.x.copy_(peers.x)
    phase, graph = replace(method.schedule(t), absent=absent), method.topology(t)
    costs = [mix(p, phase, graph, t, method, net) for p, net in ((peers, MemoryNetwork()), (one_by_one, PeerByPeer()))]
    assert bits(peers) == bits(one_by_one)
    assert costs[0] == costs[1]
    return peers, costs[0]


def method_of(graph: Graph, mixing: Mixing = MIXINGS["metropolis"], schedule: Schedule = SHARED["lora"]) -> Method:
    return Method(schedule, lambda t: graph, mixing=mixing)


@settings(deadline=None, max_examples=150)
@given(
    graphs(), st.sampled_from(sorted(MIXINGS)), st.sampled_from(sorted(SHARED)), st.integers(0, 2**31),
    st.sets(st.integers(0, 11)), st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
def test_mixing_at_once_is_mixing_peer_by_peer_to_the_bit(
    graph: Graph, mixing: str, schedule: str, seed: int, absent: set[int], dtype: torch.dtype
) -> None:
    """share_a with a shared head sends two slices with a gap between them."""
    there = frozenset(i for i in absent if i < graph.num_peers)
    if mixing == "laplacian" and not graph.edges:
        return
    peers = drawn(graph.num_peers, seed, dtype)
    before = peers.x.clone()
    both(peers, method_of(graph, MIXINGS[mixing], SHARED[schedule]), there)
    assert torch.equal(peers.x[sorted(there)], before[sorted(there)])


@pytest.mark.parametrize("name", ["ring", "star", "complete", "torus", "random_regular", "barabasi", "none"])
def test_named_graphs_of_many_peers_mix_at_once_to_the_bit(name: str) -> None:
    graph = GRAPHS[name](60)
    assert mix_at_once(drawn(60, 1, torch.float32), SHARED["lora"](1), graph, method_of(graph)) is not None
    both(drawn(60, 1, torch.float32), method_of(graph))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_blocks_and_threads_change_no_bit(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout.of({"q.B": ("B", (7, 1000)), "head": ("head", (1, 7))})
    monkeypatch.setattr(blocked, "NUMBERS", 3300)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        both(drawn(9, 0, torch.float32, layout), method_of(GRAPHS["ring"](9)))
        sweep = blocked.sweep_of(GRAPHS["ring"](9), MIXINGS["metropolis"], frozenset())
        blocks = sweep.blocks([slice(7, 7007), slice(8000, 8005)], 4) if sweep else None
    finally:
        torch.set_num_threads(before)
    assert blocks is not None and len(blocks) == -(-7 // threads) * threads + 1
    assert [i for b in blocks for i in range(b.start, b.stop)] == [*range(7, 7007), *range(8000, 8005)]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("absent", [frozenset[int](), frozenset({2})])
def test_a_row_that_is_not_finite_is_refused_and_counted_as_ever(bad: float, absent: frozenset[int]) -> None:
    peers = drawn(7, 0, torch.float32)
    peers.x[2, 3] = bad
    _, traffic = both(peers, method_of(GRAPHS["ring"](7)), absent)
    assert traffic.refused == ({} if absent else {"non-finite": 2})
    assert torch.isfinite(peers.x[[0, 1, 3, 4, 5, 6]]).all()


def test_flows_that_overflow_are_as_peer_by_peer() -> None:
    peers = drawn(7, 0, torch.float32)
    peers.x[2], peers.x[3], peers.x[5] = 3e38, -3e38, -3e38
    assert mix_at_once(drawn(7, 0, torch.float32), SHARED["lora"](1), GRAPHS["ring"](7), method_of(GRAPHS["ring"](7)))
    both(peers, method_of(GRAPHS["ring"](7)))


@pytest.mark.parametrize("threads", [1, 2, 16])
@pytest.mark.parametrize(("graph", "at_once"), [("random_regular", True), ("complete", False)])
def test_whether_peers_mix_at_once_depends_on_no_number_of_threads(graph: str, at_once: bool, threads: int) -> None:
    sweep = blocked.sweep_of(GRAPHS[graph](400), MIXINGS["metropolis"], frozenset())
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        blocks = sweep.blocks([slice(0, 73_728)], 4) if sweep else None
    finally:
        torch.set_num_threads(before)
    assert (blocks is not None) == at_once


def test_a_sum_that_overflows_is_no_row_that_is_not_finite() -> None:
    peers = drawn(7, 0, torch.float32)
    peers.x[2] = 3e38
    assert blocked.finite(peers.x, [slice(0, LAYOUT.size)], frozenset())
    assert both(peers, method_of(GRAPHS["ring"](7)))[1].refused == {}


def test_a_matrix_that_is_symmetric_only_nearly_is_mixed_peer_by_peer() -> None:
    graph = GRAPHS["ring"](5)
    w = matrix(graph, MIXINGS["metropolis"])
    w[0, 1] += 1e-8
    method = method_of(graph, given_matrix(w.tolist()))
    assert blocked.sweep_of(graph, method.mixing, frozenset()) is None
    both(drawn(5, 0, torch.float32), method)


def test_a_graph_across_which_too_many_flows_run_is_mixed_peer_by_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = GRAPHS["complete"](30)
    monkeypatch.setattr(blocked, "KEPT", 10_000)
    assert mix_at_once(drawn(30, 0, torch.float32), SHARED["lora"](1), graph, method_of(graph)) is None
    both(drawn(30, 0, torch.float32), method_of(graph))


def test_the_flows_kept_on_a_ring_are_those_of_two_turns_and_one_around() -> None:
    sweep = blocked.sweep_of(GRAPHS["ring"](1000), MIXINGS["metropolis"], frozenset())
    assert sweep is not None and (len(sweep.turns), sweep.num_messages) == (2 + ceil(998 / blocked.TOGETHER), 2000)
    assert sweep.num_kept <= 2 + 3 * blocked.TOGETHER


def test_one_peer_of_many_is_not_all_of_them() -> None:
    peers = drawn(1, 0, torch.float32)
    assert mix_at_once(peers, SHARED["lora"](1), GRAPHS["ring"](3), method_of(GRAPHS["ring"](3))) is None
