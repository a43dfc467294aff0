"""Simulate all peers in this process, and keep the run directory.

RUN/recipe.yaml rounds.jsonl summary.json partition.json log.txt adapters/ checkpoint/ report.html. A run
that was stopped goes on from its last checkpoint to the bit; a line of rounds.jsonl is one round.
"""

import json
import platform
import resource
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from math import isfinite, nan
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol, SupportsFloat, cast

import numpy as np
import torch

from dfl_lora import measures, mixing
from dfl_lora.build import Federation, build
from dfl_lora.checkpoint import load_checkpoint, save_checkpoint
from dfl_lora.data.shares import shares
from dfl_lora.errors import UserError
from dfl_lora.files import append, sweep, write_atomically
from dfl_lora.metrics import METRICS, Answers, key_of, recorded
from dfl_lora.networks import Network
from dfl_lora.networks.memory import MemoryNetwork
from dfl_lora.peers import Peers
from dfl_lora.reading import load_recipe
from dfl_lora.recipe import Recipe
from dfl_lora.report.figures import half_width
from dfl_lora.report.page import write_report
from dfl_lora.rounds import Record, Traffic, mix, rounds
from dfl_lora.run_directory import Line as Line
from dfl_lora.run_directory import clear, held, prepare, read_lines

MANY_PEERS = 64


@dataclass(frozen=True)
class Start:
    """What the seed's order does before round 1: every peer's accuracy, the measure after one gossip, its bytes."""

    accuracies: list[float]
    consensus_error: float
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


def run_recipe(recipe: Recipe, run: Path, observers: Sequence[Observer], *, resume: bool, overwrite: bool) -> Line:
    """Runs a recipe to its end in directory `run` and returns the summary."""
    prepare(run, resume, overwrite)
    recorded = load_recipe(run / "recipe.yaml") if resume and (run / "recipe.yaml").exists() else None
    federation = build(recipe.model_copy(update={"compute": recorded.compute}) if recorded else recipe)
    if recorded and recorded.digest != federation.digest:
        raise UserError(
            f"The run in {run} has another recipe (digest {str(recorded.digest)[:12]}, not {federation.digest[:12]}); "
            "resume with the recipe it was started with, or start anew with --overwrite."
        )
    run.mkdir(parents=True, exist_ok=True)
    with held(run):
        prepare(run, resume, overwrite)
        return carry_out(federation, run, observers, anew=recorded is None)


