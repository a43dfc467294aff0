"""What travels: frames and the codecs that fill them."""

import json
import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from dfl_lora.codecs import CODECS, Codec, sparse
from dfl_lora.codecs.fp32 import Fp32
from dfl_lora.codecs.frames import Frame
from dfl_lora.tensors import Layout, Tensors

LAYOUT = Layout.of({"q.B": ("B", (2, 3)), "head": ("head", (1,))})
MESSAGE = Tensors(torch.arange(7.0) - 3, LAYOUT)
FRAME = Fp32().encode(MESSAGE, {}, (0, 1, 0))
CONTENT = FRAME.to_bytes()
HEADER_BYTES = 4 + int.from_bytes(CONTENT[:4], "big")

every_codec = pytest.mark.parametrize("codec", [make(7) for make in CODECS.values()], ids=CODECS)


def kept(codec: Codec) -> dict[str, Tensors]:
    """Returns the memory of a codec at its start."""
    return {name: Tensors(torch.zeros(7), LAYOUT) for name in codec.memory}


def content(header: bytes, body: bytes) -> bytes:
    return len(header).to_bytes(4, "big") + header + body


def body(entries: dict[str, object], data: bytes) -> bytes:
    header = json.dumps(entries).encode()
    return struct.pack("<Q", len(header)) + header + data


@every_codec
def test_a_frame_crosses_the_wire(codec: Codec) -> None:
    frame = codec.encode(MESSAGE, kept(codec), (0, 1, 0))
    arrived = Frame.from_bytes(frame.to_bytes())
    assert arrived is not None
    here, there = codec.decode(frame, MESSAGE), codec.decode(arrived, MESSAGE)
    assert here is not None
    assert there is not None
    assert there.layout == LAYOUT
    assert torch.equal(here.flat, there.flat)


@every_codec
def test_a_frame_of_another_layout_is_not_decoded(codec: Codec) -> None:
    other = Tensors(MESSAGE.flat, Layout.of({"k.B": ("B", (2, 3)), "head": ("head", (1,))}))
    assert codec.decode(codec.encode(other, kept(codec), (0, 1, 0)), MESSAGE) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fp32_sends_every_bit(dtype: torch.dtype) -> None:
    values = torch.tensor([0.1, -0.0, math.inf, -math.inf, math.nan, 1e-45, 3.4e38], dtype=dtype)
    message = Tensors(values, LAYOUT)
    arrived = Frame.from_bytes(Fp32().encode(message, {}, (0, 1, 0)).to_bytes())
    assert arrived is not None
    decoded = Fp32().decode(arrived, message)
    assert decoded is not None
    assert decoded.flat.numpy().tobytes() == values.numpy().tobytes()


def test_fp32_sends_a_view_as_that_view_alone() -> None:
    matrix = torch.arange(21.0).view(3, 7)
    arrived = Frame.from_bytes(Fp32().encode(Tensors(matrix[1], LAYOUT), {}, (0, 1, 0)).to_bytes())
    assert arrived is not None
    assert torch.equal(arrived.body["x"], matrix[1])
    assert len(Fp32().encode(Tensors(matrix[1], LAYOUT), {}, (0, 1, 0)).to_bytes()) == len(CONTENT)


def test_fp32_copies_nothing_in_memory() -> None:
    assert FRAME.body["x"] is MESSAGE.flat
    decoded = Fp32().decode(FRAME, MESSAGE)
    assert decoded is not None
    assert decoded.flat is MESSAGE.flat


@pytest.mark.parametrize(
    "frame",
    [
        Frame("bf16", LAYOUT.digest, {"x": MESSAGE.flat}),
        Frame("fp32", "0" * 64, {"x": MESSAGE.flat}),
        Frame("fp32", LAYOUT.digest, {}),
        Frame("fp32", LAYOUT.digest, {"y": MESSAGE.flat}),
        Frame("fp32", LAYOUT.digest, {"x": MESSAGE.flat, "y": MESSAGE.flat}),
        Frame("fp32", LAYOUT.digest, {"x": MESSAGE.flat[:6]}),
        Frame("fp32", LAYOUT.digest, {"x": MESSAGE.flat.view(7, 1)}),
        Frame("fp32", LAYOUT.digest, {"x": MESSAGE.flat.double()}),
        Frame("fp32", LAYOUT.digest, {"x": MESSAGE.flat.int()}),
    ],
    ids=["codec", "layout", "no tensor", "another name", "one too many", "short", "shape", "float64", "integers"],
)
def test_fp32_decodes_nothing_else(frame: Frame) -> None:
    assert Fp32().decode(frame, MESSAGE) is None


DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int8,
    torch.uint8,
    torch.int16,
]
tensors = st.builds(
    lambda shape, dtype: torch.zeros(shape, dtype=dtype),
    st.lists(st.integers(0, 5), max_size=3),
    st.sampled_from(DTYPES),
)


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(st.text("xyzé/.", min_size=1, max_size=6), tensors, max_size=4), st.text(max_size=5))
def test_the_bytes_of_a_frame_are_those_of_its_encoded_body(named: dict[str, torch.Tensor], layout: str) -> None:
    frame = Frame("fp32", layout, named)
    assert frame.num_bytes == len(save(named))
    sent = frame.to_bytes()
    assert frame.num_bytes == len(sent) - 4 - int.from_bytes(sent[:4], "big")


def test_fp32_is_four_bytes_a_number_and_little_more() -> None:
    layout = Layout.of({"q.B": ("B", (1000, 8))})
    assert 0 <= Fp32().encode(Tensors(torch.ones(8000), layout), {}, (0, 1, 0)).num_bytes - 32_000 <= 128


@settings(deadline=None, max_examples=40)
@given(st.dictionaries(st.text("xyz", min_size=1), tensors, max_size=3), st.text(max_size=5), st.text(max_size=5))
def test_frames_survive_the_wire(named: dict[str, torch.Tensor], codec: str, layout: str) -> None:
    arrived = Frame.from_bytes(Frame(codec, layout, named).to_bytes())
    assert arrived is not None
    assert (arrived.codec, arrived.layout, arrived.body.keys()) == (codec, layout, named.keys())
    assert all(torch.equal(arrived.body[k], v) and arrived.body[k].dtype == v.dtype for k, v in named.items())


def test_a_transposed_tensor_survives_the_wire() -> None:
    turned = torch.arange(6.0).view(2, 3).T
    arrived = Frame.from_bytes(Frame("fp32", "", {"x": turned}).to_bytes())
    assert arrived is not None
    assert torch.equal(arrived.body["x"], turned)


@settings(deadline=None, max_examples=100)
@given(st.binary(max_size=64))
def test_garbage_is_no_frame(garbage: bytes) -> None:
    assert Frame.from_bytes(garbage) is None
    assert Frame.from_bytes(CONTENT[:HEADER_BYTES] + garbage) is None
    assert Frame.from_bytes(CONTENT + garbage) is None or not garbage


@pytest.mark.parametrize("length", range(len(CONTENT)))
def test_a_truncated_frame_is_no_frame(length: int) -> None:
    assert Frame.from_bytes(CONTENT[:length]) is None


changes = st.lists(st.tuples(st.integers(0, len(CONTENT) - 1), st.integers(0, 255)), min_size=1, max_size=4)


@settings(deadline=None, max_examples=300)
@given(changes)
def test_changed_bytes_never_raise_and_never_decode_to_another_layout(changed: list[tuple[int, int]]) -> None:
    wrong = bytearray(CONTENT)
    for place, value in changed:
        wrong[place] = value
    frame = Frame.from_bytes(bytes(wrong))
    decoded = None if frame is None else Fp32().decode(frame, MESSAGE)
    assert decoded is None or (decoded.layout == LAYOUT and decoded.flat.shape == (7,))


GOOD_BODY = save({"x": MESSAGE.flat})


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"null",
        b"3",
        b"[]",
        b'"codec"',
        b"{}",
        b'{"codec": "fp32"}',
        b'{"layout": "x"}',
        b"{'codec': 'fp32', 'layout': 'x'}",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"codec":' * 100_000,
        b"1" * 10_000,
    ],
    ids=lambda h: h.decode(errors="replace")[:20],
)
def test_a_frame_with_a_wrong_header_is_no_frame(header: bytes) -> None:
    assert Frame.from_bytes(content(header, GOOD_BODY)) is None


