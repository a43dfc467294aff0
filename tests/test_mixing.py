"""Weights, and what they predict."""

import math
from itertools import pairwise

import networkx as nx
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dfl_lora import graphs
from dfl_lora import mixing as mixings
from dfl_lora.errors import UserError
from dfl_lora.graphs import GRAPHS, Graph, clusters, complete, from_rows, line, none, ring, star
from dfl_lora.mixing import (
    MIXINGS,
    Matrix,
    Mixing,
    Row,
    chebyshev_contraction,
    eigenvalues,
    exact_in,
    expected_consensus,
    expected_consensus_on,
    expected_drift,
    expected_profile,
    gap,
    lazy,
    matrix,
    max_degree,
    messages,
    metropolis,
    rho,
    rho_on,
    rounds_at,
    rounds_to,
    uniform,
)
from dfl_lora.mixing import given as given_matrix
from example_graphs import CIRCLE, CONNECTED, EXAMPLES

every_mixing = pytest.mark.parametrize("mixing", MIXINGS.values(), ids=MIXINGS)


def from_matrix(rows: list[list[float]]) -> tuple[Graph, Mixing]:
    """Returns the mixing and the graph of a given W, both checked."""
    mixing = given_matrix(rows)
    return from_rows(len(rows), rows=rows), mixing


@st.composite
def connected_graphs(draw: st.DrawFn, smallest: int = 1, largest: int = 9) -> Graph:
    """A random tree and some more edges."""
    n = draw(st.integers(smallest, largest))
    tree = [(i, draw(st.integers(0, i - 1))) for i in range(1, n)]
    more = draw(st.sets(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)), max_size=8))
    return Graph.of(n, [*tree, *((i, j) for i, j in more if i != j)])


@pytest.mark.parametrize("name", ["link3", "link4", "link6", "du14"])
def test_the_expected_drift_is_what_constant_pulls_and_mixing_settle_at(name: str) -> None:
    """Mean square over pulls along each axis of x <- W (x + u), less the part that is common to all."""
    w = matrix(GRAPHS[name](7), metropolis)
    x = np.zeros((7, 7))
    for _ in range(2000):
        x = w @ (x + np.eye(7) - 1 / 7)
    assert expected_drift(w) == pytest.approx(np.linalg.norm(x), rel=1e-9)


def test_peers_that_never_agree_drift_without_end_and_equal_ones_not_at_all() -> None:
    assert expected_drift(np.eye(3)) == math.inf
    assert expected_drift(np.full((4, 4), 0.25)) == pytest.approx(0, abs=1e-12)


def test_the_expected_consensus_is_what_noise_and_mixing_settle_at() -> None:
    w = matrix(GRAPHS["link4"](7), metropolis)
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


def check_weights(w: Matrix, graph: Graph) -> None:
    """The law of every W: symmetric, doubly stochastic, positive on edges and on the diagonal, zero elsewhere."""
    assert np.array_equal(w, w.T)
    assert w.sum(axis=0) == pytest.approx(np.ones(graph.num_peers), abs=1e-12)
    assert w.sum(axis=1) == pytest.approx(np.ones(graph.num_peers), abs=1e-12)
    assert np.array_equal(w > 0, nx.to_numpy_array(graph.networkx) + np.eye(graph.num_peers) > 0)
    assert (w >= 0).all()
    assert (rho(w) < 1) == graph.connected
    assert eigenvalues(w)[0] == pytest.approx(1)
    assert list(np.abs(eigenvalues(w))) == sorted(np.abs(eigenvalues(w)), reverse=True)


@every_mixing
@pytest.mark.parametrize("graph", EXAMPLES.values(), ids=EXAMPLES)
def test_every_mixing_of_every_graph_is_symmetric_and_doubly_stochastic(mixing: Mixing, graph: Graph) -> None:
    check_weights(matrix(graph, mixing), graph)


@every_mixing
@settings(deadline=None, max_examples=50)
@given(graph=connected_graphs(), present=st.sets(st.integers(0, 8)))
def test_rows_are_symmetric_and_doubly_stochastic_whoever_is_present(
    mixing: Mixing, graph: Graph, present: set[int]
) -> None:
    check_weights(matrix(graph, mixing), graph)
    left = graph.among(present)
    w = matrix(left, mixing)
    check_weights(w, left)
    absent = [i for i in range(graph.num_peers) if i not in present]
    assert np.array_equal(w[absent], np.eye(graph.num_peers)[absent])


