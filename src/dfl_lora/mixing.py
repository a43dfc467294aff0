"""Mixing matrices: the weights of a neighbourhood, and what W predicts before a run.

A peer needs only its `Row`: weights over itself and its neighbours, summing to one. The whole W exists
for analysis and plots. Metropolis-Hastings: w_ij = 1 / (max(d_i, d_j) + 1) on edges, w_ii the rest
(Xiao, Boyd, Kim 2007): symmetric, doubly stochastic, and local, since degrees of neighbours suffice.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dfl_lora.errors import UserError
from dfl_lora.graphs import Graph

Matrix = NDArray[np.float64]
TOLERANCE = 1e-6


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


MIXINGS: dict[str, Mixing] = {"metropolis": metropolis}


def matrix(graph: Graph, mixing: Mixing) -> Matrix:
    """Returns W [n, n] of a graph, for analysis."""
    w = np.zeros((graph.num_peers, graph.num_peers))
    for i in range(graph.num_peers):
        row = mixing(graph, i)
        w[i, i] = row.own
        for j, weight in row.weights.items():
            w[i, j] = weight
    return w


def from_matrix(rows: Sequence[Sequence[float]]) -> tuple[Graph, Mixing]:
    """Returns the graph and the mixing of a given W: square, symmetric, doubly stochastic to 1e-6, connected."""
    n = len(rows)
    if n == 0 or any(len(row) != n for row in rows):
        raise UserError(f"The matrix has {n} rows of {sorted({len(r) for r in rows})} numbers; it must be square.")
    w = np.asarray(rows, dtype=np.float64)
    if not np.isfinite(w).all() or (w < 0).any():
        raise UserError("The matrix holds negative or non-finite weights; every weight must be between 0 and 1.")
    if not np.allclose(w, w.T, rtol=0, atol=TOLERANCE):
        i, j = np.unravel_index(np.abs(w - w.T).argmax(), w.shape)
        raise UserError(f"The matrix is not symmetric: W[{i},{j}] = {w[i, j]:g} but W[{j},{i}] = {w[j, i]:g}.")
    sums = w.sum(axis=1)
    if not np.allclose(sums, 1.0, rtol=0, atol=TOLERANCE):
        worst = int(np.abs(sums - 1).argmax())
        raise UserError(f"The matrix is not stochastic: row {worst} sums to {sums[worst]:g}, and every row must to 1.")
    graph = Graph.of(n, [(i, j) for i in range(n) for j in range(i) if w[i, j] > 0])
    if n > 1 and rho(w) > 1 - TOLERANCE:
        raise UserError("Under this matrix peers swap for ever and never agree; use (I + W) / 2 instead.")

    def given(graph: Graph, peer: int) -> Row:
        return Row(peer, {j: float(w[peer, j]) for j in graph.neighbours(peer)})

    return graph, given


def eigenvalues(w: Matrix) -> NDArray[np.floating]:
    """Returns the eigenvalues of a symmetric W, largest modulus first; the first is 1."""
    values = np.linalg.eigvalsh(w)
    return values[np.argsort(-np.abs(values))]


def rho(w: Matrix) -> float:
    """Returns ||W - 11'/n||_2, the factor by which one exchange shrinks disagreement; the gap is 1 - rho."""
    return float(np.abs(np.linalg.eigvalsh(w - 1.0 / len(w))).max())


def expected_consensus(w: Matrix) -> float:
    """Returns sqrt(sum_k lambda_k^2 / (1 - lambda_k^2)) over the eigenvalues but the first.

    The stationary disagreement of gossip when each round adds independent unit noise at every peer and
    then mixes. Only ratios between graphs mean anything: they are the expected consensus profile.
    """
    squares = eigenvalues(w)[1:] ** 2
    return float(np.sqrt((squares / (1.0 - squares)).sum()))