def test_a_header_of_other_types_is_not_decoded() -> None:
    frame = Frame.from_bytes(content(b'{"codec": null, "layout": ["fp32"]}', GOOD_BODY))
    assert frame is None or Fp32().decode(frame, MESSAGE) is None


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [7], "data_offsets": [0, 24]},
        {"dtype": "F32", "shape": [8], "data_offsets": [0, 28]},
        {"dtype": "F32", "shape": [-7], "data_offsets": [0, 28]},
        {"dtype": "F32", "shape": [7], "data_offsets": [28, 0]},
        {"dtype": "F32", "shape": [7], "data_offsets": [0, 2**40]},
        {"dtype": "PICKLE", "shape": [7], "data_offsets": [0, 28]},
        {"dtype": "F4", "shape": [56], "data_offsets": [0, 28]},
        {"dtype": "F32", "shape": [0, 2**62, 4], "data_offsets": [0, 0]},
        {"dtype": "F32", "shape": [0, 2**63], "data_offsets": [0, 0]},
        {"dtype": "F32"},
        None,
        [],
    ],
    ids=str,
)
def test_a_frame_whose_body_lies_about_itself_is_no_frame(entry: object) -> None:
    empty = isinstance(entry, dict) and entry.get("data_offsets") == [0, 0]
    data = b"" if empty else bytes(28)
    assert Frame.from_bytes(content(CONTENT[4:HEADER_BYTES], body({"x": entry}, data))) is None


PARTS = Tensors(torch.linspace(-2, 5, 14), Layout.joined({"x": LAYOUT, "z": LAYOUT}))
FINITE = st.floats(-1e6, 1e6, width=32)


@settings(deadline=None, max_examples=60)
@given(st.lists(FINITE, min_size=7, max_size=7), st.integers(0, 50))
def test_int8_is_off_by_at_most_a_step_of_its_tensor(values: list[float], peer: int) -> None:
    message = Tensors(torch.tensor(values, dtype=torch.float32), LAYOUT)
    codec = CODECS["int8"](3)
    decoded = codec.decode(codec.encode(message, {}, (peer, 1, 0)), message)
    assert decoded is not None
    for name, own in message.items():
        step = float(own.abs().max()) / 127
        assert float((decoded[name] - own).abs().max()) <= step * (1 + 1e-4) + 2e-36  # steps below normal numbers


@settings(deadline=None, max_examples=60)
@given(st.lists(FINITE, min_size=7, max_size=7))
def test_bf16_is_off_by_at_most_a_256th(values: list[float]) -> None:
    message = Tensors(torch.tensor(values, dtype=torch.float32), LAYOUT)
    codec = CODECS["bf16"](0)
    decoded = codec.decode(codec.encode(message, {}, (0, 1, 0)), message)
    assert decoded is not None
    assert ((decoded.flat - message.flat).abs() <= message.flat.abs() * 2**-8 + 1e-38).all()


def test_int8_is_unbiased() -> None:
    codec, total = CODECS["int8"](0), torch.zeros(7)
    for t in range(4000):
        decoded = codec.decode(codec.encode(MESSAGE, {}, (0, t, 0)), MESSAGE)
        assert decoded is not None
        total += decoded.flat
    assert (total / 4000 - MESSAGE.flat).abs().max() < 4 * (3 / 127) / 2 / 4000**0.5


def test_int8_draws_by_seed_peer_round_and_exchange_and_by_nothing_else() -> None:
    def bits(seed: int, *name: int) -> bytes:
        return CODECS["int8"](seed).encode(MESSAGE, {}, name).to_bytes()  # type: ignore[arg-type]

    once = bits(1, 2, 3, 4)
    assert bits(1, 2, 3, 4) == once
    assert once not in (bits(0, 2, 3, 4), bits(1, 0, 3, 4), bits(1, 2, 0, 4), bits(1, 2, 3, 0))


def test_what_travels_as_int8_takes_a_byte_a_number_and_second_moments_two() -> None:
    codec, whole = CODECS["int8"](0), Layout.joined(dict.fromkeys("xzv", LAYOUT))
    message = Tensors(torch.linspace(0, 1e-6, 21), whole)
    frame = codec.encode(message, {}, (0, 1, 0))
    assert {name: (t.dtype, len(t)) for name, t in frame.body.items()} == {
        "q": (torch.int8, 14), "s": (torch.float32, 4), "v": (torch.bfloat16, 7),
    }  # fmt: skip
    decoded = codec.decode(frame, message)
    assert decoded is not None
    assert ((decoded.flat[14:] - message.flat[14:]).abs() <= message.flat[14:] * 2**-8).all()
    assert "v" not in codec.encode(PARTS, {}, (0, 1, 0)).body


@every_codec
def test_a_frame_with_other_names_types_or_shapes_is_not_decoded(codec: Codec) -> None:
    frame = codec.encode(MESSAGE, kept(codec), (0, 1, 0))
    for name, value in frame.body.items():
        for wrong in (value[:-1], value.to(torch.float64), value.unsqueeze(0)):
            assert codec.decode(Frame(frame.codec, frame.layout, {**frame.body, name: wrong}), MESSAGE) is None
        others = {key: t for key, t in frame.body.items() if key != name}
        assert codec.decode(Frame(frame.codec, frame.layout, others), MESSAGE) is None
    assert codec.decode(Frame("other", frame.layout, frame.body), MESSAGE) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@every_codec
