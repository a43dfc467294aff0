"""A member's identity: a long-term key, and a short-lived certificate that this key vouches for.

    id          = base32(sha256(public key)), 52 small letters and digits; shown by its first 8
    vouch       = sign(key, "dfl-lora certificate" 00 certificate)
    fingerprint = sha256(certificate)

`key` is Ed25519 (RFC 8032) and signs messages; the certificate is ECDSA on P-256, since TLS libraries refuse Ed25519
certificates, signs itself, bears the id as its only name, and is valid from a day before to a year after it is made,
so that an hour of clock error changes nothing. Certificates of members are each other's only roots: one that could
sign others (CA, or keyCertSign among its key usages) would let its owner pass for anybody, hence is refused.
Keys lie in files that only their owner can read, and appear in no message, log or representation.
"""

import hashlib
import os
from base64 import b32encode
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from dfl_lora.errors import UserError
from dfl_lora.files import naming, sync_folder

KEY, TLS_KEY, CERTIFICATE = "key.pem", "tls.pem", "certificate.pem"
VOUCH = b"dfl-lora certificate\0"
"""Set before what is signed: a signature given for one purpose is worth nothing for another."""
SHOWN = 8
"""Letters of an id that a person is shown."""
BEFORE, AFTER = timedelta(days=1), timedelta(days=365)
OTHERS = 0o077
"""The bits of a file's mode that let the group and others in."""


@dataclass(frozen=True, repr=False, eq=False)
class Identity:
    """The keys of a member of a federation."""

    key: Ed25519PrivateKey
    tls_key: bytes
    """PEM."""
    certificate: bytes
    """PEM."""

    @cached_property
    def public(self) -> bytes:
        """The public half of the key, 32 bytes."""
        return public_of(self.key)

    @cached_property
    def id(self) -> str:
        return id_of(self.public)

    @cached_property
    def certificate_der(self) -> bytes:
        return x509.load_pem_x509_certificate(self.certificate).public_bytes(Encoding.DER)

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint_of(self.certificate_der)

    @cached_property
    def vouch(self) -> bytes:
        """The key's signature over the certificate, 64 bytes."""
        return self.sign(VOUCH + self.certificate_der)

    def sign(self, content: bytes) -> bytes:
        """Returns the key's signature, 64 bytes."""
        return self.key.sign(content)

    def __repr__(self) -> str:
        return f"Identity({self.id[:SHOWN]})"


