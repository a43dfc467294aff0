"""The loop: local steps, mix with neighbours, measure; the caller decides when to stop.

Written once. A process that hosts all peers is a simulation, one that hosts one is a real peer; the
learner and the network are the only things that differ.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import torch
from torch import Tensor

from dfl_lora import blocked
from dfl_lora.codecs import Codec, Memory
from dfl_lora.codecs.fp32 import Fp32
from dfl_lora.combine import Combine, Fault, Inbox, mean
from dfl_lora.corrections import Correction
from dfl_lora.corrections.none import NoCorrection
from dfl_lora.graphs import Graph
from dfl_lora.learners import Learner, Progress
from dfl_lora.mixers import Mixer, Values, once
from dfl_lora.mixing import Mixing, metropolis
from dfl_lora.networks import Network, Undone
from dfl_lora.networks.memory import MemoryNetwork
from dfl_lora.participation import Absence, nobody
from dfl_lora.peers import Peers
from dfl_lora.schedules import Phase, Schedule
from dfl_lora.tensors import Layout, Tensors

Measures = Callable[[int, Peers], Mapping[str, Any]]
Clock = Callable[[str], AbstractContextManager[None]]


@dataclass(frozen=True)
class Method:
    """A point in the product of the axes."""

    schedule: Schedule
    topology: Callable[[int], Graph]
    absence: Absence = nobody
    mixing: Mixing = metropolis
    correction: Correction = NoCorrection()
    mixer: Mixer = once
    combine: Combine = mean
    codec: Codec = Fp32()

    @property
    def memory(self) -> tuple[str, ...]:
        """The vectors that correction, mixer and codec keep in each peer."""
        return (*self.correction.memory, *self.mixer.memory, *self.codec.memory)


@dataclass
class Traffic:
    """What the hosted peers sent in one round, how long they waited for others, and what they refused."""

    bytes: int = 0
    messages: int = 0
    waited_s: float = 0.0
    refused: dict[Fault, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Record:
    """A round that is over. `peers` is valid until the next round is asked for."""

    round: int
    peers: Peers
    progress: Mapping[int, Progress]
    traffic: Traffic
    before: Mapping[str, Any]
    after: Mapping[str, Any]


def nothing(round: int, peers: Peers) -> Mapping[str, Any]:
    """Measures nothing."""
    return {}


def rounds(
    peers: Peers,
    method: Method,
    learner: Learner,
    network: Network,
    *,
    before: Measures = nothing,
    after: Measures = nothing,
    clock: Clock = lambda name: nullcontext(),
    first: int = 1,
) -> Iterator[Record]:
    """Yields a record for each round from `first` on; `before` and `after` measure on either side of mixing."""
    for t in count(first):
        phase, graph = replace(method.schedule(t), absent=method.absence(t)), method.topology(t)
        with clock("train"):
            progress = learner.train(peers, phase, t)
        trained = before(t, peers)
        with clock("exchange"):
            traffic = mix(peers, phase, graph, t, method, network)
        yield Record(t, peers, progress, traffic, trained, after(t, peers))


def mix(peers: Peers, phase: Phase, graph: Graph, t: int, method: Method, network: Network) -> Traffic:
    """Sends, combines and takes in what the phase shares, in place; returns what it cost."""
    if at_once(peers, method, network) and (cost := mix_at_once(peers, phase, graph, method)) is not None:
        return cost
    traffic, hosted = Traffic(), {p.id: p for p in peers if p.id not in phase.absent}
    edges = graph.among(frozenset(range(graph.num_peers)) - phase.absent) if phase.absent else graph
    undone, lost = list[Undone](), set[int]()

    def exchange(values: Values, k: int) -> Values:
        frames = {i: method.codec.encode(v, hosted[i].memory, (i, t, k)) for i, v in values.items()}
        traffic.messages += sum(edges.degree(i) for i in frames)
        traffic.bytes += sum(frame.num_bytes * edges.degree(i) for i, frame in frames.items())
        arrived = network.exchange(t, k, edges, frames)
        traffic.waited_s += arrived.waited_s
        undone.extend(arrived.undone)
        combined = {}
        for i, received in arrived.frames.items():
            own = values[i]
            decoded = {j: None if f is None else method.codec.decode(f, own) for j, f in received.items()}
            sent = method.codec.decode(frames[i], own) or own
            inbox = Inbox.receive(method.mixing(graph, i), own, sent, decoded)
            if len(inbox.received) < edges.degree(i):
                lost.add(i)
            for fault in inbox.refused.values():
                traffic.refused[fault] = traffic.refused.get(fault, 0) + 1
            combined[i] = taken(method, inbox, hosted[i].memory)
        return combined

    outgoing = {i: method.correction.outgoing(p, phase) for i, p in hosted.items()}
    values = method.mixer(outgoing, exchange, t, {i: peer.memory for i, peer in hosted.items()})
    phase = replace(phase, lost=frozenset(lost))
    for i, mixed in values.items():
        method.correction.incoming(hosted[i], phase, mixed)
    take_back(peers, undone, method)
    return traffic


def taken(method: Method, inbox: Inbox, memory: Memory) -> Tensors:
    """Returns what the own value becomes; the codec says to what the flows are added, and what then becomes of it."""
    return method.codec.take(inbox.own, lambda vector: method.combine(replace(inbox, own=vector)), memory)


def at_once(peers: Peers, method: Method, network: Network) -> bool:
    """Tells whether a round of mixing is W x on rows that are all in this process's memory, and nothing else."""
    plain = Method(method.schedule, method.topology, method.absence, method.mixing)
    return isinstance(network, MemoryNetwork) and method == plain and peers.x.device.type == "cpu"