@settings(deadline=None, max_examples=50)
@given(connected_graphs(smallest=2))
def test_the_laplacian_mixing_is_a_step_along_the_laplacian(graph: Graph) -> None:
    laplacian = nx.laplacian_matrix(graph.networkx, weight=None).toarray()
    largest = np.linalg.eigvalsh(laplacian)[-1]
    w = matrix(graph, MIXINGS["laplacian"])
    assert w == pytest.approx(np.eye(graph.num_peers) - 2 * laplacian / (3 * largest), abs=1e-12)
    assert eigenvalues(w).min() == pytest.approx(1 / 3)


def test_the_weights_of_each_mixing_on_a_star() -> None:
    graph = star(5)
    assert matrix(graph, max_degree)[0] == pytest.approx(np.full(5, 0.2))
    assert uniform(graph, 1).weights == {0: 0.2}
    assert lazy(graph, 1).weights == {0: 0.1}
    assert MIXINGS["laplacian"](graph, 1).weights == {0: pytest.approx(2 / 15)}


@settings(deadline=None, max_examples=50)
@given(connected_graphs())
def test_lazy_gossip_has_no_negative_eigenvalue(graph: Graph) -> None:
    w = matrix(graph, lazy)
    assert eigenvalues(w).min() > -1e-12
    assert w == pytest.approx((np.eye(graph.num_peers) + matrix(graph, metropolis)) / 2, abs=1e-15)


def test_on_regular_graphs_metropolis_is_max_degree() -> None:
    for name in ("ring", "complete", "torus", "hypercube", "exponential", "random_regular"):
        graph = EXAMPLES[name]
        assert np.array_equal(matrix(graph, metropolis), matrix(graph, max_degree))


@pytest.mark.filterwarnings("error")
@every_mixing
@pytest.mark.parametrize("graph", [none(2), none(7), clusters(6).among(range(3))], ids=["two", "seven", "parts"])
def test_peers_of_a_disconnected_graph_never_agree(mixing: Mixing, graph: Graph) -> None:
    w = matrix(graph, mixing)
    assert rho(w) == 1 and gap(w) == 0
    assert rounds_to(w) == math.inf and exact_in(graph) == math.inf
    assert expected_consensus(w) == math.inf
    assert expected_profile(graph, mixing) == math.inf
    assert chebyshev_contraction(w, 3) == 1


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["ring", "none", "clusters"])
def test_one_peer_agrees_with_itself(name: str) -> None:
    graph = GRAPHS[name](1)
    for mixing in MIXINGS.values():
        w = matrix(graph, mixing)
        assert w.tolist() == [[1.0]]
        assert rho(w) == 0 and expected_consensus(w) == 0
        assert rounds_to(w) == 1 and exact_in(graph) == 0 and messages(graph) == 0
        assert expected_profile(graph, mixing) == 1


@every_mixing
@pytest.mark.parametrize("graph", CONNECTED.values(), ids=CONNECTED)
def test_rounds_to_is_when_the_power_of_w_is_near_the_mean(mixing: Mixing, graph: Graph) -> None:
    w = matrix(graph, mixing)
    for share in (0.5, 1e-3):
        k = int(rounds_to(w, share))
        distance = [np.linalg.norm(np.linalg.matrix_power(w, t) - 1 / len(w), 2) for t in (k - 1, k)]
        assert distance[0] > share * (1 - 1e-9) or k == 1
        assert distance[1] <= share * (1 + 1e-9)


@every_mixing
@pytest.mark.parametrize("graph", CONNECTED.values(), ids=CONNECTED)
def test_the_chebyshev_contraction_is_that_of_the_polynomial(mixing: Mixing, graph: Graph) -> None:
    w, n = matrix(graph, mixing), graph.num_peers
    if not rho(w):
        assert chebyshev_contraction(w, 3) == 0
        return
    for k in (1, 2, 3, 8):
        scaled = np.linalg.eigvalsh(w - 1 / n) / rho(w)
        polynomial = np.polynomial.chebyshev.Chebyshev.basis(k)
        contraction = np.abs(polynomial(scaled)).max() / polynomial(1 / rho(w))
        assert chebyshev_contraction(w, k) == pytest.approx(contraction, rel=1e-8)
        assert chebyshev_contraction(w, k) <= rho(w) ** k + 1e-12


