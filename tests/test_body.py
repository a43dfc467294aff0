"""The body of a frame: safetensors, of which only the numbers are a stranger's."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from dfl_lora.codecs.fp32 import Fp32
from dfl_lora.codecs.frames import DTYPES, Frame
from dfl_lora.networks.body import PIECE, Expectation, body_of, frame_from, is_finite, norm_of
from dfl_lora.tensors import Layout, Tensors

FRAME = Fp32().encode(Tensors(torch.arange(7.0) - 3, Layout.of({"q.B": ("B", (7,))})), {}, (0, 1, 0))
BODY = body_of(FRAME)
EXPECTED = Expectation.of(FRAME)

tensors = st.builds(
    lambda shape, dtype, seed: (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 100).to(dtype),
    st.lists(st.integers(0, 5), max_size=3),
    st.sampled_from(list(DTYPES)),
    st.integers(0, 1000),
)
frames = st.builds(Frame, st.just("fp32"), st.just(""), st.dictionaries(st.text(max_size=8), tensors, max_size=6))


def same(one: Frame, other: Frame) -> bool:
    return one.body.keys() == other.body.keys() and all(
        torch.equal(tensor, other.body[name]) and tensor.dtype == other.body[name].dtype
        for name, tensor in one.body.items()
    )


@settings(deadline=None, max_examples=300)
@given(frames)
def test_a_body_is_what_safetensors_writes(frame: Frame) -> None:
    body = body_of(frame)
    assert body == save(dict(frame.body))
    assert len(body) == frame.num_bytes == Expectation.of(frame).length
    assert same(Frame("fp32", "", load(bytes(body))), frame)


@settings(deadline=None)
@given(frames)
def test_a_frame_comes_out_of_its_body_as_it_went_in(frame: Frame) -> None:
    arrived = frame_from(body_of(frame), Expectation.of(frame))
    assert arrived is not None
    assert (arrived.codec, arrived.layout) == (frame.codec, frame.layout)
    assert same(arrived, frame)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_bit_of_a_number_arrives(dtype: torch.dtype) -> None:
    values = torch.tensor([0.1, -0.0, math.inf, -math.inf, math.nan, 1e-45, 3.4e38], dtype=dtype)
    frame = Frame("fp32", "", {"x": values})
    arrived = frame_from(body_of(frame), Expectation.of(frame))
    assert arrived is not None
    assert arrived.body["x"].numpy().tobytes() == values.numpy().tobytes()


def test_a_body_keeps_what_the_frame_was_when_it_was_made() -> None:
    row = torch.arange(21.0).view(3, 7)
    body = body_of(Frame(FRAME.codec, FRAME.layout, {"x": row[1]}))
    row.zero_()
    arrived = frame_from(body, EXPECTED)
    assert arrived is not None
    assert arrived.body["x"].tolist() == [7, 8, 9, 10, 11, 12, 13]


def test_a_transposed_tensor_travels_as_what_it_means() -> None:
    frame = Frame("fp32", "", {"x": torch.arange(6.0).view(2, 3).T})
    arrived = frame_from(body_of(frame), Expectation.of(frame))
    assert arrived is not None
    assert torch.equal(arrived.body["x"], frame.body["x"])


def test_an_arrived_tensor_is_the_received_bytes_and_no_copy() -> None:
    body = bytearray(BODY)
    arrived = frame_from(body, EXPECTED)
    assert arrived is not None
    body[EXPECTED.places["x"].start + 3] ^= 0x80
    assert arrived.body["x"][0] == 3


@settings(deadline=None)
@given(frames, frames)
def test_a_body_of_other_names_types_or_shapes_is_none(frame: Frame, other: Frame) -> None:
    alike = [{name: (t.dtype, t.shape) for name, t in each.body.items()} for each in (frame, other)]
    assert (frame_from(body_of(other), Expectation.of(frame)) is not None) == (alike[0] == alike[1])


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.integers(0, len(BODY) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_changed_bytes_change_numbers_or_make_it_none(changes: list[tuple[int, int]]) -> None:
    wrong = bytearray(BODY)
    for place, value in changes:
        wrong[place] = value
    arrived = frame_from(wrong, EXPECTED)
    assert (arrived is not None) == (wrong[: len(EXPECTED.prefix)] == EXPECTED.prefix)
    assert arrived is None or arrived.body["x"].shape == (7,)


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_none(content: bytes) -> None:
    assert frame_from(bytearray(content), EXPECTED) is None
    assert frame_from(bytearray(EXPECTED.prefix + content), EXPECTED) is None or len(content) == 28


@pytest.mark.parametrize("length", range(len(BODY)))
def test_a_body_that_was_cut_is_none(length: int) -> None:
    assert frame_from(BODY[:length], EXPECTED) is None


def test_a_norm_is_over_all_floating_numbers() -> None:
    assert norm_of(Frame("", "", {"x": torch.tensor([3.0]), "y": torch.tensor([[4.0]]).double()})) == 5
    assert norm_of(Frame("", "", {"x": torch.tensor([3.0]), "q": torch.tensor([100])})) == 3
    assert norm_of(Frame("", "", {"q": torch.tensor([100])})) == 0


@pytest.mark.parametrize("size", [0, 1, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE + 5])
def test_a_norm_is_the_same_in_pieces(size: int) -> None:
    x = torch.randn(size, generator=torch.Generator().manual_seed(size))
    assert norm_of(Frame("", "", {"x": x})) == pytest.approx(float(torch.linalg.vector_norm(x.double())), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_number_that_is_not_finite_is_found(dtype: torch.dtype, value: float) -> None:
    x = torch.zeros(PIECE + 3, dtype=dtype)
    frame = Frame("", "", {"x": x, "q": torch.zeros(3, dtype=torch.int8)})
    assert is_finite(frame) and norm_of(frame) == 0
    x[-1] = value
    assert not is_finite(frame) and not math.isfinite(norm_of(frame))


def test_the_largest_numbers_are_finite() -> None:
    assert math.isfinite(norm_of(Frame("", "", {"x": torch.full((9,), torch.finfo(torch.float32).max)})))
    largest = Frame("", "", {"x": torch.full((9,), torch.finfo(torch.float64).max, dtype=torch.float64)})
    assert is_finite(largest) and norm_of(largest) == math.inf