def carry_out(federation: Federation, run: Path, observers: Sequence[Observer], *, anew: bool) -> Line:
    """Runs what is left of a federation's rounds in a directory that nobody else writes to; returns the summary."""
    sweep(run)
    if anew:
        clear(run)
        write_atomically(run / "recipe.yaml", federation.recipe.to_yaml().encode())
    checkpoint = load_checkpoint(run / "checkpoint", federation.peers, federation.digest)
    done = checkpoint.round if checkpoint else 0
    lines = read_lines(run, done)
    write_atomically(run / "rounds.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
    write_atomically(run / "partition.json", partition_text(federation).encode())
    simulation = Simulation(federation, run, observers, MemoryNetwork())
    if checkpoint is not None:
        simulation.start = Start(**checkpoint.kept["start"]) if checkpoint.kept["start"] else None
    elif federation.recipe.train.order == "seed":
        simulation.start = simulation.seed_start()
    for observer in observers:
        observer.started(federation, lines, simulation.start)
    simulation.go(done, lines)
    if not torch.isfinite(federation.peers.x).all(1).any():
        raise RuntimeError(
            "every peer's adapter became non-finite; lower train.learning_rate or set train.max_grad_norm."
        )
    summary = simulation.summary(lines)
    simulation.write_adapters()
    write_atomically(run / "summary.json", json.dumps(summary, indent=1).encode())
    write_report(run)
    for observer in observers:
        observer.ended(summary, run)
    return summary


@dataclass
class Simulation:
    """One run in progress."""

    federation: Federation
    run: Path
    observers: Sequence[Observer]
    network: Network
    clock: Stopwatch = field(default_factory=Stopwatch)
    start: Start | None = None

    @property
    def metric(self) -> str:
        return str(self.federation.recipe.evaluate.metric)

    def evaluate(self, t: int, peers: Peers) -> dict[int, Answers]:
        """Returns the answers of a round in which evaluation is due, else nothing."""
        recipe = self.federation.recipe
        if t % recipe.evaluate.every and t != recipe.train.rounds:
            return {}
        with self.clock("evaluate"):
            return dict(self.federation.learner.evaluate(peers))

    def before(self, t: int, peers: Peers) -> Mapping[str, Any]:
        return {"answers": self.evaluate(t, peers)} if self.federation.recipe.evaluate.before_mixing else {}

    def after(self, t: int, peers: Peers) -> Mapping[str, Any]:
        return {"answers": self.evaluate(t, peers), "consensus": consensus_of(peers)}

    def seed_start(self) -> Start:
        """Evaluates all peers, gossips once and measures, before round 1."""
        f = self.federation
        answers = f.learner.evaluate(f.peers)
        traffic = mix(f.peers, f.method.schedule(0), f.graph, 0, f.method, self.network)
        accuracies = [METRICS["accuracy"](own) for own in answers.values()]
        return Start(accuracies, consensus_of(f.peers).consensus_error, traffic.bytes / len(f.peers))

    def go(self, done: int, lines: list[Line]) -> None:
        """Runs the rounds that are left, one line and perhaps a checkpoint each."""
        f, total = self.federation, self.federation.recipe.train.rounds
        if done >= total:
            return
        start, self.clock.seconds = perf_counter(), {}
        for record in rounds(
            f.peers, f.method, f.learner, self.network,
            before=self.before, after=self.after, clock=self.clock, first=done + 1,
        ):  # fmt: skip
            seconds = {"train": 0.0, "exchange": 0.0, "evaluate": 0.0} | self.clock.reset()
            line = line_of(record, self.metric, seconds | {"total": perf_counter() - start})
            due = record.round % f.recipe.output.checkpoint_every == 0 or record.round == total
            # a checkpoint never tells of rounds that a power cut took from the lines
            append(self.run / "rounds.jsonl", json.dumps(line) + "\n", synced=due)
            lines.append(line)
            if due:
                kept = {"start": asdict(self.start) if self.start else None}
                save_checkpoint(self.run / "checkpoint", f.peers, record.round, f.digest, kept)
            for observer in self.observers:
                observer.finished_round(record, line)
            if record.round == total:
                return
            start = perf_counter()

    def summary(self, lines: list[Line]) -> Line:
        """Returns the end of the run, from its lines and one evaluation of the consensus."""
        f, last = self.federation, lines[-1]
        with self.clock("evaluate"):
            agreed = self.consensus_answers()
        seconds = {part: sum(line["seconds"][part] for line in lines) for part in last["seconds"]}
        tokens = sum(line["tokens"] for line in lines)
        return {
            "recipe_digest": f.digest,
            "name": f.recipe.name,
            "num_peers": len(f.peers),
            "rounds": len(lines),
            "metric": self.metric,
            **{key_of(name): ending(last[key_of(name)], METRICS[name](agreed)) for name in recorded(self.metric)},
            **{key: last[key] for key in ("consensus_error", "product_disagreement", "relative_disagreement")},
            "bytes_sent_per_peer": sum(line["bytes_sent_per_peer"] for line in lines)
            + (self.start.bytes_sent_per_peer if self.start else 0.0),
            "seconds": seconds,
            "tokens_per_second": tokens / max(seconds["train"], 1e-9),
            "mfu": None,
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "versions": versions(),
        }

    def consensus_answers(self) -> Answers:
        """Returns the answers of the mean of all peers, on every validation table there is."""
        f = self.federation
        tables = {id(f.data.peers.validation[i].source): i for i in reversed(f.peers.ids)}
        answers = f.learner.evaluate(f.peers.consensus(sorted(tables.values())))
        return Answers.pooled(list(answers.values()))

    def write_adapters(self) -> None:
        """Writes PEFT folders of the consensus and, unless there are very many, of every peer."""
        f = self.federation
        if f.export is None:
            return
        wanted = f.recipe.output.adapters or ("all" if len(f.peers) <= MANY_PEERS else "consensus")
        f.export.write(self.run / "adapters" / "consensus", f.peers.adapter(None), "Consensus of all peers")
        for row, peer in enumerate(f.peers.ids if wanted == "all" else ()):
            f.export.write(self.run / "adapters" / f"peer-{peer:03d}", f.peers.adapter(row), f"Peer {peer}")


def consensus_of(peers: Peers) -> measures.Consensus:
    return measures.consensus(measures.factors(peers), len(peers))


def line_of(record: Record, metric: str, seconds: Mapping[str, float]) -> Line:
    """Returns the line of rounds.jsonl of a round, with the recipe's metric beside accuracy and loss."""
    losses = {i: p.loss for i, p in record.progress.items()}
    each = [finite(losses.get(i, nan)) for i in record.peers.ids]
    line: Line = {"round": record.round, "loss": spread(list(losses.values())), "loss_per_peer": each}
    for suffix, measured in (("_before_mixing", record.before), ("", record.after)):
        answers = cast(Mapping[int, Answers], measured.get("answers", {})).values()
        for name in recorded(metric) if answers else ():
            values = [METRICS[name](own) for own in answers]
            line[key_of(name) + suffix] = spread(values) | {"per_peer": [finite(value) for value in values]}
    traffic: Traffic = record.traffic
    return {
        **line,
        **{key: finite(value) for key, value in asdict(record.after["consensus"]).items()},
        "bytes_sent_per_peer": traffic.bytes / len(record.peers),
        "messages": traffic.messages,
        "refused": dict(traffic.refused),
        "skipped_steps": sum(p.skipped for p in record.progress.values()),
        "seconds": dict(seconds),
        "tokens": sum(p.tokens for p in record.progress.values()),
    }


def ending(last: Line, consensus: float) -> Line:
    """Returns a metric at the end of a run: its last round, the interval over peers, and that of the consensus."""
    known = [value for value in last["per_peer"] if value is not None]
    return {**last, "ci95": interval(known), "consensus": finite(consensus)}


def spread(values: list[float]) -> Line:
    """Returns mean, min and max."""
    return {"mean": finite(np.mean(values)), "min": finite(np.min(values)), "max": finite(np.max(values))}


def finite(value: SupportsFloat) -> float | None:
    """Returns the number, null where it is not finite, since JSON has no word for it."""
    return float(value) if isfinite(value) else None


def interval(values: list[float]) -> float:
    """Returns the half width of Student's 95 % interval of the mean over peers; 0 for one peer."""
    return half_width(np.array(values)) if len(values) > 1 else 0.0


def partition_facts(federation: Federation) -> Line:
    """Returns what is known before round 1: who holds what, and what the graph predicts."""
    w = mixing.matrix(federation.graph, federation.method.mixing)
    expected = mixing.expected_consensus(w)
    return {
        "labels": list(federation.data.labels),
        "counts": federation.data.counts,
        "num_rows": federation.data.num_rows,
        **asdict(shares(federation.data.counts)),
        "edges": sorted(federation.graph.edges),
        "topology": federation.recipe.peers.topology.kind,
        "spectral_gap": mixing.gap(w),
        "expected_consensus": expected if isfinite(expected) else None,
    }


def partition_text(federation: Federation) -> str:
    """Returns the content of partition.json, one key a line: the facts, and the rows that repeat the partition."""
    rows = federation.data.rows
    content = partition_facts(federation) | {"rows": None if rows is None else [part.tolist() for part in rows]}
    return "{\n" + ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in content.items()) + "\n}\n"


def labels_of(run: Path) -> list[str]:
    """Returns the label names of a run."""
    try:
        return [str(label) for label in json.loads((run / "partition.json").read_text())["labels"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{run / 'partition.json'} is missing or damaged; run the recipe again.") from None


def versions() -> dict[str, str]:
    names = ("dfl-lora", "torch", "transformers", "peft", "datasets", "safetensors", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
