"""The stacked learner: many peers in one pass over one shared frozen base.

A pass packs the batches of several peers, up to a budget of tokens, into one row without padding. Their adapters are
leaves [k, r, d] (views of the store where the peers are neighbours in it); the loss is the sum over peers of each
peer's mean, so one backward gives each peer its own gradient, in its row of one buffer. Clipping, the optimiser's step
count and the finite flag are per peer.
"""

import hashlib
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from dfl_lora.data.batches import Batch, evaluation_batches
from dfl_lora.learners import Progress
from dfl_lora.learners.activations import Activations
from dfl_lora.learners.objectives import OBJECTIVES, Outcome
from dfl_lora.learners.optimizers import OPTIMIZERS
from dfl_lora.learners.work import LocalWork, PeerData
from dfl_lora.metrics import Answers
from dfl_lora.models.core import folded
from dfl_lora.models.layers import Pass
from dfl_lora.models.packing import Packing, filled
from dfl_lora.models.reading import install
from dfl_lora.peers import STEPS, Peers
from dfl_lora.roles import ROLES
from dfl_lora.schedules import Phase
from dfl_lora.streams import torch_stream

EVALUATION_ROWS = 64
Clock = Callable[[str], AbstractContextManager[None]]


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
    attention: str = "sdpa"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    num_below: int = 0
    """Layers below the first that is adapted, and where what they make is kept; None: it is made anew."""
    kept: Activations | None = None
    objective: str = "classification"
    """What is learnt, a name of OBJECTIVES."""
    packed: bool = True
    """False: rows are padded to the longest of their batch, as plain tools do; for comparison alone."""
    clock: Clock = lambda part: nullcontext()
    """Told of the parts of the work: data, forward, backward, optimiser."""

    def __post_init__(self) -> None:
        self.current = Pass(attention=self.attention)
        self.model.eval().requires_grad_(False)
        work = self.work
        causal = self.objective == "causal_lm"
        dropout = work.lora_dropout, work.base_dropout
        install(self.model, self.current, self.scaling, *dropout, self.num_below, causal=causal)
        self.model.to(self.device)
        self.dtype = next(self.model.parameters()).dtype

    def train(self, peers: Peers, phase: Phase, round: int) -> Mapping[int, Progress]:
        steps = [0 if i in phase.absent else self.work.steps_of(self.data.train[i]) for i in peers.ids]
        tallies = [Tally() for _ in peers.ids]
        means = peers.memory.get("gradient_mean")
        if means is not None:
            means[[row for row, count in enumerate(steps) if count]] = 0
        for s in range(max(steps)):
            with self.clock("data"):
                batches = {row: self.next_batch(peers, row) for row in range(len(peers)) if s < steps[row]}
            for rows in passes(batches, self.group_tokens, self.work.batch_size):
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
        self.current.generators = self.generators(peers, rows)
        losses = torch.zeros(len(rows), dtype=torch.float64, device=x.device)
        for some, shares in parts_of(batches, self.work.batch_size):
            with self.clock("forward"):
                means = self.forward(some, leaves).means
                means = means * shares.to(means)
            with self.clock("backward"), warnings.catch_warnings():  # gradients are strided views of one buffer
                warnings.filterwarnings("ignore", message="grad and param do not obey")
                means.sum().backward()  # type: ignore[no-untyped-call]
            losses += means.detach()
        self.current.generators = None
        with self.clock("optimiser"):
            finite = (torch.isfinite(gradients).all(1) & torch.isfinite(losses)).tolist()
            clip(gradients, self.work.max_grad_norm)
            kept = [place for place, ok in enumerate(finite) if ok]
            self.optimize(peers, [rows[p] for p in kept], [gradients[p] for p in kept], phase, [rates[p] for p in kept])
        peers.counters[rows, STEPS] += 1
        for row, loss, batch, ok in zip(rows, losses.tolist(), batches, finite, strict=True):
            tallies[row].loss += loss
            tallies[row].steps += 1
            tallies[row].tokens += batch.tokens
            tallies[row].skipped += not ok

    def generators(self, peers: Peers, rows: Sequence[int]) -> list[torch.Generator] | None:
        """Returns what masks are drawn from in a step of these peers; None where nothing is dropped."""
        if not (self.work.lora_dropout or self.work.base_dropout):
            return None
        names = ((peers.ids[row], int(peers.counters[row, STEPS])) for row in rows)
        return [torch_stream(self.work.seed, "dropout", *name) for name in names]

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

    def forward(self, batches: Sequence[Batch], tensors: Mapping[str, Tensor]) -> Outcome:
        """Returns what a pass makes of each peer's batch with its adapter."""
        lengths, widths = [b.lengths for b in batches], [b.width for b in batches]
        if self.packed:
            causal = self.objective == "causal_lm"
            packing = Packing(lengths, widths, self.device, self.dtype, causal=causal)
            inputs = packing.inputs([b.inputs for b in batches], batches[0].pads)
        else:
            whole = [np.full_like(own, width) for own, width in zip(lengths, widths, strict=True)]
            packing = Packing(whole, widths, self.device, self.dtype, lengths)
            columns = [{name: b.padded()[name].flatten(0, 1) for name in b.inputs} for b in batches]
            inputs = packing.inputs(columns, batches[0].pads)
        self.current.packing, self.current.tensors, self.current.view = packing, folded(tensors), "tokens"
        kept = self.kept if self.packed else None
        self.current.below = kept.get(batches, packing) if kept else None
        outcome = OBJECTIVES[self.objective](self.model, inputs, batches, self.current)
        if kept and self.current.below is None and self.current.made is not None:
            kept.put(batches, packing, self.current.made)
        self.current.below = self.current.made = None
        return outcome

    @torch.no_grad()
    def optimize(
        self, peers: Peers, rows: Sequence[int], gradients: Sequence[Tensor], phase: Phase, rates: Sequence[float]
    ) -> None:
        """Gives the optimiser the shifted gradients, moves the peers in `rows` in place, and keeps the books."""
        memory = peers.memory
        for span in peers.layout.spans(phase.trained):
            for row, gradient in zip(rows, gradients, strict=True):
                if "gradient_shift" in memory:
                    gradient[span] += memory["gradient_shift"][row, span]
                if "gradient_mean" in memory:
                    memory["gradient_mean"][row, span] += gradient[span]
        for number, role in enumerate(ROLES):
            for span in peers.layout.spans({role} & phase.trained):
                self.move(peers, rows, gradients, number, span, rates)
                if "step_shift" in memory:
                    for row, rate in zip(rows, rates, strict=True):
                        peers.x[row, span] += rate * memory["step_shift"][row, span]

    def move(
        self, peers: Peers, rows: Sequence[int], gradients: Sequence[Tensor], role: int, span: slice,
        rates: Sequence[float],
    ) -> None:  # fmt: skip
        """Moves one role, lying in `span`, of some peers; those with the same learning rate together."""
        by_rate = defaultdict[float, list[int]](list)
        for place, rate in enumerate(rates):
            by_rate[rate].append(place)
        optimizer = OPTIMIZERS[self.work.optimizer]
        for rate, places in by_rate.items():
            some = [rows[place] for place in places]
            state = {name: [m[row, span] for row in some] for name, m in peers.optimizer.items()}
            given = [gradients[place][span] for place in places]
            steps = peers.counters[some, role].tolist()
            optimizer.step([peers.x[row, span] for row in some], given, state, steps, rate)
        peers.counters[rows, role] += 1

    @torch.inference_mode()
    def evaluate(self, peers: Peers) -> Mapping[int, Answers]:
        same = first_alike(peers, self.data)
        rows = sorted(set(same))
        streams = [self.evaluation_batches(peers.ids[row]) for row in rows]
        answers: dict[int, list[Answers]] = {row: [] for row in rows}
        for batches in together(dict(zip(rows, streams, strict=True))):
            for some in passes(batches, 2 * self.group_tokens):
                x = take(peers.x, some)
                leaves = self.leaves(peers, x, x, Phase(0, frozenset(), frozenset()))
                outcome = self.forward([batches[row] for row in some], leaves)
                for row, own, mean in zip(some, outcome.answers, outcome.means.tolist(), strict=True):
                    answers[row].append(Answers(batches[row].truth, own.cpu().numpy(), mean, outcome.num_labels))
        pooled = {row: Answers.pooled(own) for row, own in answers.items()}
        return {i: pooled[row] for i, row in zip(peers.ids, same, strict=True)}

    def evaluation_batches(self, peer: int) -> Iterator[Batch]:
        """Yields the validation rows of a peer, as many at a time as a pass may hold."""
        return evaluation_batches(self.data.validation[peer], EVALUATION_ROWS, 2 * self.group_tokens)


