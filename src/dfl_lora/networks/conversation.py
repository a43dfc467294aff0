"""The conversation of one member with those that host neighbours: announce, pull, have, settle.

A round goes on with the edges whose both ends announced it. Each exchange ends when every edge is complete or given up:
its other end is gone, further on, banned, or later than the deadline. `edges.py` says what two ends can agree on,
`border.py` what is refused, `links.py` how links come and go; here is who says what, and when.
"""

import asyncio
import secrets
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import suppress
from time import monotonic
from typing import Any, Literal

from dfl_lora.errors import UserError
from dfl_lora.graphs import Graph
from dfl_lora.membership.identity import Identity
from dfl_lora.membership.roster import Member, Roster
from dfl_lora.networks import Arrived, Undone, messages
from dfl_lora.networks.body import Expectation, norm_of
from dfl_lora.networks.border import NO_STRIKE, STRIKES, Border
from dfl_lora.networks.contract import Contract, Limits
from dfl_lora.networks.edges import Applied, Edge, Ledger, Moment, Open
from dfl_lora.networks.links import Link, Links, Observe
from dfl_lora.networks.messages import (
    BEFORE,
    MOST_BYTES,
    PROTOCOL,
    Announce,
    Chunk,
    Close,
    Have,
    Hello,
    Message,
    Pull,
    Settle,
)
from dfl_lora.networks.pulls import Outgoing, Pulls
from dfl_lora.networks.sealed import Header, Refusal, seal
from dfl_lora.networks.transport import Transport

AT_LAST: Moment = (2**62, 0)
"""After everything."""
LOOK_S = 0.25
"""Between two looks at edges of which nothing is heard."""
BANNED = f"it is banned for this run: {STRIKES} of its messages were refused"
TELL_S = 10.0
"""Between two lines about who is waited for."""
MOST_SEEN = 2**53
"""A neighbour that says it has seen more of a peer's frames than that is not believed."""


