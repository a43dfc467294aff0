"""Layers over one shared frozen base that serve several peers in one pass.

LoRA: y = W x + b + s B A x for the tokens of each peer, with its own B [d_out, r] and A [r, d_in], or one A that is
frozen and common. W x is one product for all peers. What the factors add is its epilogue, peer by peer and in place:

    forward     h = A x,   y += s B h
    backward    g_h = s B' g,   g_B = s g h',   g_A = g_h x',   g_x = W' g + A' g_h

Where A is frozen nothing of x is kept for the backward pass, only h. Factors are read as aligned copies: in float32
kernels differ between a batch of one matrix and of several, and between matrices at an aligned address and rows in the
middle of the store; so a peer's bits do not depend on who shares its pass. (Measured on two cores, 7 peers of 208
tokens, 384 wide, r 4: W x takes 6.5 ms, all that the factors add 0.5 ms; as one bmm 0.4 ms, with one dense product for
a common A, widened to a whole block, 0.6 ms.)
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from dfl_lora.models.packing import ROW_BLOCK, Packing

View = Literal["tokens", "firsts", "rows"]
"""What the layers are reading: all tokens, each row's first token only, or what a head makes of it."""


@dataclass
class Pass:
    """Who shares the forward pass that is running: the layers read it, the learner sets it."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """Adapter tensors by name, [k, ...] or [1, ...] where they are common."""
    packing: Packing | None = None
    generators: Sequence[torch.Generator] | None = None
    """One per peer while training with dropout, else None."""
    attention: str = "sdpa"
    """The kernel of attention."""
    view: View = "tokens"
    below: Tensor | None = None
    """What the frozen layers below the first adapted one made of all tokens, [T, d], where that is known."""
    made: Tensor | None = None
    """The same, as they made it in this pass."""

    @property
    def spans(self) -> list[slice]:
        """The rows of each peer in what the layers are reading."""
        assert self.packing is not None
        return self.packing.token_spans if self.view == "tokens" else self.packing.row_spans

    @contextmanager
    def reading(self, view: View) -> Iterator[None]:
        self.view, before = view, self.view
        try:
            yield
        finally:
            self.view = before

    def keep(self, x: Tensor, p: float) -> Tensor | None:
        """Returns what dropout leaves of x [..., T, d] as factors 0 and 1; None where nothing is dropped.

        Each peer draws for its padded rows, as plain PEFT does, so that its masks are the same in any pass.
        """
        if self.generators is None:
            return None
        assert self.packing is not None
        keep = torch.ones(x.numel() // x.shape[-1], x.shape[-1])
        for peer, span in enumerate(self.spans):
            own = self.draws(peer, x.shape[-1]) >= p
            keep[span.start : span.start + len(own)] = own.float()
        return keep.to(x).view(x.shape)

    def draws(self, peer: int, d: int) -> Tensor:
        """Returns the uniform numbers of one peer for what the layers are reading, [tokens or rows, d]."""
        assert self.packing is not None and self.generators is not None
        lengths, width, generator = self.packing.lengths[peer], self.packing.widths[peer], self.generators[peer]
        if self.view == "rows":
            return torch.rand(len(lengths), d, generator=generator)
        draws = torch.rand(len(lengths), width, d, generator=generator)
        return draws[:, 0] if self.view == "firsts" else draws[torch.arange(width) < torch.from_numpy(lengths)[:, None]]


class StreamDropout(nn.Module):
    """Dropout whose masks come from a generator of each peer, so that who else is present changes nothing."""

    def __init__(self, p: float, current: Pass) -> None:
        super().__init__()
        self.p = p
        self.current = current

    def forward(self, x: Tensor) -> Tensor:
        keep = self.current.keep(x, self.p) if self.p else None
        return x if keep is None else x * keep / (1 - self.p)


class PeerLinear(nn.Module):
    """A linear layer of the base with what each peer adds to it: a LoRA product, or a head of its own."""

    def __init__(self, name: str, base: nn.Linear | Conv1D, current: Pass, scaling: float, dropout: nn.Module) -> None:
        super().__init__()
        self.name = name
        self.base = base
        self.current = current
        self.scaling = scaling
        self.dropout = dropout

    @property
    def weight(self) -> Tensor:
        """W [d_out, d_in] of the base."""
        return self.base.weight.T if isinstance(self.base, Conv1D) else self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        tensors, rows = self.current.tensors, x.reshape(-1, x.shape[-1])  # [T, d_in]
        if f"{self.name}.weight" in tensors:
            own, bias = tensors[f"{self.name}.weight"], tensors.get(f"{self.name}.bias")
            y = own_linear(rows.to(own.dtype), own, bias, self.current.spans)
        else:
            rows = rows.to(self.base.weight.dtype)
            if f"{self.name}.B" in tensors:
                dropped = self.dropout(rows)
                factors = tensors[f"{self.name}.A"], tensors[f"{self.name}.B"]
                apart = None if dropped is rows else dropped
                fixed = self.weight, self.base.bias, self.current.spans, self.scaling
                y = lora_linear(rows, apart, *factors, *fixed)
            else:
                y = dense(rows, self.weight, self.base.bias)
        return y.view(*x.shape[:-1], y.shape[-1])


class LoraLinear(torch.autograd.Function):
    """y = W x + b + s B A x for x [T, d_in], or with A on what dropout left of x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, apart: Tensor | None, a: Tensor, b: Tensor, weight: Tensor, bias: Tensor | None,
        spans: Sequence[slice], scaling: float,
    ) -> Tensor:  # fmt: skip
        """apart: x after dropout, or None; a [k or 1, r, d_in], b [k or 1, d_out, r]; spans: the rows of each peer."""
        y, read = dense(x, weight, bias), x if apart is None else apart
        own_a = for_each(spans, [factor.to(x.dtype, copy=True) for factor in a])  # [r, d_in]
        own_b = for_each(spans, [factor.T.to(x.dtype, copy=True).contiguous() for factor in b])  # B' [r, d_out]
        h = x.new_empty(len(x), a.shape[1])
        for s, shrink, expand in zip(spans, own_a, own_b, strict=True):
            h[s] = F.linear(read[s], shrink)
            y[s].addmm_(h[s], expand, alpha=scaling)
        ctx.save_for_backward(read if ctx.needs_input_grad[2] else None, h, weight, *own_a, *own_b)
        ctx.spans, ctx.scaling, ctx.dtype = spans, scaling, b.dtype
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (read, h, weight, *factors), k = ctx.saved_tensors, len(ctx.spans)
        for_x, for_apart, for_a, for_b = ctx.needs_input_grad[:4]
        g = gradients[0].contiguous()
        g_x = g @ weight if for_x else None
        g_apart = g.new_zeros(len(g), weight.shape[1]) if for_apart else None
        through = g_apart if for_apart else g_x  # where the gradient of what A read goes
        g_a, g_b = list[Tensor](), list[Tensor]()
        for s, shrink, expand in zip(ctx.spans, factors[:k], factors[k:], strict=True):
            g_h = F.linear(g[s], expand).mul_(ctx.scaling)  # [T_i, r]
            if for_b:
                g_b.append((h[s].T @ g[s]).T * ctx.scaling)
            if for_a:
                g_a.append(g_h.T @ read[s])
            if through is not None:
                through[s].addmm_(g_h, shrink)
        stacked = [torch.stack(own).to(ctx.dtype) if own else None for own in (g_a, g_b)]
        return g_x, g_apart, *stacked, None, None, None, None


