"""Mixing matrices: the weights of a neighbourhood, and what W predicts before a run.

A peer needs only its `Row`: weights over itself and its neighbours, summing to one. The whole W exists
for analysis and plots. Every W here is symmetric and doubly stochastic, so gossip keeps the mean, and has
a positive diagonal, so on a connected graph peers agree in the end.

With d_i the degree of peer i, L = D - A the Laplacian of the graph, on an edge between i and j
  metropolis  w_ij = 1 / (max(d_i, d_j) + 1)       needs the neighbours' degrees only (Xiao, Boyd, Lall 2005)
  laplacian   W = I - 2 L / (3 lambda_max(L))      needs the whole graph
  max_degree  w_ij = 1 / (d_max + 1)               needs the largest degree of the graph
  uniform     w_ij = 1 / n                         needs the number of peers; slow on sparse graphs
  lazy        W = (I + W_metropolis) / 2           no eigenvalue below 0
and w_ii is the rest. The average over the neighbourhood, w_ij = 1 / (d_i + 1), is no row of the table: it
keeps the mean on regular graphs only, and there it is metropolis.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dfl_lora.errors import UserError
from dfl_lora.graphs import DENSE, Graph, extreme, ring, square

Matrix = NDArray[np.float64]
TOLERANCE = 1e-6
"""By how much the weights of a given matrix may be off."""
ROUNDING = 1e-10
"""Eigenvalues of W and ratios of eigenvalues of L that are closer than this are equal."""


@dataclass(frozen=True)
class Row:
    """The weights of one peer: `weights[j]` for each neighbour j, in the order of ids; the rest is its own."""

    peer: int
    weights: Mapping[int, float]

    @property
    def own(self) -> float:
        return 1.0 - sum(self.weights.values())


Mixing = Callable[[Graph, int], Row]
"""A graph and a peer give the peer's row."""


def metropolis(graph: Graph, peer: int) -> Row:
    """Returns w_ij = 1 / (max(d_i, d_j) + 1) for each neighbour j."""
    degree = graph.degree(peer)
    return Row(peer, {j: 1.0 / (max(degree, graph.degree(j)) + 1) for j in graph.neighbours(peer)})


def laplacian(graph: Graph, peer: int) -> Row:
    """Returns the row of I - 2 L / (3 lambda_max), whose eigenvalues lie between 1/3 and 1."""
    largest = graph.largest_laplacian_eigenvalue
    return Row(peer, {j: 2.0 / (3.0 * largest) for j in graph.neighbours(peer)})  # noqa: C420 - 0 without neighbours


def max_degree(graph: Graph, peer: int) -> Row:
    """Returns w_ij = 1 / (d_max + 1) for each neighbour j, d_max the largest degree of the graph."""
    return Row(peer, dict.fromkeys(graph.neighbours(peer), 1.0 / (graph.max_degree + 1)))


def uniform(graph: Graph, peer: int) -> Row:
    """Returns w_ij = 1 / n for each neighbour j; the weight of those who are no neighbours is the peer's own."""
    return Row(peer, dict.fromkeys(graph.neighbours(peer), 1.0 / graph.num_peers))


def sums(graph: Graph, peer: int) -> Row:
    """Returns w_ij = 1: W x is x_i + sum_j (x_j - x_i), of which `mixers.RelaySum` takes the sum of the neighbours."""
    return Row(peer, dict.fromkeys(graph.neighbours(peer), 1.0))


def lazy(graph: Graph, peer: int) -> Row:
    """Returns the row of (I + W) / 2, W of metropolis: half the weights."""
    return Row(peer, {j: weight / 2 for j, weight in metropolis(graph, peer).weights.items()})


def own(graph: Graph, peer: int) -> Row:
    """Returns the weights that the graph brings itself."""
    return Row(peer, {j: graph.weight[min(peer, j), max(peer, j)] for j in graph.neighbours(peer)})


MIXINGS: Mapping[str, Mixing] = {
    "metropolis": metropolis,
    "laplacian": laplacian,
    "max_degree": max_degree,
    "uniform": uniform,
    "lazy": lazy,
}


