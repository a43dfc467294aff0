"""The core: a product B C A whose outer factors are common and frozen: C [r, r] alone is trained and exchanged.

    W = W0 + s B C A      B [d_out, r] with orthonormal columns, A [r, d_in] with orthonormal rows, C = 0 at the start
    dL/dC = B' (dL/dB_e)  with B_e = B C, which is all that the layers, PEFT and an adapter folder know of it

W is linear in C, so that sum_j w_ij (B C_j A) = B (sum_j w_ij C_j) A holds exactly, and a message has r^2 numbers for
each module, whatever its size. What can be learnt lies in the columns of B and the rows of A.

Sources: Ponkshe, Singhal, Gorbunov, Tumanov, Horvath, Vepakomma, "Initialization using Update Approximation is a Silver
Bullet for Extremely Efficient Low-Rank Fine-Tuning" (LoRA-SB), 2024, arXiv 2411.19557; Singhal, Ponkshe, Vartak,
Varshney, Vepakomma, "Fed-SB", 2025, arXiv 2502.15436, whose server average gossip stands for here. Their C starts at
singular values of a first update, here at 0, so that all start at the base. The tests hold the equations above; nothing
else of the papers was checked.
"""

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor


def folded(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns adapter tensors, of one peer or of a pass [k or 1, ...], with each core folded into its B."""
    result = dict(tensors)
    for name in [name for name in tensors if name.endswith(".core")]:
        path, c = name.removesuffix(".core"), result.pop(name)
        b = tensors[f"{path}.B"]
        result[f"{path}.B"] = own_product(b, c) if b.dim() == 3 else b @ c
    return result


class OwnProduct(torch.autograd.Function):
    """B_i C_i of each peer, one by one from aligned copies, so that its bits do not depend on who shares the pass."""

    @staticmethod
    def forward(ctx: Any, b: Tensor, c: Tensor) -> Tensor:
        """b [k or 1, d_out, r], c [k or 1, r, r]; one that is common is trained by nobody."""
        own_b, own_c = ([own.clone() for own in factor.expand(max(len(b), len(c)), -1, -1)] for factor in (b, c))
        ctx.save_for_backward(*own_b, *own_c)
        return torch.stack([left @ right for left, right in zip(own_b, own_c, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        g, saved, (for_b, for_c) = [own.clone() for own in gradients[0]], ctx.saved_tensors, ctx.needs_input_grad
        own_b, own_c = saved[: len(g)], saved[len(g) :]
        g_b = torch.stack([own @ c.T for own, c in zip(g, own_c, strict=True)]) if for_b else None
        g_c = torch.stack([b.T @ own for own, b in zip(g, own_b, strict=True)]) if for_c else None
        return g_b, g_c


own_product = cast(Callable[[Tensor, Tensor], Tensor], OwnProduct.apply)
