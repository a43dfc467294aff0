"""Who brings an invitation is admitted: a request, an answer, and the roster's next epoch between them.

Who joins opens a TLS 1.3 connection, looks at the certificate's fingerprint, and only then says its secret and what
it is: one line of JSON {addresses, certificate, key, secret, vouch}. The inviter answers with one line: the roster of
the new epoch and the recipe, or why not. Nobody is trusted for what it says: the entry is checked as every entry of a
roster is. A secret works once.
"""

import fcntl
import hmac
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import Field, TypeAdapter

from dfl_lora.membership.identity import SHOWN, id_of
from dfl_lora.membership.invitation import Invitation, Secret
from dfl_lora.membership.roster import STRICT, Key, Member, Roster, Signature, read_roster, write_roster


class Refused(ValueError):
    """Why somebody is not admitted: a kind, which is counted, and a sentence."""

    def __init__(self, kind: str, why: str) -> None:
        super().__init__(why)
        self.kind = kind


@dataclass(frozen=True, repr=False)
class Request:
    """What who joins says of itself."""

    secret: Secret
    key: Key
    certificate: Annotated[bytes, Field(min_length=1, max_length=2048)]
    vouch: Signature
    addresses: Annotated[tuple[str, ...], Field(max_length=8)]
    __pydantic_config__: ClassVar = STRICT


@dataclass(frozen=True)
class Answer:
    """What who joins is told: the roster and the recipe, or why it is refused."""

    roster: str = ""
    recipe: str = ""
    refused: str = ""
    __pydantic_config__: ClassVar = STRICT


REQUEST, ANSWER = TypeAdapter(Request), TypeAdapter(Answer)


class Admissions:
    """The invitations that are out. Each admission makes the roster's next epoch, and is on the disk when told."""

    def __init__(
        self, roster: Path, organiser: Ed25519PrivateKey, invitations: Sequence[Invitation], *, replacing: bool = False
    ) -> None:
        self.roster, self.organiser, self.replacing = roster, organiser, replacing
        self.invitations, self.used = tuple(invitations), set[Invitation]()

    def waiting(self, now: float) -> list[Invitation]:
        """Returns the invitations that are neither used nor expired."""
        return [each for each in self.invitations if each not in self.used and now < each.expires]

    def admit(self, request: Request, now: float) -> tuple[Member, Roster]:
        """Returns the new member and the new epoch; raises Refused where the secret or the entry is no good."""
        same = [each for each in self.invitations if hmac.compare_digest(each.secret, request.secret)]
        if not same:
            raise Refused("secret", "the secret is of no invitation that is out; ask for a new one")
        invitation = same[0]
        if invitation in self.used:
            raise Refused("used", "this invitation has been used; ask for a new one")
        if now >= invitation.expires:
            raise Refused("expired", "this invitation has expired; ask for a new one")
        with alone_in(self.roster.parent):
            member, roster = self.next_epoch(invitation.peer, request)
            write_roster(self.roster, roster)
        self.used.add(invitation)
        return member, roster

    def next_epoch(self, peer: int, request: Request) -> tuple[Member, Roster]:
        """Returns the new member and the next epoch; raises Refused where the roster has no place for it."""
        old = read_roster(self.roster)
        holder = old.of_peer(peer)
        if holder and not self.replacing:
            raise Refused("taken", f"peer {peer} is hosted by member {holder.id[:SHOWN]} by now; ask for another")
        id = id_of(request.key)
        if old.member(id):
            raise Refused("member", f"member {id[:SHOWN]} is in the federation already; join with a new identity")
        member = Member(id, request.key, request.certificate, request.vouch, (peer,), request.addresses)
        try:
            return member, old.admitting(member).sealed_by(self.organiser)
        except ValueError as error:
            raise Refused("entry", str(error)) from None


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Waits until no other process signs an epoch here: one organiser never signs two rosters of one epoch."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
