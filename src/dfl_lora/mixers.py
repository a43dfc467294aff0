"""Mixers: how W is applied in a round. A mixer makes polynomials of the one exchange it is given.

    plain           W x                                                        one exchange
    exact           the mean of all, over a complete graph: the server's average, as a reference
    chebyshev(k)    T_k(W / rho) / T_k(1 / rho) x, of all polynomials of degree k with p(1) = 1 the one that is smallest
                    on [-rho, rho]:  y_1 = W x,  y_(j+1) = y_(j-1) + omega_j (W y_j - y_(j-1)),  with a_0 = 1,
                    a_1 = 1 / rho,  a_(j+1) = 2 a_j / rho - a_(j-1),  omega_j = 2 a_j / (rho a_(j+1))     k exchanges
    finite_time     prod_m (W - mu_m I) / (1 - mu_m) x over the eigenvalues mu_m of W but 1: the mean itself; those of
                    W and not of L, so that any mixing will do (mixing: laplacian takes `mixing.exact_in` exchanges)
    closing         plain, and after the last round as many Chebyshev exchanges as bring peers to 1e-6 of their distance
    gossip_pga(h)   plain, and every h rounds the same (Gossip-PGA, arXiv 2105.09080, whose mean is a server's)
    relay_sum       the mean of all, those at distance d as they were d - 1 rounds ago: see `RelaySum`   one exchange

All but the last keep the mean, whatever messages are lost: each is a sum of flows that cancel, times a polynomial with
p(1) = 1. rho and the eigenvalues are those of the recipe's graph; where edges fail peers agree a little less.
Roots of finite_time are taken in Leja's order, each the furthest from those before, so that what is in between stays
small. Noise in an exchange is amplified all the same: by up to 25-100 from 16 peers on, so that it is for 10 at most.

Sources: Chebyshev, e.g. Scaman et al. 2017, arXiv 1702.08704; finite time, Sundaram and Hadjicostis 2007; RelaySum,
Vogels et al. 2021, arXiv 2110.04175. Checked are the contractions and exactness of the first two (tests/test_mixers.py)
and the delays of the last (tests/laws/test_relay_sum.py).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

import networkx as nx
import numpy as np

from dfl_lora.choices import Positive
from dfl_lora.errors import UserError
from dfl_lora.graphs import Graph
from dfl_lora.mixing import ROUNDING, Mixing, eigenvalues, matrix, rho_on

if TYPE_CHECKING:
    from dfl_lora.tensors import Tensors

Values = Mapping[int, "Tensors"]
Exchange = Callable[[Values, int], Values]
"""(values of the hosted peers, number of the exchange within the round) -> combined values: one W x."""
Kept = Mapping[int, Mapping[str, "Tensors"]]
"""What a mixer keeps of each peer from round to round, by name."""
AGREED = 1e-6
"""What is left of peers' distances where a mixer is to bring them to agreement."""
MOST_EXACT = 10
"""Peers, above which finite_time is refused."""


class Mixer(Protocol):
    """(values, exchange, round, what it keeps) -> mixed values; `memory` names the peer's own vectors that it keeps."""

    @property
    def memory(self) -> Sequence[str]: ...

    def __call__(self, values: Values, exchange: Exchange, t: int, kept: Kept) -> Values: ...


@dataclass(frozen=True)
class Forgetful:
    """A mixer of what comes in a round alone."""

    mix: Callable[[Values, Exchange, int], Values]
    memory: Sequence[str] = ()

    def __call__(self, values: Values, exchange: Exchange, t: int, kept: Kept) -> Values:
        return self.mix(values, exchange, t)


once = Forgetful(lambda values, exchange, t: exchange(values, 0))
"""W x."""


def plain(graph: Graph, mixing: Mixing, rounds: int) -> Mixer:
    """W x: one exchange."""
    return once


def exact(graph: Graph, mixing: Mixing, rounds: int) -> Mixer:
    """The mean of all in one exchange, everybody to everybody: what a server would do, as a reference."""
    return once


def chebyshev(graph: Graph, mixing: Mixing, rounds: int, *, k: Positive = 3) -> Mixer:
    """The best polynomial of k exchanges: it contracts far more than k plain ones."""
    return accelerated(known_rho(graph, mixing), k)


def known_rho(graph: Graph, mixing: Mixing) -> float:
    """Returns rho of W; raises where it could not be found."""
    rho = rho_on(graph, mixing)
    if math.isnan(rho):
        raise UserError(
            f"The rho of W on this graph of {graph.num_peers} peers was not found, since they agree too slowly, and "
            "the mixer needs it; use a graph with more edges, or mixer plain."
        )
    return rho


def accelerated(rho: float, k: int) -> Forgetful:
    """Returns Chebyshev's polynomial of degree k for eigenvalues in [-rho, rho]."""
    if rho == 0 or k == 1:
        return once

    def mix(values: Values, exchange: Exchange, t: int) -> Values:
        """The terms are ratios a_(j-1) / a_j, since a_j itself grows without bound."""
        before, now, ratio = values, exchange(values, 0), rho
        for j in range(1, k):
            ratio = 1.0 / (2.0 / rho - ratio)
            before, now = now, between(before, exchange(now, j), 2.0 * ratio / rho)
        return now

    return Forgetful(mix)


def between(first: Values, second: Values, share: float) -> Values:
    """Returns first + share (second - first)."""
    return {i: v.with_flat(v.flat + share * (second[i].flat - v.flat)) for i, v in first.items()}


