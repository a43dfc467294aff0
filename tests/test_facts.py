"""What is known of the graphs that the literature and this project speak of, to the last digit of the tables."""

from dataclasses import dataclass

import networkx as nx
import numpy as np
import pytest

from dfl_lora.graphs import GRAPHS, Graph, complete, exponential, hypercube, line, ring, star, torus
from dfl_lora.mixing import (
    chebyshev_contraction,
    exact_in,
    expected_profile,
    matrix,
    messages,
    metropolis,
    rho,
    rounds_to,
)

PUBLISHED = {
    "du14": "1,2 | 0,2 | 0,1,3 | 2,4 | 3,5 | 4,6 | 5",
    "link3": "1,6 | 0,2 | 1,3 | 2,4 | 3,5 | 4,6 | 0,5",
    "link4": "1,2,6 | 0,2,3 | 0,1,3 | 1,2,4 | 3,5,6 | 4,6 | 0,4,5",
    "link5": "1,2,5,6 | 0,2,3,6 | 0,1,3,4 | 1,2,4,5 | 2,3,5,6 | 0,3,4,6 | 0,1,4,5",
    "link6": "1,2,3,5,6 | 0,2,3,4,5 | 0,1,3,4,5 | 0,1,2,4,5 | 1,2,3,5,6 | 0,1,2,3,4,6 | 0,4,5",
    "link7": "1,2,3,4,5,6 | 0,2,3,4,5,6 | 0,1,3,4,5,6 | 0,1,2,4,5,6 | 0,1,2,3,5,6 | 0,1,2,3,4,6 | 0,1,2,3,4,5",
}


@dataclass(frozen=True)
class Fact:
    """A row of the table: rho of metropolis, rounds of plain gossip to 1e-3, contractions in 3 and 8 exchanges."""

    graph: Graph
    rho: float
    rounds: int
    chebyshev: tuple[float, float]
    plain: tuple[float, float]
    exact_in: int
    messages: int


FACTS = {  # to three digits
    "link3": Fact(GRAPHS["link3"](7), 0.749, 24, (0.181, 0.003), (0.420, 0.099), 3, 14),
    "link4": Fact(GRAPHS["link4"](7), 0.779, 28, (0.217, 0.005), (0.472, 0.135), 6, 20),
    "link5": Fact(GRAPHS["link5"](7), 0.360, 7, (0.013, 0.0), (0.047, 0.0), 3, 28),
    "link6": Fact(GRAPHS["link6"](7), 0.524, 11, (0.045, 0.0), (0.144, 0.006), 4, 34),
    "du14": Fact(GRAPHS["du14"](7), 0.934, 101, (0.587, 0.099), (0.814, 0.577), 6, 14),
    "link7": Fact(GRAPHS["link7"](7), 0.0, 1, (0.0, 0.0), (0.0, 0.0), 1, 42),
    "ring16": Fact(ring(16), 0.949, 133, (0.660, 0.147), (0.855, 0.659), 8, 32),
    "ring32": Fact(ring(32), 0.987, 536, (0.894, 0.513), (0.962, 0.902), 16, 64),
}
every_fact = pytest.mark.parametrize("fact", FACTS.values(), ids=FACTS)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_graphs_have_the_published_neighbours(name: str) -> None:
    graph = GRAPHS[name](7)
    assert " | ".join(",".join(map(str, graph.neighbours(i))) for i in range(7)) == PUBLISHED[name]


def test_link3_is_the_ring_and_link7_is_complete() -> None:
    assert GRAPHS["link3"](7) == ring(7)
    assert GRAPHS["link7"](7) == complete(7)


@every_fact
def test_one_exchange_shrinks_disagreement_by_rho(fact: Fact) -> None:
    assert rho(matrix(fact.graph, metropolis)) == pytest.approx(fact.rho, abs=5e-4)


@every_fact
def test_plain_gossip_needs_these_rounds_to_a_thousandth(fact: Fact) -> None:
    w = matrix(fact.graph, metropolis)
    assert rounds_to(w, 1e-3) == fact.rounds
    distance = [np.linalg.norm(np.linalg.matrix_power(w, t) - 1 / len(w), 2) for t in (fact.rounds - 1, fact.rounds)]
    assert distance[0] > 1e-3 >= distance[1]


@every_fact
def test_chebyshev_beats_plain_gossip_by_this_much(fact: Fact) -> None:
    w = matrix(fact.graph, metropolis)
    for k, chebyshev, plain in zip((3, 8), fact.chebyshev, fact.plain, strict=True):
        assert chebyshev_contraction(w, k) == pytest.approx(chebyshev, abs=5e-4)
        assert rho(w) ** k == pytest.approx(plain, abs=5e-4)


@every_fact
def test_the_mean_is_exact_in_these_exchanges(fact: Fact) -> None:
    assert exact_in(fact.graph) == fact.exact_in


@every_fact
def test_a_round_takes_these_messages(fact: Fact) -> None:
    assert messages(fact.graph) == fact.messages == sum(fact.graph.degree(i) for i in range(fact.graph.num_peers))


def test_the_expected_consensus_profile_of_the_published_graphs() -> None:
    profile = [expected_profile(GRAPHS[f"link{k}"](7), metropolis) for k in (3, 4, 5, 6)]
    assert profile == pytest.approx([1, 0.81, 0.40, 0.40], abs=0.005)


def test_rho_alone_predicts_the_wrong_order_of_the_published_graphs() -> None:
    shrinks = {k: rho(matrix(GRAPHS[f"link{k}"](7), metropolis)) for k in (3, 4, 5, 6)}
    assert sorted(shrinks, key=lambda k: shrinks[k]) == [5, 6, 3, 4]


@pytest.mark.parametrize("n", [4, 7, 16, 33])
def test_the_ring_and_the_complete_graph_have_their_known_rho(n: int) -> None:
    known = max(abs(1 + 2 * np.cos(2 * np.pi * k / n)) / 3 for k in range(1, n))
    assert rho(matrix(ring(n), metropolis)) == pytest.approx(known)
    assert rho(matrix(complete(n), metropolis)) == 0


@pytest.mark.parametrize("dimension", [1, 2, 3, 4, 5])
def test_a_hypercube_is_exact_in_its_dimension(dimension: int) -> None:
    assert exact_in(hypercube(2**dimension)) == dimension == nx.diameter(hypercube(2**dimension).networkx)


def test_a_star_is_exact_in_two_and_a_line_in_all_but_one() -> None:
    assert exact_in(star(9)) == 2
    assert exact_in(line(9)) == 8


def test_the_exponential_graph_mixes_faster_than_the_torus_and_the_torus_than_the_ring() -> None:
    shrinks = [rho(matrix(graph, metropolis)) for graph in (exponential(64), torus(64), ring(64))]
    assert shrinks == sorted(shrinks)
    assert exponential(64).max_degree == 11
