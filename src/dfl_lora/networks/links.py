"""One link with each member that hosts a neighbour: dialled by one end, dialled again for ever, met with a hello.

The end without addresses dials, else the one with the smaller id. Both ends say hello and compare what they agreed to
in one order; the first difference is named on both sides and the link refused. A link that ends is redialled after a
pause that doubles up to 5 s, with jitter, through all addresses of the member.
"""

import asyncio
import secrets
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from time import monotonic
from typing import Any, Literal, Protocol

from dfl_lora.membership.roster import Member, Roster
from dfl_lora.networks.messages import MOST_BYTES, Bye, Hello, Message, Refused, decoded, encoded
from dfl_lora.networks.transport import Stream, Transport, Unreachable

HELLO_S = 10.0
"""Within which a hello must have come; also of a dial."""
MOST_SESSIONS = 8
"""Processes of one member that are remembered, to tell one that began again from two at a time."""
BYE_S = 1.0
"""For a last word to arrive."""
FIRST_PAUSE_S, LONGEST_PAUSE_S, REFUSED_PAUSE_S = 0.3, 5.0, 30.0
MOST_UNREAD = 10_000
"""Short messages that wait for an end that does not read; it is cut off when it says more."""
MOST_TOLD = 100
"""Reasons of each member, and of all strangers, that are told; the rest is silent until a link is made."""
COMPARED: tuple[tuple[str, str], ...] = (
    ("protocol", "protocol version"),
    ("federation", "federation"),
    ("run", "run"),
    ("recipe", "recipe digest"),
    ("base", "digest of the frozen base"),
    ("frozen", "digest of the frozen factors"),
    ("start", "digest of the start"),
)
"""In this order: the first difference is named."""

Event = Mapping[str, Any]
Observe = Callable[[Event], None]
State = Literal["linked", "lost", "dialling", "awaited", "refused", "banned", "gone"]


@dataclass
class Link:
    """A conversation with a member. Reading never waits for writing, so that two ends never wait for each other."""

    member: Member
    stream: Stream
    hello: Hello
    restarted: bool = False
    """The other end's process is another one than on the last link."""
    sent: int = 0
    received: int = 0
    outbox: deque[bytes] = field(default_factory=deque)
    writing: asyncio.Lock = field(default_factory=asyncio.Lock)
    due: asyncio.Event = field(default_factory=asyncio.Event)
    cut: asyncio.Future[None] | None = None

    def say(self, *messages: Message) -> None:
        """Puts short messages into the outbox; they go out in this order. An end that does not read is cut off."""
        self.outbox.extend(map(encoded, messages))
        self.due.set()
        if len(self.outbox) > MOST_UNREAD and self.cut is None:
            self.cut = asyncio.ensure_future(self.stream.close())

    async def write_outbox(self) -> None:
        """Writes what is said, for as long as the link lives."""
        while self.cut is None:
            await self.due.wait()
            self.due.clear()
            while self.outbox and self.cut is None:
                await self.write(self.outbox.popleft())

    async def write(self, content: bytes) -> None:
        """Writes one message when those before are written: a body takes turns with what is said."""
        async with self.writing:
            self.sent += len(content)
            await self.stream.write(content)


@dataclass
class Standing:
    """How things are with a member, linked or not."""

    state: State = "dialling"
    since: datetime = field(default_factory=lambda: datetime.now(UTC))
    changed: float = field(default_factory=monotonic)
    why: str = ""
    links: int = 0
    sent: int = 0
    received: int = 0
    sessions: list[str] = field(default_factory=list)
    """Of the processes that were linked, the last one last; the same one may be linked many times."""

    def turn(self, state: State, why: str = "") -> None:
        if state != self.state:
            self.state, self.since, self.changed = state, datetime.now(UTC), monotonic()
        self.why = why


class Host(Protocol):
    """What the links ask of whoever holds the conversation."""

    def hello(self, member: Member | None) -> Hello:
        """Returns what is said first; the member is not known yet where somebody dials without TLS."""
        ...

    def barred(self, member: Member) -> str | None:
        """Returns why nobody here talks to a member; None where one does."""
        ...

    def met(self, link: Link) -> None:
        """A link is there."""
        ...

    def heard(self, link: Link, message: Message) -> None: ...

    def garbled(self, link: Link, why: str) -> None:
        """Something came that is no message."""
        ...

    def lost(self, link: Link) -> None: ...


