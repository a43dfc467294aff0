"""A run in progress: the rounds of the hosted peers over any network, and what is kept of them in a run directory.

RUN/recipe.yaml rounds.jsonl summary.json partition.json log.txt adapters/ checkpoint/ report.html. A run
that was stopped goes on from its last checkpoint to the bit; a line of rounds.jsonl is one round.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import torch

from dfl_lora.build import Federation, build
from dfl_lora.checkpoint import load_checkpoint, save_checkpoint
from dfl_lora.errors import UserError
from dfl_lora.files import append, sweep, write_atomically
from dfl_lora.gradient_start import start_at_gradients
from dfl_lora.metrics import METRICS, Answers
from dfl_lora.networks import Network
from dfl_lora.peers import Peers
from dfl_lora.reading import load_recipe
from dfl_lora.recipe import Recipe
from dfl_lora.records import consensus_of, hosted_in, hosts_all, line_of, partition_text, summary_of
from dfl_lora.report.page import write_report
from dfl_lora.rounds import Record, mix, rounds
from dfl_lora.run_directory import RECIPE, Line, clear, read_lines
from dfl_lora.watching import whose

MANY_PEERS = 64


@dataclass(frozen=True)
class Start:
    """What the seed's order does before round 1: every peer's accuracy, the measure after one gossip, its bytes."""

    accuracies: list[float]
    consensus_error: float | None
    """None where not all peers are hosted."""
    bytes_sent_per_peer: float


class Observer(Protocol):
    """Who watches a run: the screen, the log."""

    def started(self, federation: Federation, lines: Sequence[Line], start: Start | None) -> None:
        """The run begins, or goes on after the rounds in `lines`."""
        ...

    def finished_round(self, record: Record, line: Line) -> None: ...
    def ended(self, summary: Mapping[str, Any], run: Path) -> None: ...


@dataclass
class Stopwatch:
    """Seconds by part, summed since the last `reset`."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = perf_counter()
        try:
            yield
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + perf_counter() - start

    def reset(self) -> dict[str, float]:
        taken, self.seconds = self.seconds, {}
        return taken


def nothing_more() -> Mapping[str, Any]:
    return {}


def build_for(recipe: Recipe, run: Path, ids: Sequence[int] | None = None, *, resume: bool) -> Federation:
    """Returns the federation of a recipe; a run that goes on computes as it did, and by the same recipe."""
    recorded = load_recipe(run / RECIPE) if resume and (run / RECIPE).exists() else None
    recipe = recipe.model_copy(update={"compute": recorded.compute}) if recorded else recipe
    federation = build(recipe, ids, folder=run)
    if recorded and recorded.digest != federation.digest:
        raise UserError(
            f"The run in {run} has another recipe (digest {str(recorded.digest)[:12]}, not {federation.digest[:12]}); "
            "resume with the recipe it was started with, or start anew with --overwrite."
        )
    return federation


def open_run(federation: Federation, run: Path, observers: Sequence[Observer], *, resume: bool) -> "Running":
    """Makes a directory that nobody else writes to that of a run, loads its checkpoint, and returns the run.

    Without `resume` what an earlier run left is removed.
    """
    sweep(run)
    if not (resume and (run / RECIPE).exists()):
        clear(run)
        write_atomically(run / RECIPE, federation.recipe.to_yaml().encode())
    running = Running(federation, run, observers)
    if federation.recipe.lora.init == "gradient_svd":  # what is frozen is in no checkpoint
        running.bytes_of_start = start_at_gradients(federation)
    running.load()
    write_atomically(run / "partition.json", partition_text(federation).encode())
    return running


