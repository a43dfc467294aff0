"""A peer over hundreds of rounds, and one whose neighbour is frozen."""

import signal
import time
from collections.abc import Iterator

import pytest

from network.attacked import VICTIM, WEAK, Attacked
from network.processes import at_once, until


@pytest.fixture
def siege(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attacked]:
    siege = Attacked(tmp_path_factory.mktemp("siege"))
    try:
        siege.begin()
        yield siege
    finally:
        siege.close()


@pytest.mark.slow
def test_memory_threads_and_files_of_a_peer_are_flat_over_five_hundred_rounds(siege: Attacked) -> None:
    siege.go(50)
    first = [process.look() for process in siege.processes]
    siege.go(500)
    last = [process.look() for process in siege.processes]
    for before, after in zip(first, last, strict=True):
        assert after["rss"] - before["rss"] < 16 * 2**20
        assert after["threads"] <= before["threads"] and after["fds"] <= before["fds"] + 1


@pytest.mark.slow
def test_a_neighbour_that_is_frozen_is_noticed_within_25_s_and_comes_back(siege: Attacked) -> None:
    """The others go on with each other to the bit; the one that was frozen finds that they are further on."""
    frozen, weak = siege.processes.pop(WEAK), siege.identities[WEAK].id
    start = time.monotonic()
    frozen.send(signal.SIGSTOP)
    siege.right.leave(WEAK)
    siege.go(3)
    (lost,) = siege.victim.events("lost", weak)
    assert 1 < lost["heard"] - start < 25
    links = len(siege.victim.events("linked", weak))
    frozen.send(signal.SIGCONT)
    until(lambda: len(siege.victim.events("linked", weak)) > links, 25)
    frozen.ask("rounds", count=3)  # on its own
    failed = len([e for e in siege.victim.events("failed-edge") if e["peers"] == [VICTIM, WEAK]])
    siege.processes.append(frozen)
    at_once(siege.processes, "rounds", count=3)
    assert len([e for e in siege.victim.events("failed-edge") if e["peers"] == [VICTIM, WEAK]]) == failed
