"""A conversation under siege over real TLS, in one process and one event loop: python -m network.siege_over_tls COUNT.

Four members of the roster are on a link with a fifth. In each exchange all but one of them send mutants; then those
that have not spoiled their edges by then send frames as they should be. A border beside, in memory, says what becomes
of each mutant: over the network it must be the same, one by one, and what is taken in must be right to the bit.
Announcements of later exchanges are not sent: they are kept, and judged when their time has come.
"""

import asyncio
import hashlib
import json
import resource
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import islice
from random import Random

from dfl_lora.graphs import Graph
from dfl_lora.membership.identity import new_identity
from dfl_lora.membership.roster import Member, Roster
from dfl_lora.networks.body import Expectation, body_of
from dfl_lora.networks.border import NO_STRIKE
from dfl_lora.networks.contract import Contract, Limits
from dfl_lora.networks.conversation import Conversation
from dfl_lora.networks.grpc_transport import GrpcTransport
from dfl_lora.networks.links import Event
from dfl_lora.networks.messages import Announce, Chunk, Have, Message, Pull
from dfl_lora.networks.real import ready_to_go
from dfl_lora.networks.sealed import Header, Opened, Refusal, open_sealed
from network.attackers import Rogue
from network.mutator import HOSTS, MAX_NORM, RECIPE, Federation, Mutant, Source, Valid, as_sent, federation, mutants

OWN, FIRST_ROUND, BATCH = 3, 5, 12
"""The peer that is besieged, which nobody hosts in the mutator's roster; the first round; mutants in an exchange."""
PEERS = [peer for peers in HOSTS for peer in peers]
BODIES = {"body_flipped", "body_cut_or_longer", "beginning_flipped", "beginning_in_another_order"} | {
    "number_not_finite", "number_too_large",
}  # fmt: skip
"""Mutations of which the body is wrong, and the announcement right: an exchange begins with them, as a member that was
refused is not asked for a body again."""


@dataclass
class Besieger:
    """A member with its link, which answers pulls with whatever was announced, and takes everything in."""

    rogue: Rogue
    bodies: dict[tuple[int, int], bytearray] = field(default_factory=dict)

    async def answer(self, message: Message) -> None:
        if isinstance(message, Announce):
            opened = open_sealed(message.sealed)
            assert isinstance(opened, Opened)
            await self.rogue.say(Have(sender=OWN, sequence=opened.header.sequence))
        elif isinstance(message, Pull):
            body = self.bodies.pop((message.sender, message.sequence))
            await self.rogue.say(Chunk(message.sender, message.sequence, 0, memoryview(body)))

    async def send(self, sent: Mutant, header: Header | None) -> None:
        if header is not None:
            self.bodies[header.sender, header.sequence] = sent.body
        await self.rogue.say(Announce(sent.sealed))


