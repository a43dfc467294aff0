"""Simulate all peers in this process, and keep the run directory.

RUN/recipe.yaml rounds.jsonl summary.json partition.json log.txt adapters/ checkpoint/ report.html. A run
that was stopped goes on from its last checkpoint to the bit; a line of rounds.jsonl is one round.
"""

import json
import platform
import resource
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol, cast

import numpy as np
from scipy import stats

from dfl_lora import measures, mixing
from dfl_lora.build import CONSENSUS, Federation, build
from dfl_lora.checkpoint import load_checkpoint, save_checkpoint
from dfl_lora.errors import UserError
from dfl_lora.files import write_atomically
from dfl_lora.learners import Score
from dfl_lora.networks import Network
from dfl_lora.networks.memory import MemoryNetwork
from dfl_lora.peers import Peers
from dfl_lora.recipe import Compute, Recipe, load_recipe
from dfl_lora.report.page import write_report
from dfl_lora.rounds import Record, Traffic, mix, rounds

Line = dict[str, Any]
MANY_PEERS = 64


class Observer(Protocol):
    """Who watches a run: the screen, the log."""

    def started(self, federation: Federation, first: int) -> None: ...
    def prepared(self, scores: Mapping[int, Score], consensus_error: float) -> None:
        """The seed's order: the evaluation before round 1 and the measure after the first gossip."""
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


def prepare(run: Path, resume: bool, overwrite: bool) -> None:
    """Checks that the run directory may be used; an existing run needs --resume or --overwrite."""
    if resume and overwrite:
        raise UserError("--resume goes on with a run and --overwrite starts it anew; give one of them.")
    if run.exists() and not run.is_dir():
        raise UserError(f"{run} is a file; give a folder with --out.")
    if not (run / "recipe.yaml").exists():
        if run.exists() and any(run.iterdir()):
            raise UserError(f"{run} holds files that are no run; give another folder with --out, or empty it.")
        return
    if not (resume or overwrite):
        raise UserError(f"There is a run in {run} already; go on with --resume, replace it with --overwrite, or use --out.")


def clear(run: Path) -> None:
    """Removes what an earlier run left, and nothing else."""
    for name in ("adapters", "checkpoint"):
        shutil.rmtree(run / name, ignore_errors=True)
    for name in ("rounds.jsonl", "summary.json", "partition.json", "report.html", "log.txt", "recipe.yaml"):
        (run / name).unlink(missing_ok=True)


