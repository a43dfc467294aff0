"""The page: reads the files of a run and writes report.html beside them."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, isnan, nan
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from dfl_lora.data.shares import shares
from dfl_lora.errors import UserError
from dfl_lora.files import write_atomically
from dfl_lora.metrics import ends_of, key_of
from dfl_lora.report import figures
from dfl_lora.report.figures import Array, Drawing, Record, number, per_peer

T = TypeVar("T")
NOTHING = "–"
NAMES = {"accuracy": "accuracy", "f1": "F1", "matthews": "Matthews correlation", "loss": "validation loss"}
EXTREMES = {"min": "lowest", "max": "highest"}
BYTES = ("B", "kB", "MB", "GB", "TB")


@dataclass(frozen=True)
class Partition:
    """Which peer has which rows, and who talks to whom."""

    labels: tuple[str, ...]
    counts: Array
    """nan for a peer whose own rows were read by another process."""
    edges: tuple[tuple[int, int], ...]
    topology: str
    spectral_gap: float
    expected_consensus: float


@dataclass(frozen=True)
class Run:
    """The files of a run."""

    recipe_text: str
    recipe: Record
    records: tuple[Record, ...]
    summary: Record
    partition: Partition | None


@dataclass(frozen=True)
class Fact:
    """A value with its name, as the page shows it."""

    name: str
    value: str
    detail: str = ""


def write_report(run: Path) -> Path:
    """Returns the path of report.html, written into the directory of a run from its other files."""
    path = run / "report.html"
    write_atomically(path, render(read_run(run)).encode("utf-8", errors="replace"))
    return path


def read_run(run: Path) -> Run:
    """Returns the files of a run; only partition.json may be absent."""
    text = read(run / "recipe.yaml", str)
    recipe = read(run / "recipe.yaml", lambda text: mapping(yaml.safe_load(text)))
    summary = read(run / "summary.json", lambda text: mapping(json.loads(text)))
    records = read(
        run / "rounds.jsonl", lambda text: [mapping(json.loads(line)) for line in text.split("\n") if line.strip()]
    )
    partition = run / "partition.json"
    return Run(text, recipe, tuple(records), summary, read(partition, partition_of) if partition.exists() else None)


def read(path: Path, parse: Callable[[str], T]) -> T:
    """Returns what `parse` makes of a file, or raises with the name of the file and what to do."""
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise UserError(
            f"Cannot read {path}: {error}; a report needs the directory of a run that has ended, "
            "with its recipe.yaml, rounds.jsonl and summary.json."
        ) from None


def mapping(value: Any) -> Record:
    """Returns the value if it is a mapping, or raises."""
    if not isinstance(value, Mapping):
        raise ValueError(f"a mapping was expected, not {type(value).__name__}")
    return value


def partition_of(text: str) -> Partition:
    """Returns the partition of a partition.json, or raises if its parts do not fit together."""
    given = mapping(json.loads(text))
    labels = tuple(str(label) for label in given["labels"])
    counts = np.array(given["counts"], dtype=np.float64).reshape(len(given["counts"]), len(labels))
    edges = tuple(sorted({(min(i, j), max(i, j)) for i, j in given.get("edges", ())}))
    told = np.isfinite(counts) & (counts >= 0)
    elsewhere = np.isnan(counts).all(axis=1) & bool(labels)
    if not len(counts) or elsewhere.all() or not (told.all(axis=1) | elsewhere).all():
        raise ValueError("counts must be the numbers of rows of at least one peer")
    if not all(isinstance(end, int) and 0 <= end < len(counts) for edge in edges for end in edge):
        raise ValueError(f"edges must be pairs of peers between 0 and {len(counts) - 1}")
    gap, expected = number(given, "spectral_gap"), number(given, "expected_consensus")
    return Partition(labels, counts, edges, kind(given.get("topology")), gap, expected)


def render(run: Run) -> str:
    """Returns the page; everything is escaped but the figures."""
    environment = Environment(
        loader=PackageLoader("dfl_lora.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(
        name=str(run.recipe.get("name") or "unnamed run"),
        about=about(run),
        headline=headline(run.summary),
        drawings=drawings(run),
        partition=run.partition,
        graph_facts=graph_facts(run.partition),
        share_facts=share_facts(run.partition),
        holdings=holdings(run.partition),
        metrics=[name for _, name in shown(run.summary)],
        peers=peers(run),
        cost=cost(run.summary),
        recipe=run.recipe_text,
        provenance=provenance(run.summary),
        svg=lambda drawing: Markup(drawing.svg),
        title=title,
    )


def drawings(run: Run) -> dict[str, Drawing | None]:
    """Returns the figures by name, None where there is nothing to draw."""
    part = run.partition
    return {
        **{name: figures.metric(run.records, key, title(name)) for key, name in shown(run.summary)},
        "loss": figures.loss(run.records),
        "consensus": figures.consensus(run.records),
        "relative": figures.relative(run.records),
        "topology": figures.topology(len(part.counts), part.edges) if part else None,
        "partition": figures.partition(np.nan_to_num(part.counts), part.labels) if part else None,
    }


def about(run: Run) -> list[str]:
    """Returns what the run was, in a few words each."""
    topology = run.partition.topology if run.partition else kind(within(run.recipe, "peers", "topology"))
    schedule = kind(within(run.recipe, "method", "schedule"))
    return [
        counted(number(run.summary, "num_peers"), "peer"),
        counted(number(run.summary, "rounds"), "round"),
        *([f"topology {topology}"] if topology else []),
        *([f"schedule {schedule}"] if schedule else []),
    ]


def shown(summary: Record) -> list[tuple[str, str]]:
    """Returns the key and the name of the metrics that a report shows: the run's own first, and accuracy."""
    own = str(summary.get("metric"))
    return [(key_of(metric), NAMES[metric]) for metric in dict.fromkeys((own, "accuracy")) if metric in NAMES]


