"""The laws of gossip, over the tables: a new graph, schedule, mixer or correction inherits them all."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from dfl_lora.codecs import CODECS
from dfl_lora.codecs.frames import Frame
from dfl_lora.corrections import CORRECTIONS
from dfl_lora.corrections.local import Local
from dfl_lora.graphs import GRAPHS, Graph, complete
from dfl_lora.measures import consensus, factors
from dfl_lora.mixers import MIXERS
from dfl_lora.mixing import Row, matrix, metropolis, rho
from dfl_lora.models.core import folded
from dfl_lora.networks import Arrived, Network
from dfl_lora.networks.memory import MemoryNetwork
from dfl_lora.peers import Peers
from dfl_lora.rounds import Method, Traffic, mix
from dfl_lora.schedules import SCHEDULES, Head
from dfl_lora.tensors import Layout, Tensors
from example_graphs import SEVEN

RandomPeers = Callable[[Method], Peers]
InboxOf = Mapping[int, Frame | None]
HEADS: tuple[Head, ...] = get_args(Head)

EVERY_SCHEDULE = {**SCHEDULES, "alternating(mix=trained)": partial(SCHEDULES["alternating"], mix="trained")}
LOCAL = Local(lambda i: 3, lambda t: 0.1, False)

every_graph = pytest.mark.parametrize("graph", SEVEN.values(), ids=SEVEN)
every_schedule = pytest.mark.parametrize("schedule", EVERY_SCHEDULE)
every_exact = pytest.mark.parametrize("schedule", ["freeze_a", "core"])
"""Schedules whose products are linear in what is shared."""
every_head = pytest.mark.parametrize("head", HEADS)
KEEPING = [name for name in MIXERS if name != "relay_sum"]
"""Mixers that keep the mean."""
every_mixer = pytest.mark.parametrize("mixer", KEEPING)
METHODS = [(mixer, "none") for mixer in KEEPING] + [
    (mixer, correction) for correction in CORRECTIONS if correction != "none" for mixer in ("plain", "chebyshev")
]
every_method = pytest.mark.parametrize(("mixer", "correction"), METHODS)
every_case = pytest.mark.parametrize(
    ("graph", "mixer", "correction"),
    [pytest.param(graph, "plain", "none", id=name) for name, graph in SEVEN.items()]
    + [
        pytest.param(SEVEN[name], *method, id=f"{name}-{'-'.join(method)}")
        for name in ("link4", "du14")
        for method in METHODS[1:]
    ],
)
"""Every graph with plain gossip, and every method on two of them."""


def make(schedule: str, head: Head, graph: Graph, mixer: str = "plain", correction: str = "none") -> Method:
    return Method(
        EVERY_SCHEDULE[schedule](head),
        lambda t: graph,
        mixer=MIXERS[mixer](graph, metropolis, 8),
        correction=CORRECTIONS[correction](LOCAL),
    )


@dataclass(frozen=True)
class Changed:
    """A memory network on which `change(receiver, inbox)` decides what arrives."""

    change: Callable[[int, InboxOf], InboxOf]

    def exchange(self, round: int, k: int, graph: Graph, outgoing: Mapping[int, Frame]) -> Arrived:
        arrived = MemoryNetwork().exchange(round, k, graph, outgoing)
        return Arrived({i: self.change(i, box) for i, box in arrived.frames.items()})


@dataclass(frozen=True)
class Recorded:
    """A memory network that keeps the bytes of every frame; `frames[k]` holds those of exchange number k."""

    frames: dict[int, dict[int, bytes]] = field(default_factory=dict)

    def exchange(self, round: int, k: int, graph: Graph, outgoing: Mapping[int, Frame]) -> Arrived:
        self.frames[k] = {i: frame.to_bytes() for i, frame in outgoing.items()}
        return MemoryNetwork().exchange(round, k, graph, outgoing)


@dataclass(frozen=True)
class Replayed:
    """A network that hands the hosted peers the recorded frames of their neighbours."""

    frames: Mapping[int, Mapping[int, bytes]]

    def exchange(self, round: int, k: int, graph: Graph, outgoing: Mapping[int, Frame]) -> Arrived:
        return Arrived({i: {j: Frame.from_bytes(self.frames[k][j]) for j in graph.neighbours(i)} for i in outgoing})


def lossy(lost: set[tuple[int, int]]) -> Changed:
    """A network without the messages (receiver, sender)."""
    return Changed(lambda i, box: {j: frame for j, frame in box.items() if (i, j) not in lost})


def mix_once(peers: Peers, method: Method, network: Network | None = None, t: int = 1) -> Traffic:
    """One round of mixing without local steps."""
    return mix(peers, method.schedule(t), method.topology(t), t, method, network or MemoryNetwork())


def columns(peers: Peers, roles: frozenset[str]) -> Tensor:
    """Which numbers of a row have one of the roles: a mask [P]."""
    mask = torch.zeros(peers.layout.size, dtype=torch.bool)
    for e in peers.layout.entries:
        mask[e.start : e.stop] = e.role in roles
    return mask


def products(peers: Peers) -> list[Tensor]:
    """B_i A_i, or B C_i A, [N, d_out, d_in] of each module."""
    names = (*peers.common.layout.by_name, *peers.layout.by_name)
    tensors = folded({name: peers.stacked(name) for name in names})
    return [tensors[f"{name[:-2]}.B"] @ a for name, a in tensors.items() if name.endswith(".A")]


@every_case
@every_schedule
@every_head
def test_gossip_preserves_the_mean(
    random_peers: RandomPeers, graph: Graph, schedule: str, head: Head, mixer: str, correction: str
) -> None:
    method = make(schedule, head, graph, mixer, correction)
    peers = random_peers(method)
    before = peers.x.clone()
    for t in range(1, 4):
        mix_once(peers, method, t=t)
    assert torch.allclose(peers.x.mean(0), before.mean(0), rtol=0, atol=1e-14)
    shared = columns(peers, method.schedule(1).shared)
    assert (peers.x.var(0) < before.var(0))[shared].all()


@every_schedule
@every_head
@every_method
def test_what_is_not_shared_stays_to_the_bit(
    random_peers: RandomPeers, schedule: str, head: Head, mixer: str, correction: str
) -> None:
    method = make(schedule, head, complete(7), mixer, correction)
    peers = random_peers(method)
    before, common = peers.x.clone(), peers.common.flat.clone()
    mix_once(peers, method)
    kept = ~columns(peers, method.schedule(1).shared)
    assert torch.equal(peers.x[:, kept], before[:, kept])
    assert torch.equal(peers.common.flat, common)
    assert not torch.isclose(peers.x[:, ~kept], before[:, ~kept]).any()


@every_case
@every_schedule
@every_head
def test_equal_peers_stay_equal_to_the_bit(
    random_peers: RandomPeers, graph: Graph, schedule: str, head: Head, mixer: str, correction: str
) -> None:
    method = make(schedule, head, graph, mixer, correction)
    peers = random_peers(method)
    peers.x.copy_(peers.x[:1].clone().expand_as(peers.x))
    before = peers.x.clone()
    mix_once(peers, method)
    assert torch.equal(peers.x, peers.x[:1].expand_as(peers.x))
    assert torch.allclose(peers.x, before, rtol=0, atol=1e-13)
    if (mixer, correction) == ("plain", "none"):
        assert torch.equal(peers.x, before)


@every_graph
@every_schedule
def test_plain_gossip_applies_w(random_peers: RandomPeers, graph: Graph, schedule: str) -> None:
    method = make(schedule, "shared", graph)
    peers = random_peers(method)
    shared = columns(peers, method.schedule(1).shared)
    expected = torch.where(shared, torch.from_numpy(matrix(graph, metropolis)) @ peers.x, peers.x)
    mix_once(peers, method)
    assert torch.allclose(peers.x, expected, rtol=0, atol=1e-14)


@every_graph
def test_plain_gossip_contracts_by_rho_each_round(random_peers: RandomPeers, graph: Graph) -> None:
    method = make("lora", "shared", graph)
    peers = random_peers(method)
    shrinks = rho(matrix(graph, metropolis))
    for t in range(1, 12):
        before = (peers.x - peers.x.mean(0)).norm(dim=0)
        mix_once(peers, method, t=t)
        after = (peers.x - peers.x.mean(0)).norm(dim=0)
        assert (after <= shrinks * before + 1e-13).all()


@pytest.mark.parametrize("graph", [GRAPHS["complete"](7), GRAPHS["link7"](7)], ids=["complete", "link7"])
@every_schedule
@every_head
@every_mixer
def test_a_complete_graph_gives_the_plain_average(
    random_peers: RandomPeers, graph: Graph, schedule: str, head: Head, mixer: str
) -> None:
    method = make(schedule, head, graph, mixer)
    peers = random_peers(method)
    shared = columns(peers, method.schedule(1).shared)
    average = peers.x.mean(0)
    mix_once(peers, method)
    assert torch.allclose(peers.x[:, shared], average[shared].expand(7, -1), rtol=0, atol=1e-14)


@every_graph
@every_exact
@every_head
def test_common_factors_mix_products_exactly(
    random_peers: RandomPeers, graph: Graph, schedule: str, head: Head
) -> None:
    """sum_j w_ij (B_j A) = (sum_j w_ij B_j) A, and sum_j w_ij (B C_j A) = B (sum_j w_ij C_j) A."""
    method = make(schedule, head, graph)
    peers = random_peers(method)
    w = torch.from_numpy(matrix(graph, metropolis))
    expected = [torch.einsum("ij,jod->iod", w, p) for p in products(peers)]
    mix_once(peers, method)
    for found, wanted in zip(products(peers), expected, strict=True):
        assert torch.allclose(found, wanted, rtol=0, atol=1e-13)


@every_case
@every_exact
def test_common_factors_mix_products_as_if_they_were_exchanged(
    random_peers: RandomPeers, graph: Graph, mixer: str, correction: str, schedule: str
) -> None:
    method = make(schedule, "frozen", graph, mixer, correction)
    peers, (role,) = random_peers(method), method.schedule(1).shared
    layout = Layout.of({str(k): (role, tuple(p.shape[1:])) for k, p in enumerate(products(peers))})
    nothing = Tensors(torch.zeros(0), Layout.of({}))
    start = Tensors(torch.zeros(layout.size, dtype=torch.float64), layout)
    whole = Peers(range(7), start, nothing, memory=method.correction.memory)
    whole.x.copy_(torch.cat([p.flatten(1) for p in products(peers)], dim=1))
    mix_once(peers, method)
    mix_once(whole, method)
    mixed = torch.cat([p.flatten(1) for p in products(peers)], dim=1)
    assert torch.allclose(mixed, whole.x, rtol=0, atol=1e-12)


@every_case
@every_exact
@every_head
def test_common_factors_have_one_consensus_error(
    random_peers: RandomPeers, graph: Graph, schedule: str, head: Head, mixer: str, correction: str
) -> None:
    """consensus_error == product_disagreement, since B_bar A is the mean product.

    To half the digits of float64: a peer that lies at the mean (peer 5 of link6 hears everyone) is a square root of
    what cancels.
    """
    method = make(schedule, head, graph, mixer, correction)
    peers = random_peers(method)
    for t in range(1, 4):
        found = consensus(factors(peers), 7)
        assert found.consensus_error == pytest.approx(found.product_disagreement, rel=1e-7)
        mix_once(peers, method, t=t)


@every_graph
def test_lora_moves_the_mean_product(random_peers: RandomPeers, graph: Graph) -> None:
    """The cross terms that freeze_a does not have; this is what makes its law worth having."""
    method = make("lora", "shared", graph)
    peers = random_peers(method)
    before = [p.mean(0) for p in products(peers)]
    found = consensus(factors(peers), 7)
    assert found.consensus_error != pytest.approx(found.product_disagreement, rel=1e-3)
    mix_once(peers, method)
    for old, new in zip(before, products(peers), strict=True):
        assert (new.mean(0) - old).norm() > 1e-3 * old.norm()


@every_schedule
@pytest.mark.parametrize("head", ["private", "frozen"])
@every_method
def test_a_private_head_never_leaves(
    random_peers: RandomPeers, schedule: str, head: Head, mixer: str, correction: str
) -> None:
    """Other heads change no byte on the wire."""
    method = make(schedule, head, GRAPHS["link4"](7), mixer, correction)
    sent = []
    for scale in (1.0, -5.0):
        peers, network = random_peers(method), Recorded()
        peers.x[:, columns(peers, frozenset({"head"}))] *= scale
        for name, value in peers.common.items():
            value.mul_(scale if name == "head" else 1.0)
        mix_once(peers, method, network)
        sent.append(network.frames)
    assert sent[0] == sent[1]
    assert sent[0]


@every_schedule
def test_a_shared_head_does_leave(random_peers: RandomPeers, schedule: str) -> None:
    method = make(schedule, "shared", GRAPHS["link4"](7))
    peers, before, after = random_peers(method), Recorded(), Recorded()
    start = peers.x.clone()
    mix_once(peers, method, before)
    peers.x.copy_(start)
    peers.x[:, columns(peers, frozenset({"head"}))] *= -5.0
    mix_once(peers, method, after)
    assert before.frames != after.frames


@every_schedule
@every_method
def test_a_peer_does_not_depend_on_who_shares_its_process(
    random_peers: RandomPeers, schedule: str, mixer: str, correction: str
) -> None:
    method = make(schedule, "shared", GRAPHS["link6"](7), mixer, correction)
    together, network = random_peers(method), Recorded()
    start = together.x.clone()
    mix_once(together, method, network)
    for i in range(7):
        adapter = Tensors(start[i], together.layout)
        alone = Peers([i], adapter, together.common, memory=method.correction.memory)
        mix_once(alone, method, Replayed(network.frames))
        assert torch.equal(alone.x[0], together.x[i])


@every_case
@every_schedule
def test_a_lost_message_gives_its_weight_to_the_receiver(
    random_peers: RandomPeers, graph: Graph, schedule: str, mixer: str, correction: str
) -> None:
    """To the bit what a row without the sender gives."""
    method = make(schedule, "shared", graph, mixer, correction)
    receiver, sender = 0, graph.neighbours(0)[-1]

    def without(graph: Graph, peer: int) -> Row:
        row = method.mixing(graph, peer)
        return Row(peer, {j: w for j, w in row.weights.items() if (peer, j) != (receiver, sender)})

    lost, never = random_peers(method), random_peers(method)
    traffic = mix_once(lost, method, lossy({(receiver, sender)}))
    mix_once(never, replace(method, mixing=without))
    assert torch.equal(lost.x, never.x)
    assert torch.isfinite(lost.x).all()
    assert traffic.refused == {}


@every_case
@every_schedule
def test_a_peer_that_hears_nobody_stays_as_it_was(
    random_peers: RandomPeers, graph: Graph, schedule: str, mixer: str, correction: str
) -> None:
    method = make(schedule, "shared", graph, mixer, correction)
    peers = random_peers(method)
    before = peers.x.clone()
    mix_once(peers, method, lossy({(3, j) for j in range(7)}))
    assert torch.allclose(peers.x[3], before[3], rtol=0, atol=1e-13)
    shared = columns(peers, method.schedule(1).shared)
    assert not torch.isclose(peers.x[[0, 6]], before[[0, 6]])[:, shared].any()


def symmetric_losses() -> Iterator[set[tuple[int, int]]]:
    generator = np.random.default_rng(0)
    for _ in range(5):
        pairs = [(i, j) for i in range(7) for j in range(i) if generator.random() < 0.3]
        yield {*pairs, *((j, i) for i, j in pairs)}


@every_case
@every_schedule
def test_losses_in_both_directions_preserve_the_mean(
    random_peers: RandomPeers, graph: Graph, schedule: str, mixer: str, correction: str
) -> None:
    method = make(schedule, "shared", graph, mixer, correction)
    peers = random_peers(method)
    mean = peers.x.mean(0)
    for t, lost in enumerate(symmetric_losses(), start=1):
        mix_once(peers, method, lossy(lost), t)
        assert torch.allclose(peers.x.mean(0), mean, rtol=0, atol=1e-13)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@every_case
@every_schedule
def test_a_message_that_is_not_finite_stays_with_its_sender(
    random_peers: RandomPeers, graph: Graph, schedule: str, mixer: str, correction: str, bad: float
) -> None:
    """The others are to the bit where they would be had it been lost."""
    method = make(schedule, "shared", graph, mixer, correction)
    sick, silent = random_peers(method), random_peers(method)
    sick.x[2, columns(sick, method.schedule(1).shared)] = bad
    traffic = mix_once(sick, method)
    mix_once(silent, method, lossy({(i, 2) for i in range(7)}))
    others = [i for i in range(7) if i != 2]
    assert torch.equal(sick.x[others], silent.x[others])
    assert torch.isfinite(sick.x[others]).all()
    assert not torch.isfinite(sick.x[2]).all()
    assert traffic.refused.keys() == {"non-finite"}
    assert traffic.refused["non-finite"] >= graph.degree(2)


def truncated(frame: Frame) -> Frame | None:
    return Frame.from_bytes(frame.to_bytes()[:-1])


def of_another_layout(frame: Frame) -> Frame | None:
    return replace(frame, layout="0" * 64)


def of_another_codec(frame: Frame) -> Frame | None:
    return replace(frame, codec="unknown")


def too_short(frame: Frame) -> Frame | None:
    return replace(frame, body={name: value[:-1] for name, value in frame.body.items()})


def empty(frame: Frame) -> Frame | None:
    return replace(frame, body={})


@pytest.mark.parametrize("spoil", [truncated, of_another_layout, of_another_codec, too_short, empty])
@every_schedule
@every_method
def test_a_malformed_message_counts_as_lost(
    random_peers: RandomPeers, schedule: str, mixer: str, correction: str, spoil: Callable[[Frame], Frame | None]
) -> None:
    method = make(schedule, "shared", GRAPHS["link4"](7), mixer, correction)

    def change(receiver: int, box: InboxOf) -> InboxOf:
        return {j: spoil(f) if f is not None and (receiver, j) == (0, 2) else f for j, f in box.items()}

    spoiled, lost = random_peers(method), random_peers(method)
    traffic = mix_once(spoiled, method, Changed(change))
    mix_once(lost, method, lossy({(0, 2)}))
    assert torch.equal(spoiled.x, lost.x)
    assert traffic.refused.keys() == {"malformed"}


@every_schedule
@every_method
def test_a_stranger_and_an_echo_of_oneself_are_refused(
    random_peers: RandomPeers, schedule: str, mixer: str, correction: str
) -> None:
    method = make(schedule, "shared", GRAPHS["link3"](7), mixer, correction)
    heard, plain = random_peers(method), random_peers(method)
    traffic = mix_once(heard, method, Changed(lambda i, box: {**box, i: box[(i + 1) % 7], 99: box[(i + 1) % 7]}))
    mix_once(plain, method)
    assert torch.equal(heard.x, plain.x)
    assert traffic.refused.keys() == {"stranger"}
    assert traffic.refused["stranger"] % 14 == 0


@every_graph
@every_schedule
def test_traffic_counts_every_message_and_its_bytes(random_peers: RandomPeers, graph: Graph, schedule: str) -> None:
    method = make(schedule, "shared", graph)
    peers, network = random_peers(method), Recorded()
    traffic = mix_once(peers, method, network)
    headers = {content[: 4 + int.from_bytes(content[:4], "big")] for content in network.frames[0].values()}
    assert len(headers) == 1
    bodies = {i: len(content) - len(next(iter(headers))) for i, content in network.frames[0].items()}
    assert traffic.messages == 2 * len(graph.edges)
    assert traffic.bytes == sum(graph.degree(i) * size for i, size in bodies.items())
    assert traffic.refused == {}


@pytest.mark.parametrize("codec", [name for name, make in CODECS.items() if not make(0).memory])
@every_method
def test_the_mean_stays_under_every_codec(random_peers: RandomPeers, mixer: str, correction: str, codec: str) -> None:
    """The own value enters as it was sent."""
    method = replace(make("lora", "shared", GRAPHS["link4"](7), mixer, correction), codec=CODECS[codec](5))
    peers = random_peers(method)
    before = peers.x.mean(0)
    for t in range(1, 4):
        mix_once(peers, method, t=t)
    assert torch.allclose(peers.x.mean(0), before, rtol=0, atol=1e-12)
