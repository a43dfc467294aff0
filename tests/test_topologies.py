"""Graphs that change from round to round."""

import math
from collections.abc import Callable
from itertools import pairwise

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from changing import DRAWN, NAMES, changing
from dfl_lora.base_graph import base as base_rounds
from dfl_lora.base_graph import fewest
from dfl_lora.errors import UserError
from dfl_lora.graphs import Graph, complete, ring
from dfl_lora.mixing import Matrix, matrix, metropolis, own
from dfl_lora.topologies import (
    ROUNDS,
    TOPOLOGIES,
    Topology,
    base,
    epidemic,
    one_peer_exponential,
    random_edges,
    random_matching,
    topology_of,
    weighted,
)

every_name = pytest.mark.parametrize("name", NAMES)
every_drawn = pytest.mark.parametrize("name", DRAWN)
ROUNDS_TO_THE_MEAN = {
    5: (5, 3, 3, 1),
    7: (5, 4, 3, 3),
    8: (3, 3, 2, 2),
    10: (6, 4, 4, 2),
    16: (4, 4, 2, 2),
    25: (9, 6, 5, 2),
    32: (5, 5, 3, 3),
    100: (11, 8, 6, 3),
}
"""Of base(k) for k = 1, 2, 3, 4, by number of peers."""


def product(topology: Topology, weights: Callable[..., object], num_rounds: int) -> Matrix:
    """Returns W_m ... W_1."""
    total = np.eye(topology.num_peers)
    for t in range(1, num_rounds + 1):
        total = matrix(topology(t), weights) @ total  # type: ignore[arg-type]
    return total


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("n", ROUNDS_TO_THE_MEAN)
def test_base_is_at_the_mean_after_these_rounds_and_not_before(n: int, k: int) -> None:
    topology = base(n, k=k)
    assert topology.cycle == ROUNDS_TO_THE_MEAN[n][k - 1]
    assert np.abs(product(topology, own, topology.cycle) - 1 / n).max() < 1e-12
    assert np.abs(product(topology, own, topology.cycle - 1) - 1 / n).max() > 1e-3


@settings(deadline=None, max_examples=80)
@given(st.integers(2, 130), st.integers(1, 9))
def test_base_is_exact_for_any_number_of_peers_with_at_most_k_partners(n: int, k: int) -> None:
    if k >= n:
        return
    topology = base(n, k=k)
    assert topology.cycle == len(base_rounds(n, k)) <= 2 * math.log(n, k + 1) + 2
    assert max(graph.max_degree for graph in topology.looked_at()) <= k
    assert np.abs(product(topology, own, topology.cycle) - 1 / n).max() < 1e-12
    assert topology.union.connected


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(NAMES), st.integers(3, 40), st.integers(0, 10**6))
def test_every_round_is_symmetric_and_doubly_stochastic_with_weights_between_0_and_1(name: str, n: int, t: int) -> None:
    topology, weights = changing(name, n)
    w = matrix(topology(t), weights)
    assert (w == w.T).all()
    assert np.abs(w.sum(1) - 1).max() < 1e-15 * topology.num_peers
    assert w.min() >= 0 and w.diagonal().min() > 0


def test_edges_of_base_are_met_with_their_own_weights() -> None:
    """Five peers: four take their mean in two rounds, one of them meets the fifth with weight 4/5."""
    graphs = list(base(5).looked_at())
    assert [dict(graph.weight) for graph in graphs] == [
        {(0, 1): 0.5, (2, 3): 0.5},
        {(0, 2): 0.5, (1, 3): 0.5},
        {(0, 4): 0.8},
        {(0, 1): 0.5, (2, 3): 0.5},
        {(0, 2): 0.5, (1, 3): 0.5},
    ]
    assert own(graphs[2], 4).weights == {0: 0.8} and own(graphs[2], 1).weights == {}


def test_a_graph_keeps_its_own_weights_among_those_present_and_is_another_with_other_weights() -> None:
    graph = weighted(4, [(2, 1, 0.3), (0, 1, 0.2), (3, 2, 0.1)])
    assert dict(graph.among({1, 2, 3}).weight) == {(1, 2): 0.3, (2, 3): 0.1}
    assert graph != weighted(4, [(2, 1, 0.3), (0, 1, 0.2), (3, 2, 0.2)]) != Graph(4, graph.edges)
    assert ring(5).among({0, 1}).weight == {}


def test_the_fewest_factors_are_found() -> None:
    assert [fewest(n, 4) for n in (1, 4, 8, 12, 5, 10, 64)] == [(), (4,), (4, 2), (4, 3), None, None, (4, 4, 4)]
    assert fewest(36, 6) == (6, 6)


@pytest.mark.parametrize("n", [2, 4, 8, 32, 128])
def test_one_peer_exponential_is_at_the_mean_after_as_many_rounds_as_digits(n: int) -> None:
    topology, digits = one_peer_exponential(n), n.bit_length() - 1
    assert topology.cycle == digits
    assert np.abs(product(topology, metropolis, digits) - 1 / n).max() < 1e-12
    for t in range(1, digits + 1):
        assert topology(t).edges == {(min(i, j), max(i, j)) for i in range(n) for j in [i ^ 1 << (t - 1)]}


def test_one_peer_exponential_needs_a_power_of_two_and_says_what_else_there_is() -> None:
    with pytest.raises(UserError, match="power of two, such as 4 or 8, or use the topology base"):
        one_peer_exponential(7)


