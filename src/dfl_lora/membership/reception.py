"""Where invitations are accepted: a listener that ends when each is used or has expired.

A stranger costs a connection for a few seconds and 128 KiB: the handshake and the request have a deadline each, a
request has a largest size, connections a largest number, and refusals are told a few times of a kind, then counted.
A wrong secret (one of 2^128) ends nothing; it is answered late.
"""

import asyncio
import socket
import ssl
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from pydantic import ValidationError

from dfl_lora.errors import UserError
from dfl_lora.membership.addresses import split_address
from dfl_lora.membership.admission import ANSWER, REQUEST, Admissions, Answer, Refused, Request
from dfl_lora.membership.identity import CERTIFICATE, SHOWN, TLS_KEY

LONGEST = 64 * 1024
"""Bytes of a request; a stranger's buffer holds twice as many."""
PATIENCE_S = 10.0
"""For a handshake, and again for the request."""
ANSWER_S = 60.0
"""For the answer, which holds a whole roster."""
WRONG_S = 1.0
"""A wrong secret waits so long for its answer."""
CROWD = 256
"""Connections at a time; more wait in the system's queue."""
TOLD = 3
"""Refusals of a kind that are told; the others are counted."""


class Reception:
    """Waits where the invitations say, until each is used or has expired."""

    def __init__(
        self,
        admissions: Admissions,
        identity: Path,
        recipe: str,
        observe: Callable[[str], None],
        patience_s: float = PATIENCE_S,
    ) -> None:
        self.admissions, self.recipe, self.observe, self.patience_s = admissions, recipe, observe, patience_s
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_3
        self.context.num_tickets = 0
        self.context.load_cert_chain(identity / CERTIFICATE, identity / TLS_KEY)
        self.refused = Counter[str]()
        self.room, self.changed = asyncio.Semaphore(CROWD), asyncio.Event()
        self.hearing = set[asyncio.Task[None]]()
        self.loop: asyncio.AbstractEventLoop | None = None
        self.stopped = False

    def stop(self) -> None:
        """Ends the waiting, from any thread; who is being answered is answered."""
        self.stopped = True
        if self.loop is not None:
            with suppress(RuntimeError):  # it has ended by itself
                self.loop.call_soon_threadsafe(self.changed.set)

    async def receive(self, listening: socket.socket) -> None:
        """Admits who brings an invitation; ends when no invitation is left."""
        self.loop = asyncio.get_running_loop()
        listening.setblocking(False)
        async with asyncio.TaskGroup() as tasks:
            accepting = tasks.create_task(self.accept(listening, tasks))
            while (waiting := self.admissions.waiting(time.time())) and not self.stopped:
                self.changed.clear()
                next_s = min(each.expires for each in waiting) - time.time()
                with suppress(TimeoutError):
                    await asyncio.wait_for(self.changed.wait(), max(next_s, 0.01))
            for task in (accepting, *self.hearing):  # those who are being answered are heard out
                task.cancel()

    async def accept(self, listening: socket.socket, tasks: asyncio.TaskGroup) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self.room.acquire()
            try:
                connection, _ = await loop.sock_accept(listening)
            except OSError as error:  # too many files are open, or who called is gone
                self.room.release()
                self.tell("accept", error.strerror or str(error), "a stranger")
                await asyncio.sleep(WRONG_S)
                continue
            task = tasks.create_task(self.serve(connection))
            self.hearing.add(task)
            task.add_done_callback(self.gone)

    def gone(self, task: asyncio.Task[None]) -> None:
        self.hearing.discard(task)
        self.room.release()
        self.changed.set()

    async def serve(self, connection: socket.socket) -> None:
        """Hears one who calls, and answers."""
        task, place = asyncio.current_task(), "a stranger"
        with suppress(OSError):
            place = str(connection.getpeername()[0])
        writer = None
        try:
            reader, writer = await self.greet(connection)
            request = await self.read(reader)
            self.hearing.discard(task)
            answer = await self.judge(request, place)
            async with asyncio.timeout(ANSWER_S):
                writer.write(ANSWER.dump_json(answer) + b"\n")
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        except Refused as refused:
            self.tell(refused.kind, str(refused), place)
        except (OSError, TimeoutError) as error:  # TLS errors among them
            self.tell("broken", f"the connection broke before it was answered ({type(error).__name__})", place)
        finally:
            if writer is not None:
                writer.transport.abort()

    async def greet(self, connection: socket.socket) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Shakes hands; raises Refused where the other does not speak TLS 1.3 in time."""
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(LONGEST, loop)
        protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
        try:
            transport, _ = await loop.connect_accepted_socket(
                lambda: protocol,
                connection,
                ssl=self.context,
                ssl_handshake_timeout=self.patience_s,
                ssl_shutdown_timeout=self.patience_s,
            )
        except OSError as error:
            raise Refused("tls", f"no TLS 1.3 handshake within {self.patience_s:g} s ({said_of(error)})") from None
        return reader, asyncio.StreamWriter(transport, protocol, reader, loop)

    async def read(self, reader: asyncio.StreamReader) -> Request:
        """Returns the request; raises Refused where it is late, too long or malformed."""
        try:
            async with asyncio.timeout(self.patience_s):
                line = await reader.readuntil(b"\n")
            return REQUEST.validate_json(line)
        except TimeoutError:
            raise Refused("late", f"no request within {self.patience_s:g} s") from None
        except asyncio.LimitOverrunError:
            raise Refused("size", f"the request is longer than {LONGEST:,} bytes") from None
        except (asyncio.IncompleteReadError, ValidationError):
            raise Refused("malformed", "what was said is no request to join") from None

    async def judge(self, request: Request, place: str) -> Answer:
        """Admits or refuses, and tells both sides."""
        try:
            member, roster = self.admissions.admit(request, time.time())
        except Refused as refused:
            self.tell(refused.kind, str(refused), place)
            await asyncio.sleep(WRONG_S if refused.kind == "secret" else 0)
            return Answer(refused=str(refused))
        except (OSError, UserError) as error:  # of the inviter's own disk; the secret keeps its worth
            self.observe(f"Cannot admit {place}: {error}")
            return Answer(refused="the inviter cannot read or write its roster; tell it, and join again")
        peers = ", ".join(map(str, member.peers))
        self.observe(f"Member {member.id[:SHOWN]} has joined from {place} as peer {peers} (epoch {roster.epoch}).")
        return Answer(roster.to_json().decode(), self.recipe)

    def tell(self, kind: str, why: str, place: str) -> None:
        """Counts a refusal and tells the first of a kind."""
        self.refused[kind] += 1
        if self.refused[kind] <= TOLD:
            more = "; more of this kind are only counted" if self.refused[kind] == TOLD else ""
            self.observe(f"Refused {place}: {why}{more}.")


INVITING = "where this member's own peer is running there, give another port with --listen, one that others can reach"


def listen_at(address: str, advice: str = INVITING) -> socket.socket:
    """Returns a socket that listens at an address; raises where it is taken or not of this machine."""
    host, port = split_address(address)
    try:
        family, *_, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(place[:2], family=family)
    except OSError as error:
        said = str(error.strerror).partition(" (")[0]
        raise UserError(f"Cannot listen at {address} ({said}); {advice}.") from None


def said_of(error: BaseException) -> str:
    """Returns an error of the network in few words."""
    if isinstance(error, ssl.SSLError):
        return f"TLS: {(error.reason or 'handshake failed').lower().replace('_', ' ')}"
    if isinstance(error, (ConnectionAbortedError, TimeoutError)):
        return "too late"
    if isinstance(error, ConnectionRefusedError):
        return "nobody listens there"
    return str(getattr(error, "strerror", None) or type(error).__name__)
