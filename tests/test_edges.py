"""What two ends of an edge write down of an exchange, and what they make of what the other has written."""

import pytest
import torch

from dfl_lora.codecs.frames import Frame
from dfl_lora.networks import Undone
from dfl_lora.networks.edges import Ledger, Moment, Open

OWN, THEIRS = (Frame("fp32", "e" * 64, {"x": torch.full((2,), value)}) for value in (1.0, 2.0))
EDGE = (0, 1)


def opened(moment: Moment = (1, 0)) -> Open:
    return Open(moment, {0: OWN}, {0: 7}, frozenset({EDGE, (0, 2)}))


def after(moment: Moment) -> Ledger:
    """Returns the ledger after an exchange that was complete on one edge."""
    exchange, ledger = opened(moment), Ledger()
    exchange.got[1] = THEIRS
    exchange.acknowledge(0, 7, [1])
    ledger.take_in(exchange)
    return ledger


def test_an_edge_is_complete_when_the_frame_is_here_and_the_other_end_has_the_own_one() -> None:
    exchange = opened()
    assert sorted(exchange.pending()) == [EDGE, (0, 2)]
    exchange.got[1] = THEIRS
    assert not exchange.complete(EDGE)
    exchange.acknowledge(0, 6, [1])  # of an earlier frame
    assert not exchange.complete(EDGE)
    exchange.acknowledge(0, 7, [1, 5])
    assert exchange.complete(EDGE)
    assert exchange.pending() == [(0, 2)]
    assert exchange.arrived() == {0: {1: THEIRS}}


def test_an_edge_that_is_given_up_is_not_taken_in_and_one_whose_frame_is_here_is_kept() -> None:
    exchange = opened()
    exchange.got[1] = THEIRS
    exchange.give_up([1, 2])
    assert exchange.out == {(0, 2)}
    exchange.out.add(EDGE)
    exchange.acknowledge(0, 7, [1])
    assert exchange.arrived() == {0: {}}
    assert exchange.pending() == []


def test_frames_are_kept_until_the_other_end_tells_the_same() -> None:
    ledger = after((3, 0))
    assert ledger.applied() == [(0, 1, 3, 0)]
    assert ledger.taken_from(1) == {(3, 0)}
    assert ledger.frames == {EDGE: (OWN, THEIRS)}
    assert ledger.settle(EDGE, (3, 0), (4, 0)) == "agreed"
    assert not ledger.frames
    assert ledger.collect() == []


def test_what_the_other_end_did_not_take_in_is_undone_once() -> None:
    ledger = after((3, 0))
    assert ledger.settle(EDGE, (2, 0), (4, 0)) == "undone"
    assert ledger.settle(EDGE, (2, 0), (4, 0)) == "agreed"
    assert ledger.collect() == [Undone(0, 1, 3, 0, OWN, THEIRS)]
    assert ledger.collect() == []
    assert ledger.taken == {EDGE: (2, 0)}


@pytest.mark.parametrize("now", [(3, 0), (2, 1)])
def test_nothing_is_judged_while_the_other_end_may_yet_take_it_in(now: Moment) -> None:
    ledger = after((3, 0))
    assert ledger.settle(EDGE, (2, 0), now) == "open"
    assert ledger.frames == {EDGE: (OWN, THEIRS)}


def test_what_the_other_end_took_in_alone_is_for_the_other_end_to_take_back() -> None:
    ledger = after((3, 0))
    assert ledger.settle(EDGE, (4, 0), (5, 0)) == "agreed"
    assert ledger.taken == {EDGE: (3, 0)}
    assert ledger.collect() == []


def test_nothing_is_kept_of_an_exchange_that_the_other_end_has_told_already() -> None:
    exchange, ledger = opened((3, 0)), Ledger()
    exchange.got[1] = THEIRS
    exchange.acknowledge(0, 7, [1])
    ledger.settle(EDGE, (3, 0), (4, 0))
    ledger.take_in(exchange)
    assert ledger.applied() == [(0, 1, 3, 0)]
    assert not ledger.frames


def test_one_that_begins_again_has_no_frames_to_take_back() -> None:
    """It knows what it took in, from its checkpoint; the frames went with the process."""
    ledger = Ledger.of([(0, 1, 3, 0)])
    assert ledger.settle(EDGE, (2, 0), (4, 0)) == "lost"
    assert ledger.taken == {EDGE: (2, 0)}
    assert ledger.collect() == []