def mix_at_once(peers: Peers, phase: Phase, graph: Graph, method: Method) -> Traffic | None:
    """Mixes to the bit as peer by peer and counts the same traffic; None where it cannot, and nothing has changed."""
    sweep = blocked.sweep_of(graph, method.mixing, phase.absent)
    spans = peers.layout.spans(phase.shared)
    blocks = sweep.blocks(spans, peers.x.itemsize) if sweep else None
    if sweep is None or blocks is None or len(peers) < graph.num_peers:
        return None
    if not blocked.finite(peers.x, spans, phase.absent):  # such rows are refused, and counted, peer by peer
        return None
    frame = method.codec.encode(method.correction.outgoing(peers[0], phase), peers[0].memory, (0, phase.round, 0))
    blocked.apply(sweep, peers.x, blocks)
    return Traffic(frame.num_bytes * sweep.num_messages, sweep.num_messages)


def take_back(peers: Peers, undone: Iterable[Undone], method: Method) -> None:
    """Takes flows out of the peers again that the other end of an edge did not take in, so that the mean holds.

    A flow is w_ij (q_j - q_i) of an earlier exchange; the mixer has made it `gain` times as large by the end of its
    round. For the correction this is a mix in which nothing else moves. A combine that is not the mean keeps none, and
    what it made of a message is no flow: there nothing is taken back.
    """
    if method.combine is not mean:
        return
    hosted = {p.id: p for p in peers}
    for u in undone:
        peer, phase = hosted[u.peer], method.schedule(u.round)
        now = method.correction.outgoing(peer, phase)
        own, theirs = method.codec.decode(u.own, now), method.codec.decode(u.theirs, now)
        if own is not None and theirs is not None:
            weight = method.mixing(method.topology(u.round), u.peer).weights[u.neighbour] * gain(
                method.mixer, u.exchange, u.round
            )
            back = adding((own.flat - theirs.flat).mul_(weight))
            method.correction.incoming(peer, phase, method.codec.take(now, back, peer.memory))


def adding(flow: Tensor) -> Callable[[Tensors], Tensors]:
    """Returns what adds a flow to a vector."""
    return lambda vector: vector.with_flat(vector.flat + flow)


def gain(mixer: Mixer, exchange: int, t: int) -> float:
    """Returns by how much a mixer multiplies what an exchange of a round adds to the mean; 1 where there is but one."""

    def add(values: Values, k: int) -> Values:
        return {0: values[0].with_flat(values[0].flat + (k == exchange))}

    return float(mixer(zero(), add, t, {0: dict.fromkeys(mixer.memory, zero()[0])})[0].flat.item())


def num_exchanges(mixer: Mixer, t: int) -> int:
    """Returns how often a mixer exchanges in a round."""
    counted = list[int]()

    def count_one(values: Values, k: int) -> Values:
        counted.append(k)
        return values

    mixer(zero(), count_one, t, {0: dict.fromkeys(mixer.memory, zero()[0])})
    return len(counted)


def zero() -> Values:
    """Returns the value of one peer, the number 0."""
    return {0: Tensors(torch.zeros(1, dtype=torch.float64), Layout.of({"mean": ("A", (1,))}))}
