"""seed and seed+: a whole model for every peer, one after the other.

The seed pads every batch to the longest of a thousand rows and evaluates every peer twice a round, before and after
gossip; seed+ is the same fair loop, padded to the longest of the batch, evaluated once. The copies are made in memory,
where the seed loads the base N times: start-up is told in their favour.
"""

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn

from dfl_lora.bench.arms import EVALUATION_ROWS
from dfl_lora.bench.arms.plain import adapted, base_of, gossip, logits_of, loss_of, moments, parameters_of, start_at
from dfl_lora.bench.reading import Reader
from dfl_lora.bench.setting import Setting
from dfl_lora.recipe import Recipe

THOUSAND = 1000


class Copies:
    """N full copies of the base, each with PEFT's LoRA and an Adam of its own."""

    def __init__(self, setting: Setting, dtype: str, longest_of: int | None, evaluations: int) -> None:
        self.setting = setting
        self.reader = Reader(setting, longest_of)
        self.evaluations = evaluations
        base = base_of(setting, dtype)
        copies = [base if i == setting.num_peers - 1 else deepcopy(base) for i in range(setting.num_peers)]
        self.models = [adapted(copy, setting, ["default"]) for copy in copies]
        self.parameters = [parameters_of(model, setting, "default") for model in self.models]
        self.optimizers = []
        for parameters, start in zip(self.parameters, setting.starts, strict=True):
            start_at(parameters, start, setting.trained)
            trained = [p for p in parameters.values() if p.requires_grad]
            self.optimizers.append(torch.optim.Adam(trained, lr=setting.work.learning_rate, foreach=False))
        self.round = 0
        self.cursors = [0] * setting.num_peers

    def train_round(self) -> Sequence[float]:
        self.round += 1
        return [self.train_peer(i) for i in range(self.setting.num_peers)]

    def train_peer(self, peer: int) -> float:
        work, optimizer = self.setting.work, self.optimizers[peer]
        steps, total = work.steps_of(self.setting.data.train[peer]), 0.0
        for s in range(steps):
            batch = self.reader.batch(peer, self.cursors[peer])
            self.cursors[peer] += 1
            optimizer.param_groups[0]["lr"] = work.learning_rate_at(self.round, s, steps)
            optimizer.zero_grad()
            loss = loss_of(self.models[peer], batch)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += loss.item()
        return total / steps

    @torch.no_grad()
    def mix(self) -> None:
        gossip(self.adapters(), self.setting.weights, self.setting.shared, sparse=False)

    def evaluate(self) -> Sequence[float]:
        for _ in range(self.evaluations - 1):
            self.evaluate_once()
        return self.evaluate_once()

    @torch.inference_mode()
    def evaluate_once(self) -> Sequence[float]:
        accuracies = []
        for peer, model in enumerate(self.models):
            batches = self.reader.validation(peer, EVALUATION_ROWS)
            right = [(logits_of(model, b).argmax(1) == b.labels).float() for b in batches]
            accuracies.append(torch.cat(right).mean().item())
        return accuracies

    def adapters(self) -> Sequence[dict[str, Tensor]]:
        return [{name: p.data for name, p in parameters.items()} for parameters in self.parameters]

    def first_moments(self) -> Sequence[dict[str, Tensor]]:
        return [
            moments(optimizer, parameters, self.setting.trained)
            for optimizer, parameters in zip(self.optimizers, self.parameters, strict=True)
        ]

    @property
    def embeddings(self) -> Sequence[nn.Module]:
        return [model.get_input_embeddings() for model in self.models]


def seed(recipe: Recipe, setting: Setting, dtype: str) -> Copies:
    return Copies(setting, dtype, longest_of=THOUSAND, evaluations=2)


def seed_plus(recipe: Recipe, setting: Setting, dtype: str) -> Copies:
    return Copies(setting, dtype, longest_of=None, evaluations=1)