def matrix(graph: Graph, mixing: Mixing) -> Matrix:
    """Returns W [n, n] of a graph, for analysis."""
    w = np.zeros((graph.num_peers, graph.num_peers))
    for i in range(graph.num_peers):
        row = mixing(graph, i)
        w[i, i] = row.own
        for j, weight in row.weights.items():
            w[i, j] = weight
    return w


def given(rows: Sequence[Sequence[float]]) -> Mixing:
    """Returns the mixing of a given W: square, symmetric, doubly stochastic to 1e-6, no eigenvalue -1.

    That its graph is connected is checked where the graph is made.
    """
    w = square(rows)
    if not np.isfinite(w).all() or (w < 0).any():
        raise UserError("The matrix holds negative or non-finite weights; every weight must be between 0 and 1.")
    if not np.allclose(w, w.T, rtol=0, atol=TOLERANCE):
        i, j = np.unravel_index(np.abs(w - w.T).argmax(), w.shape)
        raise UserError(f"The matrix is not symmetric: W[{i},{j}] = {w[i, j]:g} but W[{j},{i}] = {w[j, i]:g}.")
    sums = w.sum(axis=1)
    if not np.allclose(sums, 1.0, rtol=0, atol=TOLERANCE):
        worst = int(np.abs(sums - 1).argmax())
        raise UserError(f"The matrix is not stochastic: row {worst} sums to {sums[worst]:g}; every row must sum to 1.")
    if np.linalg.eigvalsh(w)[0] < TOLERANCE - 1:
        raise UserError("Under this matrix peers swap for ever and never agree; use (I + W) / 2 instead.")

    def mixing(graph: Graph, peer: int) -> Row:
        """The weights of the matrix; those of absent neighbours are the peer's own."""
        return Row(peer, {j: float(w[peer, j]) for j in graph.neighbours(peer)})

    return mixing


def eigenvalues(w: Matrix) -> NDArray[np.floating]:
    """Returns the eigenvalues of a symmetric W, largest modulus first; the first is 1."""
    values = np.linalg.eigvalsh(w)
    return values[np.argsort(-np.abs(values))]


def rho(w: Matrix) -> float:
    """Returns ||W - 11'/n||_2, the factor by which one exchange shrinks disagreement: 0 at once, 1 never."""
    value = float(np.abs(np.linalg.eigvalsh(w - 1.0 / len(w))).max())
    return 1.0 if value > 1 - ROUNDING else 0.0 if value < ROUNDING else value


def gap(w: Matrix) -> float:
    """Returns the spectral gap 1 - rho."""
    return 1.0 - rho(w)


def rho_on(graph: Graph, mixing: Mixing) -> float:
    """Returns rho of W on a graph; of more than DENSE peers by Lanczos, without W, and nan where it does not converge.

    What sums over all eigenvalues (`expected_consensus`, `expected_drift`) is not known of so many peers.
    """
    n = graph.num_peers
    if n <= DENSE:
        return rho(matrix(graph, mixing))
    if not graph.connected:
        return 1.0
    rows = [mixing(graph, i) for i in range(n)]
    own = np.array([row.own for row in rows], dtype=np.float64)
    weights = np.array([weight for row in rows for weight in row.weights.values()])
    others = np.array([j for row in rows for j in row.weights], dtype=np.int64)
    starts = np.cumsum([0, *(len(row.weights) for row in rows)])

    def shrunk(v: NDArray[np.float64]) -> NDArray[np.float64]:
        """Returns (W - 11'/n) v."""
        apart = v - v.mean()
        from_others: NDArray[np.float64] = np.add.reduceat(weights * apart[others], starts[:-1])
        mixed: NDArray[np.float64] = own * apart + from_others
        return mixed

    value = abs(extreme(shrunk, n, "LM"))
    return 1.0 if value > 1 - ROUNDING else 0.0 if value < ROUNDING else value