def test_a_message_that_is_not_finite_is_seen_through_every_codec(codec: Codec, bad: float) -> None:
    """But for choco, whose peers then say that nothing has changed: replicas stay finite."""
    message = Tensors(MESSAGE.flat.clone(), LAYOUT)
    message.flat[2] = bad
    decoded = codec.decode(codec.encode(message, kept(codec), (0, 1, 0)), message)
    if "replica" in codec.memory:
        assert decoded is not None and not decoded.flat.any()
    else:
        assert decoded is None or not decoded.is_finite()


@every_codec
def test_equal_zeros_are_zeros(codec: Codec) -> None:
    nothing = Tensors(torch.zeros(7), LAYOUT)
    decoded = codec.decode(codec.encode(nothing, kept(codec), (0, 1, 0)), nothing)
    assert decoded is not None and not decoded.flat.any()


NUMBERS = Tensors(torch.linspace(-3.99, 4, 70), Layout.of({"q.A": ("A", (5, 6)), "q.B": ("B", (40,))}))
sparse_codecs = pytest.mark.parametrize("kind", ["top_k", "choco"])
SPARSE = {kind: CODECS[kind](0, share=0.1) for kind in ("top_k", "choco")}


def sparse_frame(kind: str, values: torch.Tensor) -> Frame:
    codec, message = SPARSE[kind], NUMBERS.with_flat(values)
    return codec.encode(message, {name: message.with_flat(torch.zeros(70)) for name in codec.memory}, (0, 1, 0))


@settings(deadline=None, max_examples=60)
@given(st.lists(FINITE, min_size=70, max_size=70), st.floats(0.01, 1))
def test_the_largest_share_leaves_out_at_most_the_rest_of_the_square(values: list[float], share: float) -> None:
    """||q - v||^2 <= (1 - share) ||v||^2."""
    v = NUMBERS.with_flat(torch.tensor(values, dtype=torch.float32))
    frame, q = sparse.encode("any", share, v)
    decoded = sparse.decode("any", share, frame, v)
    assert decoded is not None and torch.equal(decoded.flat, q)
    assert ((q == v.flat) | (q == 0)).all()
    left = (q.double() - v.flat.double()).square().sum()
    assert left <= (1 - share) * v.flat.double().square().sum() * (1 + 1e-6)


@sparse_codecs
def test_a_tenth_of_the_numbers_is_a_fifth_of_the_bytes_whatever_they_are(kind: str) -> None:
    frames = [sparse_frame(kind, values) for values in (NUMBERS.flat, torch.zeros(70), torch.ones(70))]
    for frame in frames:
        assert {name: (t.dtype, len(t)) for name, t in frame.body.items()} == {
            "i": (torch.int32, 7), "v": (torch.float32, 7),
        }  # fmt: skip
        assert frame.num_bytes == len(save(dict(frame.body))) == len(frame.prefix) + 56
    assert frames[0].body["i"].tolist() == [0, 1, 2, 66, 67, 68, 69]


@sparse_codecs
@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(-3, 73) | st.integers(-(2**31), 2**31 - 1), min_size=7, max_size=7))
def test_indices_out_of_order_or_of_no_number_are_not_decoded(kind: str, indices: list[int]) -> None:
    frame = sparse_frame(kind, NUMBERS.flat)
    given = Frame(frame.codec, frame.layout, {**frame.body, "i": torch.tensor(indices, dtype=torch.int32)})
    decoded = SPARSE[kind].decode(given, NUMBERS)
    right = indices == sorted(set(indices)) and indices[0] >= 0 and indices[-1] < 70
    assert (decoded is not None) == right


@sparse_codecs
@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4))
def test_changed_bytes_of_indices_and_numbers_never_raise(kind: str, changed: list[tuple[int, int]]) -> None:
    wrong = bytearray(sparse_frame(kind, NUMBERS.flat).to_bytes())
    for place, value in changed:
        wrong[place % len(wrong)] = value
    frame = Frame.from_bytes(bytes(wrong))
    decoded = None if frame is None else SPARSE[kind].decode(frame, NUMBERS)
    assert decoded is None or (decoded.layout == NUMBERS.layout and int((decoded.flat != 0).sum()) <= 7)
