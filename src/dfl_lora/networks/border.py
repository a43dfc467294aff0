"""The border: everything that arrives is judged here, once, and what passes is trusted inside.

A frame passes twice. Its announcement (a sealed header) is judged before anything is allocated for it, its body when
it is here; each time the cheapest check comes first. What is refused has no effect but a count, and one report for
each kind and member.

    announced   well formed · of a peer that this member hosts · this federation, run, recipe · a new sequence ·
                now, or at most the next exchange or round · this epoch or the one before ·
                codec, layout and length of the own message, once its exchange is open · signature
    received    length · sha256 · the beginning to the byte · all numbers finite · norm

`stale`, `future` and `duplicate` happen to honest members on bad days; each other refusal is a strike, and ten of them
ban a member for the run. Kept are, for each peer, the last announcement that passed, and for each member its counts.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite

from dfl_lora.codecs.frames import Frame
from dfl_lora.membership.roster import Roster
from dfl_lora.networks.body import Expectation, Room, frame_from, is_finite, norm_of
from dfl_lora.networks.sealed import Header, Kind, Opened, Refusal, open_sealed

Report = Callable[[str, Refusal], None]
Moment = tuple[int, int]
"""(round, exchange)."""

STRIKES = 10
NO_STRIKE: frozenset[Kind] = frozenset({"stale", "future", "duplicate"})


@dataclass(frozen=True)
class Expected:
    """What an exchange takes in."""

    moment: Moment
    frame: Expectation
    max_norm: float


@dataclass(frozen=True)
class Latest:
    """The last announcement of a peer that passed, and the member that made it."""

    member: str
    sequence: int
    sealed: bytes


class Border:
    """Judges what members of a roster send; `report` hears the first refusal of each kind and member."""

    def __init__(self, roster: Roster, recipe: str, report: Report, most_strikes: int = STRIKES) -> None:
        self.roster = roster
        self.most_strikes = most_strikes
        self.recipe = recipe
        self.report = report
        self.expected: Expected | None = None
        self.latest = dict[int, Latest]()
        self.counts = dict[str, Counter[Kind]]()

    def expect(self, moment: Moment, frame: Expectation, max_norm: float) -> None:
        """Opens an exchange: from now on frames are compared with this one."""
        self.expected = Expected(moment, frame, max_norm)

    def announced(self, sealed: bytes, member: str, now: Moment) -> Header | Refusal:
        """Returns the header of an announcement that a member made, whose body may then be pulled, or why not."""
        opened = open_sealed(sealed)
        judged = opened if isinstance(opened, Refusal) else self.examined(opened, sealed, member, now)
        if isinstance(judged, Refusal):
            return self.refuse(member, judged)
        self.latest[judged.sender] = Latest(member, judged.sequence, sealed)
        return judged

    def judge(self, header: Header) -> Header | Refusal:
        """Judges an announcement that came ahead of its exchange again, now that it may be open."""
        if self.expected is None or header.moment > self.expected.moment:
            return header
        refusal = unfit(header, self.expected)
        return header if refusal is None else self.refuse(self.latest[header.sender].member, refusal)

    def received(self, header: Header, body: Room, sha256: str) -> Frame | Refusal:
        """Returns the frame of an announcement that passed, as views of its body, or why it is refused.

        `sha256` is that of the body as it arrived, in hexadecimal digits: who pulls it has it at no cost.
        """
        frame = admitted(header, body, sha256, self.expected)
        return self.refuse(self.latest[header.sender].member, frame) if isinstance(frame, Refusal) else frame

    def strike(self, member: str, kind: Kind, why: str) -> Refusal:
        """Counts something else that a member sent and no honest one does."""
        return self.refuse(member, Refusal(kind, why))

    def examined(self, opened: Opened, sealed: bytes, member: str, now: Moment) -> Header | Refusal:
        """Returns the header of an announcement that is well formed, or what else is wrong with it."""
        header, host = opened.header, self.roster.of_peer(opened.header.sender)
        if host is None or host.id != member:
            whose = "nobody hosts" if host is None else f"member {host.id[:8]} hosts"
            return Refusal("identity", f"member {member[:8]} speaks for peer {header.sender}, which {whose}")
        wrong = self.foreign(header) or self.repeated(header, sealed) or untimely(header, now) or self.outdated(header)
        if wrong is None and self.expected is not None and header.moment == self.expected.moment:
            wrong = unfit(header, self.expected)
        if wrong is None and not opened.is_signed_by(host.key):
            wrong = Refusal("signature", f"a frame of peer {header.sender} is not signed by member {member[:8]}")
        return wrong or header

    def foreign(self, header: Header) -> Refusal | None:
        """Returns why a frame belongs elsewhere."""
        if header.federation != self.roster.federation:
            return differs("federation", header.federation, self.roster.federation)
        if header.run != self.roster.run:
            return differs("run", header.run, self.roster.run)
        return None if header.recipe == self.recipe else differs("recipe", header.recipe, self.recipe)

    def repeated(self, header: Header, sealed: bytes) -> Refusal | None:
        """Returns why a frame is not new."""
        last = self.latest.get(header.sender)
        if last is None or header.sequence > last.sequence:
            return None
        if sealed == last.sealed:
            return Refusal("duplicate", f"frame {header.sequence} of peer {header.sender} was announced before")
        why = f"frame {header.sequence} of peer {header.sender} comes after frame {last.sequence}; sequences only grow"
        return Refusal("replayed", why)

    def outdated(self, header: Header) -> Refusal | None:
        epoch = self.roster.epoch
        if epoch - 1 <= header.epoch <= epoch:
            return None
        return Refusal("epoch", f"a frame is of epoch {header.epoch}; allowed are {epoch} and the one before")

    def refuse(self, member: str, refusal: Refusal) -> Refusal:
        """Counts a refusal, reports it where it is the first of its kind and member, and returns it."""
        counts = self.counts.setdefault(member, Counter())
        counts[refusal.kind] += 1
        if counts[refusal.kind] == 1:
            self.report(member, refusal)
        return refusal

    @property
    def refused(self) -> Mapping[str, Mapping[Kind, int]]:
        """How many frames of each member were refused, by kind."""
        return self.counts

    def last(self, peer: int) -> int:
        """Returns the sequence of the last announcement of a peer that passed; -1 before the first."""
        return self.latest[peer].sequence if peer in self.latest else -1

    def strikes(self, member: str) -> int:
        """Returns how often a member sent what no honest one does."""
        return sum(count for kind, count in self.counts.get(member, {}).items() if kind not in NO_STRIKE)

    def banned(self, member: str) -> bool:
        """Tells whether a member is not listened to any more in this run."""
        return self.strikes(member) >= self.most_strikes


def untimely(header: Header, now: Moment) -> Refusal | None:
    """Returns why a frame can be of no use at this moment.

    An honest peer is at most one step ahead: it opens an exchange on an edge only after it had the other end's frame of
    the one before. Where the graph changes an edge may have no turn for some rounds, and a peer be further ahead: its
    announcement is judged again when this end has caught up.
    """
    round, exchange = now
    why = f"a frame is of round {header.round}, exchange {header.exchange}, and here it is round {round}, {exchange}"
    if header.moment < now:
        return Refusal("stale", f"{why}: too late")
    if header.round > round + 1:
        return Refusal("future", f"{why}: at most the next round is waited for")
    if header.exchange > (exchange + 1 if header.round == round else 0):
        return Refusal("exchange", f"{why}: at most the next exchange is waited for")
    return None


def unfit(header: Header, expected: Expected) -> Refusal | None:
    """Returns why a frame cannot be taken in by the exchange that is open."""
    if header.moment != expected.moment:
        kind: Kind = "stale" if header.moment < expected.moment else "future"
        return Refusal(kind, f"a frame is of round and exchange {header.moment}, and {expected.moment} are open")
    frame = expected.frame
    if header.codec != frame.codec:
        return differs("codec", header.codec, frame.codec)
    if header.layout != frame.layout:
        return differs("layout", header.layout, frame.layout)
    if header.length != frame.length:
        return Refusal("size", f"a body of {header.length} bytes is announced; in this exchange it has {frame.length}")
    return None


def admitted(header: Header, body: Room, sha256: str, expected: Expected | None) -> Frame | Refusal:
    """Returns the frame of a body, or what is wrong with it."""
    if expected is None:
        return Refusal("future", f"a body of round {header.round} came before any exchange was open")
    if refusal := unfit(header, expected):
        return refusal
    if len(body) != header.length:
        return Refusal("truncated", f"a body has {len(body)} bytes; {header.length} were announced")
    if sha256 != header.sha256:
        return differs("hash", sha256, header.sha256)
    frame = frame_from(body, expected.frame)
    if frame is None:
        return Refusal("names", "a body begins with other names, types or shapes than those of this exchange")
    norm = norm_of(frame)
    if not isfinite(norm) and not is_finite(frame):
        return Refusal("non-finite", f"a message of peer {header.sender} holds a number that is not finite")
    if norm > expected.max_norm:
        return Refusal("norm", f"a message has a norm of {norm:.4g}; at most {expected.max_norm:.4g} is allowed")
    return frame


def differs(kind: Kind, given: str, allowed: str) -> Refusal:
    return Refusal(kind, f"a frame has the {kind} {given[:16]}, allowed is {allowed[:16]}")