class Conversation:
    """Everything runs in one event loop; `exchange` is called by one caller at a time."""

    def __init__(
        self,
        identity: Identity,
        roster: Roster,
        hosted: Sequence[int],
        graph: Graph,
        contract: Contract,
        limits: Limits,
        transport: Transport,
        observe: Observe,
        keep: Callable[[Roster], None] = lambda roster: None,
        applied: Applied = (),
        first: int = 1,
    ) -> None:
        self.identity, self.roster, self.hosted, self.graph = identity, roster, frozenset(hosted), graph
        self.contract, self.limits, self.observe, self.keep = contract, limits, observe, keep
        self.border = Border(roster, contract.recipe, self.refused)
        self.links = Links(identity.id, roster, transport, self, observe)
        self.transport, self.session = transport, secrets.token_hex(8)
        self.ledger, self.next, self.first = Ledger.of(applied), (first, 0), first
        self.current: Open | None = None
        self.pulls = Pulls(self.border, self.ledger)
        self.positions: dict[str, Moment] = {}
        self.begun, self.ready = set[str](), False
        self.closed, self.together = dict[Edge, int](), dict[Edge, int]()  # the last round an edge failed, had its turn
        self.sequence = 0
        self.changed = asyncio.Event()
        self.failing: dict[Edge, str] = {}
        self.tasks = set[asyncio.Task[None]]()

    # ---- the loop's side

    async def open(self, listen: str | None) -> int | None:
        """Listens, where an address is given, and begins to dial; returns the port."""
        self.transport.trust(self.roster)
        port = None if listen is None else await self.transport.listen(listen, self.links.answer)
        self.links.want(self.neighbours())
        return port

    async def close(self, why: Literal["finished", "stopped"]) -> None:
        await self.links.close(why)

    async def assemble(self) -> None:
        """Waits until every neighbour is linked, at most `assemble_s`; not for the lost where others have gone on."""
        start = told = monotonic()
        while (missing := self.missing()) and monotonic() - start < self.limits.assemble_s:
            if self.left_behind() and monotonic() - start > self.limits.grace_s:
                break
            await self.pause()
            if monotonic() - told > TELL_S:
                told = monotonic()
                self.tell("waiting", None, missing, "no link yet")
        if missing:
            self.tell("absent", None, missing, f"no link after {monotonic() - start:.0f} s, this one begins without")
        self.ready = True

    def left_behind(self) -> bool:
        """Tells whether a neighbour has begun and is further on."""
        return any(id in self.begun and moment[0] > self.next[0] for id, moment in self.positions.items())

    async def exchange(self, moment: Moment, graph: Graph, outgoing: Mapping[int, Outgoing]) -> Arrived:
        """Announces the hosted peers' frames, pulls their neighbours', and returns what both ends have."""
        started, t = monotonic(), moment[0]
        edges = frozenset((i, j) for i in outgoing for j in graph.neighbours(i) if j not in self.hosted)
        sequences = {i: self.sequence + n for n, i in enumerate(outgoing, 1)}
        self.sequence += len(outgoing)
        closed = {edge for edge in edges if self.closed.get(edge) == t}
        frames = {i: out.frame for i, out in outgoing.items()}
        self.current = exchange = Open(moment, frames, sequences, edges, closed)
        sealed = {i: seal(self.header(i, exchange, out), self.identity.sign) for i, out in outgoing.items()}
        self.pulls.begin(exchange, sealed, {i: out.body for i, out in outgoing.items()})
        if frames:
            longest = max(1.0, *(norm_of(frame) for frame in frames.values()))
            self.border.expect(moment, Expectation.of(next(iter(frames.values()))), self.limits.norm_bound * longest)
        self.next, self.ready = moment, True
        for link in self.links.open.values():
            self.announce(link)
        self.pulls.look_back(self.next)
        waited = await self.until_decided(exchange, started)
        self.end(exchange)
        return Arrived(exchange.arrived(), self.ledger.collect(), waited)

    async def until_decided(self, exchange: Open, started: float) -> float:
        """Waits until no edge is pending; returns the seconds until all were heard of or given up."""
        all_heard = None
        while pending := exchange.pending():
            if all_heard is None and all(self.pulls.has_announced(j, exchange.moment) for _, j in pending):
                all_heard = monotonic()
            for edge in pending:
                if (why := self.hopeless(edge, exchange.moment, monotonic() - started)) is not None:
                    exchange.out.add(edge)
                    self.tell_failed(edge, exchange.moment, why)
            if exchange.pending():
                await self.pause()
        return (all_heard or monotonic()) - started

    def hopeless(self, edge: Edge, moment: Moment, waited: float) -> str | None:
        """Returns why nothing more is to be expected of an edge in this exchange, or None."""
        member = self.roster.of_peer(edge[1])
        if member is None:
            return f"nobody hosts peer {edge[1]} in epoch {self.roster.epoch}"
        if self.border.banned(member.id):
            return "it is banned"
        if waited > self.limits.deadline_s:
            return f"it was not ready within {self.limits.deadline_s:g} s"
        if member.id not in self.links.open:
            return None if self.lately_lost(member.id) else f"there is no link ({self.links.standing[member.id].why})"
        there = self.positions.get(member.id, BEFORE)
        if there > moment:
            return "it is further on"
        due = min(self.together.get(edge, self.first - 1) + 1, moment[0])  # not each edge is in each round
        behind = due - there[0] - (member.id in self.begun)
        return f"it is {behind} rounds behind" if behind > 0 and waited > self.limits.grace_s else None

    def tell_failed(self, edge: Edge, moment: Moment, why: str) -> None:
        """Tells that an edge failed, once for each reason until it works again."""
        if self.failing.get(edge) != why:
            self.failing[edge] = why
            where = f"round {moment[0]}, exchange {moment[1]}"
            self.tell("failed-edge", self.roster.of_peer(edge[1]), edge, f"{where}: {why}")

    def end(self, exchange: Open) -> None:
        """Closes an exchange: what is complete is written down, what is not is out for the rest of the round."""
        t = exchange.moment[0]
        for link in self.links.open.values():
            given_up = [edge for edge in exchange.out if edge[1] in link.member.peers and self.closed.get(edge) != t]
            if given_up:
                link.say(Close(round=t, edges=given_up))
        self.closed |= dict.fromkeys(exchange.out, t)
        self.together |= dict.fromkeys(exchange.edges, t)
        self.ledger.take_in(exchange)
        self.failing = {edge: why for edge, why in self.failing.items() if not exchange.complete(edge)}
        self.current, self.next = None, (t, exchange.moment[1] + 1)
        self.pulls.end()

    async def finish(self) -> list[Undone]:
        """Tells what was taken in last, waits for the others to tell, and returns what is to be taken back."""
        self.next, start = AT_LAST, monotonic()
        for link in self.links.open.values():
            self.announce(link)
        while self.unsettled() and monotonic() - start < self.limits.deadline_s:
            await self.pause()
        return self.ledger.collect()

    def unsettled(self) -> list[str]:
        """Returns the members that have not told what they took in last, and may yet."""
        return [
            id
            for id in self.neighbours()
            if self.positions.get(id, BEFORE) < AT_LAST
            and not self.border.banned(id)
            and (id in self.links.open or self.lately_lost(id))
        ]

    def lately_lost(self, id: str) -> bool:
        """Tells whether a link that is not there may come back soon enough to wait for it."""
        standing = self.links.standing.get(id)
        if standing is None or standing.state != "lost":
            return False
        return monotonic() - standing.changed <= self.limits.grace_s

    def neighbours(self) -> list[str]:
        """Returns the members that host neighbours."""
        peers = {j for i in self.hosted for j in self.graph.neighbours(i)} - self.hosted
        return sorted({member.id for member in map(self.roster.of_peer, peers) if member is not None})

    def missing(self) -> list[int]:
        """Returns the neighbours that nobody hosts yet, and those whose member may be linked and is not."""
        peers = {j for i in self.hosted for j in self.graph.neighbours(i)} - self.hosted
        hosts = {j: self.roster.of_peer(j) for j in sorted(peers)}
        linked = self.links.open
        return [j for j, m in hosts.items() if m is None or (m.id not in linked and self.links.can_meet(m))]

    async def pause(self) -> None:
        """Waits until something is heard, or a moment."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self.changed.wait(), LOOK_S)
        self.changed.clear()

    def header(self, i: int, exchange: Open, out: Outgoing) -> Header:
        return Header(
            federation=self.roster.federation,
            run=self.roster.run,
            recipe=self.contract.recipe,
            layout=out.frame.layout,
            codec=out.frame.codec,
            epoch=self.roster.epoch,
            round=exchange.moment[0],
            exchange=exchange.moment[1],
            sequence=exchange.sequences[i],
            sender=i,
            length=len(out.body),
            sha256=out.sha256,
        )

    def announce(self, link: Link) -> None:
        """Tells a member what was taken in last, and what is there to be pulled for its peers."""
        link.say(self.settle(link.member), *self.pulls.announcements(link.member.peers))

    def settle(self, member: Member) -> Settle:
        edges = [(i, j) for i in sorted(self.hosted) for j in self.graph.neighbours(i) if j in member.peers]
        return Settle(
            now=self.next, ready=self.ready, taken=[(*edge, *self.ledger.taken.get(edge, BEFORE)) for edge in edges]
        )

    # ---- the links' side

    def hello(self, member: Member | None) -> Hello:
        seen = [(j, self.border.last(j)) for j in (member.peers if member else ())]
        return Hello(
            protocol=PROTOCOL,
            id=self.identity.id,
            federation=self.roster.federation,
            run=self.roster.run,
            recipe=self.contract.recipe,
            base=self.contract.base,
            frozen=self.contract.frozen,
            start=self.contract.start,
            epoch=self.roster.epoch,
            session=self.session,
            seen=seen,
        )

    def barred(self, member: Member) -> str | None:
        if member.id not in self.neighbours():
            return "it hosts no neighbour of the peers here"
        return BANNED if self.border.banned(member.id) else None

    def met(self, link: Link) -> None:
        """Counts on from the sequences the other end has seen, and says all that matters to it."""
        self.sequence = max([self.sequence, *(n for i, n in link.hello.seen if i in self.hosted and n < MOST_SEEN)])
        if link.hello.epoch < self.roster.epoch:
            self.hand_on(link)
        self.announce(link)
        self.changed.set()

    def lost(self, link: Link) -> None:
        self.changed.set()

    def garbled(self, link: Link, why: str) -> None:
        self.border.strike(link.member.id, "message", why)
        self.ban(link.member.id)

    def heard(self, link: Link, message: Message) -> None:
        """Does what a message asks for."""
        if isinstance(message, Announce):
            self.pulls.take_announcement(link, message.sealed, self.next)
            self.ban(link.member.id)
        elif isinstance(message, Chunk):
            self.pulls.take_chunk(link, message)
            self.ban(link.member.id)
        elif isinstance(message, Pull):
            self.pulls.send(link, message)
        elif isinstance(message, Have) and self.current is not None:
            self.current.acknowledge(message.sender, message.sequence, link.member.peers)
        elif isinstance(message, Settle):
            self.compare(link, message)
        elif isinstance(message, Close):
            self.take_close(link, message)
        elif isinstance(message, messages.Roster):
            self.take_roster(link, message.content)
        self.changed.set()

    def compare(self, link: Link, theirs: Settle) -> None:
        """Compares what the two ends took in; what the other end took in of this exchange, it has."""
        self.positions[link.member.id] = theirs.now
        (self.begun.add if theirs.ready else self.begun.discard)(link.member.id)
        now = AT_LAST if link.restarted else theirs.now
        for i, j, t, k in theirs.taken:
            if i not in link.member.peers or j not in self.hosted:
                continue
            if self.current is not None and self.current.moment == (t, k):
                self.current.acknowledged |= {(j, i)} & self.current.edges
            verdict, why = self.ledger.settle((j, i), (t, k), now), f"peer {i} did not take in what peer {j} did"
            if verdict == "undone":
                self.tell("taken-back", link.member, [j, i], why)
            elif verdict == "lost":
                self.tell("unsettled", link.member, [j, i], f"{why} before it began again: the mean has moved")
        link.restarted = False

    def take_close(self, link: Link, message: Close) -> None:
        edges = {(j, i) for i, j in message.edges if i in link.member.peers and j in self.hosted}
        if message.round <= self.next[0] + 1:
            self.closed |= {edge: max(message.round, self.closed.get(edge, -1)) for edge in edges}
        if self.current is not None and self.current.moment[0] == message.round:
            self.current.out |= edges & self.current.edges

    def take_roster(self, link: Link, content: bytes) -> None:
        try:
            roster = Roster.from_json(content)
        except ValueError as error:
            self.garbled(link, f"roster: {error}")
            return
        if (roster.organiser, roster.run) != (self.roster.organiser, self.roster.run):
            self.garbled(link, "roster: it is of another organiser or run")
        self.adopt(roster)

    def adopt(self, roster: Roster) -> None:
        """Takes a roster of a higher epoch of this federation and run, tells the neighbours, and lets strangers go."""
        if not roster.supersedes(self.roster):
            return
        self.roster = self.border.roster = self.links.roster = roster
        self.transport.trust(roster)
        self.tell("roster", None, [], f"epoch {roster.epoch} with {len(roster.members)} members")
        for id, link in list(self.links.open.items()):
            member = roster.member(id)
            if member is None or member.certificate != link.member.certificate:
                self.background(self.links.drop(id, "refused", f"it is no member of epoch {roster.epoch}"))
            else:
                link.member = member
                self.hand_on(link)
        self.links.want(self.neighbours())
        self.changed.set()
        try:
            self.keep(roster)
        except (OSError, UserError) as error:
            self.tell("error", None, [], f"epoch {roster.epoch} of the roster could not be written down: {error}")

    def hand_on(self, link: Link) -> None:
        """Gives a member the roster, where a message can hold it."""
        content = self.roster.to_json()
        if len(content) < MOST_BYTES:
            link.say(messages.Roster(content))
        else:
            self.tell("roster", link.member, [], "the roster is too large for a link: copy roster.json to that member")

    def refused(self, id: str, refusal: Refusal) -> None:
        """Tells of the first refusal of its kind and member."""
        event = "late" if refusal.kind in NO_STRIKE else "refused"
        self.tell(event, self.roster.member(id), [], f"{refusal.kind}: {refusal.why}")

    def ban(self, id: str) -> None:
        """Ends the link with a member that is banned by now."""
        if self.border.banned(id) and id in self.links.open:
            self.tell("banned", self.roster.member(id), [], BANNED)
            self.background(self.links.drop(id, "banned", BANNED))

    def background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def tell(self, event: str, member: Member | None, peers: Iterable[int], why: str) -> None:
        who = {"member": member.id if member else None, "peers": list(peers)}
        self.observe({"event": event, **who, "why": why, "address": ""})
