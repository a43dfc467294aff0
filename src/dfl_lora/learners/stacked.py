"""The stacked learner: many peers in one pass over one shared frozen base.

A pass serves the peers whose next batches have the same shape, up to a budget of padded tokens. Their
adapters are leaves [k, r, d] (views of the store where the peers are neighbours in it); the loss is the
sum over peers of each peer's mean, so one backward gives each peer its own gradient. Clipping, the
optimiser's step count and the finite flag are per peer.
"""

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfl_lora.data.batches import Batch, evaluation_batches
from dfl_lora.learners import Progress
from dfl_lora.learners.optimizers import OPTIMIZERS
from dfl_lora.learners.work import LocalWork, PeerData
from dfl_lora.metrics import Answers
from dfl_lora.models.layers import Pass, install
from dfl_lora.peers import STEPS, Peers
from dfl_lora.roles import ROLES
from dfl_lora.schedules import Phase
from dfl_lora.streams import torch_stream

EVALUATION_ROWS = 64
Clock = Callable[[str], AbstractContextManager[None]]


def no_clock(part: str) -> AbstractContextManager[None]:
    return nullcontext()


@dataclass
class Tally:
    """Running sums of one peer's local steps."""

    loss: float = 0.0
    steps: int = 0
    tokens: int = 0
    skipped: int = 0

    def progress(self) -> Progress:
        return Progress(self.loss / max(self.steps, 1), self.steps, self.tokens, self.skipped)


