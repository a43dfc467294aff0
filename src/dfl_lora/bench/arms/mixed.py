"""peft-mixed: one base, all peers' rows in one padded forward, `adapter_names=` says whose each row is.

PEFT means this for inference and refuses it in training mode; in evaluation mode it is exactly differentiable. One
Adam holds all adapters; the loss is the sum of the peers' means, so that each gets its own gradient.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfl_lora.bench.arms import EVALUATION_ROWS
from dfl_lora.bench.arms.plain import adapted, base_of, gossip, logits_of, moments, parameters_of, start_at
from dfl_lora.bench.reading import Reader, rectangle
from dfl_lora.bench.setting import Setting
from dfl_lora.recipe import Recipe


class Mixed:
    """All peers in one forward over one base."""

    def __init__(self, recipe: Recipe, setting: Setting, dtype: str) -> None:
        self.setting = setting
        self.reader = Reader(setting)
        self.names = [f"peer{i}" for i in range(setting.num_peers)]
        self.model = adapted(base_of(setting, dtype), setting, self.names)
        self.parameters = [parameters_of(self.model, setting, name) for name in self.names]
        for parameters, start in zip(self.parameters, setting.starts, strict=True):
            start_at(parameters, start, setting.trained)
        trained = [p for parameters in self.parameters for p in parameters.values() if p.requires_grad]
        self.optimizer = torch.optim.Adam(trained, lr=setting.work.learning_rate, foreach=True)
        self.round = self.cursor = 0

    def train_round(self) -> Sequence[float]:
        self.round += 1
        work, everyone = self.setting.work, range(self.setting.num_peers)
        steps = work.steps_of(self.setting.data.train[0])
        total = torch.zeros(self.setting.num_peers)
        for s in range(steps):
            parts = [(i, self.reader.rows(i, self.cursor)) for i in everyone]
            self.cursor += 1
            batch, counts = self.reader.joined(parts), [len(rows) for _, rows in parts]
            names = [self.names[i] for i, rows in parts for _ in rows]
            self.optimizer.param_groups[0]["lr"] = work.learning_rate_at(self.round, s, steps)
            self.optimizer.zero_grad()
            each = F.cross_entropy(logits_of(self.model, batch, adapter_names=names), batch.labels, reduction="none")
            means = torch.stack([own.mean() for own in torch.split(each, counts)])
            means.sum().backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            total += means.detach()
        return (total / steps).tolist()

    @torch.no_grad()
    def mix(self) -> None:
        gossip(self.adapters(), self.setting.weights, self.setting.shared, sparse=True)

    @torch.no_grad()
    def evaluate(self) -> Sequence[float]:
        """Evaluates the peers' validation rows side by side, as many of each as fit into a batch of the usual size."""
        shards = [self.setting.data.validation[i] for i in range(self.setting.num_peers)]
        right = list[Tensor]()
        share = max(1, EVALUATION_ROWS // len(shards))
        for start in range(0, len(shards[0]), share):
            parts = [(shard.source, shard.rows[start : start + share]) for shard in shards]
            width = max(int(shard.source.lengths[rows].max()) for shard, (_, rows) in zip(shards, parts, strict=True))
            batch = rectangle(parts, width)
            names = [name for name, (_, rows) in zip(self.names, parts, strict=True) for _ in rows]
            given = logits_of(self.model, batch, adapter_names=names).argmax(1)
            right.append((given == batch.labels).float().view(len(shards), -1))
        return torch.cat(right, dim=1).mean(1).tolist()

    def adapters(self) -> Sequence[dict[str, Tensor]]:
        return [{name: p.data for name, p in parameters.items()} for parameters in self.parameters]

    def first_moments(self) -> Sequence[dict[str, Tensor]]:
        return [moments(self.optimizer, parameters, self.setting.trained) for parameters in self.parameters]

    @property
    def embeddings(self) -> Sequence[nn.Module]:
        return [self.model.get_input_embeddings()]
