"""The roster: who belongs to a federation, which peers each hosts, and where each is; signed by the organiser.

    signature = sign(organiser's key, "dfl-lora roster" 00 canonical JSON of all else)

A new member makes a new epoch; of two rosters of one run the higher epoch holds, so that rosters may travel from
member to member and only their signing needs the organiser. The JSON is canonical (keys in order, no blanks, ASCII,
bytes as hexadecimal digits) and one content has one encoding: what is not its own encoding again is refused, and
with it duplicate keys, NaN and blanks. A roster that was read has been checked: the organiser's signature, every id,
every certificate and vouch, and that no peer or member is there twice. A certificate may have expired: that is for
TLS to refuse, one member at a time.
"""

import base64
import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, ClassVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from dfl_lora.errors import UserError
from dfl_lora.files import write_atomically
from dfl_lora.membership.addresses import split_address
from dfl_lora.membership.identity import (
    SHOWN,
    VOUCH,
    Identity,
    check_certificate,
    fingerprint_of,
    id_of,
    public_of,
    verify,
)

SIGNED = b"dfl-lora roster\0"
LARGEST = 32 * 2**20
"""Bytes of a roster: ten thousand members take 15 MB."""
STRICT = ConfigDict(strict=True, extra="forbid", ser_json_bytes="hex", val_json_bytes="hex")

Id = Annotated[str, Field(pattern=r"^[a-z2-7]{52}$")]
Key = Annotated[bytes, Field(min_length=32, max_length=32)]
Signature = Annotated[bytes, Field(min_length=64, max_length=64)]
Peer = Annotated[int, Field(ge=0, lt=100_000)]


@dataclass(frozen=True)
class Member:
    """One process of a federation: its keys, the peers that it hosts, and where it is."""

    id: Id
    key: Key
    certificate: Annotated[bytes, Field(min_length=1, max_length=2048)]
    """DER."""
    vouch: Signature
    """The key's signature over the certificate."""
    peers: Annotated[tuple[Peer, ...], Field(min_length=1)]
    addresses: Annotated[tuple[str, ...], Field(max_length=8)]
    """Where others reach it; none: it reaches them."""
    __pydantic_config__: ClassVar = STRICT

    @classmethod
    def of(cls, identity: Identity, peers: Sequence[int], addresses: Sequence[str]) -> "Member":
        """Returns the entry of an identity."""
        der, hosted = identity.certificate_der, tuple(sorted(peers))
        return cls(identity.id, identity.public, der, identity.vouch, hosted, tuple(addresses))

    @cached_property
    def certificate_pem(self) -> bytes:
        lines = base64.encodebytes(self.certificate)
        return b"-----BEGIN CERTIFICATE-----\n" + lines + b"-----END CERTIFICATE-----\n"

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint_of(self.certificate)

    def check(self, num_peers: int) -> None:
        """Raises ValueError where something of it does not go with its key, or it hosts what is no peer."""
        who = f"member {self.id[:SHOWN]}"
        if self.id != id_of(self.key):
            raise ValueError(f"the id of {who} is not that of its key")
        try:
            check_certificate(self.certificate, self.id)
        except ValueError as error:
            raise ValueError(f"{who}: its {error}") from None
        if not verify(self.key, self.vouch, VOUCH + self.certificate):
            raise ValueError(f"{who}: its key does not vouch for its certificate")
        if list(self.peers) != sorted(set(self.peers)) or self.peers[-1] >= num_peers:
            raise ValueError(f"{who} hosts {list(self.peers[:10])}; allowed are peers below {num_peers}, in order")
        for address in self.addresses:
            if split_address(address)[1] == 0:
                raise ValueError(f"{who}: {address} has port 0, where nobody can be reached")