@dataclass
class StackedLearner:
    """Trains and evaluates all hosted peers over `model`, whose linear layers it replaces in place."""

    model: nn.Module
    data: PeerData
    work: LocalWork
    scaling: float
    group_tokens: int = 4096
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    clock: Clock = no_clock
    """Takes the time of the parts of a step: data, forward, backward, optimiser."""

    def __post_init__(self) -> None:
        self.current = Pass()
        self.model.eval().requires_grad_(False)
        install(self.model, self.current, self.scaling, self.work.lora_dropout, self.work.base_dropout)
        self.model.to(self.device)

    def train(self, peers: Peers, phase: Phase, round: int) -> Mapping[int, Progress]:
        steps = [0 if i in phase.absent else self.work.steps_of(self.data.train[i]) for i in peers.ids]
        tallies = [Tally() for _ in peers.ids]
        means = peers.memory.get("gradient_mean")
        if means is not None:
            means[[row for row, count in enumerate(steps) if count]] = 0
        for s in range(max(steps)):
            with self.clock("data"):
                batches = {row: self.next_batch(peers, row) for row in range(len(peers)) if s < steps[row]}
            for rows in passes(batches, self.group_tokens):
                rates = [self.work.learning_rate_at(round, s, steps[row]) for row in rows]
                self.step(peers, rows, [batches[row] for row in rows], phase, rates, tallies)
        if means is not None:
            given = torch.tensor([max(tally.steps - tally.skipped, 1) for tally in tallies])
            means.div_(given.to(means).unsqueeze(1))
        return {i: t.progress() for i, t in zip(peers.ids, tallies, strict=True) if i not in phase.absent}

    def next_batch(self, peers: Peers, row: int) -> Batch:
        cursor = int(peers.counters[row, STEPS])
        return self.work.order.batch(self.data.train[peers.ids[row]], peers.ids[row], cursor)

    def step(
        self,
        peers: Peers,
        rows: Sequence[int],
        batches: Sequence[Batch],
        phase: Phase,
        rates: Sequence[float],
        tallies: Sequence[Tally],
    ) -> None:
        """Does one local step of the peers in `rows`: forward, backward, clip, shift, optimise."""
        x = take(peers.x, rows)
        gradients = torch.zeros_like(x)
        leaves = self.leaves(peers, x, gradients, phase)
        self.current.generators = [
            torch_stream(self.work.seed, "dropout", peers.ids[row], int(peers.counters[row, STEPS])) for row in rows
        ]
        with self.clock("forward"):
            losses = self.forward(batches, leaves)[1]
        with warnings.catch_warnings(), self.clock("backward"):  # gradients are strided views of one buffer on purpose
            warnings.filterwarnings("ignore", message="grad and param do not obey")
            losses.sum().backward()  # type: ignore[no-untyped-call]
        self.current.generators = None
        losses = losses.detach()
        finite = torch.isfinite(gradients).all(1) & torch.isfinite(losses)
        kept = [row for row, ok in zip(rows, finite.tolist(), strict=True) if ok]
        with self.clock("optimiser"):
            clip(gradients, self.work.max_grad_norm)
            chosen = torch.tensor(rates, dtype=torch.float64)[finite.cpu()]
            self.optimize(peers, kept, gradients[finite], phase, chosen)
        peers.counters[rows, STEPS] += 1
        for row, loss, batch in zip(rows, losses.tolist(), batches, strict=True):
            tallies[row].loss += loss
            tallies[row].steps += 1
            tallies[row].tokens += batch.tokens
            tallies[row].skipped += row not in kept

    def leaves(self, peers: Peers, x: Tensor, gradients: Tensor, phase: Phase) -> dict[str, Tensor]:
        """Returns every adapter tensor of the pass; trained ones are leaves whose gradients fall into one buffer."""
        tensors = {name: value.unsqueeze(0) for name, value in peers.common.items()}
        for e in peers.layout.entries:
            leaf = x[:, e.start : e.stop].view(len(x), *e.shape).detach()
            if e.role in phase.trained:
                leaf.requires_grad_()
                leaf.grad = gradients[:, e.start : e.stop].view(len(x), *e.shape)
            tensors[e.name] = leaf
        return tensors

    def forward(self, batches: Sequence[Batch], tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Returns the logits [k, rows, labels] and each peer's mean loss [k] of equally shaped batches."""
        self.current.num_peers, self.current.tensors = len(batches), tensors
        inputs = {name: torch.cat([b.inputs[name] for b in batches]).to(self.device) for name in batches[0].inputs}
        labels = torch.cat([b.labels for b in batches]).to(self.device)
        output = self.model(**inputs)
        logits = output if isinstance(output, Tensor) else output.logits
        logits = logits if logits.dtype == torch.float64 else logits.float()
        losses = F.cross_entropy(logits, labels, reduction="none").view(len(batches), -1).mean(1)
        return logits.view(len(batches), -1, logits.shape[-1]), losses

    @torch.no_grad()
    def optimize(self, peers: Peers, rows: Sequence[int], gradients: Tensor, phase: Phase, rates: Tensor) -> None:
        """Gives the optimiser the shifted gradients, moves the peers in `rows`, and keeps the books."""
        if not rows:
            return
        optimizer = OPTIMIZERS[self.work.optimizer]
        x = take(peers.x, rows)
        state = {name: take(m, rows) for name, m in peers.optimizer.items()}
        for span in peers.layout.spans(phase.trained):
            if "gradient_shift" in peers.memory:
                gradients[:, span] += take(peers.memory["gradient_shift"], rows)[:, span]
            if "gradient_mean" in peers.memory:
                peers.memory["gradient_mean"][rows, span] += gradients[:, span]
        for number, role in enumerate(ROLES):
            for span in peers.layout.spans({role} & phase.trained):
                peers.counters[rows, number] += 1
                moments = {name: m[:, span] for name, m in state.items()}
                counts = peers.counters[rows, number].to(x.device)
                optimizer.step(x[:, span], gradients[:, span], moments, counts, rates.to(x.device))
                if "step_shift" in peers.memory:
                    x[:, span] += take(peers.memory["step_shift"], rows)[:, span]
        put(peers.x, rows, x)
        for name, m in state.items():
            put(peers.optimizer[name], rows, m)

    @torch.inference_mode()
    def evaluate(self, peers: Peers) -> Mapping[int, Answers]:
        streams = [evaluation_batches(self.data.validation[i], EVALUATION_ROWS) for i in peers.ids]
        answers: list[list[Answers]] = [[] for _ in peers.ids]
        for batches in together(streams):
            for rows in passes(batches, 2 * self.group_tokens):
                x = take(peers.x, rows)
                tensors = {name: value.unsqueeze(0) for name, value in peers.common.items()}
                tensors |= {e.name: x[:, e.start : e.stop].view(len(x), *e.shape) for e in peers.layout.entries}
                logits, losses = self.forward([batches[row] for row in rows], tensors)
                for row, own, mean in zip(rows, logits.cpu(), losses.tolist(), strict=True):
                    labels, given = batches[row].labels.numpy(), own.argmax(1).numpy()
                    answers[row].append(Answers(labels, given, mean, own.shape[1]))
        return {i: Answers.pooled(own) for i, own in zip(peers.ids, answers, strict=True)}


def take(matrix: Tensor, rows: Sequence[int]) -> Tensor:
    """Returns some rows: a view where they follow each other, else a copy."""
    if list(rows) == list(range(rows[0], rows[-1] + 1)):
        return matrix[rows[0] : rows[-1] + 1]
    return matrix[list(rows)]


def put(matrix: Tensor, rows: Sequence[int], value: Tensor) -> None:
    """Writes back what `take` returned, where that was a copy."""
    if value.untyped_storage().data_ptr() != matrix.untyped_storage().data_ptr():
        matrix[list(rows)] = value


def passes(batches: Mapping[int, Batch], budget: int) -> Iterator[list[int]]:
    """Yields the rows that share a pass: batches of equal shape, at most `budget` padded tokens, at least one."""
    by_shape = defaultdict[tuple[int, ...], list[int]](list)
    for row, batch in batches.items():
        by_shape[batch.shape].append(row)
    for shape, rows in by_shape.items():
        size = max(1, budget // (shape[0] * shape[1]))
        yield from (rows[i : i + size] for i in range(0, len(rows), size))


def together(streams: Sequence[Iterable[Batch]]) -> Iterator[dict[int, Batch]]:
    """Yields the next batch of every stream that has one, by the stream's number."""
    iterators = dict(enumerate(map(iter, streams)))
    while iterators:
        batches = {}
        for row in list(iterators):
            batch = next(iterators[row], None)
            if batch is None:
                del iterators[row]
            else:
                batches[row] = batch
        if batches:
            yield batches


def clip(gradients: Tensor, max_norm: float | None) -> None:
    """Scales each row [k, P] to at most `max_norm`, as torch's clip_grad_norm_ does for one model."""
    if max_norm is not None:
        norms = torch.linalg.vector_norm(gradients, dim=1, keepdim=True)
        gradients.mul_((max_norm / (norms + 1e-6)).clamp(max=1.0))
