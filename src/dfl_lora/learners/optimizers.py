"""Optimisers on rows: one fused step for many peers, each with its own step count.

x, g and the state are [k, p]: a row per peer. Each formula is the one of `torch.optim` (Kingma and Ba 2015;
Loshchilov and Hutter 2019), so that the oracle, which uses torch.optim, ends with the same numbers.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8
WEIGHT_DECAY = 0.01
"""AdamW's default in torch."""

Step = Callable[[Tensor, Tensor, Mapping[str, Tensor], Tensor, Tensor], None]
"""(x, g, state, steps [k] counted from 1, learning rates [k]) -> None, in place."""


@dataclass(frozen=True)
class Optimizer:
    """A step and the names of the vectors it keeps in each peer."""

    state: Sequence[str]
    step: Step


def sgd(x: Tensor, g: Tensor, state: Mapping[str, Tensor], steps: Tensor, rates: Tensor) -> None:
    """x <- x - lr g."""
    x.sub_(g * rates.unsqueeze(1).to(x.dtype))


def adam(x: Tensor, g: Tensor, state: Mapping[str, Tensor], steps: Tensor, rates: Tensor) -> None:
    """x <- x - lr m_hat / (sqrt(v_hat) + eps), with bias-corrected moments of each peer's own step count."""
    m, v = state["exp_avg"], state["exp_avg_sq"]
    m.lerp_(g, 1 - BETA_1)
    v.mul_(BETA_2).addcmul_(g, g, value=1 - BETA_2)
    t = steps.double().unsqueeze(1)
    rate = (rates.double().unsqueeze(1) / (1 - BETA_1**t)).to(x.dtype)
    scale = torch.sqrt(1 - BETA_2**t).to(x.dtype)
    x.sub_(rate * m / (v.sqrt() / scale + EPSILON))


def adamw(x: Tensor, g: Tensor, state: Mapping[str, Tensor], steps: Tensor, rates: Tensor) -> None:
    """Adam after x <- (1 - 0.01 lr) x."""
    x.mul_((1 - rates.double() * WEIGHT_DECAY).to(x.dtype).unsqueeze(1))
    adam(x, g, state, steps, rates)


MOMENTS = ("exp_avg", "exp_avg_sq")
OPTIMIZERS: dict[str, Optimizer] = {
    "adam": Optimizer(MOMENTS, adam),
    "adamw": Optimizer(MOMENTS, adamw),
    "sgd": Optimizer((), sgd),
}