@pytest.mark.parametrize(("n", "pairs"), [(2, 1), (7, 3), (8, 4), (101, 50)])
def test_a_random_matching_is_pairs_of_all_but_one_if_they_are_odd(n: int, pairs: int) -> None:
    for t in range(20):
        graph = random_matching(n)(t)
        assert len(graph.edges) == pairs and graph.max_degree == 1
        assert set(own_weights(graph)) == {0.5}


def own_weights(graph: Graph) -> list[float]:
    return [w for i in range(graph.num_peers) for w in metropolis(graph, i).weights.values()]


def test_random_matchings_meet_all_pairs_alike() -> None:
    topology, rounds = random_matching(7), 4200
    met = np.zeros((7, 7))
    for t in range(rounds):
        for i, j in topology(t).edges:
            met[i, j] += 1
    assert met[np.triu_indices(7, 1)] == pytest.approx(rounds / 7, rel=0.2)


def test_random_edges_are_there_with_their_probability() -> None:
    topology = random_edges(30, p=0.2)
    share = np.mean([len(topology(t).edges) for t in range(100)]) / (30 * 29 / 2)
    assert share == pytest.approx(0.2, rel=0.05)
    assert random_edges(6, p=1.0)(3) == complete(6)


def test_in_an_epidemic_everybody_talks_to_those_it_drew_and_those_who_drew_it() -> None:
    for t in range(20):
        graph = epidemic(30, s=3)(t)
        assert min(map(graph.degree, range(30))) >= 3
        assert 30 * 3 / 2 <= len(graph.edges) <= 30 * 3


@every_drawn
def test_what_is_drawn_depends_on_seed_and_round_alone(name: str) -> None:
    draws = [[changing(name, 12, seed=seed)[0](t) for t in range(1, 9)] for seed in range(4)]
    assert draws == [[changing(name, 12, seed=seed)[0](t) for t in range(1, 9)] for seed in range(4)]
    backwards = changing(name, 12)[0]
    assert draws[0] == [backwards(t) for t in range(8, 0, -1)][::-1]
    assert all(one != other for rounds in draws for one, other in pairwise(rounds))
    assert len({tuple(rounds) for rounds in draws}) == 4


GOLDEN = {
    "epidemic": [(0, 4), (0, 5), (1, 2), (1, 3), (1, 4), (1, 5), (2, 3), (2, 4), (2, 5), (3, 4), (3, 5)],
    "random_edges": [(0, 3), (1, 4), (4, 5)],
    "random_matching": [(0, 2), (1, 5), (3, 4)],
}


def test_drawn_rounds_are_the_same_everywhere() -> None:
    """Peers on different machines draw them themselves: a change here breaks every run between versions."""
    assert {name: sorted(changing(name, 6)[0](3).edges) for name in DRAWN} == GOLDEN


@every_name
def test_the_union_connects_all_and_has_every_edge_of_every_round(name: str) -> None:
    topology, _ = changing(name)
    assert topology.changes and topology.union.connected
    assert all(topology(t).edges <= topology.union.edges for t in range(-3, 60))
    joined = nx.Graph([edge for graph in topology.looked_at() for edge in graph.edges])
    assert nx.is_connected(joined) and len(joined) == topology.num_peers


@pytest.mark.parametrize("name", ["base", "one_peer_exponential"])
def test_a_cycle_begins_in_round_1_and_again_after_its_last(name: str) -> None:
    topology, _ = changing(name)
    assert topology.cycle
    graphs = [topology(t) for t in range(1, topology.cycle + 1)]
    assert list(topology.looked_at()) == graphs
    assert topology(0) == graphs[-1] and [topology(t + 3 * topology.cycle) for t in range(1, len(graphs) + 1)] == graphs


def test_base_with_as_many_partners_as_others_is_one_graph_and_changes_no_more() -> None:
    topology = base(7, k=6)
    assert not topology.changes and topology.union.edges == complete(7).edges


def test_a_graph_is_the_same_in_every_round() -> None:
    topology = topology_of(ring(5))
    assert topology(1) == topology(99) == topology.union == ring(5)
    assert not topology.changes and list(topology.looked_at()) == [ring(5)]
    assert [str(t) for t in (topology, topology_of(ring(2)), base(7), epidemic(5))] == [
        "5 edges", "1 edge", "5 graphs in turn", "another graph drawn in every round",
    ]  # fmt: skip


@every_name
def test_one_peer_is_alone_under_every_name(name: str) -> None:
    topology, _ = changing(name, 1)
    assert topology(1) == topology.union == Graph(1, frozenset()) and not topology.changes


@every_name
@pytest.mark.parametrize("num_peers", [-1, 0, 2, 3, 4, 5, 6])
def test_any_number_of_peers_makes_a_topology_or_one_clear_sentence(name: str, num_peers: int) -> None:
    try:
        topology = TOPOLOGIES[name](num_peers)
    except UserError as error:
        sentence = str(error)
        assert str(num_peers) in sentence and "\n" not in sentence and sentence.endswith(".")
    else:
        assert isinstance(topology, Topology)
        assert topology.num_peers == num_peers > 0 and topology.union.connected


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: base(7, k=7), "base.k=7. needs more than 7 peers, and 7 were asked for; lower k"),
        (lambda: epidemic(3, s=3), "epidemic.s=3. needs more than 3 peers"),
        (lambda: random_edges(20, p=1e-6), f"leaves 20 parts that never meet in {ROUNDS} rounds"),
    ],
)
def test_what_cannot_be_is_refused_with_what_to_do(make: Callable[[], Topology], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        make()


def test_fewer_rounds_are_looked_at_where_they_have_very_many_edges() -> None:
    assert random_matching(1000).num_looked_at == ROUNDS
    assert random_edges(400, p=0.5).num_looked_at == 5
