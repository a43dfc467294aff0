"""How much memory a run will need: its peak resident set, predicted before it trains.

    peak = max(loading, process + base + peers + kernels + max(training, evaluation) + heap
                        + max(exchange, measures, checkpoint, export))

process     this process after one small pass, less base and peers: libraries, rows, what loading left behind
loading     the peak of this process so far: it has loaded what a run loads
base        bytes of the frozen model, once
peers       4 N P (1 + vectors of the optimiser + vectors of the correction); nothing where they are stored on disk
training    the tensors alive in the largest pass, forward and backward, which the recipe's own batches give
evaluation  the same of the largest evaluation pass
heap        what the allocator keeps of freed blocks below LARGE: HEAP for each byte that lived in such blocks, and
            these blocks of training beside the large ones of evaluation
kernels     what oneDNN keeps for each new shape of a pass, up to its own limit of kernels
exchange    the flows of a block where peers are mixed at once, else 4 N S for what leaves and as much for what comes
            back; S numbers in a message
measures    of few peers the factors of a module in float64 and three [2 r N, 2 r N] matrices of inner products;
            of many a few d_out x d_in matrices and the factors of a block of peers
checkpoint  a piece of the file: the state is written from its own memory
export      some columns of the peers in float64, for their mean

A pass of k peers, T tokens and S pairs of tokens that attention weighs needs c0 + c1 k + c2 T + c3 S bytes. The
coefficients are measured with the run's own learner on a few of its rows: the bytes of all storages alive at a time,
seen from torch's dispatcher.
HEAP and KERNELS are what was measured (glibc 2.36, torch 2.13, MiniLM); an allocator that returns memory needs less.
Limits: a processor, not a GPU; the first BATCHES batches stand for a longer run.
"""

import resource
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any
from weakref import finalize

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dfl_lora import blocked, machine, measures
from dfl_lora.build import Federation
from dfl_lora.checkpoint import PIECE
from dfl_lora.data.batches import Batch
from dfl_lora.learners.stacked import StackedLearner, Tally, parts_of, passes, together
from dfl_lora.models.packing import BUCKET, filled
from dfl_lora.networks.memory import MemoryNetwork
from dfl_lora.peers import MEAN_COLUMNS, Peers
from dfl_lora.rounds import at_once
from dfl_lora.schedules import Phase
from dfl_lora.tensors import Tensors

HEAP = 0.6
"""Bytes of freed blocks between the living ones, for each byte of a pass in blocks below LARGE: measured 0.3 to 0.9."""
LARGE = 32 * 2**20
"""glibc gives blocks of this size back to the system as soon as they are freed."""
KERNELS = 512 * 2**20
"""oneDNN keeps the last 1,024 kernels, half a megabyte each: measured, after which a run in bfloat16 grows no more."""
BATCHES = 4000
SMALL = 1024
"""Tokens of a measured pass; one of up to twice as many is measured whole."""
FLOAT32, FLOAT64, MANY = 4, 8, 1 << 24

Measured = Callable[[Sequence[Batch]], None]
"""Does a pass of peers with a batch each."""
Passes = Sequence[Sequence[Batch]]
"""What shares a pass: a batch of each of its peers."""


@dataclass(frozen=True)
class Estimate:
    """The parts in bytes, what the machine has left for a run, and how many such peers would fit into it."""

    loading: int
    process: int
    base: int
    peers: int
    kernels: int
    available: int
    training: int = 0
    evaluation: int = 0
    heap: int = 0
    exchange: int = 0
    measures: int = 0
    checkpoint: int = 0
    export: int = 0
    peers_that_fit: int = 0

    @property
    def total(self) -> int:
        """The peak."""
        return max(self.loading, sum(self.parts().values()))

    def parts(self) -> dict[str, int]:
        """Returns what adds up to the peak where loading is not the peak itself, by name."""
        largest = max(self.training, self.evaluation)
        moments = {name: getattr(self, name) for name in ("exchange", "measures", "checkpoint", "export")}
        last = max(moments, key=lambda name: moments[name])
        return {
            "libraries and rows": self.process,
            "base model": self.base,
            "peers": self.peers,
            "compiled kernels": self.kernels,
            "training pass" if largest == self.training else "evaluation pass": largest,
            "kept by the allocator": self.heap,
            last: moments[last],
        }

    def as_json(self) -> dict[str, int]:
        """Returns the fields and the total."""
        return asdict(self) | {"total": self.total}


