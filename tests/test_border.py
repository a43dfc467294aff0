"""The border: what is not as it should be is refused, counted and reported, and has no other effect."""

import hashlib
from dataclasses import replace
from random import Random

import pytest
import torch

from dfl_lora.codecs.frames import Frame
from dfl_lora.networks.body import Expectation, body_of
from dfl_lora.networks.border import STRIKES, Border
from dfl_lora.networks.sealed import Header, Kind, Refusal, seal
from network.mutator import MAX_NORM, MOMENT, Source, federation
from network.siege import FRAME_KINDS, besieged

HERE = federation()
ROUND, EXCHANGE = MOMENT
MEMBER, OTHER = HERE.host(2), HERE.host(4)


class Gate:
    """A border, what it reported, and frames of peer 2 to bring to it."""

    def __init__(self) -> None:
        self.reports: list[tuple[str, Refusal]] = []
        self.border = Border(
            HERE.roster, HERE.roster.recipe, lambda member, refusal: self.reports.append((member, refusal))
        )
        self.source = Source(HERE, Random("gate"))

    def opened(self) -> "Gate":
        self.border.expect(MOMENT, Expectation.of(HERE.frame), MAX_NORM)
        return self

    def frame(self, **changes: object) -> tuple[Header, bytearray]:
        """Returns a new header of peer 2 with some fields changed, and its body."""
        good = self.source.valid()
        return replace(good.header, **{"sender": 2} | changes), good.body

    def announce(self, header: Header, now: tuple[int, int] = MOMENT) -> Header | Refusal:
        return self.border.announced(seal(header, MEMBER.sign), MEMBER.id, now)

    def announced_kind(self, now: tuple[int, int] = MOMENT, **changes: object) -> str | None:
        """Returns the kind for which a changed header is refused; None where it passes."""
        verdict = self.announce(self.frame(**changes)[0], now)
        return verdict.kind if isinstance(verdict, Refusal) else None

    def receive(self, header: Header, body: bytearray) -> Frame | Refusal:
        return self.border.received(header, body, hashlib.sha256(body).hexdigest())

    def bring(self, body: bytearray) -> Frame | Refusal:
        """Returns what comes of a body that is announced as it is."""
        header, _ = self.frame(length=len(body), sha256=hashlib.sha256(body).hexdigest())
        assert self.announce(header) == header
        return self.receive(header, body)

    def refused(self) -> dict[Kind, int]:
        return dict(self.border.refused.get(MEMBER.id, {}))


@pytest.fixture
def gate() -> Gate:
    return Gate().opened()


def test_a_frame_that_is_right_is_taken_in_without_a_copy(gate: Gate) -> None:
    header, body = gate.frame()
    assert gate.announce(header) == header
    frame = gate.receive(header, body)
    assert isinstance(frame, Frame)
    assert body_of(frame) == body
    body[-1] ^= 1
    assert body_of(frame) == body
    assert gate.reports == [] and gate.border.refused == {}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("identity", {"sender": 4}),
        ("identity", {"sender": 3}),
        ("federation", {"federation": OTHER.id}),
        ("run", {"run": "0" * 32}),
        ("recipe", {"recipe": "0" * 64}),
        ("epoch", {"epoch": HERE.roster.epoch + 1}),
        ("epoch", {"epoch": HERE.roster.epoch - 2}),
        ("stale", {"round": ROUND - 1}),
        ("stale", {"exchange": EXCHANGE - 1}),
        ("future", {"round": ROUND + 2, "exchange": 0}),
        ("exchange", {"exchange": EXCHANGE + 2}),
        ("exchange", {"round": ROUND + 1, "exchange": 1}),
        ("codec", {"codec": "int8"}),
        ("layout", {"layout": "0" * 64}),
        ("size", {"length": 10**11}),
        (None, {"epoch": HERE.roster.epoch - 1}),
        (None, {"exchange": EXCHANGE + 1}),
        (None, {"round": ROUND + 1, "exchange": 0}),
    ],
)
def test_a_header_passes_where_everything_in_it_is_right(
    gate: Gate, kind: str | None, changes: dict[str, object]
) -> None:
    assert gate.announced_kind(**changes) == kind


