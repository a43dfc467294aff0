"""RelaySum: whom a peer hears of when, and where peers with different data end."""

from itertools import pairwise

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dfl_lora.errors import UserError
from dfl_lora.graphs import Graph
from dfl_lora.mixers import MIXERS, Mixer, reached
from dfl_lora.mixing import metropolis, sums
from dfl_lora.networks.memory import MemoryNetwork
from dfl_lora.peers import Peers
from dfl_lora.rounds import Method, mix
from dfl_lora.tensors import Tensors
from quadratics import LAYOUT, Quadratics, method_on

ROUNDS = 12


def relay(graph: Graph) -> Mixer:
    return MIXERS["relay_sum"](graph, sums, ROUNDS)


def tree(num_peers: int, seed: int) -> Graph:
    return Graph.of(num_peers, list(nx.random_labeled_tree(num_peers, seed=seed).edges))


def on(graph: Graph) -> Method:
    return method_on(graph, mixing=sums, mixer=relay(graph))


def drawn(num_peers: int, seed: int) -> list[Tensor]:
    """What peers hold before each round's mixing: x(t) [n, P]."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(num_peers, LAYOUT.size, generator=generator, dtype=torch.float64) for _ in range(ROUNDS)]


@given(num_peers=st.integers(1, 9), seed=st.integers(0, 10**6))
@settings(deadline=None, max_examples=40)
def test_a_peer_hears_of_every_other_as_many_rounds_later_as_it_is_far(num_peers: int, seed: int) -> None:
    """x_i+ = (sum of x_j(t + 1 - d_ij) + the own value for each that is not heard of yet) / n."""
    graph, values = tree(num_peers, seed), drawn(num_peers, seed)
    method, far = on(graph), dict(nx.all_pairs_shortest_path_length(graph.networkx))
    peers = Quadratics.drawn(num_peers).peers(method)
    for t in range(1, ROUNDS + 1):
        peers.x.copy_(values[t - 1])
        traffic = mix(peers, method.schedule(t), graph, t, method, MemoryNetwork())
        assert traffic.messages == 2 * (num_peers - 1)
        for i in range(num_peers):
            heard = [values[t - far[i][j]][j] for j in range(num_peers) if 0 < far[i][j] <= t]
            assert reached(graph, t)[i] == len(heard)
            own = (num_peers - len(heard)) * values[t - 1][i]
            assert torch.allclose(peers.x[i], (torch.stack([*heard, own]).sum(0)) / num_peers, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", ["line", "star", "random"])
def test_peers_end_where_a_server_would_bring_them(name: str) -> None:
    """With different data too: at the fixed point of exact averages, where plain gossip on the tree is far from."""
    shapes = {"line": list(pairwise(range(7))), "star": [(0, i) for i in range(1, 7)], "random": tree(7, 3).edges}
    graph, of = Graph.of(7, list(shapes[name])), Quadratics.drawn(7)
    everyone = Graph.of(7, [(i, j) for i in range(7) for j in range(i)])
    server = of.run(method_on(everyone, mixer=MIXERS["exact"](everyone, metropolis, 1)), 400).x
    assert torch.allclose(of.run(on(graph), 400).x, server, rtol=0, atol=1e-9)
    assert (of.run(method_on(graph), 400).x - server).norm(dim=1).max() > 0.1


def test_in_fp32_rounding_adds_up_slowly() -> None:
    """Seven peers on a line, 300 rounds of mixing alone: the figure of the page."""
    graph = Graph.of(7, list(pairwise(range(7))))
    method = method_on(graph, mixing=sums, mixer=MIXERS["relay_sum"](graph, sums, 300))
    start = 0.1 * torch.randn(7, LAYOUT.size, generator=torch.Generator().manual_seed(0))
    ends = []
    for dtype in (torch.float32, torch.float64):
        x = Tensors(torch.zeros(LAYOUT.size, dtype=dtype), LAYOUT)
        peers = Peers(range(7), x, x.select(frozenset()), memory=method.memory)
        peers.x.copy_(start)
        for t in range(1, 301):
            mix(peers, method.schedule(t), graph, t, method, MemoryNetwork())
        ends.append(peers.x.double())
    assert 0 < (ends[0] - ends[1]).abs().max() < 2e-6


def test_a_peer_that_is_not_finite_stops_it_in_one_sentence() -> None:
    """A sum with a part left out would be wrong ever after, at every peer."""
    graph = tree(5, 1)
    method, of = on(graph), Quadratics.drawn(5)
    peers = of.peers(method)
    mix(peers, method.schedule(1), graph, 1, method, MemoryNetwork())
    peers.x[3, 2] = torch.nan
    before = peers.x.clone()
    with pytest.raises(
        UserError, match=r"^Peer 3 has numbers that are not finite in round 2, .* use mixer plain, .*\.$"
    ):
        mix(peers, method.schedule(2), graph, 2, method, MemoryNetwork())
    assert torch.allclose(peers.x, before, equal_nan=True, rtol=0, atol=0)
