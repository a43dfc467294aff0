"""What is said on a link: every message comes back as it was, and nothing else is one."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dfl_lora.networks.messages import (
    Announce,
    Bye,
    Chunk,
    Close,
    Have,
    Hello,
    Message,
    Pull,
    Refused,
    Roster,
    Settle,
    decoded,
    encoded,
)

numbers, indices = st.integers(-1, 2**63 - 1), st.integers(0, 2**31 - 1)
texts = st.text("0123456789abcdefxyz", max_size=60)
moments = st.tuples(numbers, numbers)
said = st.one_of(
    st.builds(
        Hello,
        protocol=numbers,
        id=texts,
        federation=texts,
        run=texts,
        recipe=texts,
        base=texts,
        frozen=texts,
        start=texts,
        epoch=numbers,
        session=texts,
        seen=st.lists(st.tuples(indices, numbers), max_size=4),
    ),
    st.builds(Settle, now=moments, taken=st.lists(st.tuples(indices, indices, numbers, numbers), max_size=4)),
    st.builds(Pull, sender=indices, sequence=numbers, offset=st.integers(0, 2**63 - 1)),
    st.builds(Have, sender=indices, sequence=numbers),
    st.builds(Close, round=numbers, edges=st.lists(st.tuples(indices, indices), max_size=4)),
    st.builds(Refused, why=st.text([chr(c) for c in range(32, 127)], max_size=1000)),
    st.builds(Bye, why=st.sampled_from(["finished", "stopped"])),
    st.builds(Roster, st.binary(max_size=100)),
    st.builds(Announce, st.binary(max_size=100)),
)


@settings(deadline=None)
@given(said)
def test_every_message_comes_back_as_it_was(message: Message) -> None:
    assert decoded(encoded(message)) == message


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**63 - 1), st.integers(0, 2**63 - 1), st.binary(max_size=200))
def test_a_piece_of_a_body_comes_back_with_its_place(sender: int, sequence: int, offset: int, data: bytes) -> None:
    chunk = decoded(encoded(Chunk(sender, sequence, offset, memoryview(data))))
    assert isinstance(chunk, Chunk)
    assert (chunk.sender, chunk.sequence, chunk.offset, bytes(chunk.data)) == (sender, sequence, offset, data)


@settings(deadline=None, max_examples=400)
@given(st.one_of(st.binary(max_size=80), st.binary(max_size=80).map(lambda rest: b"HSPVCRB"[:1] + rest)))
def test_any_bytes_are_a_message_or_a_sentence(content: bytes) -> None:
    said = ""
    try:
        message = decoded(content)
        assert encoded(message)[:1] == content[:1]
    except ValueError as error:
        said = str(error)
    assert len(said) < 400
    assert said.isprintable()


PULL = {"sender": 1, "sequence": 2, "offset": 3}


@pytest.mark.parametrize(
    "wrong",
    [
        PULL | {"more": 1},
        PULL | {"sender": "1"},
        PULL | {"sender": -1},
        PULL | {"sender": 2**31},
        PULL | {"sender": True},
        PULL | {"sender": 1.0},
        PULL | {"sequence": -2},
        PULL | {"sequence": 2**63},
        {"sender": 1},
        [1, 2, 3],
        None,
    ],
    ids=str,
)
def test_a_message_with_anything_wrong_is_none(wrong: object) -> None:
    assert decoded(b"P" + json.dumps(PULL).encode()) == Pull(sender=1, sequence=2, offset=3)
    with pytest.raises(ValueError, match="pull"):
        decoded(b"P" + json.dumps(wrong).encode())


@pytest.mark.parametrize("content", [b"", b"x", b"\x00{}", b"K", b"K123"])
def test_what_begins_otherwise_is_none(content: bytes) -> None:
    with pytest.raises(ValueError):
        decoded(content)


@pytest.mark.parametrize("nested", [b"[" * 100_000, b'{"a":' * 100_000, b"1" * 100_000])
def test_deep_or_long_json_is_refused_like_any_other(nested: bytes) -> None:
    with pytest.raises(ValueError):
        decoded(b"S" + nested)
