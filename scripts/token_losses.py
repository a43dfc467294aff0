"""Seconds of a loss of labelled tokens, forward and backward, on one thread: ours in chunks, torch's, and all logits.

python scripts/token_losses.py [TOKENS WIDTH WORDS]
"""

import sys
from collections.abc import Callable
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor

from dfl_lora.models.causal import CHUNK_NUMBERS, token_losses

REPEATS = 5


def main() -> None:
    torch.set_num_threads(1)
    tokens, width, words = (int(given) for given in (sys.argv[1:] or (512, 1024, 32_000)))
    weight = torch.randn(words, width) / width**0.5
    hidden, targets = torch.randn(tokens, width, requires_grad=True), torch.randint(words, (tokens,))
    chunk = max(1, CHUNK_NUMBERS // words)
    ways: dict[str, Callable[[], Tensor]] = {
        "ours, in chunks": lambda: token_losses(hidden, targets, lambda h: h @ weight.T, chunk)[0].sum(),
        "all logits at once": lambda: F.cross_entropy(hidden @ weight.T, targets, reduction="sum"),
    }
    if hasattr(F, "linear_cross_entropy"):
        ways["torch's linear_cross_entropy"] = lambda: F.linear_cross_entropy(hidden, weight, targets, reduction="sum")
    for name, loss in ways.items():
        taken = []
        for _ in range(REPEATS):
            hidden.grad, start = None, perf_counter()
            loss().backward()  # type: ignore[no-untyped-call]
            taken.append(perf_counter() - start)
        print(f"{name:30} {min(taken):.2f} to {max(taken):.2f} s")


if __name__ == "__main__":
    main()
