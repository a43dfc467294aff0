"""Peers that are absent from a round: nothing of theirs moves, and nobody is pulled."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from dfl_lora.graphs import GRAPHS
from dfl_lora.mixing import MIXINGS
from dfl_lora.networks.memory import MemoryNetwork
from dfl_lora.participation import absence, nobody
from dfl_lora.peers import Peers
from dfl_lora.rounds import Method, mix
from dfl_lora.schedules import SCHEDULES

NUM_PEERS = 7
SEVEN = ("ring", "complete", "du14", "link4", "link6")
RandomPeers = Callable[[Method], Peers]


@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("num_peers", [1, 2, 7, 100])
def test_a_round_has_its_share_of_peers_and_at_least_one(num_peers: int, share: float) -> None:
    for t in range(1, 20):
        present = num_peers - len(absence(num_peers, share, 0)(t))
        assert present == max(1, round(share * num_peers))


def test_who_is_absent_depends_on_the_seed_and_the_round_alone() -> None:
    draws = [absence(20, 0.5, 1)(t) for t in range(1, 9)]
    assert draws == [absence(20, 0.5, 1)(t) for t in range(1, 9)]
    assert len(set(draws)) > 1
    assert draws != [absence(20, 0.5, 2)(t) for t in range(1, 9)]


def test_every_peer_has_its_turn() -> None:
    absent = absence(7, 0.3, 0)
    assert frozenset.intersection(*(absent(t) for t in range(1, 40))) == frozenset()


def test_a_full_share_is_everybody_always() -> None:
    assert absence(7, 1.0, 0) is nobody
    assert nobody(3) == frozenset()


@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize("name", SEVEN)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_absent_peers_stay_to_the_bit_and_the_mean_stays(
    random_peers: RandomPeers, name: str, mixing: str, schedule: str
) -> None:
    graph = GRAPHS[name](NUM_PEERS)
    method = Method(SCHEDULES[schedule]("shared"), lambda t: graph, absence(NUM_PEERS, 0.5, 3), MIXINGS[mixing])
    peers = random_peers(method)
    mean = peers.x.mean(0)
    for t in range(1, 6):
        before, absent = peers.x.clone(), sorted(method.absence(t))
        phase = replace(method.schedule(t), absent=frozenset(absent))
        mix(peers, phase, graph, t, method, MemoryNetwork())
        assert torch.equal(peers.x[absent], before[absent])
        assert torch.allclose(peers.x.mean(0), mean, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", SEVEN)
def test_only_messages_between_present_peers_travel(random_peers: RandomPeers, name: str) -> None:
    graph = GRAPHS[name](NUM_PEERS)
    method = Method(SCHEDULES["lora"]("shared"), lambda t: graph)
    peers = random_peers(method)
    phase = replace(method.schedule(1), absent=frozenset({0, 2}))
    traffic = mix(peers, phase, graph, 1, method, MemoryNetwork())
    assert traffic.messages == 2 * sum(not {i, j} & {0, 2} for i, j in graph.edges)
    assert traffic.refused == {}


def test_a_round_of_one_peer_changes_nobody(random_peers: RandomPeers) -> None:
    graph = GRAPHS["complete"](NUM_PEERS)
    method = Method(SCHEDULES["lora"]("shared"), lambda t: graph, absence(NUM_PEERS, 0.01, 0))
    peers = random_peers(method)
    before = peers.x.clone()
    traffic = mix(peers, replace(method.schedule(1), absent=method.absence(1)), graph, 1, method, MemoryNetwork())
    assert torch.equal(peers.x, before)
    assert traffic.messages == 0


def test_the_graphs_of_this_file_are_in_the_table() -> None:
    assert set(SEVEN) <= set(GRAPHS)
