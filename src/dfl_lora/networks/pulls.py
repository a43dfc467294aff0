"""Bodies: announced, pulled from where they broke off, sent in pieces.

The receiver decides: it asks for a body when the exchange is open here, from the offset that it has, so that a link
that ends in the middle costs what was under way and no more. Kept are, for each neighbour, its last announcement and at
most one body on its way; for each hosted peer the frame of the exchange that is open.
"""

import asyncio
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dfl_lora.codecs.frames import Frame
from dfl_lora.networks.body import Room, room
from dfl_lora.networks.border import NO_STRIKE, Border
from dfl_lora.networks.edges import Edge, Ledger, Moment, Open
from dfl_lora.networks.links import Link
from dfl_lora.networks.messages import CHUNK_BYTES, Announce, Chunk, Have, Pull, encoded
from dfl_lora.networks.sealed import Header, Opened, Refusal, open_sealed


@dataclass
class Heard:
    """The last announcement of a peer, the link it came on, and what of its body is here."""

    header: Header
    sealed: bytes
    link: Link
    buffer: Room = field(default_factory=bytearray)
    filled: int = 0
    digest: Any = None
    """sha256 of what is here; None where nothing was asked for."""

    @property
    def moment(self) -> Moment:
        return self.header.moment

    def let_go(self) -> None:
        self.buffer, self.filled, self.digest = bytearray(), 0, None


@dataclass(frozen=True)
class Outgoing:
    """A frame of a hosted peer, ready to be pulled."""

    frame: Frame
    body: Room
    sha256: str


