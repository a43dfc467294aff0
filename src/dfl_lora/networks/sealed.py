"""The seal of a frame: what it is, where it belongs and who vouches for it, a few hundred bytes that go ahead of it.

    sealed    = "DFLL" | version (1 byte) | n (2 bytes, big endian) | header (n bytes) | signature (64 bytes)
    signature = ed25519("dfl-lora frame" | 0 | sha256(everything before the signature))

The header is canonical JSON: every field, sorted, no blanks, ASCII. So few texts are allowed that one regular
expression says all of them: a header is matched, never parsed, and no two texts mean the same header. The signature
covers the digest of the body through the header, so that a body of any length costs one signature of a few bytes.
"""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from struct import Struct
from typing import Any, Literal

from dfl_lora.membership.identity import verify

MAGIC, VERSION = b"DFLL", 1
START = Struct(">4sBH")
"""Magic, version, length of the header."""
SIGNATURE_BYTES = 64
MOST_HEADER_BYTES = 1024
DOMAIN = b"dfl-lora frame\0"
"""No signature of this key over anything else can be taken for one over a frame."""

DIGEST = "[0-9a-f]{64}"
TEXTS = {
    "codec": "[a-z0-9_]{1,32}",
    "federation": "[a-z2-7]{52}",
    "layout": DIGEST,
    "recipe": DIGEST,
    "run": "[0-9a-f]{1,64}",
    "sha256": DIGEST,
}
NUMBERS = ("epoch", "exchange", "length", "round", "sender", "sequence")
FIELDS = {n: f'"(?P<{n}>{text})"' for n, text in TEXTS.items()} | {n: f"(?P<{n}>0|[1-9][0-9]*)" for n in NUMBERS}
HEADER = re.compile(r"\{" + ",".join(f'"{name}":{FIELDS[name]}' for name in sorted(FIELDS)) + r"\}")

Kind = Literal[
    "magic", "version", "length", "header", "identity", "federation", "run", "recipe", "epoch", "codec", "layout",
    "size", "signature", "replayed", "duplicate", "stale", "future", "exchange", "truncated", "hash", "names",
    "non-finite", "norm", "message",
]  # fmt: skip


@dataclass(frozen=True)
class Refusal:
    """Why something that arrived has no effect: one sentence that says what was given and what is allowed."""

    kind: Kind
    why: str


@dataclass(frozen=True)
class Header:
    """What a frame is: which federation, run and recipe, made how, for when, by which peer; and its body's digest."""

    federation: str
    run: str
    recipe: str
    layout: str
    codec: str
    epoch: int
    round: int
    exchange: int
    sequence: int
    sender: int
    length: int
    sha256: str

    @property
    def moment(self) -> tuple[int, int]:
        return self.round, self.exchange

    def to_json(self) -> bytes:
        return json.dumps(vars(self), sort_keys=True, separators=(",", ":")).encode()


@dataclass(frozen=True)
class Opened:
    """A seal that is well formed; who made it is not known until its signature is checked."""

    header: Header
    signed: bytes
    signature: bytes

    def is_signed_by(self, key: bytes) -> bool:
        """Tells whether the holder of an ed25519 public key (32 bytes) made this seal."""
        return verify(key, self.signature, self.signed)


def seal(header: Header, sign: Callable[[bytes], bytes]) -> bytes:
    """Returns the sealed header; `sign` makes the 64 bytes of an ed25519 signature."""
    content = header.to_json()
    unsigned = START.pack(MAGIC, VERSION, len(content)) + content
    return unsigned + sign(to_sign(unsigned))


def to_sign(unsigned: bytes) -> bytes:
    """Returns what a signature is made over: the domain and the digest of everything before the signature."""
    return DOMAIN + hashlib.sha256(unsigned).digest()


def open_sealed(content: bytes) -> Opened | Refusal:
    """Returns the header and its signature, which is not checked yet, or why the bytes are no seal; never raises."""
    if content[: len(MAGIC)] != MAGIC:
        return Refusal("magic", f"an announcement begins with {shown(content[: len(MAGIC)])}, not {shown(MAGIC)}")
    if len(content) < START.size + SIGNATURE_BYTES:
        least = START.size + SIGNATURE_BYTES
        return Refusal("length", f"an announcement has {len(content)} bytes, at least {least} are needed")
    _, version, size = START.unpack_from(content)
    if version != VERSION:
        return Refusal("version", f"an announcement is of version {version}, only {VERSION} is spoken here")
    stop = START.size + size
    if size > MOST_HEADER_BYTES or len(content) != stop + SIGNATURE_BYTES:
        allowed = f"{START.size} + header (at most {MOST_HEADER_BYTES}) + {SIGNATURE_BYTES}"
        return Refusal("length", f"an announcement of {len(content)} bytes has a header of {size}; it is {allowed}")
    header = header_of(content[START.size : stop])
    if isinstance(header, Refusal):
        return header
    return Opened(header, to_sign(content[:stop]), content[stop:])


def header_of(content: bytes) -> Header | Refusal:
    """Returns the header of its canonical JSON, or why it is none."""
    match = HEADER.fullmatch(content.decode("latin-1"))
    if match is None:
        return Refusal(
            "header", f"the header {shown(content)} is not the canonical JSON of {', '.join(sorted(FIELDS))}"
        )
    for name in NUMBERS:
        if len(match[name]) > 19 or int(match[name]) >= 2**63:
            return Refusal("header", f"{name} is {match[name][:24]} in the header; it is below 2**63")
    fields: dict[str, Any] = {
        name: int(value) if name in NUMBERS else value for name, value in match.groupdict().items()
    }
    return Header(**fields)


def shown(content: bytes | str) -> str:
    """Returns the beginning of what a stranger sent, in printable ASCII."""
    return ascii(content[:24]) + ("..." if len(content) > 24 else "")