@pytest.mark.parametrize("graph", CONNECTED.values(), ids=CONNECTED)
def test_the_mean_is_exact_after_the_distinct_eigenvalues_and_not_before(graph: Graph) -> None:
    laplacian = nx.laplacian_matrix(graph.networkx, weight=None).toarray().astype(float)
    values = [v for v in np.linalg.eigvalsh(laplacian) if v > 1e-9]
    distinct = [values[0], *(b for a, b in pairwise(values) if b - a > 1e-6)]
    assert exact_in(graph) == len(distinct)
    mean = np.eye(graph.num_peers)
    for value in distinct[:-1]:
        mean = mean @ (np.eye(graph.num_peers) - laplacian / value)
    assert not np.allclose(mean, 1 / graph.num_peers, atol=1e-3)
    mean = mean @ (np.eye(graph.num_peers) - laplacian / distinct[-1])
    assert np.allclose(mean, 1 / graph.num_peers, atol=1e-9)


def test_large_matrices_are_checked_too() -> None:
    given_matrix(np.full((1000, 1000), 1 / 1000).tolist())
    assert rho(matrix(complete(300), uniform)) == 0


def test_the_expected_profile_is_relative_to_the_ring_under_the_same_mixing() -> None:
    for mixing in MIXINGS.values():
        assert expected_profile(ring(9), mixing) == pytest.approx(1)
        ratio = expected_consensus(matrix(line(9), mixing)) / expected_consensus(matrix(ring(9), mixing))
        assert expected_profile(line(9), mixing) == pytest.approx(ratio)
    assert expected_profile(ring(3), metropolis) == 1
    assert expected_profile(line(3), metropolis) == math.inf
    assert expected_profile(ring(3), lazy) == 1


def test_the_expected_profile_of_a_given_matrix_is_relative_to_the_ring_under_metropolis() -> None:
    graph, mixing = from_matrix(CIRCLE)
    expected = expected_consensus(np.array(CIRCLE)) / expected_consensus(matrix(ring(7), metropolis))
    assert expected_profile(graph, mixing) == pytest.approx(expected)


def test_a_given_matrix_keeps_the_mean_when_a_neighbour_is_absent() -> None:
    graph, mixing = from_matrix(CIRCLE)
    left = graph.among({0, 1, 2})
    check_weights(matrix(left, mixing), left)


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
        ([[0.5, 0.5], [0.5, 0.6]], "row 1 sums to 1.1; every row must sum to 1"),
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
    with pytest.raises(UserError, match="swap for ever"):
        given_matrix(rows)


@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize("name", ["ring", "star", "random_regular", "torus", "hypercube", "complete"])
def test_rho_by_lanczos_is_that_of_the_matrix(name: str, mixing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = GRAPHS[name](256)
    expected = rho(matrix(graph, MIXINGS[mixing]))
    assert rho_on(graph, MIXINGS[mixing]) == expected
    large = Graph(256, graph.edges)
    for module in (graphs, mixings):
        monkeypatch.setattr(module, "DENSE", 100)
    assert rho_on(large, MIXINGS[mixing]) == pytest.approx(expected, abs=1e-9)
    assert math.isnan(expected_consensus_on(large, MIXINGS[mixing]))
    assert math.isnan(expected_profile(large, MIXINGS[mixing]))
    assert expected_consensus_on(GRAPHS[name](64), MIXINGS[mixing]) == expected_consensus(
        matrix(GRAPHS[name](64), MIXINGS[mixing])
    )


def test_of_many_peers_who_do_not_all_talk_rho_is_one() -> None:
    assert rho_on(GRAPHS["none"](3000), MIXINGS["metropolis"]) == 1.0


def test_what_lanczos_does_not_find_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MATRIX", 3000)
    found = rho_on(GRAPHS["ring"](3000), MIXINGS["metropolis"])
    assert math.isnan(found) and math.isnan(rounds_at(found))


def test_the_gap_of_a_ring_of_thousands_is_that_of_the_formula() -> None:
    """1 - (1 + 2 cos(2 pi / n)) / 3."""
    expected = 2 / 3 * (1 - math.cos(2 * math.pi / 3000))
    assert 1 - rho_on(GRAPHS["ring"](3000), MIXINGS["metropolis"]) == pytest.approx(expected, rel=1e-6)