def finite_time(graph: Graph, mixing: Mixing, rounds: int) -> Mixer:
    """The mean of all in as many exchanges as W has different eigenvalues besides 1; up to 10 peers."""
    roots = leja(eigenvalues(matrix(graph, mixing))[1:].tolist())

    def mix(values: Values, exchange: Exchange, t: int) -> Values:
        """(W y - mu y) / (1 - mu) = y + (W y - y) / (1 - mu)."""
        for j, root in enumerate(roots):
            values = between(values, exchange(values, j), 1.0 / (1.0 - root))
        return values

    return Forgetful(mix)


def leja(roots: list[float]) -> list[float]:
    """Returns the different roots, the largest first, each next one the furthest (by product) from those before."""
    left, ordered = list[float](), list[float]()
    for root in sorted(roots, key=lambda r: -abs(r)):
        if all(abs(root - other) > ROUNDING for other in left):
            left.append(root)
    while left:
        best = max(left, key=lambda r: float(np.prod([abs(r - o) for o in ordered])) if ordered else abs(r))
        left.remove(best)
        ordered.append(best)
    return ordered


def agreement(graph: Graph, mixing: Mixing) -> Forgetful:
    """Returns Chebyshev's polynomial of the degree that leaves AGREED of distances; plain if peers never agree."""
    rho = known_rho(graph, mixing)
    if not 0 < rho < 1:
        return once
    return accelerated(rho, math.ceil(math.acosh(1.0 / AGREED) / math.acosh(1.0 / rho)))


def closing(graph: Graph, mixing: Mixing, rounds: int) -> Mixer:
    """W x in every round but the last, which ends with peers that agree to 1e-6 of how far apart they were."""
    last = agreement(graph, mixing)
    return Forgetful(lambda values, exchange, t: (last if t == rounds else once).mix(values, exchange, t))


def gossip_pga(graph: Graph, mixing: Mixing, rounds: int, *, every: Positive = 6) -> Mixer:
    """W x, and every so many rounds agreement on the mean of all, to 1e-6."""
    mean = agreement(graph, mixing)
    return Forgetful(lambda values, exchange, t: (once if t % every else mean).mix(values, exchange, t))


@dataclass(frozen=True)
class RelaySum:
    """Sums go along a tree, each neighbour's without what came from the peer itself, so that everybody counts once.

        m_ij(t) = x_i(t) + sum over neighbours k but j of m_ki(t - 1)           what i tells j in round t
        x_i+    = ((n - c_i) x_i(t) + M_i(t)) / n,   M_i = sum_j m_ji,  c_i = how many peers that sum is of

    Here every peer says one value to all its neighbours, S_i(t) = x_i(t) + M_i(t - 1); since m_ij(t) is S_i(t) without
    m_ji(t - 1), M_i(t) = sum_j S_j(t) - d_i S_i(t - 1) + M_i(t - 2), with d_i neighbours. What is lost of a sum is
    missing ever after, so every message has to come. The mean of peers is not kept: they agree on the mean of values
    that are some rounds old, and where these stay, on the mean of all. W has a 1 for every edge (`mixing.sums`).
    """

    graph: Graph
    memory: Sequence[str] = ("relay_sent", "relay_now", "relay_before")

    def __call__(self, values: Values, exchange: Exchange, t: int, kept: Kept) -> Values:
        """Returns x+, and moves S(t - 1), M(t - 1) and M(t - 2), which are kept, on; raises where x is not finite."""
        mixed, n, others = dict(values), self.graph.num_peers, reached(self.graph, t)
        old = {
            i: [kept[i][name].select(v.layout.roles).flat.clone() for name in self.memory] for i, v in values.items()
        }
        sums = {i: v.with_flat(v.flat + old[i][1]) for i, v in values.items()}
        for i in (i for i, v in sums.items() if not v.is_finite()):
            raise UserError(
                f"Peer {i} has numbers that are not finite in round {t}, and mixer relay_sum can leave out no part of "
                "a sum; lower train.learning_rate, or use mixer plain, under which such a peer is left alone."
            )
        for i, exchanged in exchange(sums, 0).items():
            (sent, now, before), x, said = old[i], values[i].flat, sums[i].flat
            news = exchanged.flat - said + self.graph.degree(i) * (said - sent) + before
            mixed[i] = values[i].with_flat(x + (news - others[i] * x) / n)
            for name, moved in zip(self.memory, (said, news, now), strict=True):
                kept[i][name].assign(values[i].layout.roles, values[i].with_flat(moved))
        return mixed


@lru_cache(maxsize=1)
def reached(graph: Graph, t: int) -> Sequence[int]:
    """Returns of how many other peers the sum is that each has in round t, on a tree: of those at most t away."""
    edges, degrees = nx.adjacency_matrix(graph.networkx, weight=None), [graph.degree(i) for i in range(graph.num_peers)]
    before = now = sent = np.zeros(graph.num_peers, dtype=np.int64)
    for _ in range(t):  # the recursion of the sums, of ones
        told = 1 + now
        before, now, sent = now, edges @ told - degrees * sent + before, told
        if (now == graph.num_peers - 1).all():
            break
    found: list[int] = now.tolist()
    return found


def relay_sum(graph: Graph, mixing: Mixing, rounds: int) -> Mixer:
    """The mean of all, of those far away as they were some rounds ago; on trees, one exchange."""
    return RelaySum(graph)


MIXERS: Mapping[str, Callable[..., Mixer]] = {
    "plain": plain,
    "exact": exact,
    "chebyshev": chebyshev,
    "finite_time": finite_time,
    "closing": closing,
    "gossip_pga": gossip_pga,
    "relay_sum": relay_sum,
}