def scores(summary: Record, key: str, name: str) -> list[Fact]:
    """Returns what the peers and their average reached in a metric."""
    worst, best = ends_of(key)
    return [
        Fact(title(name), fixed(number(summary, key, "mean")), interval(within(summary, key, "ci95"))),
        Fact("Worst peer", fixed(number(summary, key, worst)), f"{EXTREMES[worst]} {name}"),
        Fact("Best peer", fixed(number(summary, key, best)), f"{EXTREMES[best]} {name}"),
        Fact("Consensus", fixed(number(summary, key, "consensus")), f"{name} of the average"),
    ]


def headline(summary: Record) -> list[Fact]:
    """Returns the results of a run."""
    return [
        *(fact for key, name in shown(summary) for fact in scores(summary, key, name)),
        Fact("Consensus error", short(number(summary, "consensus_error")), "after the last round"),
        Fact("Relative disagreement", short(number(summary, "relative_disagreement")), "after the last round"),
        Fact("Sent per peer", size(number(summary, "bytes_sent_per_peer")), "in all rounds"),
        Fact("Time", duration(number(summary, "seconds", "total")), "in all rounds"),
    ]


def cost(summary: Record) -> list[Fact]:
    """Returns where the time and the memory went."""
    parts = [(part, number(summary, "seconds", part)) for part in ("train", "exchange", "wait", "evaluate", "total")]
    return [
        *(Fact(f"Seconds: {part}", short(seconds)) for part, seconds in parts),
        Fact("Tokens per second", short(number(summary, "tokens_per_second"))),
        Fact("Model FLOPs utilisation", short(number(summary, "mfu"))),
        Fact("Peak memory", size(number(summary, "peak_rss_bytes"))),
    ]


def graph_facts(partition: Partition | None) -> str:
    """Returns what is known of how well the graph mixes."""
    if partition is None:
        return ""
    facts = {"Spectral gap": partition.spectral_gap, "expected consensus": partition.expected_consensus}
    return ", ".join(f"{name} {short(value)}" for name, value in facts.items() if not isnan(value))


def share_facts(partition: Partition | None) -> str:
    """Returns how unequal the rows of the peers are."""
    if partition is None or not partition.labels:
        return ""
    return str(shares(partition.counts[~np.isnan(partition.counts).any(axis=1)].tolist()))