def estimate(federation: Federation, available: int | None = None) -> Estimate:
    """Returns the predicted memory of a run of all peers the federation hosts; it moves none of them.

    `available` is what the run may use; None: what this machine has left, with what this process gives back.
    """
    f, learner = federation, federation.learner
    assert isinstance(learner, StackedLearner), "memory is known of the stacked learner alone"
    loading = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    training, evaluation = training_passes(learner, f.peers), evaluation_passes(learner, f.peers)
    phases = {p.trained: p for p in map(f.method.schedule, range(1, learner.work.rounds + 1))}.values()
    steps, forward = [training_pass(learner, f.peers, phase) for phase in phases], evaluation_pass(learner, f.peers)
    steps[0]([cut(training[0][0], 2)])  # what a process has once: libraries read in, weights touched
    base = sum(t.nbytes for t in (*learner.model.parameters(), *learner.model.buffers()))
    on_disk = f.recipe.compute.store == "disk"
    state = 0 if on_disk else sum(matrix.nbytes for matrix in f.peers.arrays().values())
    psutil.heap_trim()
    process = machine.own_memory() - base - (f.peers.x.nbytes if on_disk else state)
    used = psutil.heap_info().heap_used
    alive = [law for step in steps for law in laws_of(step, training, learner.group_tokens)]
    scored = laws_of(forward, evaluation, 2 * learner.group_tokens)
    grown = max(0, psutil.heap_info().heap_used - used) // sum(law.passes for law in (*alive, *scored))
    start = Estimate(
        loading=loading,
        process=process,
        base=base,
        peers=state,
        kernels=min(grown * (num_sizes(training) * len(steps) + num_sizes(evaluation)), KERNELS),
        available=machine.available_memory() + machine.own_memory() if available is None else available,
    )

    exchange = exchanging(f)

    def of(num_peers: int) -> Estimate:
        """Returns the estimate of `num_peers` such peers."""
        growth, held = num_peers / len(f.peers), state * num_peers // len(f.peers)
        whole, small = np.array([np.max([law(growth) for law in laws], axis=0) for laws in (alive, scored)]).T
        return replace(
            start,
            loading=loading + held - state,
            peers=held,
            training=int(whole[0]),
            evaluation=int(whole[1]),
            heap=int((1 + HEAP) * small.max() + (whole - small).max() - whole.max()),
            exchange=exchange(num_peers),
            measures=measuring(f.peers, num_peers),
            checkpoint=PIECE,
            export=FLOAT64 * min(f.peers.layout.size, MEAN_COLUMNS) * num_peers,
        )

    fit = bisect_right(range(1, MANY), start.available, key=lambda n: of(n).total)
    return replace(of(len(f.peers)), peers_that_fit=fit)


def training_passes(learner: StackedLearner, peers: Peers) -> Passes:
    """Returns the training passes of the first BATCHES batches that the peers will read."""
    work, found, left = learner.work, list[list[Batch]](), BATCHES
    steps = {row: work.steps_of(learner.data.train[i]) for row, i in enumerate(peers.ids)}
    for first, s in ((t, s) for t in range(work.rounds) for s in range(max(steps.values()))):
        batches = {
            row: work.order.batch(learner.data.train[peers.ids[row]], peers.ids[row], first * count + s)
            for row, count in steps.items()
            if s < count
        }
        for rows in passes(batches, learner.group_tokens, work.batch_size):
            parts = parts_of([batches[row] for row in rows], work.batch_size)
            found.append(max((some for some, _ in parts), key=lambda some: sum(b.tokens for b in some)))
        left -= len(batches)
        if left <= 0:
            break
    return found


def evaluation_passes(learner: StackedLearner, peers: Peers) -> Passes:
    """Returns the evaluation passes, and those of the consensus, one peer alone."""
    found = list[list[Batch]]()
    for ids in (peers.ids, peers.ids[:1]):
        streams = {i: learner.evaluation_batches(i) for i in ids}
        for batches in together(streams):
            found += ([batches[i] for i in some] for some in passes(batches, 2 * learner.group_tokens))
    return found