@dataclass(frozen=True)
class Roster:
    """The members of a federation, as its organiser has signed them."""

    organiser: Key
    """The public key that signs epochs."""
    epoch: Annotated[int, Field(ge=1, lt=2**63)]
    run: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    """Drawn when the federation was founded: no message of another run is taken."""
    recipe: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")]
    """The recipe's digest."""
    num_peers: Annotated[int, Field(ge=1, le=100_000)]
    members: tuple[Member, ...]
    signature: Signature = bytes(64)
    __pydantic_config__: ClassVar = STRICT

    @cached_property
    def federation(self) -> str:
        """The id of the organiser's key."""
        return id_of(self.organiser)

    @cached_property
    def hosts(self) -> dict[int, Member]:
        """The member that hosts each peer; a peer that nobody hosts yet is not there."""
        return {peer: member for member in self.members for peer in member.peers}

    @cached_property
    def by_id(self) -> dict[str, Member]:
        return {member.id: member for member in self.members}

    def of_peer(self, peer: int) -> Member | None:
        """Returns the member that hosts a peer."""
        return self.hosts.get(peer)

    def member(self, id: str) -> Member | None:
        """Returns the member of an id."""
        return self.by_id.get(id)

    def admitting(self, member: Member) -> "Roster":
        """Returns the next epoch, unsigned, with a new member; it takes its peers over from those who had them."""
        left = (replace(m, peers=tuple(p for p in m.peers if p not in member.peers)) for m in self.members)
        members = (*(m for m in left if m.peers), member)
        return replace(self, epoch=self.epoch + 1, members=members, signature=bytes(64))

    @property
    def content(self) -> bytes:
        """What is signed."""
        return SIGNED + canonical(replace(self, signature=bytes(64)))

    def sealed_by(self, organiser: Ed25519PrivateKey) -> "Roster":
        """Returns the roster with its organiser's signature; raises ValueError where it is not well made."""
        if public_of(organiser) != self.organiser:
            raise ValueError(f"the key is not that of the organiser of federation {self.federation[:SHOWN]}")
        return Roster.from_json(replace(self, signature=organiser.sign(self.content)).to_json())

    def supersedes(self, other: "Roster") -> bool:
        """Tells whether it is a later epoch of the same organiser's same run."""
        same = (self.organiser, self.run) == (other.organiser, other.run)
        return same and self.epoch > other.epoch

    def to_json(self) -> bytes:
        return canonical(self)

    @classmethod
    def from_json(cls, content: bytes) -> "Roster":
        """Reads and checks a roster; raises ValueError with a sentence."""
        if len(content) > LARGEST:
            raise ValueError(f"the roster has {len(content):,} bytes; allowed are {LARGEST:,}")
        try:
            roster = ROSTER.validate_json(content)
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            place = ".".join(ascii(part).strip("'")[:30] for part in first["loc"][-3:])
            raise ValueError(f"the roster is malformed: {f'{place}: ' if place else ''}{first['msg']}") from None
        if roster.to_json() != content:
            raise ValueError("the roster is not in canonical JSON: keys in order, once each, no blanks")
        if not verify(roster.organiser, roster.signature, roster.content):
            raise ValueError("the roster is not signed by its organiser")
        roster.check_members()
        return roster

    def check_members(self) -> None:
        """Raises ValueError where a member is not well made, or a member or a peer is there twice."""
        ids, taken = set[str](), set[int]()
        for member in self.members:
            member.check(self.num_peers)
            if member.id in ids:
                raise ValueError(f"member {member.id[:SHOWN]} is there twice")
            if twice := taken.intersection(member.peers):
                raise ValueError(f"peer {min(twice)} is hosted twice")
            ids.add(member.id)
            taken.update(member.peers)


ROSTER = TypeAdapter(Roster)


def first_roster(organiser: Ed25519PrivateKey, recipe: str, num_peers: int, members: Sequence[Member]) -> Roster:
    """Returns the signed first epoch of a new run."""
    unsigned = Roster(public_of(organiser), 1, secrets.token_hex(16), recipe, num_peers, tuple(members))
    return unsigned.sealed_by(organiser)


def canonical(roster: Roster) -> bytes:
    """Returns the one encoding of a roster."""
    return json.dumps(ROSTER.dump_python(roster, mode="json"), sort_keys=True, separators=(",", ":")).encode()


def read_roster(path: Path) -> Roster:
    """Reads the roster in a file; raises where it is absent or forged."""
    try:
        return Roster.from_json(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"There is no roster at {path}; give the place of the one that found or join made.") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; give the file roster.json that found or join made.") from None
    except ValueError as error:
        raise UserError(f"{path} is no good: {error}; fetch it anew from another member.") from None


def write_roster(path: Path, roster: Roster) -> None:
    """Writes a roster whole or not at all."""
    write_atomically(path, roster.to_json())
