"""What two members say to each other on their link: one byte for the kind, then strict JSON or plain bytes.

    hello     who I am and what I agreed to                        first on every link, both ways
    roster    a roster of a higher epoch than the other end's      JSON as the organiser signed it
    settle    which exchange each edge took in last                 before announcements, on a new link, at the end
    announce  a sealed header: this frame is there to be pulled     bytes, see sealed.py
    pull      send the body of that frame from an offset on         the receiver decides size, order and resume
    chunk     a piece of a body                                     sender, sequence, offset, then the bytes
    have      the whole frame is here and well formed
    close     these edges are out for the rest of the round
    refused   why nobody here will talk to the other end
    bye       this process ends
Everything is checked when it is read: a stranger's JSON has no unknown key, no other type and no number out of range.
"""

from dataclasses import dataclass
from struct import Struct
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

PROTOCOL = 1
CHUNK_BYTES = 2**18
"""Of a body in one message. 1 MiB costs 65,000 page faults more for 100 MB, and 151 ms in place of 95."""
MOST_BYTES = 3 * 2**20
"""Of a message: a chunk, or a roster of two thousand members; a larger one travels as a file."""
PLACE = Struct(">IQQ")
"""Before the bytes of a chunk: sender, sequence, offset."""

Number = Annotated[int, Field(ge=-1, lt=2**63)]
Index = Annotated[int, Field(ge=0, lt=2**31)]
Offset = Annotated[int, Field(ge=0, lt=2**63)]
Short = Annotated[str, Field(max_length=200, pattern="^[0-9a-z]*$")]
Digest = Annotated[str, Field(max_length=64, pattern="^[0-9a-z]*$")]
Sentence = Annotated[str, Field(max_length=1000, pattern="^[ -~]*$")]
"""No more than a terminal can be shown: what a stranger says is told to people."""
Moment = tuple[Number, Number]
"""(round, exchange); (-1, -1) is before everything."""
Edge = tuple[Index, Index]
"""(peer of the member that speaks, peer of the member that listens)."""
BEFORE: tuple[int, int] = (-1, -1)


class Said(BaseModel):
    """A message in JSON."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Hello(Said):
    """The contract, in the order in which it is compared, and where the speaker stands."""

    protocol: Number
    id: Short
    federation: Short
    run: Short
    recipe: Digest
    base: Digest
    frozen: Digest
    start: Digest
    epoch: Number
    session: Short
    """Drawn when the speaker's process started: another one means that it began again from its checkpoint."""
    seen: list[tuple[Index, Number]]
    """The last sequence accepted of each of the listener's peers: it counts on from there."""


class Settle(Said):
    """What each edge took in last; what lies before `now` is final."""

    now: Moment
    ready: bool
    """Whether the speaker has begun, or still waits for its own neighbours."""
    taken: list[tuple[Index, Index, Number, Number]]


class Pull(Said):
    sender: Index
    sequence: Number
    offset: Offset


class Have(Said):
    sender: Index
    sequence: Number


class Close(Said):
    round: Number
    edges: list[Edge]


class Refused(Said):
    why: Sentence


class Bye(Said):
    why: Literal["finished", "stopped"]


@dataclass(frozen=True)
class Roster:
    """A roster as its organiser signed it; it is read by `membership.roster`."""

    content: bytes


@dataclass(frozen=True)
class Announce:
    sealed: bytes


@dataclass(frozen=True)
class Chunk:
    sender: int
    sequence: int
    offset: int
    data: memoryview


SAID: dict[bytes, type[Said]] = {
    b"H": Hello, b"S": Settle, b"P": Pull, b"V": Have, b"C": Close, b"R": Refused, b"B": Bye,
}  # fmt: skip
KINDS = {kind: letter for letter, kind in SAID.items()}
Message = Said | Roster | Announce | Chunk


def encoded(message: Message) -> bytes:
    """Returns the bytes of a message."""
    if isinstance(message, Said):
        return KINDS[type(message)] + message.model_dump_json().encode()
    if isinstance(message, Chunk):
        return b"K" + PLACE.pack(message.sender, message.sequence, message.offset) + message.data
    return b"T" + message.content if isinstance(message, Roster) else b"A" + message.sealed


def decoded(content: bytes) -> Message:
    """Returns the message of some bytes; raises ValueError with a sentence where they are none."""
    kind, rest = content[:1], memoryview(content)[1:]
    if kind == b"K":
        if len(rest) < PLACE.size:
            raise ValueError(f"a chunk of {len(rest)} bytes has no room for its place")
        sender, sequence, offset = PLACE.unpack_from(rest)
        return Chunk(sender, sequence, offset, rest[PLACE.size :])
    if kind == b"A":
        return Announce(bytes(rest))
    if kind == b"T":
        return Roster(bytes(rest))
    if kind not in SAID:
        raise ValueError(f"no message begins with the byte {kind.hex() or 'of nothing'}")
    try:
        return SAID[kind].model_validate_json(bytes(rest))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ascii(".".join(map(str, first["loc"]))[:80])[1:-1]  # a key may be anything
        raise ValueError(f"{SAID[kind].__name__.lower()} {place}: {first['msg'][:120]}") from None