class Siege:
    """The besieged conversation, the besiegers, and the border beside."""

    def __init__(self, seed: int) -> None:
        here, self.identity = federation(seed), new_identity()
        with socket.create_server(("127.0.0.1", 0)) as server:
            self.port = int(server.getsockname()[1])
        members = tuple(replace(member, addresses=()) for member in here.roster.members)
        own = Member.of(self.identity, [OWN], [f"127.0.0.1:{self.port}"])
        self.roster: Roster = replace(here.roster, members=(*members, own)).sealed_by(here.organiser)
        self.here: Federation = replace(here, roster=self.roster)
        self.source, self.shadow = Source(self.here, Random(f"mutants over TLS {seed}")), self.here.border()
        self.graph = Graph(8, frozenset((min(OWN, peer), max(OWN, peer)) for peer in PEERS))
        self.contract = Contract(RECIPE, "b" * 64, "c" * 64, "d" * 64)
        self.told: list[Event] = []
        self.besiegers: dict[str, Besieger] = {}
        self.sent = self.resigned = self.taken_in = 0
        self.refused = Counter[str]()

    async def begin(self) -> None:
        transport, limits = GrpcTransport(self.identity), Limits(deadline_s=30, grace_s=30, norm_bound=MAX_NORM)
        given = (self.identity, self.roster, [OWN], self.graph, self.contract, limits, transport, self.told.append)
        self.conversation = Conversation(*given)
        self.conversation.border.most_strikes = 10**9
        await self.conversation.open(f"127.0.0.1:{self.port}")
        own = self.roster.members[-1]
        for id, identity in self.here.identities.items():
            rogue = await Rogue.dial(identity, self.roster, self.contract, own, self.port)
            self.besiegers[id] = besieger = Besieger(rogue)
            rogue.judge = besieger.answer
            await rogue.say(rogue.hello())
        await self.until(lambda: len(self.conversation.links.open) == len(HOSTS))

    async def until(self, look: Callable[[], bool]) -> None:
        end = time.monotonic() + 20
        while not look():
            assert time.monotonic() < end, f"waited in vain: {self.refused}, {self.counted()}, {self.told[-5:]}"
            await asyncio.sleep(0)

    def counted(self) -> Counter[str]:
        """Returns what the conversation refused."""
        counts = Counter[str]()
        for kinds in self.conversation.border.refused.values():
            counts.update(kinds)
        return counts

    async def exchange(self, round: int, count: int) -> None:
        """One exchange with some mutants; fails where anything becomes of them, or not the right thing of the rest."""
        self.source.federation = self.here = here = replace(self.here, moment=(round, 1))
        self.shadow.expect(here.moment, Expectation.of(here.frame), MAX_NORM)
        exchanging = asyncio.ensure_future(
            self.conversation.exchange(here.moment, self.graph, {OWN: ready_to_go(here.frame)})
        )
        await asyncio.sleep(0)
        spoilt = set[int]()
        if round >= FIRST_ROUND + 2:  # a mutant may be a frame of before
            honest = self.here.host(PEERS[round % len(PEERS)]).id
            drawn = list(islice(mutants(self.source, 10**9), 2 * count))
            drawn.sort(key=lambda mutant: mutant[0] not in BODIES)
            for how, mutant in drawn:
                if mutant.member != honest and how != "ahead":
                    await self.attack(mutant, spoilt)
            await self.until(lambda: self.counted().total() == self.refused.total())
        right = {}
        for peer in sorted(set(PEERS) - spoilt):
            good = self.valid(peer)
            right[peer] = good.body
            header = self.shadow.announced(good.sealed, good.identity.id, here.moment)
            assert isinstance(header, Header), header
            self.source.note(peer, good.sealed)
            await self.besiegers[good.identity.id].send(as_sent(good, good.sealed), header)
        arrived = (await exchanging).frames[OWN]
        assert set(arrived) == set(PEERS) - spoilt, (arrived.keys(), spoilt)
        for peer, frame in arrived.items():
            assert frame is not None and body_of(frame) == right[peer], f"peer {peer} in round {round}"
        self.taken_in += len(arrived)

    def valid(self, peer: int) -> Valid:
        """Returns a frame as it should be, of a certain peer."""
        while (good := self.source.valid()).header.sender != peer:
            pass
        return good

    async def attack(self, mutant: Mutant, spoilt: set[int]) -> None:
        """Sends a mutant, and notes what must become of it; edges of who is refused are spoilt for the round."""
        judged = self.shadow.announced(mutant.sealed, mutant.member, self.here.moment)
        if isinstance(judged, Refusal) and judged.kind == "future":
            return
        self.sent += 1
        self.resigned += mutant.resigned
        member = self.roster.member(mutant.member)
        assert member is not None
        if isinstance(judged, Refusal):
            self.refused[judged.kind] += 1
            await self.besiegers[member.id].send(mutant, None)
            spoilt |= set() if judged.kind in NO_STRIKE else set(member.peers)
            return
        self.source.note(judged.sender, mutant.sealed)
        await self.besiegers[member.id].send(mutant, judged)
        if judged.sender not in spoilt:
            excess = len(mutant.body) - judged.length  # the length is wrong before the digest is
            self.refused["size" if excess > 0 else "truncated" if excess else self.refusal(judged, mutant)] += 1
            spoilt.add(judged.sender)
            await self.until(lambda: self.counted().total() == self.refused.total())

    def refusal(self, header: Header, mutant: Mutant) -> str:

        verdict = self.shadow.received(header, bytearray(mutant.body), hashlib.sha256(mutant.body).hexdigest())
        assert isinstance(verdict, Refusal), mutant
        return verdict.kind

    async def end(self) -> None:
        for besieger in self.besiegers.values():
            await besieger.rogue.close()
        await self.conversation.close("finished")


async def main(count: int, seed: int = 0) -> None:
    siege, start, grown_from = Siege(seed), time.monotonic(), 0
    await siege.begin()
    round = FIRST_ROUND
    while siege.sent < count:
        await siege.exchange(round, BATCH)
        if siege.sent > count // 20 and not grown_from:
            grown_from = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        round += 1
    assert siege.counted() == siege.refused, (siege.counted(), siege.refused)
    assert not [event for event in siege.told if event["event"] in ("lost", "banned")], siege.told
    await siege.end()
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - grown_from)
    print(json.dumps({
        "sent": siege.sent, "resigned": siege.resigned, "refused": siege.refused, "rounds": round - FIRST_ROUND,
        "taken_in": siege.taken_in, "grown_bytes": grown, "seconds": time.monotonic() - start,
    }))  # fmt: skip


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
