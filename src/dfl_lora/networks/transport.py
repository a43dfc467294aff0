"""How a link is carried: a stream of whole messages to one other process, over whatever.

One end dials, the other listens; from then on both are alike. `grpc_transport.py` is the real one.
"""

from collections.abc import Awaitable, Callable
from typing import Protocol

from dfl_lora.membership.roster import Member, Roster


class Unreachable(Exception):
    """A link could not be opened; one sentence says why. `absent`: nobody listens there at all."""

    def __init__(self, why: str, absent: bool = False) -> None:
        super().__init__(why)
        self.absent = absent


class Stream(Protocol):
    """Messages in order, until one end closes."""

    @property
    def certificate(self) -> bytes | None:
        """The certificate of the other end (DER), which its handshake proved; None without TLS."""
        ...

    @property
    def address(self) -> str: ...

    async def read(self) -> bytes | None:
        """Returns the next message; None where the stream has ended."""
        ...

    async def write(self, message: bytes) -> None:
        """Sends a message, and waits while the other end does not read; nothing happens where the stream has ended."""
        ...

    async def close(self) -> None: ...


Serve = Callable[[Stream], Awaitable[None]]


class Transport(Protocol):
    """Opens streams to members of a roster, and from them."""

    async def listen(self, at: str, serve: Serve) -> int:
        """Listens at "host:port", serves each stream until `serve` returns, and returns the port."""
        ...

    async def dial(self, member: Member, address: str) -> Stream:
        """Returns a stream to a member; raises Unreachable."""
        ...

    def trust(self, roster: Roster) -> None:
        """Admits the members of this roster from now on, and nobody else."""
        ...

    async def close(self) -> None: ...
