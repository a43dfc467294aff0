"""The sequential learner: plain PEFT, one peer at a time. The reference that the stacked learner must equal."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from dfl_lora.data.batches import Batch, evaluation_batches
from dfl_lora.learners import Progress
from dfl_lora.learners.work import LocalWork, PeerData
from dfl_lora.metrics import Answers
from dfl_lora.models.placement import Placement
from dfl_lora.peers import STEPS, Peer, Peers
from dfl_lora.roles import ROLES, Role
from dfl_lora.schedules import Phase
from dfl_lora.streams import torch_stream

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter], float], torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}


@dataclass
class Draw:
    """The generator that masks are drawn from; None where nothing is dropped."""

    generator: torch.Generator | None = None


class StreamDropout(nn.Module):
    """Dropout whose masks come from the stream of the peer that is in the model."""

    def __init__(self, p: float, draw: Draw) -> None:
        super().__init__()
        self.p = p
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        if self.draw.generator is None or self.p == 0.0:
            return x
        keep = torch.rand(x.shape, generator=self.draw.generator) >= self.p
        return x * keep.to(x) / (1 - self.p)


@dataclass
class SequentialLearner:
    """Trains one PEFT model, loading each peer's adapter and optimiser state into it in turn."""

    model: nn.Module
    placement: Placement
    data: PeerData
    work: LocalWork
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        lora = self.placement.lora
        config = LoraConfig(
            r=lora.r,
            lora_alpha=lora.lora_alpha,
            lora_dropout=max(lora.lora_dropout, 1e-9),
            use_rslora=lora.use_rslora,
            target_modules=list(self.placement.modules),
            fan_in_fan_out=self.placement.transposed,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            self.peft = get_peft_model(self.model, config).eval().to(self.device)
        for path in self.placement.modules if lora.core else ():
            layer = self.peft.get_submodule(f"base_model.model.{path}").lora_B
            layer["default"] = nn.Sequential(nn.Linear(lora.r, lora.r, bias=False), layer["default"]).to(self.device)
        self.draw = Draw()
        for name, module in list(self.peft.named_modules()):
            if isinstance(module, nn.Dropout):
                p = self.work.lora_dropout if ".lora_dropout." in name else module.p * self.work.base_dropout
                parent, _, child = name.rpartition(".")
                setattr(self.peft.get_submodule(parent), child, StreamDropout(p, self.draw))
        self.parameters = {name: self.peft.get_parameter(self.path_of(name)) for name in self.placement.layout.by_name}

    def path_of(self, name: str) -> str:
        """Returns PEFT's name of a parameter; a core is a layer of its own below B."""
        path, _, part = name.rpartition(".")
        b = "lora_B.default.1" if self.placement.lora.core else "lora_B.default"
        places = {"A": "lora_A.default", "B": b, "core": "lora_B.default.0"}
        return f"base_model.model.{path}.{places[part]}.weight" if part in places else f"base_model.model.{name}"

    def load(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.data = values[name].detach().to(self.device, copy=True)

    def train(self, peers: Peers, phase: Phase, round: int) -> Mapping[int, Progress]:
        return {
            p.id: self.train_peer(p, peers.adapter(row), phase, round)
            for row, p in enumerate(peers)
            if p.id not in phase.absent
        }

    def train_peer(self, peer: Peer, adapter: Mapping[str, Tensor], phase: Phase, round: int) -> Progress:
        """Does the local steps of one peer with torch.optim, and writes adapter and state back."""
        self.load(adapter)
        trained = {e.name: e.role for e in peer.adapter.layout.entries if e.role in phase.trained}
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(name in trained)
        optimizer = self.optimizer(peer, trained)
        shard = self.data.train[peer.id]
        steps, total, tokens, skipped = self.work.steps_of(shard), 0.0, 0, 0
        if "gradient_mean" in peer.memory:
            peer.memory["gradient_mean"].flat.zero_()
        for s in range(steps):
            cursor = int(peer.counters[STEPS])
            batch = self.work.order.batch(shard, peer.id, cursor)
            self.draw.generator = torch_stream(self.work.seed, "dropout", peer.id, cursor)
            optimizer.zero_grad()
            loss = 0.0
            for part in batch.parts(self.work.batch_size):
                mean = self.forward(part)[1] * (part.num_learnt / batch.num_learnt)
                mean.backward()  # type: ignore[no-untyped-call]
                loss += mean.item()
            self.draw.generator = None
            optimizer.param_groups[0]["lr"] = self.work.learning_rate_at(round, s, steps)
            skipped += not self.step(peer, optimizer, trained)
            peer.counters[STEPS] += 1
            total += loss
            tokens += batch.tokens
        self.save(peer, optimizer, trained)
        if "gradient_mean" in peer.memory:
            peer.memory["gradient_mean"].flat.div_(max(steps - skipped, 1))
        return Progress(total / steps, steps, tokens, skipped)

    def optimizer(self, peer: Peer, trained: Mapping[str, Role]) -> torch.optim.Optimizer:
        """Returns a torch optimiser in the state the peer was left in."""
        parameters = [self.parameters[name] for name in trained]
        optimizer = OPTIMIZERS[self.work.optimizer](parameters, self.work.learning_rate)
        for name, role in trained.items():
            steps = int(peer.counters[ROLES.index(role)])
            if peer.optimizer and steps:
                state = {key: vectors[name].clone() for key, vectors in peer.optimizer.items()}
                optimizer.state[self.parameters[name]] = {"step": torch.tensor(float(steps)), **state}
        return optimizer

    def step(self, peer: Peer, optimizer: torch.optim.Optimizer, trained: Mapping[str, Role]) -> bool:
        """Clips, shifts and applies one gradient; returns False where it was not finite and was skipped."""
        gradients = {name: self.parameters[name].grad for name in trained}
        if not all(g is not None and torch.isfinite(g).all() for g in gradients.values()):
            return False
        if self.work.max_grad_norm is not None:
            nn.utils.clip_grad_norm_([self.parameters[name] for name in trained], self.work.max_grad_norm)
        shift, mean = peer.memory.get("gradient_shift"), peer.memory.get("gradient_mean")
        for name, gradient in gradients.items():
            assert gradient is not None
            if shift is not None:
                gradient.add_(shift[name])
            if mean is not None:
                mean[name].add_(gradient)
        optimizer.step()
        if "step_shift" in peer.memory:
            for name in trained:
                self.parameters[name].data.add_(optimizer.param_groups[0]["lr"] * peer.memory["step_shift"][name])
        for number, role in enumerate(ROLES):
            peer.counters[number] += role in trained.values()
        return True

    def save(self, peer: Peer, optimizer: torch.optim.Optimizer, trained: Mapping[str, Role]) -> None:
        for name in trained:
            parameter = self.parameters[name]
            peer.adapter[name].copy_(parameter.data)
            for key, vectors in peer.optimizer.items():
                if parameter in optimizer.state:
                    vectors[name].copy_(optimizer.state[parameter][key])

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        output = self.peft(**{name: value.to(self.device) for name, value in batch.padded().items()})
        logits = output if isinstance(output, Tensor) else output.logits
        labels = batch.labels.to(self.device)
        if logits.dim() == 3:  # [rows, width, vocabulary] of a causal model
            logits, learnt = logits[batch.is_token.to(self.device)], labels >= 0
            logits, labels = logits[learnt], labels[learnt]
        return logits, F.cross_entropy(logits, labels)

    @torch.inference_mode()
    def evaluate(self, peers: Peers) -> Mapping[int, Answers]:
        return {i: self.evaluate_peer(i, peers.adapter(row)) for row, i in enumerate(peers.ids)}

    def evaluate_peer(self, peer: int, adapter: Mapping[str, Tensor]) -> Answers:
        self.load(adapter)
        answers = []
        for batch in evaluation_batches(self.data.validation[peer], 64):
            logits, mean = self.forward(batch)
            given = logits.cpu().argmax(1).numpy()
            answers.append(Answers(batch.truth, given, mean.item(), logits.shape[1]))
        return Answers.pooled(answers)
