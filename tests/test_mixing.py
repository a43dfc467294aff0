"""Weights, and what they predict."""

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dfl_lora.errors import UserError
from dfl_lora.graphs import Graph, complete, named, ring
from dfl_lora.mixing import MIXINGS, Mixing, Row, eigenvalues, expected_consensus, from_matrix, matrix, metropolis, rho

every_mixing = pytest.mark.parametrize("mixing", MIXINGS.values(), ids=MIXINGS)

FACTS = [  # graph, rho, rounds of plain gossip to 1e-3, messages a round
    (named("link3", 7), 0.749, 24, 14),
    (named("link4", 7), 0.779, 28, 20),
    (named("link5", 7), 0.360, 7, 28),
    (named("link6", 7), 0.524, 11, 34),
    (named("du14", 7), 0.934, 101, 14),
    (named("link7", 7), 0.0, 1, 42),
    (ring(16), 0.949, 133, 32),
    (ring(32), 0.987, 536, 64),
]


@st.composite
def connected_graphs(draw: st.DrawFn, smallest: int = 1, largest: int = 9) -> Graph:
    """A random tree and some more edges."""
    n = draw(st.integers(smallest, largest))
    tree = [(i, draw(st.integers(0, i - 1))) for i in range(1, n)]
    more = draw(st.sets(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)), max_size=8))
    return Graph.of(n, [*tree, *((i, j) for i, j in more if i != j)])


@pytest.mark.parametrize(("graph", "expected", "rounds", "messages"), FACTS)
def test_the_known_graphs_mix_as_fast_as_computed(graph: Graph, expected: float, rounds: int, messages: int) -> None:
    w = matrix(graph, metropolis)
    assert rho(w) == pytest.approx(expected, abs=5e-4)
    assert sum(graph.degree(i) for i in range(graph.num_peers)) == messages
    from_mean = [np.linalg.norm(np.linalg.matrix_power(w, t) - 1 / len(w), 2) for t in (rounds - 1, rounds)]
    assert from_mean[0] > 1e-3 >= from_mean[1]


def test_the_expected_consensus_profile_of_the_published_graphs() -> None:
    errors = [expected_consensus(matrix(named(f"link{k}", 7), metropolis)) for k in (3, 4, 5, 6)]
    assert [e / errors[0] for e in errors] == pytest.approx([1, 0.81, 0.40, 0.40], abs=0.005)


def test_the_expected_consensus_is_what_noise_and_mixing_settle_at() -> None:
    w = matrix(named("link4", 7), metropolis)
    deviation, covariance = np.eye(7) - 1 / 7, np.zeros((7, 7))
    for _ in range(400):
        covariance = w @ (covariance + np.eye(7)) @ w
    assert expected_consensus(w) == pytest.approx(math.sqrt(np.trace(deviation @ covariance @ deviation)), rel=1e-9)


def test_complete_graphs_and_single_peers_agree_at_once() -> None:
    for n in (1, 2, 7):
        w = matrix(complete(n), metropolis)
        assert np.allclose(w, 1 / n, atol=1e-15)
        assert rho(w) == pytest.approx(0, abs=1e-12)
        assert expected_consensus(w) == pytest.approx(0, abs=1e-12)


def test_metropolis_takes_the_larger_degree_of_the_two() -> None:
    star = Graph.of(4, [(0, 1), (0, 2), (0, 3)])
    assert metropolis(star, 0).weights == {1: 0.25, 2: 0.25, 3: 0.25}
    assert metropolis(star, 2).weights == {0: 0.25}
    assert metropolis(star, 2).own == 0.75
    path = Graph.of(3, [(0, 1), (1, 2)])
    assert metropolis(path, 0).weights == {1: 1 / 3}


@every_mixing
@settings(deadline=None, max_examples=50)
@given(graph=connected_graphs())
def test_rows_are_symmetric_and_doubly_stochastic(mixing: Mixing, graph: Graph) -> None:
    w = matrix(graph, mixing)
    assert np.array_equal(w, w.T)
    assert w.sum(axis=0) == pytest.approx(np.ones(graph.num_peers), abs=1e-12)
    assert w.sum(axis=1) == pytest.approx(np.ones(graph.num_peers), abs=1e-12)
    assert rho(w) < 1
    assert eigenvalues(w)[0] == pytest.approx(1)
    assert list(np.abs(eigenvalues(w))) == sorted(np.abs(eigenvalues(w)), reverse=True)


