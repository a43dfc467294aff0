"""What a topology and its weights predict before a run: how fast peers agree, and how far apart they will stay.

Where the graph is the same in every round it is what `mixing` says of W. Where it changes, with W_t that of round t and
m the number of rounds that are looked at, a cycle of them or some that are drawn,

    rho                 ||W_m ... W_1 - 11'/n||^(1/m), the factor of one round on average
    exact in            the first t with W_t ... W_1 = 11'/n
    expected consensus  the root of the mean of tr S_t, S_t = W_t (S_(t-1) + I - 11'/n) W_t from S_0 = 0: each round
                        adds independent unit noise at every peer and then mixes, as for one W. Of a cycle the second
                        time through it is meant, of drawn rounds the second half

Limits: of a cycle that is not exact, and of drawn rounds that mix slowly, S is still growing then.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from dfl_lora import mixing
from dfl_lora.graphs import Edge, Graph
from dfl_lora.mixing import ROUNDING, Matrix, Mixing
from dfl_lora.topologies import Topology

MOST_CHANGING = 1000
"""Peers, above which the products of changing W are not computed: some seconds."""


@dataclass(frozen=True)
class Outlook:
    """What is predicted; nan is what is not known: of so many peers, or of `mixing.sums`, which do not mix alone."""

    num_rounds: int
    """Those that were looked at: 1, a cycle, or some that are drawn."""
    edges: tuple[Edge, ...]
    """Who talks to whom in any of them."""
    messages: float
    """Of a round, on average."""
    rho: float
    exact_in: float
    """Rounds of plain gossip; inf: never, or not in those that were looked at."""
    rounds_to_a_thousandth: float
    expected_consensus: float
    expected_profile: float
    """Relative to the ring of as many peers."""


@lru_cache(maxsize=2)
def outlook(topology: Topology, weights: Mixing) -> Outlook:
    """Returns what is predicted of a topology under a mixing."""
    if topology.changes:
        return of_changing(topology, weights)
    graph = topology(1)
    if weights is mixing.sums:
        edges = tuple(sorted(graph.edges))
        return Outlook(1, edges, mixing.messages(graph), math.nan, math.nan, math.nan, math.nan, math.nan)
    shrinks = mixing.rho_on(graph, weights)
    return Outlook(
        1,
        tuple(sorted(graph.edges)),
        mixing.messages(graph),
        shrinks,
        1 if shrinks == 0 else math.inf,
        mixing.rounds_at(shrinks),
        mixing.expected_consensus_on(graph, weights),
        mixing.expected_profile(graph, weights),
    )


def of_changing(topology: Topology, weights: Mixing) -> Outlook:
    """Returns what is predicted where the graph changes, from one look at each round."""
    looked_at, n = topology.num_looked_at, topology.num_peers
    edges, messages, seen = set[Edge](), 0, Seen.of(n) if n <= MOST_CHANGING else None
    for t in range(1, looked_at * (2 if topology.cycle else 1) + 1):
        graph = topology(t)
        if t <= looked_at:
            edges |= graph.edges
            messages += mixing.messages(graph)
        if seen is not None:
            seen.round(graph, weights)
    exact = seen.gone_in if seen and topology.cycle else math.inf
    shrinks = math.nan if seen is None else 0.0 if exact < math.inf else seen.rho(looked_at)
    expected = math.nan if seen is None else seen.expected_consensus(shrinks)
    thousandth = exact if exact < math.inf else mixing.rounds_at(shrinks)
    profile = mixing.relative_to_ring(expected, n, weights)
    return Outlook(looked_at, tuple(sorted(edges)), messages / looked_at, shrinks, exact, thousandth, expected, profile)


@dataclass
class Seen:
    """The rounds so far: their product less 11'/n, and the covariance S of peers to whom each round adds unit noise."""

    apart: Matrix
    left: Matrix
    spread: Matrix
    traces: list[float]
    gone_in: float = math.inf
    """The round after which nothing is left of the product; `left` is that of the round before."""

    @staticmethod
    def of(num_peers: int) -> "Seen":
        apart = np.eye(num_peers) - 1.0 / num_peers
        return Seen(apart, apart, np.zeros_like(apart), [])

    def round(self, graph: Graph, weights: Mixing) -> None:
        """Adds a round; W is symmetric, and sparse for the products."""
        from scipy.sparse import csr_array

        w = csr_array(mixing.matrix(graph, weights))
        self.spread = w @ (w @ (self.spread + self.apart)).T
        self.traces.append(float(np.trace(self.spread)))
        if self.gone_in == math.inf:
            left = w @ self.left
            if np.abs(left).max() < ROUNDING:
                self.gone_in = len(self.traces)
            else:
                self.left = left

    def rho(self, num_rounds: int) -> float:
        """Returns the factor of a round on average: over all, or over those after which something was left."""
        rounds = min(num_rounds, self.gone_in - 1)
        value = float(np.linalg.norm(self.left, 2)) ** (1.0 / rounds) if rounds else 0.0
        return 1.0 if value > 1 - ROUNDING else value

    def expected_consensus(self, shrinks: float) -> float:
        return math.inf if shrinks == 1 else math.sqrt(np.mean(self.traces[len(self.traces) // 2 :]))