def run_recipe(recipe: Recipe, run: Path, observer: Observer, *, resume: bool, overwrite: bool) -> Line:
    """Runs a recipe to its end in directory `run` and returns the summary."""
    prepare(run, resume, overwrite)
    if resume and (run / "recipe.yaml").exists():
        recipe = recipe.model_copy(update={"compute": recorded_compute(run)})
    federation = build(recipe)
    run.mkdir(parents=True, exist_ok=True)
    if not resume:
        clear(run)
    checkpoint = load_checkpoint(run / "checkpoint", federation.peers, federation.digest)
    done = checkpoint.round if checkpoint else 0
    lines = read_lines(run)[:done]
    if len(lines) < done:
        raise UserError(f"{run / 'rounds.jsonl'} has {len(lines)} rounds, the checkpoint {done}; use --overwrite.")
    write_atomically(run / "rounds.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
    write_atomically(run / "recipe.yaml", federation.recipe.to_yaml().encode())
    write_atomically(run / "partition.json", json.dumps(partition_facts(federation), indent=1).encode())
    simulation = Simulation(federation, run, observer, MemoryNetwork())
    observer.started(federation, done + 1)
    if done == 0 and federation.recipe.train.order == "seed":
        simulation.seed_preparation()
    elif checkpoint is not None:
        simulation.initial_bytes = checkpoint.kept["initial_bytes"]
    simulation.go(done, lines)
    summary = simulation.summary(lines)
    write_atomically(run / "summary.json", json.dumps(summary, indent=1).encode())
    simulation.write_adapters()
    write_report(run)
    observer.ended(summary, run)
    return summary


@dataclass
class Simulation:
    """One run in progress."""

    federation: Federation
    run: Path
    observer: Observer
    network: Network
    clock: Stopwatch = field(default_factory=Stopwatch)
    initial_bytes: float = 0.0

    def evaluate(self, t: int, peers: Peers) -> dict[int, Score]:
        """Returns the scores of a round in which evaluation is due, else nothing."""
        recipe = self.federation.recipe
        if t % recipe.evaluate.every and t != recipe.train.rounds:
            return {}
        with self.clock("evaluate"):
            return dict(self.federation.learner.evaluate(peers))

    def before(self, t: int, peers: Peers) -> Mapping[str, Any]:
        return {"scores": self.evaluate(t, peers)} if self.federation.recipe.evaluate.before_mixing else {}

    def after(self, t: int, peers: Peers) -> Mapping[str, Any]:
        return {"scores": self.evaluate(t, peers), "consensus": consensus_of(peers)}

    def seed_preparation(self) -> None:
        """Evaluates all peers, gossips once and measures, before round 1."""
        f = self.federation
        scores = f.learner.evaluate(f.peers)
        traffic = mix(f.peers, f.method.schedule(0), f.graph, 0, f.method, self.network)
        self.initial_bytes = traffic.bytes / len(f.peers)
        self.observer.prepared(scores, consensus_of(f.peers).consensus_error)

    def go(self, done: int, lines: list[Line]) -> None:
        """Runs the rounds that are left, one line and perhaps a checkpoint each."""
        f, total = self.federation, self.federation.recipe.train.rounds
        if done >= total:
            return
        start, self.clock.seconds = perf_counter(), {}
        with (self.run / "rounds.jsonl").open("a") as file:
            for record in rounds(
                f.peers, f.method, f.learner, self.network,
                before=self.before, after=self.after, clock=self.clock, first=done + 1,
            ):  # fmt: skip
                seconds = {"train": 0.0, "exchange": 0.0, "evaluate": 0.0} | self.clock.reset()
                line = line_of(record, seconds | {"total": perf_counter() - start})
                file.write(json.dumps(line) + "\n")
                file.flush()
                lines.append(line)
                if record.round % f.recipe.output.checkpoint_every == 0 or record.round == total:
                    kept = {"initial_bytes": self.initial_bytes}
                    save_checkpoint(self.run / "checkpoint", f.peers, record.round, f.digest, kept)
                self.observer.finished_round(record, line)
                if record.round == total:
                    return
                start = perf_counter()

    def summary(self, lines: list[Line]) -> Line:
        """Returns the end of the run, from its lines and one evaluation of the consensus."""
        f, last = self.federation, lines[-1]
        with self.clock("evaluate"):
            agreed = f.learner.evaluate(f.peers.consensus())[CONSENSUS].accuracy
        seconds = {part: sum(line["seconds"][part] for line in lines) for part in last["seconds"]}
        tokens = sum(line["tokens"] for line in lines)
        return {
            "recipe_digest": f.digest,
            "name": f.recipe.name,
            "num_peers": len(f.peers),
            "rounds": len(lines),
            "accuracy": {**last["accuracy"], "ci95": half_width(last["accuracy"]["per_peer"]), "consensus": agreed},
            **{key: last[key] for key in ("consensus_error", "product_disagreement", "relative_disagreement")},
            "bytes_sent_per_peer": self.initial_bytes + sum(line["bytes_sent_per_peer"] for line in lines),
            "seconds": seconds,
            "tokens_per_second": tokens / max(seconds["train"], 1e-9),
            "mfu": None,
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "versions": versions(),
        }

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


def line_of(record: Record, seconds: Mapping[str, float]) -> Line:
    """Returns the line of rounds.jsonl of a round."""
    losses = [p.loss for p in record.progress.values()]
    line: Line = {"round": record.round, "loss": spread(losses)}
    for key, measured in (("accuracy_before_mixing", record.before), ("accuracy", record.after)):
        scores = cast(Mapping[int, Score], measured.get("scores", {}))
        if scores:
            values = [score.accuracy for score in scores.values()]
            line[key] = spread(values) | {"per_peer": values}
    traffic: Traffic = record.traffic
    return {
        **line,
        **asdict(record.after["consensus"]),
        "bytes_sent_per_peer": traffic.bytes / len(record.peers),
        "messages": traffic.messages,
        "refused": dict(traffic.refused),
        "skipped_steps": sum(p.skipped for p in record.progress.values()),
        "seconds": dict(seconds),
        "tokens": sum(p.tokens for p in record.progress.values()),
    }


def spread(values: list[float]) -> dict[str, Any]:
    """Returns mean, min and max; null where a value is not finite, since JSON has no word for it."""
    keys = {"mean": float(np.mean(values)), "min": float(np.min(values)), "max": float(np.max(values))}
    return {key: value if np.isfinite(value) else None for key, value in keys.items()}


def half_width(values: list[float]) -> float:
    """Returns the half width of Student's 95 % interval of the mean over peers; 0 for one peer."""
    if len(values) < 2:
        return 0.0
    return float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5)


def partition_facts(federation: Federation) -> Line:
    """Returns what is known before round 1: who holds what, and what the graph predicts."""
    w = mixing.matrix(federation.graph, federation.method.mixing)
    alone = federation.graph.num_peers == 1
    return {
        "labels": list(federation.data.labels),
        "counts": federation.data.counts,
        "edges": sorted(federation.graph.edges),
        "topology": federation.recipe.peers.topology.kind,
        "spectral_gap": 1.0 if alone else 1 - mixing.rho(w),
        "expected_consensus": 0.0 if alone else mixing.expected_consensus(w),
    }


def versions() -> dict[str, str]:
    names = ("dfl-lora", "torch", "transformers", "peft", "datasets", "safetensors", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def read_lines(run: Path) -> list[Line]:
    """Returns the whole lines of rounds.jsonl; a torn last line is the mark of a killed process and is dropped."""
    path = run / "rounds.jsonl"
    if not path.exists():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(cast(Line, json.loads(text)))
        except ValueError:
            break
    return lines


def recorded_compute(run: Path) -> Compute:
    """Returns how the machine computed when the run was started: a resumed run goes on the same way."""
    return load_recipe(run / "recipe.yaml").compute
