"""What is written down of a run: a line for each round, the summary at the end, who holds what.

A process that hosts some of the peers writes of those, names them as `hosted`, and has null for what only all of them
together can tell. `merged` makes the line of all from the lines that each process wrote of its own.
"""

import json
import platform
import resource
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from math import isfinite, nan
from pathlib import Path
from typing import SupportsFloat, cast

import numpy as np

from dfl_lora import measures
from dfl_lora.build import Federation
from dfl_lora.data.shares import shares
from dfl_lora.errors import UserError
from dfl_lora.metrics import METRICS, Answers, key_of, recorded
from dfl_lora.outlook import outlook
from dfl_lora.peers import Peers
from dfl_lora.report.figures import half_width
from dfl_lora.rounds import Record, Traffic
from dfl_lora.run_directory import Line

AGREEMENT = ("consensus_error", "product_disagreement", "relative_disagreement")
"""What only all peers together can tell."""


def consensus_of(peers: Peers) -> measures.Consensus:
    return measures.consensus(measures.factors(peers), len(peers))


def hosts_all(federation: Federation) -> bool:
    """Tells whether all peers of the recipe are in this process."""
    return len(federation.peers) == federation.topology.num_peers


def hosted_in(federation: Federation) -> Line:
    """Returns the key that says whose a line is, where it is not everybody's."""
    return {} if hosts_all(federation) else {"hosted": list(federation.peers.ids)}


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
    agreement = asdict(record.after["consensus"]) if "consensus" in record.after else dict.fromkeys(AGREEMENT, nan)
    return {
        **line,
        **{key: finite(value) for key, value in agreement.items()},
        "bytes_sent_per_peer": traffic.bytes / len(record.peers),
        "messages": traffic.messages,
        "refused": dict(traffic.refused),
        "skipped_steps": sum(p.skipped for p in record.progress.values()),
        "seconds": dict(seconds),
        "tokens": sum(p.tokens for p in record.progress.values()),
    }


def merged(lines: Sequence[Line]) -> Line:
    """Returns the line of a round of all peers from those of single peers, in the order of their ids.

    Seconds are those of the slowest; what only all of them together could tell is null.
    """
    first = lines[0]
    per_peer = {key: [line[key]["per_peer"][0] for line in lines] for key in first if per_peer_in(first[key])}
    losses = [line["loss_per_peer"][0] for line in lines]
    return {
        "round": first["round"],
        "loss": spread(known(losses)),
        "loss_per_peer": losses,
        **{key: spread(known(values)) | {"per_peer": values} for key, values in per_peer.items()},
        **dict.fromkeys(AGREEMENT),
        "bytes_sent_per_peer": sum(line["bytes_sent_per_peer"] for line in lines) / len(lines),
        "messages": sum(line["messages"] for line in lines),
        "refused": dict(sum((Counter(line["refused"]) for line in lines), Counter[str]())),
        "skipped_steps": sum(line["skipped_steps"] for line in lines),
        "seconds": {part: max(line["seconds"][part] for line in lines) for part in first["seconds"]},
        "tokens": sum(line["tokens"] for line in lines),
    }


def per_peer_in(value: object) -> bool:
    return isinstance(value, Mapping) and "per_peer" in value


def summary_of(federation: Federation, lines: Sequence[Line], agreed: Answers | None, bytes_before: float) -> Line:
    """Returns the end of a run from its lines and the answers of the consensus, which is None where it is unknown."""
    last, metric = lines[-1], str(federation.recipe.evaluate.metric)
    seconds = {part: sum(line["seconds"].get(part, 0.0) for line in lines) for part in last["seconds"]}
    tokens = sum(line["tokens"] for line in lines)
    at_the_mean = {name: nan if agreed is None else METRICS[name](agreed) for name in recorded(metric)}
    return {
        "recipe_digest": federation.digest,
        "name": federation.recipe.name,
        "num_peers": federation.topology.num_peers,
        **hosted_in(federation),
        "rounds": len(lines),
        "metric": metric,
        **{key_of(name): ending(last[key_of(name)], value) for name, value in at_the_mean.items()},
        **{key: last[key] for key in AGREEMENT},
        "bytes_sent_per_peer": sum(line["bytes_sent_per_peer"] for line in lines) + bytes_before,
        "seconds": seconds,
        "tokens_per_second": tokens / max(seconds["train"], 1e-9),
        "mfu": None,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "versions": versions(),
    }


def ending(last: Line, consensus: float) -> Line:
    """Returns a metric at the end of a run: its last round, the interval over peers, and that of the consensus."""
    return {**last, "ci95": interval(known(last["per_peer"])), "consensus": finite(consensus)}


def known(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def spread(values: list[float]) -> Line:
    """Returns mean, min and max."""
    if not values:
        return dict.fromkeys(("mean", "min", "max"))
    return {"mean": finite(np.mean(values)), "min": finite(np.min(values)), "max": finite(np.max(values))}


def finite(value: SupportsFloat) -> float | None:
    """Returns the number, null where it is not finite, since JSON has no word for it."""
    return float(value) if isfinite(value) else None


def interval(values: list[float]) -> float:
    """Returns the half width of Student's 95 % interval of the mean over peers; 0 for one peer."""
    return half_width(np.array(values)) if len(values) > 1 else 0.0


def partition_facts(federation: Federation) -> Line:
    """Returns what is known before round 1: who holds what, and what the graph predicts.

    `edges` are those of all rounds; of a topology that is drawn in each, those of the rounds that were looked at.
    """
    predicted = outlook(federation.topology, federation.method.mixing)
    return {
        "labels": list(federation.data.labels),
        "counts": counts_by_peer(federation),
        "num_rows": federation.data.num_rows,
        "notes": dict(federation.data.notes),
        **asdict(shares(federation.data.counts)),
        "edges": list(predicted.edges),
        "topology": federation.recipe.peers.topology.kind,
        "spectral_gap": finite(1.0 - predicted.rho),
        "expected_consensus": finite(predicted.expected_consensus),
    }


def counts_by_peer(federation: Federation) -> list[list[int] | list[None]]:
    """Returns the rows of each label at every peer, nulls for peers whose own rows are not read in this process."""
    counts, ids = federation.data.counts, federation.peers.ids
    if len(counts) == federation.topology.num_peers:
        return list(counts)
    own = dict(zip(ids, counts, strict=True))
    return [own.get(i, [None] * len(federation.data.labels)) for i in range(federation.topology.num_peers)]


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
