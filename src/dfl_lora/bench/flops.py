"""The arithmetic a round cannot do without, and what an arm really executes.

Useful work of training, a real token, base frozen: 4P + 12 L S d + LoRA, where P are the frozen matmul parameters of
the encoder (forward 2P, backward through the activations 2P), L the layers, d the hidden size and S the length of the
token's own row; LoRA is 6 r (d_in + d_out) a module, with A frozen 4 r d_in + 6 r d_out. A trained head of H
parameters is 6H a row. Evaluation is the forward alone. Nothing is counted for padding, which HFU shows instead:
executed FLOPs are those that torch's FlopCounterMode sees in one round.
"""

from dataclasses import dataclass
from math import prod

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from dfl_lora.data.batches import Rows
from dfl_lora.models.base import Files, quiet
from dfl_lora.models.placement import Placement


@dataclass(frozen=True)
class Shape:
    """What the formula needs of a base and its adapters."""

    frozen: int
    """P."""
    layers: int
    hidden: int
    rank: int
    modules: tuple[tuple[int, int], ...]
    """(d_in, d_out) of each adapted module."""
    head: int
    """H."""

    def train_flops(self, lengths: Rows, frozen_a: bool) -> float:
        """Returns the useful FLOPs of training on rows of these lengths."""
        tokens, pairs, rows = sums(lengths)
        into, out = (sum(m[i] for m in self.modules) for i in (0, 1))
        lora = self.rank * ((4 if frozen_a else 6) * into + 6 * out)
        return tokens * (4 * self.frozen + lora) + 12 * self.layers * self.hidden * pairs + 6 * self.head * rows

    def evaluation_flops(self, lengths: Rows) -> float:
        """Returns the useful FLOPs of one evaluation on rows of these lengths."""
        tokens, pairs, rows = sums(lengths)
        lora = 2 * self.rank * sum(map(sum, self.modules))
        return tokens * (2 * self.frozen + lora) + 4 * self.layers * self.hidden * pairs + 2 * self.head * rows


def sums(lengths: Rows) -> tuple[int, int, int]:
    """Returns the tokens, the token pairs that attend to each other, and the rows."""
    return int(lengths.sum()), int((lengths**2).sum()), len(lengths)


def shape_of(files: Files, placement: Placement, num_labels: int) -> Shape:
    """Returns the shape of a base model from its configuration: no weights are read."""
    with quiet():
        config = AutoConfig.from_pretrained(files.path, num_labels=num_labels, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
    inside = f"{model.base_model_prefix}.encoder", f"{model.base_model_prefix}.transformer"
    frozen = sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(inside)
    )
    head = sum(prod(shape) for shape in placement.head.values())
    modules = tuple(placement.modules.values())
    return Shape(frozen, config.num_hidden_layers, config.hidden_size, placement.lora.r, modules, head)
