"""Attention over a packed pass: rows see themselves alone, in buckets of a like length.

For each bucket the tokens are gathered to [n, heads, L, d], one product serves all its rows, and what comes out is laid
back. No row is in two buckets, so gradients are laid back too, not added up. With `firsts` only the first token of each
row asks; all are answered from. In a causal model a token sees itself and those before it, or the last `window` of
them; several heads may share their keys and values, and scores may be capped: c tanh(s / c).
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface

from dfl_lora.models.layers import Pass, StreamDropout
from dfl_lora.models.packing import Bucket

PACKED = "packed"
Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor]
"""(q [n, heads, L or 1, d], k and v [n, heads, L, d], mask [n, 1, 1, L] or None, scaling) -> the shape of q."""
Weigh = Callable[[Tensor, Tensor, Tensor | None, float], Tensor]
"""(q, k, mask, scaling) -> what each token weighs the others by, [n, heads, L or 1, L]."""


def weights_of(q: Tensor, k: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Returns softmax(s q k' + mask)."""
    scores = (q * scaling) @ k.transpose(2, 3)
    return torch.softmax(scores if mask is None else scores + mask, dim=-1)


def causal_weights(window: int | None, cap: float | None) -> Weigh:
    """Returns softmax, in float32 at least, over the last `window` tokens up to each token, scores capped."""

    def weigh(q: Tensor, k: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        scores = (q * scaling) @ k.transpose(2, 3)
        scores = scores if cap is None else torch.tanh(scores / cap) * cap
        places = torch.arange(q.shape[2], device=q.device)
        back = places[:, None] - places  # how far each token lies before another
        hidden = back < 0 if window is None else (back < 0) | (back >= window)
        wide = torch.promote_types(q.dtype, torch.float32)
        return torch.softmax(scores.masked_fill(hidden, -torch.inf), dim=-1, dtype=wide).to(q.dtype)

    return weigh


def eager_of(weigh: Weigh) -> Kernel:
    def kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        return weigh(q, k, mask, scaling) @ v

    return kernel


def causal_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)


def for_every_head(kernel: Kernel) -> Kernel:
    """Returns a kernel whose keys and values are repeated for the heads that share them."""

    def repeating(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        times = q.shape[1] // k.shape[1]
        return kernel(q, k.repeat_interleave(times, dim=1), v.repeat_interleave(times, dim=1), mask, scaling)

    return repeating


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)


KERNELS: dict[str, Kernel] = {"eager": eager_of(weights_of), "sdpa": sdpa}


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None = None, *, current: Pass,
    scaling: float, sliding_window: int | None = None, softcap: float | None = None, **_: object,
) -> tuple[Tensor, None]:  # fmt: skip
    """The attention that a Hugging Face module calls: query [1, heads, T or R, d] -> [1, T or R, heads, d]."""
    packing = current.packing
    assert packing is not None
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))  # [T, heads, d]
    weigh = causal_weights(sliding_window, softcap) if packing.causal else weights_of
    dropout = dropout_of(module)
    if dropout is not None and dropout.p and current.generators is not None:
        kernels = dropping(current, q.shape[1], dropout.p, weigh)
    elif packing.causal:
        flash = current.attention == "sdpa" and softcap is None
        kernels = [
            causal_sdpa if flash and (sliding_window is None or bucket.width <= sliding_window) else eager_of(weigh)
            for bucket in packing.buckets
        ]
    else:
        kernels = [KERNELS[current.attention]] * len(packing.buckets)
    if q.shape[1] != k.shape[1]:
        kernels = [for_every_head(kernel) for kernel in kernels]
    return packed_attention(q, k, v, packing.buckets, kernels, scaling, current.view == "firsts").unsqueeze(0), None


def dropout_of(module: nn.Module) -> StreamDropout | None:
    """Returns the dropout of attention weights by the names that modules give it."""
    parts = dict(module.named_children())
    found = parts.get("dropout", parts.get("attn_dropout"))
    return found if isinstance(found, StreamDropout) else None


def dropping(current: Pass, heads: int, p: float, weigh: Weigh) -> list[Kernel]:
    """Returns a kernel for each bucket that drops weights; every peer draws for its padded rows, as plain PEFT does."""
    assert current.packing is not None and current.generators is not None
    packing = current.packing
    draws = [
        torch.rand(len(lengths), heads, width, width, generator=generator)
        for lengths, width, generator in zip(packing.lengths, packing.widths, current.generators, strict=True)
    ]
    of_rows = [own for peer in draws for own in peer]  # [heads, width, width] of each row

    def kernel_of(bucket: Bucket) -> Kernel:
        def kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
            weights = weigh(q, k, mask, scaling)
            keep = torch.ones(weights.shape)
            for own, number in zip(keep, bucket.numbers, strict=True):
                kept = of_rows[number][:, : own.shape[1], : own.shape[2]] >= p
                own[:, : kept.shape[1], : kept.shape[2]] = kept.float()
            return (weights * keep.to(weights) / (1 - p)) @ v

        return kernel

    return [kernel_of(bucket) for bucket in packing.buckets]


class PackedAttention(torch.autograd.Function):
    """Attention in buckets; each keeps a small graph of its own for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, buckets: Sequence[Bucket], kernels: Sequence[Kernel],
        scaling: float, firsts: bool,
    ) -> Tensor:  # fmt: skip
        """q [T, heads, d], or [R, heads, d] where only firsts ask; k and v [T, heads, d]; returns the shape of q."""
        result, graphs, wanted = torch.zeros_like(q), [], ctx.needs_input_grad[:3]
        for bucket, kernel in zip(buckets, kernels, strict=True):
            asking, keys, values = bucket.gather(q, firsts), bucket.gather(k, False), bucket.gather(v, False)
            for part, grad in zip((asking, keys, values), wanted, strict=True):
                part.requires_grad_(grad)
            with torch.set_grad_enabled(any(wanted)):
                answer = kernel(asking, keys, values, bucket.mask, scaling)
            bucket.lay(answer.detach(), result, firsts)
            graphs.append(((asking, keys, values), answer))
        ctx.buckets, ctx.graphs, ctx.firsts, ctx.shapes = buckets, graphs, firsts, (q.shape, k.shape, v.shape)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        g, wanted = gradients[0], ctx.needs_input_grad[:3]
        laid = [g.new_zeros(shape) if grad else None for shape, grad in zip(ctx.shapes, wanted, strict=True)]
        for bucket, (parts, answer) in zip(ctx.buckets, ctx.graphs, strict=True):
            leaves = [part for part in parts if part.requires_grad]
            own = iter(torch.autograd.grad(answer, leaves, bucket.gather(g, ctx.firsts, hidden=0)))
            for number, whole in enumerate(laid):
                if whole is not None:
                    bucket.lay(next(own), whole, ctx.firsts and number == 0)
        ctx.graphs = None
        return (*laid, None, None, None, None)


packed_attention = cast(Callable[..., Tensor], PackedAttention.apply)
AttentionInterface.register(PACKED, attend)
AttentionMaskInterface.register(PACKED, lambda *_, **__: None)
