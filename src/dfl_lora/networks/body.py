"""The body of a frame: safetensors, of which every byte but the numbers is known beforehand.

    body = n (8 bytes, little endian) | JSON header (n bytes) | the numbers, tensor after tensor

All peers of a run send the same tensors in an exchange, so a receiver writes down the beginning that it expects, from
its own frame, and compares it to the byte: the JSON of a stranger is never parsed, names, types, shapes and length
cannot differ. What is left are the numbers, and a received tensor is a view of them where they arrived: nothing is
copied. In the other direction the numbers are copied once, into the same views of a new body.

Tensors lie by type, then by name, so that each is aligned (`codecs.frames`).
"""

import mmap
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import hypot, prod

import torch
from torch import Tensor

from dfl_lora.codecs.frames import ORDER, Frame

PIECE = 2**18
"""Numbers in a part of a norm. Float64 takes 2 MiB for them, and is 8 times as fast as at once: 9 ms for 100 MB."""
LARGE = 4 * 2**20
"""Bytes from which a body lies in huge pages: to fill 100 MB takes 7 ms then, and 90 in small ones."""
Room = bytearray | mmap.mmap


def room(length: int) -> Room:
    """Returns so many zeros to be written over."""
    if length < LARGE or sys.platform != "linux":
        return bytearray(length)
    pages = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in a body: its first byte, its type and its shape."""

    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def of(self, body: Room) -> Tensor:
        """Returns the tensor as a view of the body."""
        count = prod(self.shape)
        if not count:
            return torch.empty(self.shape, dtype=self.dtype)
        return torch.frombuffer(body, dtype=self.dtype, count=count, offset=self.start).view(self.shape)


@dataclass(frozen=True)
class Expectation:
    """The only body that is right in an exchange, but for its numbers."""

    codec: str
    layout: str
    prefix: bytes
    places: Mapping[str, Place]
    length: int

    @staticmethod
    def of(frame: Frame) -> "Expectation":
        """Returns what neighbours send where this is the own frame."""
        places, stop = dict[str, Place](), len(frame.prefix)
        for name, tensor in sorted(frame.body.items(), key=lambda item: (ORDER.index(item[1].dtype), item[0])):
            places[name] = Place(stop, tensor.dtype, tuple(tensor.shape))
            stop += tensor.nbytes
        return Expectation(frame.codec, frame.layout, frame.prefix, places, stop)


def body_of(frame: Frame) -> Room:
    """Returns the bytes of a frame's body, as safetensors writes them; a copy, the frame may change afterwards."""
    expected = Expectation.of(frame)
    body = room(expected.length)
    body[: len(expected.prefix)] = expected.prefix
    for name, place in expected.places.items():
        place.of(body).copy_(frame.body[name])
    return body


def frame_from(body: Room, expected: Expectation) -> Frame | None:
    """Returns the frame whose tensors are views of the body, or None where it is not the expected one."""
    if len(body) != expected.length or body[: len(expected.prefix)] != expected.prefix:
        return None
    return Frame(expected.codec, expected.layout, {name: place.of(body) for name, place in expected.places.items()})


def norm_of(frame: Frame) -> float:
    """Returns the Euclidean norm of all floating numbers of a frame, in float64; not finite where one is not."""
    pieces = (p for t in frame.body.values() if t.is_floating_point() for p in torch.split(t.reshape(-1), PIECE))
    return hypot(*(float(torch.linalg.vector_norm(piece, dtype=torch.float64)) for piece in pieces))


def is_finite(frame: Frame) -> bool:
    """Tells whether all numbers of a frame are finite; their norm may overflow where they are."""
    return all(bool(torch.isfinite(t).all()) for t in frame.body.values())