def test_a_frame_is_signed_by_the_member_whose_link_it_came_on(gate: Gate) -> None:
    header, _ = gate.frame()
    sealed = seal(header, OTHER.sign)
    forged, elsewhere = (gate.border.announced(sealed, one.id, MOMENT) for one in (MEMBER, OTHER))
    assert isinstance(forged, Refusal) and forged.kind == "signature"
    assert isinstance(elsewhere, Refusal) and elsewhere.kind == "identity"
    stranger = gate.border.announced(seal(header, MEMBER.sign), "a" * 52, MOMENT)
    assert isinstance(stranger, Refusal) and stranger.kind == "identity"


def test_a_sequence_only_grows_and_the_last_announcement_may_come_again(gate: Gate) -> None:
    assert gate.border.last(2) == -1
    first, second = gate.frame()[0], gate.frame()[0]
    assert gate.announce(second) == second
    assert gate.border.last(2) == second.sequence
    assert gate.announced_kind(sequence=first.sequence) == "replayed"
    again, changed = gate.announce(second), gate.announce(replace(second, sha256="0" * 64))
    assert isinstance(again, Refusal) and again.kind == "duplicate"
    assert isinstance(changed, Refusal) and changed.kind == "replayed"
    assert gate.announced_kind() is None


def test_an_announcement_that_was_refused_uses_up_no_sequence(gate: Gate) -> None:
    header, _ = gate.frame()
    assert isinstance(gate.announce(replace(header, layout="0" * 64)), Refusal)
    assert gate.border.last(2) == -1
    assert gate.announce(header) == header


@pytest.mark.parametrize(("kind", "change"), [("codec", "int8"), ("layout", "0" * 64), ("length", 10**11)])
def test_an_announcement_that_came_ahead_is_judged_when_its_exchange_opens(kind: str, change: object) -> None:
    gate, before = Gate(), (ROUND, EXCHANGE - 1)
    good, bad = gate.frame()[0], gate.frame(**{kind: change})[0]
    for header in (good, bad):
        assert gate.announce(header, before) == header
        assert gate.border.judge(header) == header
    gate.border.expect(before, Expectation.of(HERE.frame), MAX_NORM)
    assert gate.border.judge(bad) == bad
    gate.opened()
    assert gate.border.judge(good) == good
    verdict = gate.border.judge(bad)
    assert isinstance(verdict, Refusal) and verdict.kind == {"length": "size"}.get(kind, kind)
    assert gate.refused() == {verdict.kind: 1}
    gate.border.expect((ROUND + 1, 0), Expectation.of(HERE.frame), MAX_NORM)
    late = gate.border.judge(good)
    assert isinstance(late, Refusal) and late.kind == "stale"


def test_a_body_is_taken_in_by_its_own_exchange_alone() -> None:
    gate = Gate()
    header, body = gate.frame()
    assert gate.announce(header) == header
    kinds = list[str]()
    for moment in (None, (ROUND, EXCHANGE - 1), (ROUND, EXCHANGE + 1)):
        if moment is not None:
            gate.border.expect(moment, Expectation.of(HERE.frame), MAX_NORM)
        verdict = gate.receive(header, body)
        assert isinstance(verdict, Refusal)
        kinds.append(verdict.kind)
    assert kinds == ["future", "future", "stale"]
    assert isinstance(gate.opened().receive(header, body), Frame)


def test_a_body_is_the_one_that_was_announced(gate: Gate) -> None:
    header, body = gate.frame()
    gate.announce(header)
    cut, changed = gate.receive(header, body[:-1]), gate.receive(header, body[:-1] + b"!")
    assert isinstance(cut, Refusal) and cut.kind == "truncated"
    assert isinstance(changed, Refusal) and changed.kind == "hash"