def parts_of(batches: Sequence[Batch], num_rows: int) -> Iterator[tuple[list[Batch], Tensor]]:
    """Yields the parts of the peers' batches that are read one after the other, and each part's share of its batch.

    Gradients of a step add up: peers whose batches are in as many parts, of `num_rows` rows at most, share a pass.
    """
    apart = [batch.parts(num_rows) for batch in batches]
    for some in zip(*apart, strict=True):
        shares = [part.num_learnt / batch.num_learnt for part, batch in zip(some, batches, strict=True)]
        yield list(some), torch.tensor(shares, dtype=torch.float64)


def first_alike(peers: Peers, data: PeerData) -> list[int]:
    """Returns for each peer the first row with the same adapter, to the bit, and the same validation rows."""
    seen, found = dict[tuple[object, ...], int](), []
    for row, i in enumerate(peers.ids):
        shard = data.validation[i]
        digest = hashlib.blake2b(peers.x[row].contiguous().cpu().numpy().data, digest_size=16).digest()
        found.append(seen.setdefault((digest, id(shard.source), shard.rows.tobytes()), row))
    return found


def take(matrix: Tensor, rows: Sequence[int]) -> Tensor:
    """Returns some rows: a view where they follow each other, else a copy."""
    if list(rows) == list(range(rows[0], rows[-1] + 1)):
        return matrix[rows[0] : rows[-1] + 1]
    return matrix[list(rows)]


def passes(batches: Mapping[int, Batch], budget: int, num_rows: int | None = None) -> Iterator[list[int]]:
    """Yields the rows that share a pass: in order, at most `budget` tokens with their fills, at least one.

    Where batches are read in parts of `num_rows`, all that share a pass have as many parts.
    """
    rows, used, parts = list[int](), 0, 1
    for row, batch in batches.items():
        own = 1 if num_rows is None else -(-len(batch.lengths) // num_rows)
        tokens = filled(-(-batch.tokens // own))
        if rows and (used + tokens > budget or own != parts):
            yield rows
            rows, used = [], 0
        rows.append(row)
        used += tokens
        parts = own
    if rows:
        yield rows


def together(streams: Mapping[int, Iterable[Batch]]) -> Iterator[dict[int, Batch]]:
    """Yields the next batch of every stream that has one, by the stream's number."""
    iterators = {row: iter(stream) for row, stream in streams.items()}
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
