"""Combining in product space: what a neighbourhood agrees on is the product B A, which is all that a model sees.

Averaging A and B apart gives B_bar A_bar and not the mean product P = sum_j w_j B_j A_j, the own one (w_i) included.

    product  the best factors of P of the own rank r, turned towards the own A. P is never formed: with the thin factors
             [w_1 B_1 ... w_k B_k] = Q_b R_b and [A_1' ... A_k'] = Q_a R_a, P = Q_b (R_b R_a') Q_a', whose core is
             [k r, k r]; its truncated SVD U S V' gives A+ = t R V' and B+ = U S R' / t, with t = ||A_i||_F / sqrt(r)
             and R the rotation that brings A+ nearest to A_i (Procrustes), since Adam's moments belong to these
             factors (DeCAF, arXiv 2505.21382). What the truncation cuts off is lost, and the mean of products with it.
    fair     the mean of A and B, then the least change of B that brings the product nearest to P:
             B+ = sum_j w_j B_j (A_j A_bar') (A_bar A_bar')^+  (LoRA-FAIR, arXiv 2411.14961). The mean of A stays,
             that of B does not.
    rotated  each neighbour's factors turned to the own ones before they are averaged: B_j R_j, R_j' A_j, with R_j the
             rotation nearest to bringing both to (B_i, A_i); the product of each stays (FedRot, arXiv 2602.23638).

They are of a whole neighbourhood, so they go with one exchange a round, with no correction, and with schedules that
share both factors; heads are averaged. Where messages are lost their weight is the own value's, as everywhere. A peer
whose own value is not finite keeps to the mean, which leaves what is wrong where it is.

Of DeCAF, LoRA-FAIR and FedRot the formulas were checked against what they are to minimise (tests/test_products.py), and
nothing else of the papers.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dfl_lora.combine import Combine, Inbox, mean
from dfl_lora.peers import Peers
from dfl_lora.tensors import Tensors


@dataclass(frozen=True)
class Factors:
    """One module's factors in a neighbourhood, the own ones first, in float64."""

    weights: list[float]
    a: list[Tensor]  # [r, d_in]
    b: list[Tensor]  # [d_out, r]


Solve = Callable[[Factors], tuple[Tensor, Tensor]]


def modules(inbox: Inbox) -> Iterator[tuple[str, Factors]]:
    """Yields the name of each module of which both factors were sent, and its factors."""
    weights = [1.0 - sum(inbox.row.weights[j] for j in inbox.received), *(inbox.row.weights[j] for j in inbox.received)]
    values = [inbox.own, *inbox.received.values()]
    for name in inbox.own.layout.by_name:
        module = name.removesuffix(".A")
        if name.endswith(".A") and f"{module}.B" in inbox.own.layout.by_name:
            a, b = ([v[f"{module}.{factor}"].double() for v in values] for factor in "AB")
            yield module, Factors(weights, a, b)


def by_module(solve: Solve) -> Callable[[Inbox], Tensors]:
    """Returns the combine that averages, and then replaces the factors of each module by what `solve` makes of them."""

    def combine(inbox: Inbox) -> Tensors:
        result = mean(inbox)
        for name, factors in modules(inbox) if result.is_finite() else ():
            a, b = solve(factors)
            result[f"{name}.A"].copy_(a)
            result[f"{name}.B"].copy_(b)
        return result

    return combine


def truncated(f: Factors) -> tuple[Tensor, Tensor]:
    """Returns the best factors of the mean product of the own rank, turned towards the own A; if it is zero, that A."""
    r = rank_of(f.a[0])
    a, b = torch.zeros_like(f.a[0]), torch.zeros_like(f.b[0])
    q_b, r_b = torch.linalg.qr(torch.cat([w * b for w, b in zip(f.weights, f.b, strict=True)], dim=1))  # [d_out, k r]
    q_a, r_a = torch.linalg.qr(torch.cat([a.T for a in f.a], dim=1))  # [d_in, k r]
    u, s, vt = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    if not s[0] > 0:
        return f.a[0], b
    rows = (q_a @ vt[:r].T).T  # [r, d_in], orthonormal; fewer than r where d_in or d_out is below r
    scale = f.a[0].norm() / r**0.5
    rotation = polar(f.a[0][:r] @ rows.T)
    a[:r], b[:, :r] = scale * rotation @ rows, (q_b @ (u[:, :r] * s[:r])) @ rotation.T / scale
    return a, b


def rank_of(a: Tensor) -> int:
    """Returns the number of rows of A before those that are zero: peers may have ranks below the layout's."""
    return int(a.any(1).sum())


def fair(f: Factors) -> tuple[Tensor, Tensor]:
    """Returns the mean of A, and the B that with it is nearest to the mean product."""
    a = sum((w * own for w, own in zip(f.weights, f.a, strict=True)), torch.zeros_like(f.a[0]))
    moved = [w * b @ (own @ a.T) for w, b, own in zip(f.weights, f.b, f.a, strict=True)]
    return a, torch.stack(moved).sum(0) @ torch.linalg.pinv(a @ a.T, hermitian=True)


def turned(f: Factors) -> tuple[Tensor, Tensor]:
    """Returns the mean of the factors after each was turned to the own ones."""
    a, b = torch.zeros_like(f.a[0]), torch.zeros_like(f.b[0])
    for w, own_a, own_b in zip(f.weights, f.a, f.b, strict=True):
        rotation = polar(own_b.T @ f.b[0] + own_a @ f.a[0].T)
        a += w * rotation.T @ own_a
        b += w * own_b @ rotation
    return a, b


def polar(m: Tensor) -> Tensor:
    """Returns the matrix with orthonormal columns that is nearest to one with no more columns than rows."""
    u, _, vt = torch.linalg.svd(m, full_matrices=False)
    nearest: Tensor = u @ vt
    return nearest


def agreed(peers: Peers) -> Tensors:
    """Returns the best factors of the mean over peers of the products, and the mean of what is no factor.

    Where factors were turned, or have ranks of their own, the product of their means is not what peers agree on.
    """
    result, size = peers.mean(), len(peers)
    for name in [e.name for e in peers.layout.entries if e.role == "A"] if result.is_finite() else ():
        a, b = (peers.stacked(name.removesuffix(".A") + factor).double() for factor in (".A", ".B"))
        first = max(range(size), key=lambda row: rank_of(a[row]))  # a peer of the full rank says what they are near to
        order = [first, *(row for row in range(size) if row != first)]
        solved = truncated(Factors([1.0 / size] * size, list(a[order]), list(b[order])))
        for factor, value in zip((".A", ".B"), solved, strict=True):
            result[name.removesuffix(".A") + factor].copy_(value)
    return result


product, lora_fair, rotated = by_module(truncated), by_module(fair), by_module(turned)
COMBINES: Mapping[str, Combine] = {"mean": mean, "product": product, "fair": lora_fair, "rotated": rotated}
