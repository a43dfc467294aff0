"""Optimisers on rows: one fused step for many peers, each with its own step count.

The functions of `torch.optim` (Kingma and Ba 2015; Loshchilov and Hutter 2019) in their fused form: a row is read and
written once, and a peer that is not among them is not moved.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adam import adam as torch_adam
from torch.optim.adamw import adamw as torch_adamw
from torch.optim.sgd import sgd as torch_sgd

from dfl_lora.corrections.local import BETA_2

BETA_1, EPSILON = 0.9, 1e-8
WEIGHT_DECAY = 0.01
"""AdamW's default in torch."""

Step = Callable[[list[Tensor], list[Tensor], Mapping[str, list[Tensor]], list[int], float], None]
"""(x, g, state, steps done before, learning rate) -> None, in place; a list has a vector for each peer."""


@dataclass(frozen=True)
class Optimizer:
    """A step and the names of the vectors it keeps in each peer."""

    state: Sequence[str]
    step: Step


def sgd(x: list[Tensor], g: list[Tensor], state: Mapping[str, list[Tensor]], steps: list[int], rate: float) -> None:
    """x <- x - lr g."""
    torch_sgd(
        x, g, [None] * len(x), fused=True, weight_decay=0.0, momentum=0.0, lr=rate, dampening=0.0, nesterov=False,
        maximize=False,
    )  # fmt: skip


def adam(x: list[Tensor], g: list[Tensor], state: Mapping[str, list[Tensor]], steps: list[int], rate: float) -> None:
    """x <- x - lr m_hat / (sqrt(v_hat) + eps), with bias-corrected moments of each peer's own step count."""
    fused(torch_adam, x, g, state, steps, lr=rate, weight_decay=0.0)


def adamw(x: list[Tensor], g: list[Tensor], state: Mapping[str, list[Tensor]], steps: list[int], rate: float) -> None:
    """Adam after x <- (1 - 0.01 lr) x."""
    fused(torch_adamw, x, g, state, steps, lr=rate, weight_decay=WEIGHT_DECAY)


def fused(
    function: Callable[..., None], x: list[Tensor], g: list[Tensor], state: Mapping[str, list[Tensor]],
    steps: list[int], **rates: float,
) -> None:  # fmt: skip
    """Calls torch's function of the Adam family on vectors with step counts of their own."""
    m, v = state["exp_avg"], state["exp_avg_sq"]
    counts = [torch.tensor(float(count), device=own.device) for count, own in zip(steps, m, strict=True)]
    settings = {"amsgrad": False, "beta1": BETA_1, "beta2": BETA_2, "eps": EPSILON, "maximize": False}
    function(x, g, m, v, [], counts, fused=True, **settings, **rates)


MOMENTS = ("exp_avg", "exp_avg_sq")
OPTIMIZERS: dict[str, Optimizer] = {
    "adam": Optimizer(MOMENTS, adam),
    "adamw": Optimizer(MOMENTS, adamw),
    "sgd": Optimizer((), sgd),
}
