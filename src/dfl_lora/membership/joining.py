"""Joining: the call of who was invited.

The secret is said to the certificate that the invitation names, and to no other. What comes back is held against the
invitation: the federation, the recipe's digest, and that the roster has the own entry.
"""

import asyncio
import hmac
import ssl
import time
from collections.abc import Sequence
from contextlib import suppress

from pydantic import ValidationError

from dfl_lora.errors import UserError
from dfl_lora.membership.addresses import split_address
from dfl_lora.membership.admission import ANSWER, REQUEST, Answer, Request
from dfl_lora.membership.identity import SHOWN, Identity, fingerprint_of
from dfl_lora.membership.invitation import Invitation
from dfl_lora.membership.reception import ANSWER_S, PATIENCE_S, said_of
from dfl_lora.membership.roster import LARGEST, Member, Roster

LONGEST_ANSWER = 2 * LARGEST
"""Bytes: a roster and a recipe."""


def ask(invitation: Invitation, identity: Identity, addresses: Sequence[str]) -> tuple[Roster, str]:
    """Returns the roster with the own entry, and the recipe; raises where one is not admitted, or it is no good."""
    answer = asyncio.run(call(invitation, identity, addresses))
    if answer.refused:
        said = "".join(letter for letter in answer.refused[:300] if letter.isprintable())
        raise UserError(f"{invitation.address} refuses the invitation: {said}.")
    try:
        roster = Roster.from_json(answer.roster.encode())
        check_roster(roster, invitation, identity)
    except ValueError as error:
        raise UserError(f"What {invitation.address} sent is not what the invitation says: {error}.") from None
    return roster, answer.recipe


async def call(invitation: Invitation, identity: Identity, addresses: Sequence[str]) -> Answer:
    """Says the secret to who invited, and to nobody else."""
    host, port = split_address(invitation.address)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # the fingerprint is what counts
    try:
        async with asyncio.timeout(2 * PATIENCE_S):
            reader, writer = await asyncio.open_connection(host, port, ssl=context, limit=LONGEST_ANSWER)
    except (OSError, TimeoutError) as error:
        until = time.strftime("%Y-%m-%d %H:%M", time.localtime(invitation.expires))
        raise UserError(
            f"Nobody who could admit answers at {invitation.address} ({said_of(error)}); the inviter's `dfl-lora "
            f"invite` must be running there, which it does until {until} at the latest."
        ) from None
    try:
        check_fingerprint(writer, invitation)
        member = Member.of(identity, (invitation.peer,), addresses)
        request = Request(invitation.secret, member.key, member.certificate, member.vouch, member.addresses)
        async with asyncio.timeout(ANSWER_S):
            writer.write(REQUEST.dump_json(request) + b"\n")
            await writer.drain()
            return ANSWER.validate_json(await reader.readuntil(b"\n"))
    except (OSError, TimeoutError, EOFError, asyncio.LimitOverrunError, ValidationError) as error:
        raise UserError(
            f"{invitation.address} did not answer ({said_of(error)}); ask there whether peer {invitation.peer} has "
            "joined, and if so for an invitation that replaces it."
        ) from None
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


def check_fingerprint(writer: asyncio.StreamWriter, invitation: Invitation) -> None:
    """Raises where another than the inviter answers."""
    session = writer.get_extra_info("ssl_object")
    fingerprint = fingerprint_of(session.getpeercert(binary_form=True) or b"")
    if not hmac.compare_digest(fingerprint, invitation.fingerprint):
        raise UserError(
            f"What answers at {invitation.address} is not who invited: its certificate is {fingerprint[:16]}..., the "
            f"invitation says {invitation.fingerprint[:16]}...; the secret was not sent. Somebody may stand between; "
            "ask the inviter."
        )


def check_roster(roster: Roster, invitation: Invitation, identity: Identity) -> None:
    """Raises ValueError where a roster is of another federation or recipe, or lacks the own entry."""
    if roster.federation != invitation.federation:
        raise ValueError(
            f"the roster is of federation {roster.federation[:SHOWN]}, not {invitation.federation[:SHOWN]}"
        )
    if roster.recipe != invitation.recipe:
        raise ValueError(f"the recipe has digest {roster.recipe[:16]}..., not {invitation.recipe[:16]}...")
    own = roster.member(identity.id)
    if own is None or own.peers != (invitation.peer,):
        raise ValueError(f"the roster does not say that member {identity.id[:SHOWN]} hosts peer {invitation.peer}")