class Links:
    """The links of one member, by the ids of the others."""

    def __init__(self, own: str, roster: Roster, transport: Transport, host: Host, observe: Observe) -> None:
        self.own, self.roster, self.transport, self.host, self.observe = own, roster, transport, host, observe
        self.open: dict[str, Link] = {}
        self.standing: dict[str, Standing] = {}
        self.dialling: dict[str, asyncio.Task[None]] = {}
        self.told: set[tuple[str, str, str]] = set()
        self.closing = False

    def want(self, ids: Iterable[str]) -> None:
        """Keeps a link to each of these members: dials those that are this end's to dial."""
        for member in (self.roster.member(id) for id in ids):
            if member is None or member.id == self.own:
                continue
            dials = self.dials(member)
            self.standing.setdefault(member.id, Standing("dialling" if dials else "awaited"))
            if not self.can_meet(member):
                why = "neither end has an address, so that nobody can dial"
                self.standing[member.id].turn("refused", why)
                self.tell_once("refused", member, why, "")
            elif dials and member.id not in self.dialling:
                self.dialling[member.id] = asyncio.create_task(self.dial_for_ever(member.id))

    def can_meet(self, other: Member) -> bool:
        """Tells whether one of the two ends can be reached."""
        own = self.roster.member(self.own)
        return bool(other.addresses) or (own is not None and bool(own.addresses))

    def dials(self, other: Member) -> bool:
        """Tells whether this end dials: the one that cannot be reached, else the smaller id."""
        own = self.roster.member(self.own)
        if own is not None and bool(own.addresses) != bool(other.addresses):
            return not own.addresses
        return self.own < other.id and bool(other.addresses)

    async def dial_for_ever(self, id: str) -> None:
        pause = FIRST_PAUSE_S
        while not self.closing and (member := self.roster.member(id)) is not None:
            standing, met = self.standing[id], False
            for address in member.addresses:
                try:
                    stream = await asyncio.wait_for(self.transport.dial(member, address), HELLO_S)
                except (Unreachable, TimeoutError) as error:
                    why = str(error) or f"no answer in {HELLO_S:g} s"
                    standing.turn("lost" if standing.links else "dialling", f"{address}: {why}")
                    self.tell_once("unreachable", member, why, address)
                    continue
                met = await self.serve(stream, member)
                if met:
                    break
            pause = FIRST_PAUSE_S if met else min(2 * pause, LONGEST_PAUSE_S)
            longest = REFUSED_PAUSE_S if standing.state in ("refused", "banned") else pause
            await asyncio.sleep(longest * (0.5 + secrets.randbelow(1000) / 1000))

    async def answer(self, stream: Stream) -> None:
        """Serves a stream that somebody else opened."""
        await self.serve(stream, None)

    async def serve(self, stream: Stream, dialled: Member | None) -> bool:
        """Meets the other end and talks with it until the link ends; returns whether they met."""
        link = None
        try:
            link = await self.meet(stream, dialled)
            if link is not None:
                await self.talk(link)
        except Exception as error:  # the border of a link: whatever goes wrong ends it, and it is dialled again
            member = link.member if link else dialled
            self.tell("error", member, f"{type(error).__name__}: {error}", stream.address)
        finally:
            if link is not None:
                self.end(link)
            await stream.close()
        return link is not None

    async def meet(self, stream: Stream, dialled: Member | None) -> Link | None:
        """Says and hears hello; returns the link, or None where the other end is refused."""
        known = self.identify(stream, dialled)
        if isinstance(known, str):
            await self.refuse(stream, dialled, known)
            return None
        await stream.write(encoded(self.host.hello(known)))
        try:
            content = await asyncio.wait_for(stream.read(), HELLO_S)
            if content is None or len(content) > MOST_BYTES:
                raise ValueError("the stream ended before a hello" if content is None else "a hello that is too large")
            message = decoded(content)
        except (TimeoutError, ValueError) as error:
            await self.refuse(stream, known, str(error) or f"no hello in {HELLO_S:g} s")
            return None
        if isinstance(message, Refused):
            self.refused(known, f"it says: {message.why}", stream.address)
            return None
        if not isinstance(message, Hello):
            await self.refuse(stream, known, f"its first word was {type(message).__name__.lower()}, not hello")
            return None
        member = known or self.roster.member(message.id)
        why = self.difference(member, message, dialled)
        if why is not None or member is None:
            await self.refuse(stream, member, why or "")
            return None
        return Link(member, stream, message)

    def identify(self, stream: Stream, dialled: Member | None) -> Member | str | None:
        """Returns whose certificate it is, or why nobody's; None without TLS, where only the frames are signed."""
        if stream.certificate is None:
            return dialled
        known = next((m for m in self.roster.members if m.certificate == stream.certificate), None)
        if known is None:
            return f"no member of epoch {self.roster.epoch} has its certificate"
        if dialled is not None and known.id != dialled.id:
            return f"it answers with the certificate of {known.id[:8]}, not of {dialled.id[:8]}"
        return known

    def difference(self, member: Member | None, theirs: Hello, dialled: Member | None) -> str | None:
        """Returns the first difference between the two hellos, or another reason not to talk."""
        if member is None or member.id != theirs.id or member.id == self.own:
            whose = "itself" if theirs.id == self.own else f"'{theirs.id[:8]}'"
            return f"it says that it is {whose}, which is not whom its certificate and the roster name"
        mine = self.host.hello(member)
        for key, name in COMPARED:
            if getattr(mine, key) != getattr(theirs, key):
                return (
                    f"the {name} differs: {str(getattr(mine, key))[:16]} here, {str(getattr(theirs, key))[:16]} there"
                )
        if dialled is None and self.dials(member):
            return f"{member.id[:8]} dialled, but in this pair {self.own[:8]} dials"
        if member.id in self.open and theirs.session in self.standing[member.id].sessions[:-1]:
            return "two processes have this identity, and another one is linked; end one of them"
        return self.host.barred(member)

    async def refuse(self, stream: Stream, member: Member | None, why: str) -> None:
        """Says why, here and there."""
        self.refused(member, why, stream.address)
        with suppress(TimeoutError):
            await asyncio.wait_for(stream.write(encoded(Refused(why=why[:1000]))), BYE_S)

    def refused(self, member: Member | None, why: str, address: str = "") -> None:
        standing = None if member is None or member.id in self.open else self.standing.get(member.id)
        if standing is not None and standing.state != "banned":
            standing.turn("refused", why)
        self.tell_once("refused", member, why, address)

    async def talk(self, link: Link) -> None:
        """Reads until the link ends."""
        id, older = link.member.id, self.open.get(link.member.id)
        standing = self.standing.setdefault(id, Standing())
        link.restarted = bool(standing.sessions) and standing.sessions[-1] != link.hello.session
        self.open[id] = link
        if older is not None:
            await older.stream.close()
        standing.links += 1
        standing.sessions = [s for s in standing.sessions if s != link.hello.session][1 - MOST_SESSIONS :]
        standing.sessions.append(link.hello.session)
        standing.turn("linked")
        self.told = {told for told in self.told if told[1] != id}
        self.tell("linked", link.member, address=link.stream.address)
        writer = asyncio.create_task(link.write_outbox())
        try:
            self.host.met(link)
            while (content := await link.stream.read()) is not None and self.open.get(id) is link:
                link.received += len(content)
                self.take(link, content)
                if standing.state == "gone":
                    break
        finally:
            writer.cancel()

    def take(self, link: Link, content: bytes) -> None:
        """Hands a message on, where it is one."""
        try:
            if len(content) > MOST_BYTES:
                raise ValueError(f"a message of {len(content):,} bytes, at most {MOST_BYTES:,} are allowed")
            message = decoded(content)
        except ValueError as error:
            return self.host.garbled(link, str(error))
        if isinstance(message, Bye | Refused):
            self.standing[link.member.id].turn("gone" if isinstance(message, Bye) else "refused", message.why)
        return self.host.heard(link, message)

    def end(self, link: Link) -> None:
        standing = self.standing[link.member.id]
        standing.sent += link.sent
        standing.received += link.received
        if self.open.get(link.member.id) is link:
            del self.open[link.member.id]
            if standing.state == "linked":
                standing.turn("lost", "the link ended")
            if not self.closing:
                self.tell(standing.state, link.member, standing.why)
        self.host.lost(link)

    async def drop(self, id: str, state: State, why: str) -> None:
        """Ends the link with a member for a reason, which it is told."""
        self.standing.setdefault(id, Standing()).turn(state, why)
        if (link := self.open.get(id)) is not None:
            with suppress(TimeoutError):
                await asyncio.wait_for(link.write(encoded(Refused(why=why[:1000]))), BYE_S)
            await link.stream.close()

    async def close(self, why: Literal["finished", "stopped"]) -> None:
        """Says bye to all and ends every link."""
        self.closing = True
        for link in list(self.open.values()):
            with suppress(TimeoutError):
                await asyncio.wait_for(link.write(encoded(Bye(why=why))), BYE_S)
        end = monotonic() + BYE_S
        while self.open and monotonic() < end:  # the other end hangs up when it has heard it
            await asyncio.sleep(0.01)
        for task in self.dialling.values():
            task.cancel()
        for link in list(self.open.values()):
            await link.stream.close()
        await asyncio.gather(*self.dialling.values(), return_exceptions=True)
        await self.transport.close()

    def tell(self, event: str, member: Member | None, why: str = "", address: str = "") -> None:
        who = {"member": member.id if member else None, "peers": list(member.peers) if member else []}
        self.observe({"event": event, **who, "why": why, "address": address})

    def tell_once(self, event: str, member: Member | None, why: str, address: str) -> None:
        """Tells an event once for each member and reason until the next link; what is remembered is bounded."""
        key = (event, member.id if member else "", why)
        if key not in self.told and sum(told[1] == key[1] for told in self.told) < MOST_TOLD:
            self.told.add(key)
            self.tell(event, member, why, address)
