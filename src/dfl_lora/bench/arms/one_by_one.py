"""seed, seed+ and peft-switch: peers one after the other, each with PEFT's LoRA and an Adam of its own.

The seed holds a whole model for every peer, pads every batch to the longest of a thousand rows and evaluates every
peer twice a round (here both after gossip, at the same cost); seed+ is the same fair loop, padded to the longest of
the batch, evaluated once. The copies are made in memory, where the seed loads the base N times: start-up is told in
their favour.
peft-switch holds one base with a named adapter for every peer, and calls set_adapter before its steps.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy

import torch
from peft import PeftModel
from torch import Tensor, nn

from dfl_lora.bench.arms import EVALUATION_ROWS
from dfl_lora.bench.arms.plain import (
    Parameters,
    adapted,
    base_of,
    gossip,
    logits_of,
    loss_of,
    moments,
    parameters_of,
    start_at,
)
from dfl_lora.bench.reading import Reader
from dfl_lora.bench.setting import Setting
from dfl_lora.recipe import Recipe

THOUSAND = 1000


class OneByOne:
    """Peers in turn; `model_of` returns the model with a peer's adapter at work."""

    def __init__(
        self, setting: Setting, reader: Reader, models: Sequence[PeftModel], parameters: Sequence[Parameters],
        model_of: Callable[[int], PeftModel], plainly: bool, evaluations: int = 1,
    ) -> None:  # fmt: skip
        """`plainly`: an Adam that goes tensor by tensor and gossip over all peers, as the seed has them."""
        self.setting, self.reader, self.models, self.parameters = setting, reader, models, parameters
        self.model_of, self.plainly, self.evaluations = model_of, plainly, evaluations
        self.optimizers = []
        for own, start in zip(parameters, setting.starts, strict=True):
            start_at(own, start, setting.trained)
            trained = [p for p in own.values() if p.requires_grad]
            self.optimizers.append(torch.optim.Adam(trained, lr=setting.work.learning_rate, foreach=not plainly))
        self.round = 0
        self.cursors = [0] * setting.num_peers

    def train_round(self) -> Sequence[float]:
        self.round += 1
        return [self.train_peer(i) for i in range(self.setting.num_peers)]

    def train_peer(self, peer: int) -> float:
        work, optimizer, model = self.setting.work, self.optimizers[peer], self.model_of(peer)
        steps, total = work.steps_of(self.setting.data.train[peer]), 0.0
        for s in range(steps):
            batch = self.reader.batch(peer, self.cursors[peer])
            self.cursors[peer] += 1
            optimizer.param_groups[0]["lr"] = work.learning_rate_at(self.round, s, steps)
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += loss.item()
        return total / steps

    @torch.no_grad()
    def mix(self) -> None:
        gossip(self.adapters(), self.setting.weights, self.setting.shared, sparse=not self.plainly)

    def evaluate(self) -> Sequence[float]:
        for _ in range(self.evaluations - 1):
            self.evaluate_once()
        return self.evaluate_once()

    @torch.no_grad()
    def evaluate_once(self) -> Sequence[float]:
        accuracies = []
        for peer in range(self.setting.num_peers):
            model = self.model_of(peer)
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


def copies(setting: Setting, dtype: str, longest_of: int | None, evaluations: int) -> OneByOne:
    """Returns peers with a full copy of the base each."""
    base, last = base_of(setting, dtype), setting.num_peers - 1
    models = [adapted(base if i == last else deepcopy(base), setting, ["default"]) for i in range(setting.num_peers)]
    parameters = [parameters_of(model, setting, "default") for model in models]
    reader = Reader(setting, longest_of)
    return OneByOne(setting, reader, models, parameters, models.__getitem__, plainly=True, evaluations=evaluations)


def seed(recipe: Recipe, setting: Setting, dtype: str) -> OneByOne:
    return copies(setting, dtype, longest_of=THOUSAND, evaluations=2)


def seed_plus(recipe: Recipe, setting: Setting, dtype: str) -> OneByOne:
    return copies(setting, dtype, longest_of=None, evaluations=1)


def switch(recipe: Recipe, setting: Setting, dtype: str) -> OneByOne:
    """Returns peers over one base."""
    names = [f"peer{i}" for i in range(setting.num_peers)]
    model = adapted(base_of(setting, dtype), setting, names)
    parameters = [parameters_of(model, setting, name) for name in names]

    def switched(peer: int) -> PeftModel:
        model.set_adapter(names[peer])
        for name, parameter in parameters[peer].items():  # set_adapter trains all of an adapter
            parameter.requires_grad_(name in setting.trained)
        return model

    return OneByOne(setting, Reader(setting), [model], parameters, switched, plainly=False)