Size = tuple[int, int, int]


def size_of(batches: Sequence[Batch]) -> Size:
    """Returns (peers, tokens with their fills, pairs of tokens that attention weighs) of a pass."""
    pairs = sum(int(((-(-b.lengths // BUCKET) * BUCKET) ** 2).sum()) for b in batches)
    return len(batches), sum(filled(b.tokens) for b in batches), pairs


@dataclass(frozen=True)
class Law:
    """The bytes alive in a pass, [1, peers, tokens, pairs] times coefficients: in all, and in blocks below LARGE."""

    size: Size
    coefficients: NDArray[np.float64]  # [4, 2]
    budget: int
    """Tokens of a pass, which no number of peers exceeds."""
    passes: int
    """How many were measured."""

    def __call__(self, growth: float) -> NDArray[np.float64]:
        """Returns both [2] where there are `growth` times as many peers."""
        peers, tokens, pairs = self.size
        share = max(1 / peers, min(growth, max(1.0, self.budget / tokens)))
        bytes: NDArray[np.float64] = np.array([1, peers * share, tokens * share, pairs * share]) @ self.coefficients
        return bytes


def num_sizes(found: Passes) -> int:
    return len(set(map(size_of, found)))


def laws_of(run: Measured, found: Passes, budget: int) -> list[Law]:
    """Returns the laws of the pass with the most tokens and of the one with the most pairs of tokens."""
    largest = {max(range(len(found)), key=lambda n: size_of(found[n])[by]) for by in (1, 2)}
    return [law_of(run, found[n], budget) for n in sorted(largest)]


def law_of(run: Measured, batches: Sequence[Batch], budget: int) -> Law:
    """Measures small passes of the rows of a large one: the law is linear, and what does not vary has no say."""
    size, longest = size_of(batches), max(batches, key=lambda b: int(b.lengths.max()))
    few = max(1, SMALL // int(longest.lengths.max()))
    ones = [[cut(longest, few)], [cut(longest, 2 * few)], [cut(longest, few, shortest=True)]]
    points = (
        [*ones, [cut(b, few) for b in batches[:2]]]
        if size[1] > 2 * SMALL
        else [[cut(b, len(b.lengths)) for b in batches]]
    )
    sizes = [size_of(point) for point in points]
    alive = [peak_of(run, point, LARGE * own[1] // size[1]) for point, own in zip(points, sizes, strict=True)]
    matrix = np.array([[1, *own] for own in sizes], dtype=float)
    scale = matrix.max(0)  # pairs are a thousand times tokens
    coefficients = np.linalg.lstsq(matrix / scale, np.array(alive, dtype=float))[0] / scale[:, None]
    return Law(size, coefficients, budget, len(points))


def cut(batch: Batch, rows: int, *, shortest: bool = False) -> Batch:
    """Returns the longest rows of a batch, or the shortest, by their length; of no table, so that nothing is kept."""
    order = np.argsort(batch.lengths, kind="stable")
    chosen = (order if shortest else order[::-1])[:rows].copy()
    starts = np.cumsum(batch.lengths) - batch.lengths
    tokens = torch.from_numpy(np.concatenate([np.arange(starts[r], starts[r] + batch.lengths[r]) for r in chosen]))
    inputs = {name: values[tokens] for name, values in batch.inputs.items()}
    each = len(batch.labels) == len(batch.lengths)  # of each row, else of each token
    labels = batch.labels[torch.from_numpy(chosen) if each else tokens]
    return replace(batch, inputs=inputs, lengths=batch.lengths[chosen], labels=labels, source=None, rows=None)


def scratch(peers: Peers, num_peers: int) -> Peers:
    """Returns other peers like these, to be moved at will."""
    start = Tensors(peers.x[0].clone(), peers.layout)
    return Peers(range(num_peers), start, peers.common, optimizer=peers.optimizer, memory=peers.memory)


def training_pass(learner: StackedLearner, peers: Peers, phase: Phase) -> Measured:
    """Returns the local step of some peers."""

    def run(batches: Sequence[Batch]) -> None:
        rows = range(len(batches))
        learner.step(scratch(peers, len(rows)), rows, batches, phase, [0.0 for _ in rows], [Tally() for _ in rows])

    return run


def evaluation_pass(learner: StackedLearner, peers: Peers) -> Measured:
    """Returns the forward pass of some peers without gradients."""
    untrained = Phase(1, frozenset(), frozenset())

    @torch.inference_mode()
    def run(batches: Sequence[Batch]) -> None:
        some = scratch(peers, len(batches))
        learner.forward(batches, learner.leaves(some, some.x, some.x, untrained))

    return run


def exchanging(federation: Federation) -> Callable[[int], int]:
    """Returns the bytes, for a number of peers, of what leaves, of what comes back, and of the messages of one decoded.

    Peers that are mixed at once keep some flows of a block instead. Of rounds that differ the largest counts.
    """
    f, method = federation, federation.method
    phases = {(phase := method.schedule(t)).shared: phase for t in range(1, f.recipe.train.rounds + 1)}
    spans = [span for shared in phases for span in f.peers.layout.spans(shared)]
    in_place, kept, degrees = at_once(f.peers, method, MemoryNetwork()), [0], list[int]()
    for graph in f.topology.looked_at():
        sweep = blocked.sweep_of(graph, method.mixing, frozenset()) if in_place else None
        blocks = sweep.blocks(spans, f.peers.x.itemsize) if sweep else None
        if sweep is None or blocks is None:
            degrees.append(graph.max_degree)
        else:
            widest = max((block.stop - block.start for block in blocks), default=0)
            kept.append(sweep.num_kept * widest * f.peers.x.itemsize * torch.get_num_threads())
    peer = scratch(f.peers, 1)[0]
    numbers = max(method.correction.outgoing(peer, phase).flat.numel() for phase in phases.values())
    return lambda n: max([*kept, *(FLOAT32 * numbers * (2 * n + degree + 1) for degree in degrees)])


def measuring(peers: Peers, num_peers: int) -> int:
    """Returns the bytes of the consensus measures of the module that needs most."""
    sizes = [0]
    for a, b in measures.factors(peers):
        r, d_in, d_out = a.shape[1], a.shape[2], b.shape[1]
        if measures.by_pairs(num_peers, r, d_in, d_out):
            sizes.append(3 * (2 * r * num_peers) ** 2 + num_peers * r * (4 * d_in + 5 * d_out))
        else:
            block = min(num_peers, measures.peers_in_block(r, d_in, d_out))
            sizes.append(3 * d_in * d_out + block * r * (6 * d_in + 5 * d_out + 12 * r))
    return FLOAT64 * max(sizes)


class Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of storages that come to life inside the block; `peaks`: of all, of those below `large`."""

    def __init__(self, large: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.large = large
        self.known = set[int]()
        self.now, self.peaks = [0, 0], [0, 0]

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.meet(storages((args, kwargs)), new=False)  # what was there before counts nothing
        result = func(*args, **(kwargs or {}))
        self.meet(storages(result), new=True)
        self.peaks = [max(pair) for pair in zip(self.peaks, self.now, strict=True)]
        return result

    def meet(self, found: Sequence[torch.UntypedStorage], *, new: bool) -> None:
        """Counts storages where they are `new`, and until they die: their addresses are used again."""
        for storage in found:
            if storage._cdata not in self.known:
                size = storage.nbytes() if new else 0
                self.known.add(storage._cdata)
                self.count(size)
                finalize(storage, self.free, storage._cdata, size)

    def count(self, size: int) -> None:
        self.now = [self.now[0] + size, self.now[1] + (size if abs(size) < self.large else 0)]

    def free(self, storage: int, size: int) -> None:
        self.known.discard(storage)
        self.count(-size)


def storages(values: object) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def peak_of(run: Measured, batches: Sequence[Batch], large: int = LARGE) -> list[int]:
    """Returns the most bytes that a pass makes live at a time: of all blocks, of those below `large`."""
    with Alive(large) as alive:
        run(batches)
    return list(alive.peaks)