@dataclass
class Running:
    """The hosted peers of a federation on their way; `lines` has a line for each round that is over."""

    federation: Federation
    run: Path
    observers: Sequence[Observer]
    lines: list[Line] = field(default_factory=list)
    start: Start | None = None
    bytes_of_start: float = 0.0
    """What each peer sent to find where all begin."""
    kept: Mapping[str, Any] = field(default_factory=dict)
    """What a checkpoint keeps for the network."""
    clock: Stopwatch = field(default_factory=Stopwatch)
    answers: Mapping[int, Answers] = field(default_factory=dict)
    """Of the peers after the last round, where this process ran it and evaluated them."""

    @property
    def done(self) -> bool:
        return len(self.lines) >= self.federation.recipe.train.rounds

    @property
    def next_round(self) -> int:
        """The next round in which peers exchange; 0 is the gossip before round 1 of the seed's order."""
        return len(self.lines) + 1 if self.lines or self.federation.recipe.train.order == "standard" else 0

    def load(self) -> None:
        """Loads the checkpoint into the peers, and cuts rounds.jsonl back to its rounds."""
        f = self.federation
        checkpoint = load_checkpoint(self.run / "checkpoint", f.peers, f.digest)
        self.lines = read_lines(self.run, checkpoint.round if checkpoint else 0)
        write_atomically(self.run / "rounds.jsonl", "".join(json.dumps(line) + "\n" for line in self.lines).encode())
        if checkpoint is not None:
            self.start = Start(**checkpoint.kept["start"]) if checkpoint.kept["start"] else None
            self.kept = {key: value for key, value in checkpoint.kept.items() if key != "start"}

    def begin(self, network: Network) -> None:
        """Tells the observers; a run that begins by the seed's order gossips once before its first round."""
        if self.next_round == 0:
            self.start = self.seed_start(network)
        self.announce()

    def announce(self) -> None:
        for observer in self.observers:
            observer.started(self.federation, self.lines, self.start)

    def seed_start(self, network: Network) -> Start:
        """Evaluates all peers, gossips once and measures, before round 1."""
        f = self.federation
        answers = f.learner.evaluate(f.peers)
        traffic = mix(f.peers, f.method.schedule(0), f.method.topology(0), 0, f.method, network)
        accuracies = [METRICS["accuracy"](own) for own in answers.values()]
        error = consensus_of(f.peers).consensus_error if hosts_all(f) else None
        return Start(accuracies, error, traffic.bytes / len(f.peers))

    def go(self, network: Network, keep: Callable[[], Mapping[str, Any]] = nothing_more) -> None:
        """Runs the rounds that are left, one line and perhaps a checkpoint each; it holds what `keep` returns then."""
        f, total = self.federation, self.federation.recipe.train.rounds
        if self.done:
            return
        begun, self.clock.seconds = perf_counter(), {}
        for record in rounds(
            f.peers, f.method, f.learner, network,
            before=self.before, after=self.after, clock=self.clock, first=len(self.lines) + 1,
        ):  # fmt: skip
            line = hosted_in(f) | line_of(record, str(f.recipe.evaluate.metric), self.seconds(record, begun))
            due = record.round % f.recipe.output.checkpoint_every == 0 or record.round == total
            # a checkpoint never tells of rounds that a power cut took from the lines
            append(self.run / "rounds.jsonl", json.dumps(line) + "\n", synced=due)
            self.lines.append(line)
            if due:
                self.save(keep())
            for observer in self.observers:
                observer.finished_round(record, line)
            if record.round == total:
                return
            begun = perf_counter()

    def before(self, t: int, peers: Peers) -> Mapping[str, Any]:
        return {"answers": self.evaluate(t, peers)} if self.federation.recipe.evaluate.before_mixing else {}

    def after(self, t: int, peers: Peers) -> Mapping[str, Any]:
        agreement = {"consensus": consensus_of(peers)} if hosts_all(self.federation) else {}
        self.answers = self.evaluate(t, peers)
        return {"answers": self.answers, **agreement}

    def evaluate(self, t: int, peers: Peers) -> dict[int, Answers]:
        """Returns the answers of a round in which evaluation is due, else nothing."""
        recipe = self.federation.recipe
        if t % recipe.evaluate.every and t != recipe.train.rounds:
            return {}
        with self.clock("evaluate"):
            return dict(self.federation.learner.evaluate(peers))

    def seconds(self, record: Record, begun: float) -> dict[str, float]:
        """Returns the seconds of a round by part; the wait for slower neighbours is no part of the exchange."""
        taken = {"train": 0.0, "exchange": 0.0, "evaluate": 0.0} | self.clock.reset()
        waited = min(record.traffic.waited_s, taken["exchange"])
        return taken | {"exchange": taken["exchange"] - waited, "wait": waited, "total": perf_counter() - begun}

    def save(self, kept: Mapping[str, Any]) -> None:
        """Writes a checkpoint of the last round."""
        f, start = self.federation, {"start": asdict(self.start) if self.start else None}
        save_checkpoint(self.run / "checkpoint", f.peers, len(self.lines), f.digest, {**kept, **start})

    def end(self) -> Line:
        """Writes what a run leaves at its end, and returns the summary."""
        self.check_finite()
        summary = self.summary()
        self.write_adapters()
        self.write_end(summary)
        return summary

    def check_finite(self) -> None:
        peers = self.federation.peers
        if not any(peer.adapter.is_finite() for peer in peers):
            subject = "every peer's adapter" if hosts_all(self.federation) else f"the adapter of {whose(peers.ids)}"
            raise RuntimeError(f"{subject} became non-finite; lower train.learning_rate or set train.max_grad_norm.")

    def summary(self) -> Line:
        """Returns the end of the run, from its lines and one evaluation of the consensus."""
        with self.clock("evaluate"):
            agreed = self.consensus_answers() if hosts_all(self.federation) else None
        before = self.bytes_of_start + (self.start.bytes_sent_per_peer if self.start else 0.0)
        return summary_of(self.federation, self.lines, agreed, before)

    def consensus_answers(self) -> Answers:
        """Returns the answers of the mean of all peers, on every validation table there is.

        Where every peer is at the mean to the bit, they are those of the last round.
        """
        f = self.federation
        tables = {id(f.data.peers.validation[i].source): i for i in reversed(f.peers.ids)}
        ids, mean = sorted(tables.values()), f.peers.agreed()
        known = self.answers and all(torch.equal(peer.adapter.flat, mean.flat) for peer in f.peers)
        answers = self.answers if known else f.learner.evaluate(f.peers.consensus(ids))
        return Answers.pooled([answers[i] for i in ids])

    def write_adapters(self) -> None:
        """Writes PEFT folders of the consensus, where all peers are here, and, unless there are very many, of each."""
        f = self.federation
        wanted = f.recipe.output.adapters or ("all" if len(f.peers) <= MANY_PEERS else "consensus")
        if f.export is None:
            return
        if hosts_all(f):
            self.write_consensus()
        if wanted == "all" or not hosts_all(f):
            for row, peer in enumerate(f.peers.ids):
                f.export.write(self.run / "adapters" / f"peer-{peer:03d}", f.peers.adapter(row), f"Peer {peer}")

    def write_consensus(self) -> None:
        f = self.federation
        if f.export is not None:
            made = "" if f.recipe.method.combine == "mean" else ": the best factors of the mean of their products"
            f.export.write(self.run / "adapters" / "consensus", f.peers.adapter(None), f"Consensus of all peers{made}")

    def write_end(self, summary: Line) -> None:
        """Writes the summary and the report, and tells the observers."""
        write_atomically(self.run / "summary.json", json.dumps(summary, indent=1).encode())
        write_report(self.run)
        for observer in self.observers:
            observer.ended(summary, self.run)
