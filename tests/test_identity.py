"""Identities: the id is the key's, the key vouches for the certificate, and only their owner reads the keys."""

import base64
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from dfl_lora.errors import UserError
from dfl_lora.membership.addresses import is_loopback, join_address, split_address
from dfl_lora.membership.identity import (
    VOUCH,
    check_certificate,
    create_identity,
    id_of,
    load_identity,
    load_key,
    new_identity,
    verify,
    write_key,
)
from forging import ORGANISER, certificate_like

FILES = ("key.pem", "tls.pem", "certificate.pem")


def test_an_identity_that_is_read_is_the_one_that_was_written(tmp_path: Path) -> None:
    made, read = create_identity(tmp_path / "own"), load_identity(tmp_path / "own")
    assert (made.id, made.public, made.tls_key, made.certificate) == (
        read.id,
        read.public,
        read.tls_key,
        read.certificate,
    )
    assert made.fingerprint == read.fingerprint and made.vouch == read.vouch


def test_the_id_is_the_hash_of_the_key_and_the_key_vouches_for_the_certificate() -> None:
    one, other = new_identity(), new_identity()
    assert one.id == id_of(one.public) != other.id and len(one.id) == 52 and one.id.isalnum() and one.id.islower()
    assert verify(one.public, one.vouch, VOUCH + one.certificate_der)
    assert not verify(other.public, one.vouch, VOUCH + one.certificate_der)
    assert not verify(one.public, one.vouch, VOUCH + other.certificate_der)
    assert not verify(b"no key", one.vouch, VOUCH + one.certificate_der)


def test_a_certificate_bears_the_id_signs_no_other_and_is_valid_from_a_day_before_to_a_year_after() -> None:
    identity, now = new_identity(), datetime.now(UTC)
    certificate = x509.load_pem_x509_certificate(identity.certificate)
    check_certificate(identity.certificate_der, identity.id)
    assert abs(certificate.not_valid_before_utc - (now - timedelta(days=1))) < timedelta(minutes=1)
    assert abs(certificate.not_valid_after_utc - (now + timedelta(days=365))) < timedelta(minutes=1)
    usage = certificate.extensions.get_extension_for_class(x509.KeyUsage)
    assert usage.critical and usage.value.digital_signature and not usage.value.key_cert_sign
    certificate.verify_directly_issued_by(certificate)


def test_keys_are_made_for_their_owner_alone(tmp_path: Path) -> None:
    create_identity(tmp_path / "own")
    write_key(tmp_path / "organiser.key", ORGANISER)
    assert (tmp_path / "own").stat().st_mode & 0o777 == 0o700
    for file in (tmp_path / "own/key.pem", tmp_path / "own/tls.pem", tmp_path / "organiser.key"):
        assert file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601])
@pytest.mark.parametrize("name", ["key.pem", "tls.pem"])
def test_a_key_that_others_can_read_is_refused(name: str, mode: int, tmp_path: Path) -> None:
    create_identity(tmp_path / "own")
    (tmp_path / "own" / name).chmod(mode)
    with pytest.raises(UserError, match=rf"{name} can be read by others .*chmod 600"):
        load_identity(tmp_path / "own")


def test_an_organisers_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    write_key(tmp_path / "organiser.key", ORGANISER)
    (tmp_path / "organiser.key").chmod(0o644)
    with pytest.raises(UserError, match="chmod 600"):
        load_key(tmp_path / "organiser.key")


def test_an_identity_is_never_written_over_another(tmp_path: Path) -> None:
    first = create_identity(tmp_path / "own")
    with pytest.raises(UserError, match="new or an empty folder"):
        create_identity(tmp_path / "own")
    with pytest.raises(FileExistsError):
        write_key(tmp_path / "own" / "key.pem", ORGANISER)
    assert load_identity(tmp_path / "own").id == first.id


@pytest.mark.parametrize("name", FILES)
def test_an_identity_that_lacks_a_file_is_refused_with_its_name(name: str, tmp_path: Path) -> None:
    create_identity(tmp_path / "own")
    (tmp_path / "own" / name).unlink()
    with pytest.raises(UserError, match=rf"There is no .*{name}"):
        load_identity(tmp_path / "own")


@pytest.mark.parametrize("content", [b"", b"\xff\x00", b"half"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_identity_is_refused_without_a_word_of_what_it_holds(
    name: str, content: bytes, tmp_path: Path
) -> None:
    create_identity(tmp_path / "own")
    file = tmp_path / "own" / name
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] if content == b"half" else content)
    with pytest.raises(UserError, match=r"damaged|holds no Ed25519 key") as raised:
        load_identity(tmp_path / "own")
    secrets = [line for line in whole.decode().splitlines() if not line.startswith("-")]
    assert not any(secret[:12] in str(raised.value) for secret in secrets)