@settings(deadline=None, max_examples=50)
@given(connected_graphs())
def test_metropolis_weights_are_on_edges_only_and_never_negative(graph: Graph) -> None:
    for i in range(graph.num_peers):
        row = metropolis(graph, i)
        assert row.peer == i
        assert tuple(row.weights) == graph.neighbours(i)
        assert all(0 < weight <= 0.5 for weight in row.weights.values())
        assert row.own > 0


@settings(deadline=None, max_examples=50)
@given(connected_graphs(smallest=4), st.data())
def test_a_metropolis_row_is_local(graph: Graph, data: st.DataObject) -> None:
    peer = data.draw(st.integers(0, graph.num_peers - 1))
    far = [i for i in range(graph.num_peers) if i != peer and i not in graph.neighbours(peer)]
    assume(len(far) > 1)
    i, j = data.draw(st.permutations(far))[:2]
    assert metropolis(Graph.of(graph.num_peers, [*graph.edges, (i, j)]), peer) == metropolis(graph, peer)


@settings(deadline=None, max_examples=50)
@given(connected_graphs(smallest=2))
def test_a_written_matrix_gives_back_its_graph_and_rows(graph: Graph) -> None:
    w = matrix(graph, metropolis)
    again, mixing = from_matrix(w.tolist())
    assert again == graph
    assert np.allclose(matrix(again, mixing), w, atol=1e-15)


def test_the_row_of_a_given_matrix_sums_to_one_whatever_its_rounding() -> None:
    graph, mixing = from_matrix([[0.3333335, 0.6666666], [0.6666666, 0.3333335]])
    row = mixing(graph, 0)
    assert row == Row(0, {1: 0.6666666})
    assert row.own + row.weights[1] == 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "0 rows of .* numbers; it must be square"),
        ([[0.5, 0.5]], r"1 rows of \[2\] numbers; it must be square"),
        ([[1.0], [0.5, 0.5]], r"2 rows of \[1, 2\] numbers; it must be square"),
        ([[1.5, -0.5], [-0.5, 1.5]], "negative or non-finite weights; every weight must be between 0 and 1"),
        ([[math.nan, 1], [1, 0]], "negative or non-finite"),
        ([[0.5, math.inf], [math.inf, 0.5]], "negative or non-finite"),
        ([[0.5, 0.5], [0.4, 0.6]], r"not symmetric: W\[0,1\] = 0.5 but W\[1,0\] = 0.4"),
        ([[0.5, 0.5], [0.5, 0.6]], "row 1 sums to 1.1, and every row must to 1"),
        ([[1, 0], [0, 1]], "disconnected: it falls into 2 parts"),
    ],
)
def test_a_matrix_that_cannot_gossip_is_refused(rows: list[list[float]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_matrix(rows)


@pytest.mark.parametrize("off", [5e-6, 1e-5, 1e-3])
def test_a_row_that_is_off_by_more_than_one_millionth_is_refused(off: float) -> None:
    with pytest.raises(UserError, match="not stochastic"):
        from_matrix([[0.5 + off, 0.5], [0.5, 0.5 + off]])


@pytest.mark.parametrize("off", [2e-6, 1e-5, 1e-3])
def test_weights_that_differ_by_more_than_one_millionth_between_the_two_are_refused(off: float) -> None:
    with pytest.raises(UserError, match="not symmetric"):
        from_matrix([[0.5, 0.5], [0.5 - off, 0.5 + off]])


@pytest.mark.parametrize(
    "rows", [[[0, 1], [1, 0]], [[0, 0.5, 0, 0.5], [0.5, 0, 0.5, 0], [0, 0.5, 0, 0.5], [0.5, 0, 0.5, 0]]]
)
def test_a_matrix_under_which_peers_swap_for_ever_is_refused(rows: list[list[float]]) -> None:
    with pytest.raises(UserError):
        from_matrix(rows)
