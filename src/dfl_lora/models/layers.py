"""Layers over one shared frozen base that serve several peers in one pass.

A pass holds k peers; the rows of peer i are the i-th of k equal blocks of the batch. Dense layers take
all rows at once. A row's bits then depend on the others only in a ragged block of rows, so each peer's
rows are filled up with zeros to a multiple of ROW_BLOCK (measured: torch 2.13, CPU, fp32 and bf16).
LoRA: y = W x + b + s B A x, with A [k, r, d_in] (or [1, r, d_in], frozen and common) and B [k, d_out, r].
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROW_BLOCK = 16


@dataclass
class Pass:
    """Who shares the forward pass that is running: the layers read it, the learner sets it."""

    num_peers: int = 1
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    generators: Sequence[torch.Generator] | None = None
    """One per peer while training with dropout, else None."""


class StreamDropout(nn.Module):
    """Dropout whose masks come from a generator of each peer, so that who else is present changes nothing."""

    def __init__(self, p: float, current: Pass) -> None:
        super().__init__()
        self.p = p
        self.current = current

    def forward(self, x: Tensor) -> Tensor:
        generators = self.current.generators
        if generators is None or self.p == 0.0:
            return x
        count = x.numel() // len(generators)
        draws = torch.cat([torch.rand(count, generator=g) for g in generators])
        keep = (draws >= self.p).to(device=x.device, dtype=x.dtype).view(x.shape)
        return x * keep / (1 - self.p)


class PeerLinear(nn.Module):
    """A linear layer of the base with what each peer adds to it: a LoRA product, or a head of its own."""

    def __init__(self, name: str, base: nn.Linear, current: Pass, scaling: float, dropout: nn.Module) -> None:
        super().__init__()
        self.name = name
        self.base = base
        self.current = current
        self.scaling = scaling
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        k, tensors = self.current.num_peers, self.current.tensors
        rows = x.reshape(k, -1, x.shape[-1])  # [k, T, d_in]
        if f"{self.name}.weight" in tensors:
            y = self.own_head(rows, tensors[f"{self.name}.weight"], tensors.get(f"{self.name}.bias"))
        else:
            rows = rows.to(self.base.weight.dtype)
            blocks = whole_blocks(rows)
            y = dense(blocks, self.base.weight, self.base.bias)
            if f"{self.name}.B" in tensors:
                a, b = tensors[f"{self.name}.A"], tensors[f"{self.name}.B"]
                dropped = self.dropout(rows)
                blocks = blocks if dropped is rows else whole_blocks(dropped)
                y = y + self.scaling * product(blocks, a.to(rows.dtype), b.to(rows.dtype))
        return y[:, : rows.shape[1]].reshape(*x.shape[:-1], y.shape[-1])

    def own_head(self, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Applies each peer's own weight in the precision it is kept in: heads are small and read few rows."""
        y = grouped(whole_blocks(rows.to(weight.dtype)), weight.expand(len(rows), -1, -1))
        return y if bias is None else y + bias.unsqueeze(1)


def whole_blocks(rows: Tensor) -> Tensor:
    """Returns rows [k, T, d] with zeros after each peer's, up to a multiple of ROW_BLOCK."""
    missing = -rows.shape[1] % ROW_BLOCK
    return F.pad(rows, (0, 0, 0, missing)) if missing else rows


def dense(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns W x + b for whole blocks of rows [k, T, d]: one product for all peers.

    Narrow outputs (a frozen A, a head) go peer by peer: for them the kernel depends on the number of rows.
    """
    if len(weight) >= ROW_BLOCK:
        return F.linear(rows, weight, bias)
    y = grouped(rows, weight.expand(len(rows), -1, -1))
    return y if bias is None else y + bias


def product(rows: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Returns B A x for rows [k, T, d_in]; a [k, r, d_in] or [1, r, d_in] where it is common, b [k, d_out, r]."""
    hidden = dense(rows, a[0], None) if len(a) == 1 else grouped(rows, a)
    return grouped(hidden, b.expand(len(rows), -1, -1))


def grouped(rows: Tensor, weights: Tensor) -> Tensor:
    """Returns each peer's own product, rows [k, T, d] with weights [k, o, d].

    One after the other, on copies: kernels in float32 differ between a batch of one and of several, and
    between matrices that start at an aligned address and rows in the middle of the store.
    """
    return torch.stack([F.linear(x, w.clone()) for x, w in zip(rows, weights, strict=True)])


def install(model: nn.Module, current: Pass, scaling: float, lora_dropout: float, base_dropout: bool) -> None:
    """Replaces, in place, every nn.Linear by a PeerLinear and every nn.Dropout by one drawn by streams."""
    for name, module in list(model.named_modules()):
        replacement: nn.Module
        if isinstance(module, nn.Linear):
            replacement = PeerLinear(name, module, current, scaling, StreamDropout(lora_dropout, current))
        elif isinstance(module, nn.Dropout):
            replacement = StreamDropout(module.p if base_dropout else 0.0, current)
        else:
            continue
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, replacement)