def test_a_body_has_the_own_names_types_and_shapes(gate: Gate) -> None:
    turned = replace(HERE.frame, body=dict(HERE.frame.body) | {"x": HERE.frame.body["x"].reshape(4, 6)})
    verdict = gate.bring(body_of(turned))
    assert isinstance(verdict, Refusal) and verdict.kind == "names"


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        ("non-finite", "x", float("nan")),
        ("non-finite", "half", float("inf")),
        ("non-finite", "scale", float("-inf")),
        ("norm", "x", 1.001 * MAX_NORM),
        ("norm", "x", 3e38),
        ("norm", "scale", -1e300),
        (None, "x", 0.999 * MAX_NORM),
        (None, "q", 100),
    ],
)
def test_numbers_are_finite_and_their_norm_is_bounded(gate: Gate, kind: str | None, name: str, value: float) -> None:
    tensor = HERE.frame.body[name].clone()
    tensor.view(-1)[-1] = value
    verdict = gate.bring(body_of(replace(HERE.frame, body=dict(HERE.frame.body) | {name: tensor})))
    assert (verdict.kind if isinstance(verdict, Refusal) else None) == kind
    assert torch.equal(HERE.frame.body["x"], torch.zeros(6, 4))


def test_refusals_are_counted_by_member_and_kind_and_each_is_reported_once(gate: Gate) -> None:
    for _ in range(3):
        assert gate.announced_kind(recipe="0" * 64) == "recipe"
        assert gate.announced_kind(run="0" * 32) == "run"
        gate.border.announced(b"HTTP/1.1", OTHER.id, MOMENT)
    assert gate.refused() == {"recipe": 3, "run": 3}
    assert gate.border.refused[OTHER.id] == {"magic": 3}
    assert [(member, refusal.kind) for member, refusal in gate.reports] == [
        (MEMBER.id, "recipe"),
        (MEMBER.id, "run"),
        (OTHER.id, "magic"),
    ]


def test_ten_strikes_ban_a_member_and_nobody_else(gate: Gate) -> None:
    assert gate.border.strikes(MEMBER.id) == 0
    for strike in range(STRIKES):
        assert gate.border.strikes(MEMBER.id) == strike and not gate.border.banned(MEMBER.id)
        gate.announced_kind(recipe="0" * 64)
    assert gate.border.banned(MEMBER.id) and not gate.border.banned(OTHER.id)


def test_what_a_member_sends_beside_frames_can_be_a_strike(gate: Gate) -> None:
    refusal = gate.border.strike(MEMBER.id, "message", "a message without an end")
    assert gate.reports == [(MEMBER.id, refusal)]
    assert gate.border.strikes(MEMBER.id) == 1


def test_to_be_late_early_or_heard_twice_is_no_strike(gate: Gate) -> None:
    header, _ = gate.frame()
    assert gate.announce(header) == header
    for _ in range(2 * STRIKES):
        gate.announce(header)
        assert gate.announced_kind(round=ROUND - 1) == "stale"
        assert gate.announced_kind(round=ROUND + 9) == "future"
    assert gate.border.strikes(MEMBER.id) == 0 and not gate.border.banned(MEMBER.id)


def test_a_newer_roster_says_who_speaks_for_whom(gate: Gate) -> None:
    members = [replace(m, peers=tuple({2: 4, 4: 2}.get(p, p) for p in m.peers)) for m in HERE.roster.members]
    header, _ = gate.frame(sender=4)
    assert gate.announce(header) != header
    gate.border.roster = replace(HERE.roster, epoch=HERE.roster.epoch + 1, members=tuple(members))
    assert gate.announce(header) == header
    assert gate.announced_kind(sender=4, epoch=HERE.roster.epoch + 1) is None
    assert gate.announced_kind(sender=4, epoch=HERE.roster.epoch - 1) == "epoch"


def test_of_20_000_mutants_none_is_taken_in_and_every_check_refuses_some() -> None:
    siege = besieged(seed=0, count=20_000)
    assert min(siege.refused[kind] for kind in FRAME_KINDS) >= 50, siege.table()
    assert siege.refused.total() == 20_000
    assert siege.resigned >= 10_000