def create_identity(folder: Path) -> Identity:
    """Makes an identity and writes it to a folder that only its owner can enter; never over an existing one."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"There is something at {folder} already; an identity needs a new or an empty folder.")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    identity = new_identity()
    write_new(folder / CERTIFICATE, identity.certificate, 0o644)
    write_new(folder / TLS_KEY, identity.tls_key, 0o600)
    write_new(folder / KEY, pem(identity.key), 0o600)
    return identity


def new_identity() -> Identity:
    """Returns an identity with fresh keys."""
    key, tls_key = Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP256R1())
    certificate = certify(tls_key, id_of(public_of(key)))
    return Identity(key, pem(tls_key), certificate.public_bytes(Encoding.PEM))


def load_identity(folder: Path) -> Identity:
    """Reads the identity in a folder; raises where it is absent, damaged, expired, or others can read its keys."""
    key, tls_key = load_key(folder / KEY), read_private(folder / TLS_KEY)
    try:
        certificate = (folder / CERTIFICATE).read_bytes()
        tls_public = load_pem_private_key(tls_key, None).public_key()
        identity = Identity(key, tls_key, certificate)
        check_certificate(identity.certificate_der, identity.id)
        parsed = x509.load_pem_x509_certificate(certificate)
        if parsed.public_key() != tls_public:
            raise ValueError(f"certificate is not of the key in {TLS_KEY}")
    except FileNotFoundError:
        raise absent(folder / CERTIFICATE) from None
    except (ValueError, TypeError) as error:  # never with what the files hold
        reason = f"its {error}" if str(error).startswith("certificate") else "a file in it is damaged"
        raise UserError(f"The identity in {folder} is no good: {reason}; restore it, or join anew.") from None
    now = datetime.now(UTC)
    if not parsed.not_valid_before_utc <= now <= parsed.not_valid_after_utc:
        raise UserError(
            f"The certificate in {folder} is valid from {parsed.not_valid_before_utc:%Y-%m-%d %H:%M} to "
            f"{parsed.not_valid_after_utc:%Y-%m-%d %H:%M} UTC, and the clock says {now:%Y-%m-%d %H:%M}; "
            "set the clock, or join anew with an invitation that replaces this member."
        )
    return identity


def load_key(path: Path) -> Ed25519PrivateKey:
    """Reads a signing key; raises where it is absent, damaged, or others than its owner can read it."""
    content = read_private(path)
    try:
        key = load_pem_private_key(content, None)
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise UserError(f"{path} holds no Ed25519 key as PEM; restore it from a copy.")
    return key


def write_key(path: Path, key: Ed25519PrivateKey) -> None:
    """Writes a signing key to a new file that only its owner can read."""
    write_new(path, pem(key), 0o600)


def read_private(path: Path) -> bytes:
    """Returns what a file holds; raises where others than its owner can read it."""
    try:
        mode = path.stat().st_mode
        content = path.read_bytes()
    except FileNotFoundError:
        raise absent(path) from None
    if mode & OTHERS:
        raise UserError(
            f"{path} can be read by others than its owner (mode {mode & 0o777:04o}), and a key must not be; "
            f"say chmod 600 {path}, and think of who may have read it."
        )
    return content


def absent(path: Path) -> UserError:
    return UserError(f"There is no {path}; give the place of the keys that found or join made.")


def write_new(path: Path, content: bytes, mode: int) -> None:
    """Writes a file that must not be there yet, with its mode from the first moment."""
    with naming(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    sync_folder(path.parent)


def certify(tls_key: ec.EllipticCurvePrivateKey, name: str) -> x509.Certificate:
    """Returns a certificate that signs itself, bears a name, and can sign no other."""
    subject, now = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]), datetime.now(UTC)
    usage = x509.KeyUsage(
        digital_signature=True, content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, key_cert_sign=False, crl_sign=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    purposes = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    return (
        x509.CertificateBuilder(subject, subject, tls_key.public_key(), x509.random_serial_number())
        .not_valid_before(now - BEFORE)
        .not_valid_after(now + AFTER)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(purposes, critical=False)
        .sign(tls_key, hashes.SHA256())
    )


def check_certificate(der: bytes, name: str) -> None:
    """Raises ValueError where a certificate bears another name, can sign others, or is not on P-256."""
    try:
        certificate = x509.load_der_x509_certificate(der)
        names = [attribute.value for attribute in certificate.subject]
        key, extensions = certificate.public_key(), certificate.extensions
        own = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        constraints = extensions.get_extension_for_class(x509.BasicConstraints).value
        usage = extensions.get_extension_for_class(x509.KeyUsage).value
    except (ValueError, TypeError, x509.ExtensionNotFound) as error:
        raise ValueError("certificate is damaged, or lacks a name, its constraints or its key usage") from error
    if names != [name] or list(own) != [x509.DNSName(name)]:
        raise ValueError(f"certificate bears another name than the id {name[:SHOWN]}")
    if constraints.ca or usage.key_cert_sign:
        raise ValueError("certificate could sign other certificates, which would let its owner pass for anybody")
    if not (isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1)):
        raise ValueError("certificate is not of a key on P-256")


def verify(public: bytes, signature: bytes, content: bytes) -> bool:
    """Tells whether the owner of a public key has signed the content."""
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, content)
    except (InvalidSignature, ValueError):
        return False
    return True


def id_of(public: bytes) -> str:
    """Returns the id that a public key has."""
    return b32encode(hashlib.sha256(public).digest()).decode().lower().rstrip("=")


def fingerprint_of(certificate: bytes) -> str:
    """Returns the sha256 of a certificate (DER) in hexadecimal digits."""
    return hashlib.sha256(certificate).hexdigest()


def public_of(key: Ed25519PrivateKey) -> bytes:
    """Returns the public half of a signing key, 32 bytes."""
    return key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)


def pem(key: Ed25519PrivateKey | ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