class Pulls:
    """The bodies of the exchange that is open, in both directions."""

    def __init__(self, border: Border, ledger: Ledger) -> None:
        self.border, self.ledger = border, ledger
        self.exchange: Open | None = None
        self.sealed: Mapping[int, bytes] = {}
        self.bodies: Mapping[int, Room] = {}
        self.heard_of: dict[int, Heard] = {}
        self.early: dict[int, tuple[Link, bytes]] = {}
        self.asked: dict[tuple[str, int], tuple[Link, Pull]] = {}
        self.sending: dict[tuple[str, int], asyncio.Task[None]] = {}

    def begin(self, exchange: Open, sealed: Mapping[int, bytes], bodies: Mapping[int, Room]) -> None:
        """Opens an exchange: what is sealed can be announced, and pulled from here."""
        self.exchange, self.sealed, self.bodies = exchange, sealed, bodies

    def look_back(self, next: Moment) -> None:
        """Pulls what was announced before its exchange was open here."""
        for link, sealed in [self.early.pop(j) for j in list(self.early)]:
            self.take_announcement(link, sealed, next)
        for j in list(self.heard_of):
            self.pull(j)

    def end(self) -> None:
        """Closes the exchange, and lets go of what is still on its way."""
        moment = self.exchange.moment if self.exchange else None
        self.exchange, self.sealed, self.bodies = None, {}, {}
        self.asked.clear()
        for heard in self.heard_of.values():
            if moment is not None and heard.moment <= moment:
                heard.let_go()

    def has_announced(self, j: int, moment: Moment) -> bool:
        """Tells whether a peer is in an exchange, or was."""
        return j in self.heard_of and self.heard_of[j].moment >= moment

    def announcements(self, receivers: Iterable[int]) -> list[Announce]:
        """Returns what there is for these peers of another member."""
        edges = self.exchange.edges - self.exchange.out if self.exchange else frozenset[Edge]()
        wanted = set(receivers)
        return [Announce(self.sealed[i]) for i in sorted({i for i, j in edges if j in wanted})]

    def take_announcement(self, link: Link, sealed: bytes, next: Moment) -> None:
        """Notes what a peer announces, and pulls it where its exchange is open here."""
        again = [
            h for j in link.member.peers if (h := self.heard_of.get(j)) and h.sealed == sealed and h.link is not link
        ]
        if again:  # on a new link: what was pulled already stays
            again[0].link = link
            self.pull(again[0].header.sender)
            return
        verdict = self.border.announced(sealed, link.member.id, next)
        if isinstance(verdict, Header):
            self.heard_of[verdict.sender] = Heard(verdict, sealed, link)
            self.pull(verdict.sender)
        elif verdict.kind == "future":  # judged again when this end has caught up
            opened = open_sealed(sealed)
            if isinstance(opened, Opened) and opened.header.sender in link.member.peers:
                self.early[opened.header.sender] = link, sealed
        elif verdict.kind not in NO_STRIKE and self.exchange is not None:  # no use to wait for the deadline
            self.exchange.give_up(link.member.peers)

    def pull(self, j: int) -> None:
        """Asks for the frame of a peer, from where it broke off; or says that it is here."""
        heard, exchange = self.heard_of[j], self.exchange
        here = Have(sender=j, sequence=heard.header.sequence)
        if exchange is None or exchange.moment != heard.moment:
            if heard.moment in self.ledger.taken_from(j):
                heard.link.say(here)
        elif j in exchange.got:
            heard.link.say(here)
        elif isinstance(self.border.judge(heard.header), Refusal):
            exchange.give_up([j])
        elif j in {edge[1] for edge in exchange.pending()}:
            if heard.digest is None:
                heard.buffer, heard.digest = room(heard.header.length), hashlib.sha256()
            heard.link.say(Pull(sender=j, sequence=heard.header.sequence, offset=heard.filled))

    def send(self, link: Link, asked: Pull) -> None:
        """Sends the body of a hosted peer's frame to a member with neighbours of it: what it asked for last."""
        exchange = self.exchange
        if exchange is None or exchange.sequences.get(asked.sender) != asked.sequence:
            return
        if not any((asked.sender, j) in exchange.edges for j in link.member.peers):
            return
        key = link.member.id, asked.sender
        self.asked[key] = link, asked
        if key not in self.sending:
            self.sending[key] = asyncio.create_task(self.send_bodies(key))

    async def send_bodies(self, key: tuple[str, int]) -> None:
        """Sends until nothing more is asked for. It is never cancelled: gRPC ends a call whose write is cancelled."""
        try:
            while (wanted := self.asked.pop(key, None)) is not None:
                link, asked = wanted
                exchange, body = self.exchange, memoryview(self.bodies[asked.sender])
                for offset in range(asked.offset, len(body), CHUNK_BYTES):
                    piece = body[offset : offset + CHUNK_BYTES]
                    await link.write(encoded(Chunk(asked.sender, asked.sequence, offset, piece)))
                    if self.exchange is not exchange or key in self.asked:
                        break
        finally:
            del self.sending[key]

    def take_chunk(self, link: Link, chunk: Chunk) -> None:
        """Adds a piece to a body that was asked for; pieces that were not are let fall."""
        heard = self.heard_of.get(chunk.sender)
        if heard is None or heard.link is not link or heard.digest is None or self.exchange is None:
            return
        if heard.header.sequence != chunk.sequence or heard.filled != chunk.offset:
            return
        stop, right = heard.filled + len(chunk.data), min(heard.filled + CHUNK_BYTES, heard.header.length)
        if stop != right:  # a body that came in drops would never end, and one that goes on has no room
            why = f"a piece of a body of {heard.header.length:,} bytes ends at {stop:,}, not at {right:,}"
            self.border.strike(link.member.id, "truncated" if stop < right else "size", why)
            self.give_up(heard)
            return
        heard.buffer[heard.filled : stop] = chunk.data
        heard.digest.update(chunk.data)
        heard.filled = stop
        if stop == heard.header.length:
            self.take_body(heard)

    def take_body(self, heard: Heard) -> None:
        exchange, j = self.exchange, heard.header.sender
        verdict = self.border.received(heard.header, heard.buffer, heard.digest.hexdigest())
        if exchange is None or not isinstance(verdict, Frame):
            return self.give_up(heard)
        heard.let_go()
        exchange.got[j] = verdict
        return heard.link.say(Have(sender=j, sequence=heard.header.sequence))

    def give_up(self, heard: Heard) -> None:
        """Lets a body go that is no good, and the edges that it was for."""
        heard.let_go()
        if self.exchange is not None:
            self.exchange.out |= {edge for edge in self.exchange.edges if edge[1] == heard.header.sender}
