"""The laws of codecs that keep something: what is left out of a message is not lost, and peers agree all the same."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

import quadratics
from dfl_lora.codecs import CODECS, Codec
from dfl_lora.codecs.frames import Frame
from dfl_lora.graphs import GRAPHS, Graph
from dfl_lora.mixing import matrix, metropolis
from dfl_lora.networks import Arrived
from dfl_lora.networks.memory import MemoryNetwork
from dfl_lora.peers import Peers
from dfl_lora.rounds import Method, mix, rounds
from dfl_lora.schedules import SCHEDULES, Head
from dfl_lora.tensors import Layout
from example_graphs import SEVEN
from quadratics import Quadratics, method_on

RandomPeers = Callable[[Method], Peers]
LINK4 = GRAPHS["link4"](7)
KEEPING = [name for name, make in CODECS.items() if make(0).memory]

every_codec = pytest.mark.parametrize("codec", KEEPING)
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES)
every_graph = pytest.mark.parametrize("graph", SEVEN.values(), ids=SEVEN)


def make(codec: str, schedule: str = "lora", head: Head = "shared", graph: Graph = LINK4, **options: float) -> Method:
    options = {"share": 0.2, **options}
    return Method(SCHEDULES[schedule](head), lambda t: graph, codec=CODECS[codec](0, **options))


@dataclass(frozen=True)
class Recorded:
    """A memory network that keeps the bytes of every frame by round, and loses some: (receiver, sender)."""

    frames: dict[int, dict[int, bytes]] = field(default_factory=dict)
    lost: frozenset[tuple[int, int]] = frozenset()

    def exchange(self, round: int, k: int, graph: Graph, outgoing: Mapping[int, Frame]) -> Arrived:
        self.frames[round] = {i: frame.to_bytes() for i, frame in outgoing.items()}
        boxes = MemoryNetwork().exchange(round, k, graph, outgoing).frames
        return Arrived({i: {j: f for j, f in box.items() if (i, j) not in self.lost} for i, box in boxes.items()})


@dataclass(frozen=True)
class Replayed:
    """A network that hands the hosted peers the recorded frames of their neighbours."""

    frames: Mapping[int, Mapping[int, bytes]]

    def exchange(self, round: int, k: int, graph: Graph, outgoing: Mapping[int, Frame]) -> Arrived:
        return Arrived({i: {j: Frame.from_bytes(self.frames[round][j]) for j in graph.neighbours(i)} for i in outgoing})


def gossip(
    peers: Peers, method: Method, num_rounds: int, network: Recorded | Replayed | MemoryNetwork | None = None
) -> None:
    """Mixes without local steps."""
    for t in range(1, num_rounds + 1):
        mix(peers, method.schedule(t), method.topology(t), t, method, network or MemoryNetwork())


def columns(peers: Peers, roles: frozenset[str]) -> Tensor:
    mask = torch.zeros(peers.layout.size, dtype=torch.bool)
    for e in peers.layout.entries:
        mask[e.start : e.stop] = e.role in roles
    return mask


@every_codec
@every_graph
@every_schedule
def test_the_mean_stays(random_peers: RandomPeers, graph: Graph, schedule: str, codec: str) -> None:
    method = make(codec, schedule, graph=graph)
    peers = random_peers(method)
    before = peers.x.clone()
    gossip(peers, method, 30)
    assert torch.allclose(peers.x.mean(0), before.mean(0), rtol=0, atol=1e-13)
    assert not torch.isclose(peers.x, before)[:, columns(peers, method.schedule(1).shared)].all()


@every_graph
def test_the_mean_stays_where_messages_are_lost_at_both_ends(random_peers: RandomPeers, graph: Graph) -> None:
    method = make("top_k", graph=graph)
    peers = random_peers(method)
    before, (i, j) = peers.x.mean(0), min(graph.edges)
    gossip(peers, method, 10, Recorded(lost=frozenset({(i, j), (j, i)})))
    assert torch.allclose(peers.x.mean(0), before, rtol=0, atol=1e-13)


@every_codec
@every_schedule
def test_equal_peers_stay_equal_to_the_bit(random_peers: RandomPeers, schedule: str, codec: str) -> None:
    method = make(codec, schedule)
    peers = random_peers(method)
    peers.x.copy_(peers.x[:1].clone().expand_as(peers.x))
    before = peers.x.clone()
    gossip(peers, method, 5)
    assert torch.equal(peers.x, before)


@every_codec
@every_schedule
@pytest.mark.parametrize("head", ["private", "frozen"])
def test_a_private_head_never_leaves(random_peers: RandomPeers, schedule: str, head: Head, codec: str) -> None:
    """Other heads change no byte on the wire, in none of several rounds, and mixing changes no head."""
    method, sent = make(codec, schedule, head), []
    for scale in (1.0, -5.0):
        peers, network = random_peers(method), Recorded()
        own = columns(peers, frozenset({"head"}))
        peers.x[:, own] *= scale
        before = peers.x[:, own].clone()
        gossip(peers, method, 4, network)
        assert torch.equal(peers.x[:, own], before)
        assert not any(vector[:, own].any() for vector in peers.memory.values())
        sent.append(network.frames)
    assert sent[0] == sent[1] and len(sent[0]) == 4


@every_codec
def test_a_peer_does_not_depend_on_who_shares_its_process(random_peers: RandomPeers, codec: str) -> None:
    method = make(codec)
    together, network = random_peers(method), Recorded()
    start = together.x.clone()
    gossip(together, method, 5, network)
    for i in range(7):
        nothing = together[i].adapter.with_flat(torch.zeros_like(start[i]))
        alone = Peers([i], nothing, together.common, memory=method.memory)
        alone.x[0] = start[i]
        gossip(alone, method, 5, Replayed(network.frames))
        assert torch.equal(alone.x[0], together.x[i])


@every_codec
def test_all_of_the_numbers_at_full_length_is_plain_gossip(random_peers: RandomPeers, codec: str) -> None:
    """But for rounding to fp32, which is what travels."""
    sparse, plain = make(codec, share=1.0, gamma=1.0), Method(SCHEDULES["lora"]("shared"), lambda t: LINK4)
    peers, others = random_peers(sparse), random_peers(plain)
    gossip(peers, sparse, 5)
    gossip(others, plain, 5)
    assert torch.allclose(peers.x, others.x, rtol=0, atol=1e-6)


@every_codec
def test_an_exchange_costs_what_its_frames_are_long(random_peers: RandomPeers, codec: str) -> None:
    method, network = make(codec), Recorded()
    peers = random_peers(method)
    for t in range(1, 4):
        traffic = mix(peers, method.schedule(t), LINK4, t, method, network)
        bodies = {i: len(f) - 4 - int.from_bytes(f[:4], "big") for i, f in network.frames[t].items()}
        assert len(set(bodies.values())) == 1
        assert traffic.bytes == sum(LINK4.degree(i) * size for i, size in bodies.items())


def test_what_error_feedback_leaves_out_is_sent_later() -> None:
    """sum_t q_t + e_T = sum_t x_t."""
    method, seven = method_on(LINK4, codec=CODECS["top_k"](0)), Quadratics.drawn(7)
    peers, network, before = seven.peers(method), Recorded(), list[Tensor]()
    for record in rounds(peers, method, seven, network, before=lambda t, p: before.append(p.x.clone()) or {}):
        if record.round == 20:
            break
    sent = torch.zeros_like(peers.x)
    for frames in network.frames.values():
        for i, content in frames.items():
            frame = Frame.from_bytes(content)
            q = frame and method.codec.decode(frame, peers[i].adapter)
            assert q is not None
            sent[i] += q.flat
    assert torch.allclose(sent + peers.memory["residual"], sum(before, torch.zeros_like(sent)), rtol=0, atol=1e-9)


def test_the_gap_is_what_replicas_of_all_neighbours_give(random_peers: RandomPeers) -> None:
    """The algorithm as it is in the paper, every replica kept by everybody."""
    gamma, w = 0.4, torch.from_numpy(matrix(LINK4, metropolis))
    method = make("choco", gamma=gamma)
    peers = random_peers(method)
    x, replicas, kept = peers.x.clone(), torch.zeros_like(peers.x), -(-peers.layout.size // 5)
    for t in range(1, 11):
        change = x - replicas
        largest = change.abs().topk(kept, dim=1).indices
        replicas += torch.zeros_like(x).scatter(1, largest, change.gather(1, largest).float().double())
        x += gamma * (w @ replicas - replicas)
        mix(peers, method.schedule(t), LINK4, t, method, MemoryNetwork())
        assert torch.allclose(peers.memory["replica"], replicas, rtol=0, atol=1e-12)
        assert torch.allclose(peers.memory["gap"], w @ replicas - replicas, rtol=0, atol=1e-12)
        assert torch.allclose(peers.x, x, rtol=0, atol=1e-12)


def test_choco_brings_peers_to_their_mean_without_local_steps(random_peers: RandomPeers) -> None:
    """Where top_k stays away from it by what it leaves out."""
    apart = {}
    for codec in KEEPING:
        method = make(codec)
        peers = random_peers(method)
        mean = peers.x.mean(0)
        gossip(peers, method, 200)
        apart[codec] = float((peers.x - mean).norm(dim=1).max())
    assert apart["choco"] < 1e-4 < apart["top_k"]


def test_choco_ends_near_where_fp32_does_at_a_fifth_of_the_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = Layout.of({"q.A": ("A", (10, 400)), "q.B": ("B", (300, 10)), "head": ("head", (200,))})
    monkeypatch.setattr(quadratics, "LAYOUT", wide)
    of, ends, sent = replace(Quadratics.drawn(7), rate=0.01), {}, {}
    codecs: dict[str, Codec] = {"fp32": CODECS["fp32"](0), "choco": CODECS["choco"](0, share=0.1, gamma=0.4)}
    for name, codec in codecs.items():
        method, bytes = method_on(LINK4, codec=codec), 0
        peers = of.peers(method)
        peers.x, peers.memory = peers.x.float(), {key: value.float() for key, value in peers.memory.items()}
        for record in rounds(peers, method, of, MemoryNetwork()):
            bytes += record.traffic.bytes
            if record.round == 300:
                break
        ends[name], sent[name] = peers.x.double(), bytes
    apart = of.centres - of.optimum
    assert (ends["choco"].mean(0) - of.optimum).norm() < 0.02 * apart.norm(dim=1).mean()
    assert (ends["choco"] - ends["fp32"]).norm(dim=1).max() < 0.1 * apart.norm(dim=1).mean()
    assert 0.2 < sent["choco"] / sent["fp32"] < 0.21


def test_neighbours_of_a_choco_peer_that_is_not_finite_go_on(random_peers: RandomPeers) -> None:
    method = make("choco")
    peers = random_peers(method)
    gossip(peers, method, 5)
    peers.x[2, 0] = torch.nan
    gossip(peers, method, 200)
    others = [i for i in range(7) if i != 2]
    assert torch.isfinite(peers.x[others]).all() and peers.x[others].abs().max() < 10
    assert all(torch.isfinite(vector).all() for vector in peers.memory.values())
