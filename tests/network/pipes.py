"""Links in memory, for tests of what is said on them: in one event loop, and every message may be lost or held up."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from dfl_lora.membership.roster import Member, Roster
from dfl_lora.networks.transport import Serve, Stream, Unreachable

ROOM = 8
"""Messages that a stream holds before a writer waits."""
Judge = Callable[[str, str, bytes], Awaitable[bool]]
"""(id of the speaker, id of the listener, message) -> whether it arrives; it may wait, and so hold it up."""


async def everything(speaker: str, listener: str, message: bytes) -> bool:
    return True


@dataclass
class Wires:
    """Who listens where, and what becomes of messages."""

    judge: Judge = everything
    serving: dict[str, Callable[["Pipe"], Awaitable[None]]] = field(default_factory=dict)
    pipes: list["Pipe"] = field(default_factory=list)
    down: set[str] = field(default_factory=set)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def cut(self, *ids: str) -> None:
        """Ends every stream between these members."""
        for pipe in self.pipes:
            if {pipe.own, pipe.other} <= set(ids) or (len(ids) == 1 and ids[0] in (pipe.own, pipe.other)):
                pipe.hang_up()


class Pipe:
    """One end of a stream."""

    def __init__(self, wires: Wires, own: Member, other: Member) -> None:
        self.wires, self.own, self.other = wires, own.id, other.id
        self.certificate: bytes | None = other.certificate
        self.address = f"pipe:{other.id[:8]}"
        self.inbox: asyncio.Queue[bytes | None] = asyncio.Queue(ROOM)
        self.peer: Pipe = self
        self.ended = asyncio.Event()

    async def read(self) -> bytes | None:
        getting, ending = asyncio.ensure_future(self.inbox.get()), asyncio.ensure_future(self.ended.wait())
        done, _ = await asyncio.wait({getting, ending}, return_when=asyncio.FIRST_COMPLETED)
        ending.cancel()
        if getting in done and not self.ended.is_set():
            return getting.result()
        getting.cancel()
        return None

    async def write(self, message: bytes) -> None:
        if not self.ended.is_set() and await self.wires.judge(self.own, self.other, message):
            putting, ending = (
                asyncio.ensure_future(self.peer.inbox.put(message)),
                asyncio.ensure_future(self.ended.wait()),
            )
            await asyncio.wait({putting, ending}, return_when=asyncio.FIRST_COMPLETED)
            ending.cancel()
            putting.cancel()

    async def close(self) -> None:
        self.hang_up()

    def hang_up(self) -> None:
        self.ended.set()
        self.peer.ended.set()


class PipeTransport:
    """The transport of one member."""

    def __init__(self, wires: Wires, own: Member) -> None:
        self.wires, self.own = wires, own
        self.trusted: Roster | None = None

    def trust(self, roster: Roster) -> None:
        self.trusted = roster

    async def listen(self, at: str, serve: Serve) -> int:
        self.wires.serving[self.own.addresses[0]] = serve
        return 1

    async def dial(self, member: Member, address: str) -> Stream:
        serve = self.wires.serving.get(address)
        if serve is None or {self.own.id, member.id} & self.wires.down:
            raise Unreachable("Connection refused", absent=True)
        here, there = Pipe(self.wires, self.own, member), Pipe(self.wires, member, self.own)
        here.peer, there.peer = there, here
        self.wires.pipes += [here, there]
        task = asyncio.ensure_future(serve(there))
        self.wires.tasks.add(task)
        return here

    async def close(self) -> None:
        for address in self.own.addresses:
            self.wires.serving.pop(address, None)