def holdings(partition: Partition | None) -> list[tuple[int, list[str], str, str]]:
    """Returns each peer with its rows of each label, its rows, and its share of all rows."""
    if partition is None or not partition.labels:
        return []
    rows = partition.counts.sum(axis=1)
    shares_of_all = rows / max(1.0, np.nansum(rows))
    return [
        (i, [whole(n) for n in counts], whole(rows[i]), NOTHING if isnan(rows[i]) else f"{shares_of_all[i]:.1%}")
        for i, counts in enumerate(partition.counts)
    ]


def peers(run: Run) -> list[tuple[int, list[str], str]]:
    """Returns each peer with its final metrics and its training rows."""
    finals = [by_peer(run.summary, per_peer(run.summary, key)) for key, _ in shown(run.summary)]
    rows = run.partition.counts.sum(axis=1) if run.partition and run.partition.labels else np.zeros(0)
    return [
        (i, [at(values, i, fixed) for values in finals], at(rows, i, whole))
        for i in range(max(len(rows), *map(len, finals)))
    ]


def by_peer(summary: Record, values: Array) -> Array:
    """Returns the values of all peers, nan for those that another process hosted."""
    hosted = summary.get("hosted")
    if not isinstance(hosted, list) or len(hosted) != len(values):
        return values
    everyone = np.full(max(int(number(summary, "num_peers")), max(hosted) + 1), nan)
    everyone[hosted] = values
    return everyone


def provenance(summary: Record) -> list[str]:
    """Returns the digest of the recipe and the versions of what ran it."""
    digest, versions = summary.get("recipe_digest"), summary.get("versions")
    return [
        *([f"recipe {digest}"] if digest else []),
        *(f"{name} {version}" for name, version in (versions.items() if isinstance(versions, Mapping) else ())),
    ]


def within(record: Any, *path: str) -> Any:
    """Returns what is at that path of nested mappings, or None."""
    for key in path:
        record = record.get(key) if isinstance(record, Mapping) else None
    return record


def kind(choice: Any) -> str:
    """Returns the name of a choice that is written as a name or as a mapping with a kind, else an empty string."""
    choice = choice.get("kind") if isinstance(choice, Mapping) else choice
    return choice if isinstance(choice, str) else ""


def at(values: Array, i: int, text: Callable[[float], str]) -> str:
    """Returns the text of value i, a dash if there is none."""
    return text(float(values[i])) if i < len(values) else NOTHING


def interval(ci95: Any) -> str:
    """Returns the 95 % interval over peers, given as a half width or as its two ends."""
    if isinstance(ci95, Sequence) and len(ci95) == 2:
        return f"95 %: {fixed(number(ci95[0]))} to {fixed(number(ci95[1]))}"
    return "mean of the peers" if isnan(number(ci95)) else f"± {fixed(number(ci95))} (95 %)"


def counted(count: float, word: str) -> str:
    """Returns such as "7 peers"."""
    return f"{short(count)} {word}{'' if count == 1 else 's'}"


def title(name: str) -> str:
    """Returns a name as it stands at the beginning."""
    return name[:1].upper() + name[1:]


def fixed(value: float) -> str:
    """Returns a metric, a dash for nan."""
    return NOTHING if isnan(value) else f"{value:.4f}"


def whole(count: float) -> str:
    """Returns a number of rows, a dash for nan."""
    return NOTHING if isnan(count) else f"{count:,.0f}"


def short(value: float) -> str:
    """Returns a number of about three digits, a dash for nan."""
    if isnan(value):
        return NOTHING
    return f"{value:,.0f}" if 999.5 <= abs(value) < 1e9 else f"{value:.3g}"


def size(count: float) -> str:
    """Returns a number of bytes in decimal units, a dash if it is not known."""
    if not isfinite(count):
        return NOTHING
    power = 0
    while abs(count) >= 999.5 and power < len(BYTES) - 1:
        count, power = count / 1000, power + 1
    return f"{short(count)} {BYTES[power]}"


def duration(seconds: float) -> str:
    """Returns seconds as a person reads them, a dash if they are not known."""
    if not isfinite(seconds):
        return NOTHING
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
