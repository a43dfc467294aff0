"""What is predicted of a topology before a run."""

import math

import numpy as np
import pytest

from changing import DRAWN, changing
from dfl_lora.graphs import GRAPHS
from dfl_lora.mixing import MIXINGS, expected_consensus, expected_profile, matrix, metropolis, own, rho, rounds_to
from dfl_lora.outlook import MOST_CHANGING, of_changing, outlook
from dfl_lora.topologies import Topology, base, one_peer_exponential, random_edges, random_matching, topology_of


@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize("name", ["ring", "star", "complete", "link4", "none"])
def test_of_one_graph_it_is_what_is_known_of_w(name: str, mixing: str) -> None:
    graph, weights = GRAPHS[name](7), MIXINGS[mixing]
    found, w = outlook(topology_of(graph), weights), matrix(graph, weights)
    assert (found.num_rounds, found.edges, found.messages) == (1, tuple(sorted(graph.edges)), 2 * len(graph.edges))
    assert (found.rho, found.rounds_to_a_thousandth) == (rho(w), rounds_to(w))
    assert (found.expected_consensus, found.expected_profile) == (
        expected_consensus(w), expected_profile(graph, weights),
    )  # fmt: skip


@pytest.mark.parametrize("name", ["ring", "star", "link4"])
def test_one_graph_drawn_again_and_again_is_predicted_as_that_graph(name: str) -> None:
    graph = GRAPHS[name](7)
    found, known = of_changing(Topology(7, lambda t: graph, None), metropolis), outlook(topology_of(graph), metropolis)
    assert found.rho == pytest.approx(known.rho, abs=1e-6)
    assert found.expected_consensus == pytest.approx(known.expected_consensus, rel=1e-3)
    assert found.expected_profile == pytest.approx(known.expected_profile, rel=1e-3)
    assert found.messages == known.messages and found.edges == known.edges


@pytest.mark.parametrize(("n", "k"), [(5, 1), (7, 1), (7, 2), (25, 3)])
def test_a_cycle_that_ends_at_the_mean_has_rho_0_and_says_after_how_many_rounds(n: int, k: int) -> None:
    topology = base(n, k=k)
    found = outlook(topology, own)
    assert found.rho == 0 and found.exact_in == found.rounds_to_a_thousandth == found.num_rounds == topology.cycle
    assert found.edges == tuple(sorted(topology.union.edges))
    assert found.messages == sum(2 * len(graph.edges) for graph in topology.looked_at()) / found.num_rounds


def test_the_expected_consensus_of_one_peer_exponential_by_hand() -> None:
    """Of eight peers, seven directions: four vanish in a round, two live one round longer, one two, in every round."""
    found = outlook(one_peer_exponential(8), metropolis)
    assert found.expected_consensus == pytest.approx(math.sqrt(2 * 1 + 1 * 2))


@pytest.mark.parametrize("name", DRAWN)
def test_rho_of_drawn_rounds_is_how_fast_random_values_agree(name: str) -> None:
    topology, weights = changing(name, 20)
    found, x = outlook(topology, weights), np.random.default_rng(0).standard_normal((20, 5))
    x -= x.mean(0)
    first = np.linalg.norm(x)
    for t in range(1, 31):
        x = matrix(topology(t), weights) @ x
    assert (np.linalg.norm(x) / first) ** (1 / 30) == pytest.approx(found.rho, rel=0.1)
    assert found.exact_in == math.inf and 1 < found.rounds_to_a_thousandth < 60


def test_pairs_that_are_always_the_same_agree_at_once() -> None:
    assert outlook(random_matching(2), metropolis).rho == 0


def test_more_peers_than_can_be_known_have_edges_and_no_rho() -> None:
    found = outlook(random_edges(MOST_CHANGING + 1, p=0.01), metropolis)
    assert math.isnan(found.rho) and math.isnan(found.expected_consensus) and math.isnan(found.expected_profile)
    assert found.messages > 0 and found.edges
