"""A frame: what a codec made of a message, ready to travel. Its body is safetensors; nothing is unpickled."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

Signature = tuple[tuple[str, str, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Frame:
    """An encoded message: the codec's name, the digest of the layout it was made from, and the body."""

    codec: str
    layout: str
    body: Mapping[str, Tensor]

    @property
    def num_bytes(self) -> int:
        """The length of the encoded body; computed from names and shapes, equal to len(save(body))."""
        return body_bytes(tuple((name, str(t.dtype)[6:], tuple(t.shape)) for name, t in sorted(self.body.items())))

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


@lru_cache(maxsize=64)
def body_bytes(signature: Signature) -> int:
    """Returns the length of a safetensors body of that signature, by encoding one of zeros."""
    return len(save({name: torch.zeros(shape, dtype=getattr(torch, dtype)) for name, dtype, shape in signature}))
