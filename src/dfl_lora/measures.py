"""Consensus measures: how far the peers' products B A are from agreement.

consensus_error       mean_i sum_layers ||B_i A_i - B_bar A_bar||_F, unscaled (the seed's measure).
product_disagreement  mean_i sum_layers ||B_i A_i - mean_j B_j A_j||_F.
relative_disagreement the latter over sum_layers ||mean_j B_j A_j||_F.

No d x d matrix is formed. With dB = B_i - B_bar and dA = A_i - A_bar,
    B_i A_i - B_bar A_bar = [dB, B_bar] [A_i; dA] = L_i R_i,
whose factors are as small as the difference itself, so that Gram matrices <L_i R_i, L_j R_j> =
tr((L_i' L_j) (R_j R_i')) lose no digits where peers nearly agree. All in float64.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from dfl_lora.peers import Peers


@dataclass(frozen=True)
class Consensus:
    """The three measures of one moment."""

    consensus_error: float
    product_disagreement: float
    relative_disagreement: float


def factors(peers: Peers) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (A [N or 1, r, d_in], B [N or 1, d_out, r]) of each module."""
    names = (*peers.common.layout.by_name, *peers.layout.by_name)
    for name in names:
        if name.endswith(".A"):
            yield peers.stacked(name), peers.stacked(name.removesuffix(".A") + ".B")


def consensus(modules: Iterable[tuple[Tensor, Tensor]], num_peers: int) -> Consensus:
    """Returns the measures over modules of stacked factors."""
    error = disagreement = size = 0.0
    for a, b in modules:
        from_means, from_mean, mean_norm = module_distances(
            a.double().expand(num_peers, -1, -1), b.double().expand(num_peers, -1, -1)
        )
        error += from_means.mean().item()
        disagreement += from_mean.mean().item()
        size += mean_norm.item()
    apart = disagreement * inf if disagreement else 0.0  # products that cancel are infinitely far from their mean
    return Consensus(error, disagreement, disagreement / size if size else apart)


def module_distances(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns ||B_i A_i - B_bar A_bar||, ||B_i A_i - mean_j B_j A_j|| (both [N]) and ||mean_j B_j A_j||.

    a [N, r, d_in], b [N, d_out, r], float64.
    """
    a_bar, b_bar = a.mean(0, keepdim=True), b.mean(0, keepdim=True)
    left = torch.cat([b - b_bar, b_bar.expand_as(b)], dim=2)  # [N, d_out, 2r]
    right = torch.cat([a, a - a_bar], dim=1)  # [N, 2r, d_in]
    delta = inner_products(left, right)  # [N, N]: <D_i, D_j>, D_i = B_i A_i - B_bar A_bar
    to_mean = delta.mean(1)
    from_mean = delta.diagonal() - 2 * to_mean + to_mean.mean()
    mean_square = inner_products(b, a).mean()
    return (
        delta.diagonal().clamp(min=0).sqrt(),
        from_mean.clamp(min=0).sqrt(),
        mean_square.clamp(min=0).sqrt(),
    )


def inner_products(left: Tensor, right: Tensor) -> Tensor:
    """Returns <L_i R_i, L_j R_j>_F = tr((L_i' L_j) (R_j R_i')) as [N, N]; left [N, o, q], right [N, q, d]."""
    n, _, q = left.shape
    columns = left.transpose(0, 1).reshape(-1, n * q)  # [o, N q]
    rows = right.reshape(n * q, -1)  # [N q, d]
    grams = (columns.T @ columns) * (rows @ rows.T)  # [(i, p), (j, s)]; symmetric, so the trace is the block sum
    return grams.view(n, q, n, q).sum(dim=(1, 3))
