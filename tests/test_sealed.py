"""The seal of a frame: what is written is read, and nothing else is."""

import hashlib
import json
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dfl_lora.networks.sealed import MAGIC, START, VERSION, Header, Opened, Refusal, open_sealed, seal, to_sign

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = KEY.public_key().public_bytes_raw()
HEADER = Header("a" * 52, "b" * 32, "c" * 64, "d" * 64, "fp32", 3, 4, 1, 55, 2, 12_345, "e" * 64)
SEALED = seal(HEADER, KEY.sign)
CONTENT = HEADER.to_json()

digests = st.text("0123456789abcdef", min_size=64, max_size=64)
numbers = st.integers(0, 2**63 - 1)
headers = st.builds(
    Header,
    federation=st.text("abcdefghijklmnopqrstuvwxyz234567", min_size=52, max_size=52),
    run=st.text("0123456789abcdef", min_size=1, max_size=64),
    recipe=digests,
    layout=digests,
    codec=st.from_regex("[a-z0-9_]{1,32}", fullmatch=True),
    epoch=numbers,
    round=numbers,
    exchange=numbers,
    sequence=numbers,
    sender=numbers,
    length=numbers,
    sha256=digests,
)


def sealed_around(content: bytes) -> bytes:
    unsigned = START.pack(MAGIC, VERSION, len(content)) + content
    return unsigned + KEY.sign(to_sign(unsigned))


def kind_of(content: bytes) -> str:
    opened = open_sealed(content)
    assert isinstance(opened, Refusal), opened
    assert len(opened.why) < 300 and opened.why.isascii() and opened.why.isprintable()
    return opened.kind


@settings(deadline=None)
@given(headers)
def test_a_header_crosses_the_wire_and_its_signature_holds(header: Header) -> None:
    opened = open_sealed(seal(header, KEY.sign))
    assert isinstance(opened, Opened)
    assert opened.header == header
    assert opened.is_signed_by(PUBLIC)


def test_a_header_is_canonical_json() -> None:
    assert json.dumps(json.loads(CONTENT), sort_keys=True, separators=(",", ":")).encode() == CONTENT
    assert json.loads(CONTENT) == vars(HEADER)


def test_a_signature_is_over_a_domain_and_the_digest_of_all_before_it() -> None:
    signed = b"dfl-lora frame\0" + hashlib.sha256(SEALED[:-64]).digest()
    KEY.public_key().verify(SEALED[-64:], signed)


def test_a_seal_is_its_makers_alone() -> None:
    opened = open_sealed(SEALED)
    assert isinstance(opened, Opened)
    assert not opened.is_signed_by(Ed25519PrivateKey.generate().public_key().public_bytes_raw())
    forged = open_sealed(SEALED[:-64] + bytes(64))
    assert isinstance(forged, Opened) and not forged.is_signed_by(PUBLIC)


def test_a_signature_is_for_one_header() -> None:
    other = open_sealed(seal(replace(HEADER, length=12_346), KEY.sign)[:-64] + SEALED[-64:])
    assert isinstance(other, Opened) and not other.is_signed_by(PUBLIC)


@pytest.mark.parametrize("length", range(len(SEALED)))
def test_a_seal_that_was_cut_is_none(length: int) -> None:
    assert kind_of(SEALED[:length]) == ("magic" if length < 4 else "length")


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=2000))
@example(b"DFLL" + bytes(100))
@example(b"[" * 1024)
@example(b"[" * 65_535)
def test_any_bytes_are_a_refusal_and_raise_nothing(content: bytes) -> None:
    for given_bytes in (content, MAGIC + content, sealed_around(content), SEALED + content[:1] + b"!"):
        assert kind_of(given_bytes) in ("magic", "version", "length", "header")


@settings(deadline=None, max_examples=300)
@given(st.integers(0, 8 * len(SEALED) - 1))
def test_a_turned_bit_is_noticed(bit: int) -> None:
    changed = bytearray(SEALED)
    changed[bit // 8] ^= 1 << bit % 8
    opened = open_sealed(bytes(changed))
    assert isinstance(opened, Refusal) or not opened.is_signed_by(PUBLIC)


values = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=80), st.lists(st.integers(), max_size=2)
)


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(sorted(vars(HEADER))), values)
@example("round", True)
@example("round", 1.0)
@example("round", -1)
@example("round", 2**63)
@example("round", 10**18)
@example("length", 10**500)
@example("sha256", "E" * 64)
@example("codec", "fp32\n")
@example("federation", "0" * 52)
def test_a_field_is_taken_where_its_type_and_range_are_right(name: str, value: object) -> None:
    fields = vars(HEADER) | {name: value}
    content = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
    opened = open_sealed(sealed_around(content)[:2000])
    if isinstance(opened, Opened):
        assert vars(opened.header) == fields
        assert type(value) is type(getattr(HEADER, name))
        assert not isinstance(value, int) or 0 <= value < 2**63
    else:
        assert opened.kind == "header"


@pytest.mark.parametrize("most", [2**63, 10**19, 10**400])
def test_a_number_of_64_bits_or_more_is_named(most: int) -> None:
    opened = open_sealed(sealed_around(CONTENT.replace(b'"round":4', b'"round":%d' % most)))
    assert isinstance(opened, Refusal)
    assert opened.kind == "header"
    assert opened.why.startswith("round is ")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b" " + CONTENT,
        CONTENT + b"\n",
        CONTENT.replace(b":", b": "),
        CONTENT.replace(b'"codec":"fp32",', b""),
        CONTENT.replace(b'"codec":"fp32",', b'"codec":"fp32","codec":"fp32",'),
        CONTENT.replace(b'"codec":', b'"colour":"red","codec":'),
        CONTENT.replace(b'"epoch":3', b'"epoch":03'),
        CONTENT.replace(b'"epoch":3', b'"epoch":+3'),
        CONTENT.replace(b'"epoch":3', b'"epoch":3e0'),
        CONTENT.replace(b'"epoch":3', '"epoch":\u0663'.encode()),
        CONTENT.replace(b"fp32", b"fp\\u0033\\u0032"),
        json.dumps(vars(HEADER), separators=(",", ":")).encode(),
        CONTENT.decode().encode("utf-16"),
        CONTENT * 2,
    ],
    ids=lambda content: content.decode("latin-1")[:30],
)
def test_another_text_for_a_header_is_none(content: bytes) -> None:
    assert kind_of(sealed_around(content)) == "header"


def test_what_is_wrong_with_a_seal_is_named() -> None:
    assert kind_of(b"HTTP" + SEALED[4:]) == "magic"
    assert kind_of(MAGIC + b"\2" + SEALED[5:]) == "version"
    assert kind_of(SEALED + b"!") == "length"
    assert kind_of(sealed_around(bytes(1025))) == "length"
    assert kind_of(sealed_around(bytes(1024))) == "header"
