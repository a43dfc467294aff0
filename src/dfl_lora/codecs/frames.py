"""A frame: what a codec made of a message, ready to travel. Its body is safetensors; nothing is unpickled."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

Signature = tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]
DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
}
"""What a body can hold, in the order in which it lies there, so that each is aligned. No bool: most bytes are none."""
ORDER = list(DTYPES)


@dataclass(frozen=True)
class Frame:
    """An encoded message: the codec's name, the digest of the layout it was made from, and the body."""

    codec: str
    layout: str
    body: Mapping[str, Tensor]

    @property
    def num_bytes(self) -> int:
        """The length of the encoded body; computed from names and shapes, equal to len(save(body))."""
        return len(self.prefix) + sum(t.nbytes for t in self.body.values())

    @property
    def prefix(self) -> bytes:
        """What the encoded body begins with, before the numbers."""
        return prefix_of(tuple((name, t.dtype, tuple(t.shape)) for name, t in in_order(self.body)))

    def to_bytes(self) -> bytes:
        """Returns a length-prefixed JSON header and the safetensors body."""
        header = json.dumps({"codec": self.codec, "layout": self.layout}, sort_keys=True).encode()
        return len(header).to_bytes(4, "big") + header + save({k: v.contiguous() for k, v in self.body.items()})

    @staticmethod
    def from_bytes(content: bytes) -> "Frame | None":
        """Returns the frame, or None where the bytes are not one."""
        size = int.from_bytes(content[:4], "big")
        try:
            header = json.loads(content[4 : 4 + size])
            return Frame(str(header["codec"]), str(header["layout"]), load(content[4 + size :]))
        except (ValueError, KeyError, TypeError, RuntimeError, SafetensorError):
            return None


def in_order(body: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    """Returns the tensors as safetensors lays them down."""
    return sorted(body.items(), key=lambda item: (ORDER.index(item[1].dtype), item[0]))


@lru_cache(maxsize=64)
def prefix_of(signature: Signature) -> bytes:
    """Returns what safetensors writes before the numbers of tensors in that order: the header's length and the header.

    It is written here, since the library needs the numbers for it; the tests compare the two.
    """
    entries, stop = dict[str, object](), 0
    for name, dtype, shape in signature:
        start, stop = stop, stop + prod(shape) * dtype.itemsize
        entries[name] = {"dtype": DTYPES[dtype], "shape": [*shape], "data_offsets": [start, stop]}
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header
