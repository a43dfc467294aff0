"""Consensus measures: how far the peers' products B A are from agreement.

consensus_error       mean_i sum_layers ||B_i A_i - B_bar A_bar||_F, unscaled (the seed's measure).
product_disagreement  mean_i sum_layers ||B_i A_i - mean_j B_j A_j||_F.
relative_disagreement the latter over sum_layers ||mean_j B_j A_j||_F.

Few peers need no d x d matrix. With dB = B_i - B_bar and dA = A_i - A_bar,
    B_i A_i - B_bar A_bar = [dB, B_bar] [A_i; dA] = L_i R_i,
whose factors are as small as the difference itself, so that Gram matrices <L_i R_i, L_j R_j> =
tr((L_i' L_j) (R_j R_i')) lose no digits where peers nearly agree. All in float64. Of a
product B C A (`models.core`) with common B = Q_b R_b and A' = Q_a R_a the norms are those of R_b (C R_a'), r rows and
columns of each.

Where these [2 r N, 2 r N] would be larger than one d_out x d_in matrix, that matrix is formed instead, once, and peers
are gone through in blocks: with D_i = L_i R_i and D_bar its mean over peers,
    ||D_i - D_bar||^2 = ||L_i R_i||^2 - 2 <dB_i' D_bar, A_i> - 2 <B_bar' D_bar, dA_i> + ||D_bar||^2.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from dfl_lora.peers import Peers

BLOCK = 2**19
"""Numbers in the factors and differences of a block of peers."""


@dataclass(frozen=True)
class Consensus:
    """The three measures of one moment."""

    consensus_error: float
    product_disagreement: float
    relative_disagreement: float


def factors(peers: Peers) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (A [N or 1, r, d_in], B [N or 1, d_out, r]) of each module; with a core, factors of the same norms."""
    names = (*peers.common.layout.by_name, *peers.layout.by_name)
    for path in (name.removesuffix(".A") for name in names if name.endswith(".A")):
        a, b = peers.stacked(f"{path}.A"), peers.stacked(f"{path}.B")
        if f"{path}.core" in names:
            a, b = peers.stacked(f"{path}.core").double() @ triangle(a.mT).mT, triangle(b)
        yield a, b


def triangle(m: Tensor) -> Tensor:
    """Returns R of m = Q R, in float64."""
    r: Tensor = torch.linalg.qr(m.double(), mode="r").R
    return r


def consensus(modules: Iterable[tuple[Tensor, Tensor]], num_peers: int) -> Consensus:
    """Returns the measures over modules of stacked factors."""
    error = disagreement = size = 0.0
    for a, b in modules:
        a, b = a.expand(num_peers, -1, -1), b.expand(num_peers, -1, -1)
        if by_pairs(num_peers, a.shape[1], a.shape[2], b.shape[1]):
            from_means, from_mean, mean_norm = module_distances(a.double(), b.double())
        else:
            from_means, from_mean, mean_norm = many_distances(a, b)
        error += from_means.mean().item()
        disagreement += from_mean.mean().item()
        size += mean_norm.item()
    apart = disagreement * inf if disagreement else 0.0  # products that cancel are infinitely far from their mean
    return Consensus(error, disagreement, disagreement / size if size else apart)


def by_pairs(num_peers: int, r: int, d_in: int, d_out: int) -> bool:
    """Tells whether all pairs of peers make smaller matrices than a layer is."""
    return (2 * r * num_peers) ** 2 <= d_in * d_out


def peers_in_block(r: int, d_in: int, d_out: int) -> int:
    """Returns how many peers' factors and differences are in float64 at a time."""
    return max(1, BLOCK // (2 * r * (d_in + d_out + 2 * r)))


def many_distances(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns what `module_distances` does, block by block; a [N, r, d_in], b [N, d_out, r] of any precision."""
    n, r, d_in = a.shape
    size = peers_in_block(r, d_in, b.shape[1])
    blocks = [slice(start, start + size) for start in range(0, n, size)]
    a_bar = mean_of(a, blocks)  # [r, d_in]
    b_bar = mean_of(b, blocks)  # [d_out, r]

    def differences() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yields A_i [k, r, d_in], dA_i, and dB_i [k, d_out, r] of each block."""
        for block in blocks:
            own = a[block].double()
            yield own, own - a_bar, b[block].double() - b_bar

    d_bar = torch.zeros(b.shape[1], d_in, dtype=torch.float64, device=a.device)
    for own, d_a, d_b in differences():
        d_bar += d_b.transpose(0, 1).reshape(len(d_bar), -1) @ own.reshape(-1, d_in) + b_bar @ d_a.sum(0)
    d_bar /= n
    along, size_of_mean = b_bar.T @ d_bar, d_bar.square().sum()  # [r, d_in]
    from_means, from_mean = [], []
    for own, d_a, d_b in differences():
        left = torch.cat([d_b, b_bar.expand_as(d_b)], dim=2)  # [k, d_out, 2r]
        right = torch.cat([own, d_a], dim=1)  # [k, 2r, d_in]
        squares = ((left.mT @ left) * (right @ right.mT)).sum((1, 2))
        inner = ((d_b.mT @ d_bar) * own).sum((1, 2)) + (along * d_a).sum((1, 2))
        from_means.append(squares)
        from_mean.append(squares - 2 * inner + size_of_mean)
    return (
        torch.cat(from_means).clamp(min=0).sqrt(),
        torch.cat(from_mean).clamp(min=0).sqrt(),
        torch.linalg.matrix_norm(b_bar @ a_bar + d_bar),
    )


def mean_of(factor: Tensor, blocks: list[slice]) -> Tensor:
    """Returns the mean over peers in float64, of which no more than a block is made."""
    total = torch.zeros(factor.shape[1:], dtype=torch.float64, device=factor.device)
    for block in blocks:
        total += factor[block].double().sum(0)
    return total / len(factor)


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
