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

All of them keep the mean, whatever messages are lost: each is a sum of flows that cancel, times a polynomial with
p(1) = 1. rho and the eigenvalues are those of the recipe's graph; where edges fail peers agree a little less.
Roots of finite_time are taken in Leja's order, each the furthest from those before, so that what is in between stays
small. Noise in an exchange is amplified all the same: by up to 25-100 from 16 peers on, so that it is for 10 at most.

Sources: Chebyshev, e.g. Scaman et al. 2017, arXiv 1702.08704; finite time, Sundaram and Hadjicostis 2007. Checked are
the contractions and exactness of both (tests/test_mixers.py).
"""

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

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
Mixer = Callable[[Values, Exchange, int], Values]
"""(values, exchange, round) -> mixed values."""
AGREED = 1e-6
"""What is left of peers' distances where a mixer is to bring them to agreement."""
MOST_EXACT = 10
"""Peers, above which finite_time is refused."""


def once(values: Values, exchange: Exchange, t: int) -> Values:
    """Returns W x."""
    return exchange(values, 0)


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


def accelerated(rho: float, k: int) -> Mixer:
    """Returns Chebyshev's polynomial of degree k for eigenvalues in [-rho, rho]."""
    if rho == 0 or k == 1:
        return once

    def mixer(values: Values, exchange: Exchange, t: int) -> Values:
        """The terms are ratios a_(j-1) / a_j, since a_j itself grows without bound."""
        before, now, ratio = values, exchange(values, 0), rho
        for j in range(1, k):
            ratio = 1.0 / (2.0 / rho - ratio)
            before, now = now, between(before, exchange(now, j), 2.0 * ratio / rho)
        return now

    return mixer


def between(first: Values, second: Values, share: float) -> Values:
    """Returns first + share (second - first)."""
    return {i: v.with_flat(v.flat + share * (second[i].flat - v.flat)) for i, v in first.items()}


def finite_time(graph: Graph, mixing: Mixing, rounds: int) -> Mixer:
    """The mean of all in as many exchanges as W has different eigenvalues besides 1; up to 10 peers."""
    roots = leja(eigenvalues(matrix(graph, mixing))[1:].tolist())

    def mixer(values: Values, exchange: Exchange, t: int) -> Values:
        """(W y - mu y) / (1 - mu) = y + (W y - y) / (1 - mu)."""
        for j, root in enumerate(roots):
            values = between(values, exchange(values, j), 1.0 / (1.0 - root))
        return values

    return mixer


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


def agreement(graph: Graph, mixing: Mixing) -> Mixer:
    """Returns Chebyshev's polynomial of the degree that leaves AGREED of distances; plain if peers never agree."""
    rho = known_rho(graph, mixing)
    if not 0 < rho < 1:
        return once
    return accelerated(rho, math.ceil(math.acosh(1.0 / AGREED) / math.acosh(1.0 / rho)))


def closing(graph: Graph, mixing: Mixing, rounds: int) -> Mixer:
    """W x in every round but the last, which ends with peers that agree to 1e-6 of how far apart they were."""
    last = agreement(graph, mixing)
    return lambda values, exchange, t: (last if t == rounds else once)(values, exchange, t)


def gossip_pga(graph: Graph, mixing: Mixing, rounds: int, *, every: Positive = 6) -> Mixer:
    """W x, and every so many rounds agreement on the mean of all, to 1e-6."""
    mean = agreement(graph, mixing)
    return lambda values, exchange, t: (once if t % every else mean)(values, exchange, t)


MIXERS: Mapping[str, Callable[..., Mixer]] = {
    "plain": plain,
    "exact": exact,
    "chebyshev": chebyshev,
    "finite_time": finite_time,
    "closing": closing,
    "gossip_pga": gossip_pga,
}
