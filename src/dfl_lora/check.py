"""What is known of a recipe before anything runs: its digest, a row as the model reads it, who holds what, what the
graph predicts, every byte that will be sent, and whether the peers fit into memory."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from math import isfinite
from typing import Any

from dfl_lora.build import Federation, build
from dfl_lora.codecs.frames import Frame
from dfl_lora.data.batches import TokenSource
from dfl_lora.data.causal import render
from dfl_lora.fitting import fitted
from dfl_lora.graphs import Graph
from dfl_lora.memory import Estimate, estimate
from dfl_lora.mixing import sums
from dfl_lora.models.base import load_tokenizer
from dfl_lora.networks import Arrived
from dfl_lora.outlook import outlook
from dfl_lora.recipe import Recipe
from dfl_lora.records import partition_facts
from dfl_lora.roles import ROLES
from dfl_lora.rounds import Traffic, mix, num_exchanges
from dfl_lora.topologies import OWN_WEIGHTS


@dataclass(frozen=True)
class Silence:
    """A network that takes every frame and delivers none: what is sent can be counted, and no adapter changes."""

    def exchange(self, round: int, k: int, graph: Graph, outgoing: Mapping[int, Frame]) -> Arrived:
        return Arrived({i: {} for i in outgoing})


@dataclass(frozen=True)
class Sample:
    """The first row of the first peer as the model reads it."""

    text: str
    """Of a causal task the trained tokens stand between « and »."""
    num_tokens: int
    label: str | None
    cut: int | None
    """How many of all training rows are as long as the longest that is read, so may have been cut; None of a causal
    task, where it is known which were: the notes of the partition say it."""


@dataclass(frozen=True)
class Prediction:
    """What the graph and its W predict."""

    topology: str
    mixing: str
    num_edges: int
    num_rounds: int
    """1; a cycle of graphs; or the rounds that were looked at where each is drawn. Their edges count once."""
    spectral_gap: float
    exchanges_to_a_thousandth: float
    expected_consensus: float
    """Infinite, like the next, where peers never agree; nan where it is not known of so many peers."""
    expected_profile: float
    """Relative to the ring of as many peers."""


@dataclass(frozen=True)
class Sent:
    """Bytes and messages: mean over the peers in a round, and in the whole run."""

    bytes_per_peer_and_round: float
    messages_per_round: float
    bytes_per_peer: float


@dataclass(frozen=True)
class Check:
    """The whole of it."""

    recipe: Recipe
    digest: str
    sample: Sample | None
    partition: Mapping[str, Any]
    graph: Prediction
    numbers: Mapping[str, int]
    """What a peer holds of its own, by role, and what is frozen and common to all."""
    sent: Sent
    memory: Estimate
    carried: str
    """What adapters hold beside LoRA and heads, since the published base lacks it; empty where that is nothing."""

    def as_json(self) -> dict[str, Any]:
        """Returns pure data; null where a number is not finite, since JSON has no word for it."""
        graph = {k: v if isinstance(v, str) or isfinite(v) else None for k, v in asdict(self.graph).items()}
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "digest": self.digest,
            "sample": asdict(self.sample) if self.sample else None,
            "partition": dict(self.partition),
            "graph": graph,
            "numbers": dict(self.numbers),
            "sent": asdict(self.sent),
            "memory": self.memory.as_json(),
            "carried": self.carried,
        }


def check(recipe: Recipe) -> Check:
    """Returns what is known of a recipe; raises as a run would where it cannot run."""
    federation = fitted(build(recipe), recipe)
    return Check(
        federation.recipe,
        federation.digest,
        sample_of(federation),
        partition_facts(federation),
        prediction(federation),
        numbers(federation),
        sent(federation),
        estimate(federation),
        federation.export.carried if federation.export else "",
    )


def sample_of(federation: Federation) -> Sample | None:
    """Returns a rendered row; None where rows are vectors."""
    train, export = federation.data.peers.train, federation.export
    shard = train[min(train)]
    source, row = shard.source, int(shard.rows[0])
    if export is None or not isinstance(source, TokenSource):
        return None
    tokens, tokenizer = (
        source.columns["input_ids"][source.offsets[row] : source.offsets[row + 1]],
        load_tokenizer(export.files, federation.recipe.task.tokens),
    )
    if source.targets is not None:
        return Sample(render(tokenizer, source, row), len(tokens), None, None)
    cut = sum(int((s.source.lengths[s.rows] >= source.max_length).sum()) for s in train.values())
    text = str(tokenizer.decode(tokens.tolist()))
    return Sample(text, len(tokens), federation.data.labels[int(source.labels[row])], cut)


def prediction(federation: Federation) -> Prediction:
    peers, predicted = federation.recipe.peers, outlook(federation.topology, federation.method.mixing)
    return Prediction(
        str(peers.topology),
        "its own" if peers.topology.kind in OWN_WEIGHTS or federation.method.mixing is sums else peers.mixing,
        len(predicted.edges),
        predicted.num_rounds,
        1.0 - predicted.rho,
        predicted.rounds_to_a_thousandth,
        predicted.expected_consensus,
        predicted.expected_profile,
    )


def numbers(federation: Federation) -> dict[str, int]:
    layout, common = federation.peers.layout, federation.peers.common.layout
    by_role: dict[str, int] = {role: layout.restrict({role}).size for role in ROLES}
    return {**by_role, "each": layout.size, "common": common.size}


def sent(federation: Federation) -> Sent:
    """Counts what the loop itself sends, round by round, with the codec that the run will use; rounds alike once."""
    f, num_peers, seen = federation, len(federation.peers), dict[tuple[int, ...], Traffic]()

    def traffic(t: int) -> Traffic:
        phase, graph = (
            replace(f.method.schedule(t), absent=f.method.absence(t) if t else frozenset()),
            f.method.topology(t),
        )
        messages = 2 * len(graph.among(frozenset(range(num_peers)) - phase.absent).edges)
        frame = f.method.codec.encode(f.method.correction.outgoing(f.peers[0], phase), f.peers[0].memory, (0, t, 0))
        key = (messages, frame.num_bytes, num_exchanges(f.method.mixer, t))
        if key not in seen:
            seen[key] = mix(f.peers, phase, graph, t, f.method, Silence())
        return seen[key]

    rounds = [traffic(t) for t in range(1, f.recipe.train.rounds + 1)]
    before = [traffic(0)] if f.recipe.train.order == "seed" else []  # it gossips once before round 1
    return Sent(
        sum(t.bytes / num_peers for t in rounds) / len(rounds),
        sum(t.messages for t in rounds) / len(rounds),
        sum(t.bytes / num_peers for t in rounds) + sum(t.bytes / num_peers for t in before),  # as a run adds them up
    )
