"""One round of an arm, taken apart: seconds, tokens, FLOPs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from dfl_lora.bench.arms import Adapter, Arm
from dfl_lora.bench.arms.own import PARTS, Own
from dfl_lora.bench.gemm import rate

Size = tuple[int, ...]


@dataclass(frozen=True)
class Round:
    """What one round took, and the GEMM rate of the processor on either side of it."""

    train_s: float
    mix_s: float
    evaluate_s: float
    peaks: tuple[float, float]
    losses: Sequence[float]
    accuracies: Sequence[float]
    parts: dict[str, float]
    """Of the training, where the arm tells; what no part claims is `rest`."""

    @property
    def total_s(self) -> float:
        return self.train_s + self.mix_s + self.evaluate_s

    @property
    def peak(self) -> float:
        return sum(self.peaks) / 2


@dataclass
class Roof:
    """The processor's rate of products like the cell's, measured whenever an arm has ended."""

    rows: int
    hidden: int
    dtype: torch.dtype
    rates: list[float] = field(default_factory=list)

    def measure(self) -> float:
        self.rates.append(rate(self.rows, self.hidden, self.dtype))
        return self.rates[-1]


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = perf_counter()
    result = work()
    return perf_counter() - start, result


def run_round(arm: Arm, roof: Roof, count: AbstractContextManager[Any]) -> Round:
    """Does one round of an arm between two measurements of the roof; its training runs inside `count`."""
    before = roof.rates[-1] if roof.rates else roof.measure()
    if isinstance(arm, Own):
        arm.clock.reset()
    with count:
        train_s, losses = timed(arm.train_round)
    parts = split(arm.clock.reset(), train_s) if isinstance(arm, Own) else {}
    mix_s, _ = timed(arm.mix)
    evaluate_s, accuracies = timed(arm.evaluate)
    return Round(train_s, mix_s, evaluate_s, (before, roof.measure()), list(losses), list(accuracies), parts)


def split(taken: dict[str, float], total_s: float) -> dict[str, float]:
    """Returns the seconds of a training by part; what no part claims is the rest."""
    named = {part: taken.get(part, 0.0) for part in PARTS}
    return named | {"rest": total_s - sum(named.values())}


@dataclass
class Counted:
    """What one training round executed."""

    flops: int = 0
    tokens: int = 0
    """Tokens that entered the encoder, padding included; 0 where they enter by no embedding module."""


def attention_forward(q: Size, k: Size, v: Size, *_: object, out_shape: object = None, **__: object) -> int:
    return int(sdpa_flop_count(q, k, v))  # type: ignore[no-untyped-call]


def attention_backward(g: Size, q: Size, k: Size, v: Size, *_: object, out_shape: object = None, **__: object) -> int:
    return int(sdpa_backward_flop_count(g, q, k, v))  # type: ignore[no-untyped-call]


ON_PROCESSORS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
}
"""The fused attention of processors, which torch's counter does not know."""


@contextmanager
def counting(arm: Arm, counted: Counted) -> Iterator[None]:
    """Counts the FLOPs and the tokens of what runs inside, forward and backward."""

    def add(module: object, arguments: tuple[torch.Tensor, ...]) -> None:
        counted.tokens += arguments[0].numel() if arguments else 0

    hooks = [module.register_forward_pre_hook(add) for module in arm.embeddings]
    try:
        with FlopCounterMode(display=False, custom_mapping=ON_PROCESSORS) as flops:
            yield
        counted.flops = int(flops.get_total_flops())
    finally:
        for hook in hooks:
            hook.remove()


def copied(adapters: Sequence[Adapter]) -> list[Adapter]:
    """Returns the adapters as they are now."""
    return [{name: value.detach().clone() for name, value in adapter.items()} for adapter in adapters]
