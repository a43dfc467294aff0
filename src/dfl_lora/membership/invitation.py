"""An invitation: one line that lets one stranger become the member who hosts one peer.

    token = "dfl1:" + base64url(JSON {address, expires, federation, fingerprint, peer, recipe, secret})

`address` is where the inviter waits, `fingerprint` that of its certificate: who joins looks at it before it says the
`secret`, 16 random bytes that work once and until `expires` (seconds since 1970). Who reads the line can take the
place of the one it was meant for, so it travels as a password does. `federation` and `recipe` say beforehand what one
agrees to join.
"""

import json
import re
import secrets
from base64 import urlsafe_b64decode, urlsafe_b64encode
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field, TypeAdapter, ValidationError

from dfl_lora.errors import UserError
from dfl_lora.membership.addresses import split_address
from dfl_lora.membership.roster import STRICT, Id, Peer, Roster

MARK = "dfl1:"
LONGEST = 4096
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Secret = Annotated[bytes, Field(min_length=16, max_length=16)]


@dataclass(frozen=True)
class Invitation:
    """What a token says."""

    address: Annotated[str, Field(max_length=300)]
    """Where the inviter waits."""
    expires: Annotated[int, Field(ge=0, lt=2**40)]
    """Seconds since 1970."""
    federation: Id
    fingerprint: Digest
    """Of the inviter's certificate."""
    peer: Peer
    """The peer that the new member will host."""
    recipe: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")]
    """The recipe's digest."""
    secret: Secret
    __pydantic_config__: ClassVar = STRICT

    @property
    def token(self) -> str:
        """The one line that is handed over."""
        content = json.dumps(INVITATION.dump_python(self, mode="json"), sort_keys=True, separators=(",", ":"))
        return MARK + urlsafe_b64encode(content.encode()).decode().rstrip("=")

    def __repr__(self) -> str:
        return f"Invitation(peer {self.peer})"


INVITATION = TypeAdapter(Invitation)


def invite(roster: Roster, fingerprint: str, address: str, peer: int, expires: int) -> Invitation:
    """Returns a new invitation with a secret of its own."""
    secret = secrets.token_bytes(16)
    return Invitation(address, expires, roster.federation, fingerprint, peer, roster.recipe, secret)


def read_token(token: str) -> Invitation:
    """Returns what a token says; raises where it is none."""
    body = token.strip().removeprefix(MARK)
    try:
        if not re.fullmatch(rf"{MARK}[\w-]{{1,{LONGEST}}}", token.strip(), re.ASCII):
            raise ValueError("it is no token")
        invitation = INVITATION.validate_json(urlsafe_b64decode(body + "=" * (-len(body) % 4)))
        split_address(invitation.address)
    except (ValueError, ValidationError):  # never with the token: it may be a good one with one letter lost
        raise UserError(
            f"This is no invitation, or a part of it is lost; give the whole line that invite printed, from {MARK} on."
        ) from None
    return invitation
