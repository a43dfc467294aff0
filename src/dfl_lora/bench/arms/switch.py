"""peft-switch: one base, a named adapter for every peer, set_adapter before its steps, an Adam each."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dfl_lora.bench.arms import EVALUATION_ROWS
from dfl_lora.bench.arms.plain import adapted, base_of, gossip, logits_of, loss_of, moments, parameters_of, start_at
from dfl_lora.bench.reading import Reader
from dfl_lora.bench.setting import Setting
from dfl_lora.recipe import Recipe


class Switch:
    """Peers one after the other over one base."""

    def __init__(self, recipe: Recipe, setting: Setting, dtype: str) -> None:
        self.setting = setting
        self.reader = Reader(setting)
        self.names = [f"peer{i}" for i in range(setting.num_peers)]
        self.model = adapted(base_of(setting, dtype), setting, self.names)
        self.parameters = [parameters_of(self.model, setting, name) for name in self.names]
        self.optimizers = []
        for parameters, start in zip(self.parameters, setting.starts, strict=True):
            start_at(parameters, start, setting.trained)
            trained = [p for p in parameters.values() if p.requires_grad]
            self.optimizers.append(torch.optim.Adam(trained, lr=setting.work.learning_rate, foreach=True))
        self.round = 0
        self.cursors = [0] * setting.num_peers

    def switch_to(self, peer: int) -> None:
        self.model.set_adapter(self.names[peer])
        for name, parameter in self.parameters[peer].items():  # set_adapter trains all of an adapter
            parameter.requires_grad_(name in self.setting.trained)

    def train_round(self) -> Sequence[float]:
        self.round += 1
        return [self.train_peer(i) for i in range(self.setting.num_peers)]

    def train_peer(self, peer: int) -> float:
        self.switch_to(peer)
        work, optimizer = self.setting.work, self.optimizers[peer]
        steps, total = work.steps_of(self.setting.data.train[peer]), 0.0
        for s in range(steps):
            batch = self.reader.batch(peer, self.cursors[peer])
            self.cursors[peer] += 1
            optimizer.param_groups[0]["lr"] = work.learning_rate_at(self.round, s, steps)
            optimizer.zero_grad()
            loss = loss_of(self.model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += loss.item()
        return total / steps

    @torch.no_grad()
    def mix(self) -> None:
        gossip(self.adapters(), self.setting.weights, self.setting.shared, sparse=True)

    @torch.no_grad()
    def evaluate(self) -> Sequence[float]:
        accuracies = []
        for peer in range(self.setting.num_peers):
            self.switch_to(peer)
            batches = self.reader.validation(peer, EVALUATION_ROWS)
            right = [(logits_of(self.model, b).argmax(1) == b.labels).float() for b in batches]
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
        return [self.model.get_input_embeddings()]
