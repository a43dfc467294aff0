"""A link with an end that does not do its part."""

import asyncio
from dataclasses import dataclass

from dfl_lora.membership.roster import Member
from dfl_lora.networks.links import MOST_UNREAD, Event, Link, Links
from dfl_lora.networks.messages import PROTOCOL, Have, Hello, Message, encoded
from network.members import CONTRACT, Federation
from network.pipes import PipeTransport, Wires


@dataclass
class Talkative:
    """Answers everything that it hears."""

    federation: Federation
    heard_of: int = 0
    most: int = 0
    """Messages that waited to be written."""

    def hello(self, member: Member | None) -> Hello:
        roster = self.federation.roster
        return Hello(
            protocol=PROTOCOL, id=roster.members[0].id, federation=roster.federation, run=roster.run,
            **vars(CONTRACT), epoch=roster.epoch, session="0", seen=[],
        )  # fmt: skip

    def barred(self, member: Member) -> str | None:
        return None

    def met(self, link: Link) -> None: ...

    def heard(self, link: Link, message: Message) -> None:
        self.heard_of += 1
        link.say(message)
        self.most = max(self.most, len(link.outbox))

    def garbled(self, link: Link, why: str) -> None: ...

    def lost(self, link: Link) -> None: ...


@dataclass
class Deaf:
    """A stream whose other end says hello and goes on and on, and reads nothing."""

    certificate: bytes | None
    first: bytes
    address: str = "somewhere"
    ended: bool = False
    writes: int = 0

    async def read(self) -> bytes | None:
        await asyncio.sleep(0)
        if self.ended:
            return None
        first, self.first = self.first, encoded(Have(sender=0, sequence=0))
        return first

    async def write(self, message: bytes) -> None:
        self.writes += 1
        if self.writes > 1:
            await asyncio.Event().wait()

    async def close(self) -> None:
        self.ended = True


def test_an_end_that_says_more_and_more_and_never_reads_is_cut_off() -> None:
    async def work() -> None:
        federation = Federation.of([[0], [1]])
        host, told, (own, other) = Talkative(federation), list[Event](), federation.roster.members
        links = Links(other.id, federation.roster, PipeTransport(Wires(), other), host, told.append)
        stream = Deaf(own.certificate, encoded(host.hello(None)))
        await asyncio.wait_for(links.answer(stream), 20)
        assert stream.ended and host.most <= MOST_UNREAD + 1
        assert [event["event"] for event in told] == ["linked", "lost"]

    asyncio.run(work())