class OwnLinear(torch.autograd.Function):
    """y = W_i x + b_i for the rows of each peer: a head of its own, in the precision it is kept in."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, spans: Sequence[slice]) -> Tensor:
        """x [R, d_in], weight [k or 1, d_out, d_in], bias [k or 1, d_out], spans: the rows of each peer."""
        weights = for_each(spans, [own.clone() for own in weight])
        y = x.new_zeros(len(x), weight.shape[1])
        for s, own in zip(spans, weights, strict=True):
            y[s] = F.linear(x[s], own)
        for s, own in zip(spans, for_each(spans, list(bias)), strict=True) if bias is not None else ():
            y[s] += own
        ctx.save_for_backward(x, *weights)
        ctx.spans = spans
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x, *weights), g = ctx.saved_tensors, gradients[0].contiguous()
        for_x, for_weight, for_bias = ctx.needs_input_grad[:3]
        pairs = list(zip(ctx.spans, weights, strict=True))
        g_x = x.new_zeros(x.shape) if for_x else None
        if g_x is not None:
            for s, own in pairs:
                g_x[s] = g[s] @ own
        g_weight = torch.stack([g[s].T @ x[s] for s, _ in pairs]) if for_weight else None
        g_bias = torch.stack([g[s].sum(0) for s, _ in pairs]) if for_bias else None
        return g_x, g_weight, g_bias, None


lora_linear = cast(Callable[..., Tensor], LoraLinear.apply)
own_linear = cast(Callable[..., Tensor], OwnLinear.apply)


def for_each(spans: Sequence[slice], own: list[Tensor]) -> list[Tensor]:
    """Returns one tensor for each peer, from as many or from one that is common."""
    return own * len(spans) if len(own) == 1 else own


def dense(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns W x + b for whole blocks of rows [T, d]: one product for all peers.

    Narrow outputs (a frozen head) are widened to a block: for them the kernel depends on the number of rows.
    """
    if len(weight) >= ROW_BLOCK:
        return F.linear(rows, weight, bias)
    y = F.linear(rows, F.pad(weight, (0, 0, 0, ROW_BLOCK - len(weight))))[:, : len(weight)]
    return y.contiguous() if bias is None else y + bias


def install(model: nn.Module, current: Pass, scaling: float, lora_dropout: float, base_dropout: bool) -> None:
    """Replaces, in place, every linear layer by a PeerLinear and every nn.Dropout by one drawn by streams."""
    for name, module in list(model.named_modules()):
        replacement: nn.Module
        if isinstance(module, nn.Linear | Conv1D):
            replacement = PeerLinear(name, module, current, scaling, StreamDropout(lora_dropout, current))
        elif isinstance(module, nn.Dropout):
            replacement = StreamDropout(module.p if base_dropout else 0.0, current)
        else:
            continue
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, replacement)