@pytest.mark.parametrize(("name", "said"), [
    ("key.pem", "certificate bears another name"),
    ("tls.pem", "certificate is not of the key in tls.pem"),
    ("certificate.pem", "certificate bears another name"),
])  # fmt: skip
def test_files_of_two_identities_make_none(name: str, said: str, tmp_path: Path) -> None:
    create_identity(tmp_path / "own")
    create_identity(tmp_path / "other")
    shutil.copy(tmp_path / "other" / name, tmp_path / "own" / name)
    with pytest.raises(UserError, match=said):
        load_identity(tmp_path / "own")


@pytest.mark.parametrize("days", [(-400, -35), (2, 365)])
def test_a_certificate_that_is_not_valid_now_is_refused_with_what_the_clock_says(
    days: tuple[float, float], tmp_path: Path
) -> None:
    identity = create_identity(tmp_path / "own")
    tls_key = load_pem_private_key(identity.tls_key, None)
    _, certificate = certificate_like(identity.id, tls_key, days=days)
    (tmp_path / "own" / "certificate.pem").write_bytes(certificate.public_bytes(Encoding.PEM))
    with pytest.raises(UserError, match="set the clock, or join anew"):
        load_identity(tmp_path / "own")


def test_an_identity_shows_its_id_and_no_key() -> None:
    identity = new_identity()
    shown = f"{identity!r} {identity} {[identity]}"
    assert shown == " ".join([f"Identity({identity.id[:8]})"] * 2 + [f"[Identity({identity.id[:8]})]"])
    assert base64.b64encode(identity.key.private_bytes_raw())[:12].decode() not in shown


@pytest.mark.parametrize(("how", "said"), [
    ({"ca": True}, "could sign other"),
    ({"signs": True}, "could sign other"),
    ({"names": ["x", "y"]}, "another name"),
    ({"names": ["*.example.org"]}, "another name"),
    ({"subject": "another"}, "another name"),
    ({"tls_key": ec.generate_private_key(ec.SECP384R1())}, "P-256"),
])  # fmt: skip
def test_a_certificate_that_could_pass_for_another_is_refused(how: dict[str, object], said: str) -> None:
    name = new_identity().id
    _, certificate = certificate_like(name, **how)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=said):
        check_certificate(certificate.public_bytes(Encoding.DER), name)


def test_a_certificate_without_a_key_usage_is_refused() -> None:
    key, name = ec.generate_private_key(ec.SECP256R1()), new_identity().id
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    bare = (
        x509.CertificateBuilder(subject, subject, key.public_key(), 7)
        .not_valid_before(datetime.now(UTC))
        .not_valid_after(datetime.now(UTC) + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    with pytest.raises(ValueError, match="lacks"):
        check_certificate(bare.public_bytes(Encoding.DER), name)


@pytest.mark.parametrize(("address", "parts"), [
    ("127.0.0.1:7000", ("127.0.0.1", 7000)), ("peer.example.org:1", ("peer.example.org", 1)),
    ("[::1]:65535", ("::1", 65535)), ("h:0", ("h", 0)),
])  # fmt: skip
def test_an_address_is_a_host_and_a_port(address: str, parts: tuple[str, int]) -> None:
    assert split_address(address) == parts and join_address(*parts) == address


@pytest.mark.parametrize("address", [
    "", ":", "h", "h:", ":7", "h:x", "h:-1", "h:65536", "h:7\n", "h :7", "::1:7", "[::1]", "[h]:7", "a b:7", "h:٣",
    "\x1b[31mh:7", "-h:7", "fe80::1%eth0:7", "[fe80::1%eth0]:7", "h" * 254 + ":7", "http://h:7",
])  # fmt: skip
def test_what_is_no_address_is_refused_in_printable_letters(address: str) -> None:
    with pytest.raises(ValueError, match="no address; write host:port") as raised:
        split_address(address)
    assert str(raised.value).isprintable()


def test_an_address_of_this_machine_alone_is_known() -> None:
    assert is_loopback("127.0.0.1:7") and is_loopback("[::1]:7") and is_loopback("localhost:7")
    assert not is_loopback("0.0.0.0:7") and not is_loopback("192.0.2.1:7") and not is_loopback("example.org:7")
