"""Identities and rosters as a forger makes them: signed, and wrong in one thing."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from dfl_lora.membership.identity import Identity, create_identity, new_identity, pem
from dfl_lora.membership.roster import Member, Roster, first_roster, write_roster

ORGANISER = Ed25519PrivateKey.from_private_bytes(b"the organiser's key of the tests")
RECIPE = "a" * 64


def certificate_like(
    name: str,
    tls_key: Any = None,
    *,
    ca: bool = False,
    signs: bool = False,
    subject: str | None = None,
    names: Sequence[str] = (),
    days: tuple[float, float] = (-1, 365),
) -> tuple[Any, x509.Certificate]:
    """Returns a key and a certificate of it like a member's, but for what is said."""
    key = tls_key or ec.generate_private_key(ec.SECP256R1())
    own, now = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject or name)]), datetime.now(UTC)
    usage = x509.KeyUsage(True, False, False, False, False, signs, False, False, False)
    builder = (
        x509.CertificateBuilder(own, own, key.public_key(), x509.random_serial_number())
        .not_valid_before(now + timedelta(days=days[0]))
        .not_valid_after(now + timedelta(days=days[1]))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(n) for n in names or [name]]), critical=False)
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .add_extension(usage, critical=True)
    )
    return key, builder.sign(key, hashes.SHA256())


def with_certificate(identity: Identity, key: Any, certificate: x509.Certificate) -> Identity:
    """Returns an identity whose key vouches for another certificate."""
    return Identity(identity.key, pem(key), certificate.public_bytes(Encoding.PEM))


def entry(peers: Sequence[int], addresses: Sequence[str] = ("127.0.0.1:7000",)) -> Member:
    """Returns a new member."""
    return Member.of(new_identity(), peers, addresses)


def signed(roster: Roster, key: Ed25519PrivateKey = ORGANISER) -> bytes:
    """Returns a roster that is signed whatever it says."""
    return replace(roster, signature=key.sign(roster.content)).to_json()


def founded(folder: Path, num_peers: int = 4) -> tuple[Identity, Roster]:
    """Returns the first member of a federation, hosting peer 0, and its roster; both are written to a folder."""
    identity = create_identity(folder / "identity")
    roster = first_roster(ORGANISER, RECIPE, num_peers, [Member.of(identity, [0], ["127.0.0.1:7000"])])
    write_roster(folder / "roster.json", roster)
    return identity, roster