def rounds_to(w: Matrix, share: float = 1e-3) -> float:
    """Returns the smallest k >= 1 with rho^k <= share: rounds of plain gossip; inf where peers never agree."""
    return rounds_at(rho(w), share)


def rounds_at(shrinks: float, share: float = 1e-3) -> float:
    """Returns `rounds_to` of a known rho; nan where it is not known."""
    if math.isnan(shrinks):
        return math.nan
    if shrinks == 1:
        return math.inf
    return max(1, math.ceil(math.log(share) / math.log(shrinks))) if shrinks else 1


def chebyshev_contraction(w: Matrix, k: int) -> float:
    """Returns 1 / T_k(1 / rho), by which the best polynomial of k exchanges shrinks disagreement; plain is rho^k.

    T_k(x) = cosh(k arcosh x) is Chebyshev's polynomial; of all p of degree k with p(1) = 1, T_k(x / rho) / T_k(1 / rho)
    is the smallest on [-rho, rho].
    """
    shrinks = rho(w)
    angle = k * math.acosh(1.0 / shrinks) if shrinks else math.inf
    return 2.0 * math.exp(-angle) / (1.0 + math.exp(-2.0 * angle))


def exact_in(graph: Graph) -> float:
    """Returns the number m of distinct non-zero eigenvalues of L: prod_k (I - L / lambda_k) is the mean in m exchanges.

    No fewer will do: a polynomial in L that is the mean has all of them as roots. inf where peers never agree.
    """
    values = graph.laplacian_eigenvalues
    return int((np.diff(values) > ROUNDING * values[-1]).sum()) if graph.connected else math.inf


def messages(graph: Graph) -> int:
    """Returns the messages of a round, sum_i d_i: one each way over every edge."""
    return 2 * len(graph.edges)


def expected_consensus(w: Matrix) -> float:
    """Returns sqrt(sum_k lambda_k^2 / (1 - lambda_k^2)) over the eigenvalues but the first; inf if peers never agree.

    The stationary disagreement of gossip when each round adds independent unit noise at every peer and
    then mixes. Only ratios between graphs mean anything: they are the expected consensus profile.
    """
    values = np.abs(eigenvalues(w)[1:])
    if (values > 1 - ROUNDING).any():
        return math.inf
    squares = values[values > ROUNDING] ** 2
    return float(np.sqrt((squares / (1.0 - squares)).sum()))


def expected_drift(w: Matrix) -> float:
    """Returns sqrt(sum_k lambda_k^2 / (1 - lambda_k)^2) over the eigenvalues but the first; inf if peers never agree.

    The stationary disagreement where every peer is pulled in a direction of its own that stays the same, as by skewed
    data, and then mixes: each mode adds up to lambda / (1 - lambda) of its pull. Again only ratios mean anything.
    """
    values = eigenvalues(w)[1:]
    if (np.abs(values) > 1 - ROUNDING).any():
        return math.inf
    return float(np.sqrt((values**2 / (1.0 - values) ** 2).sum()))


def expected_consensus_on(graph: Graph, mixing: Mixing) -> float:
    """Returns the expected consensus of W on a graph; nan, not known, of more than DENSE peers."""
    return expected_consensus(matrix(graph, mixing)) if graph.num_peers <= DENSE else math.nan


def expected_profile(graph: Graph, mixing: Mixing) -> float:
    """Returns the expected consensus relative to that of the ring of as many peers under the same mixing.

    A given W is compared with the ring under metropolis. Where the ring agrees at once (up to 3 peers under
    metropolis), the ratio is 1 if this graph does so too, else inf. Of more than DENSE peers it is nan, not known.
    """
    return relative_to_ring(expected_consensus_on(graph, mixing), graph.num_peers, mixing)


def relative_to_ring(expected: float, num_peers: int, mixing: Mixing) -> float:
    """Returns an expected consensus relative to the ring's."""
    if math.isnan(expected):
        return math.nan
    on_ring = mixing if mixing in MIXINGS.values() else metropolis
    reference = expected_consensus(matrix(ring(num_peers), on_ring))
    return expected / reference if reference else (math.inf if expected else 1.0)
