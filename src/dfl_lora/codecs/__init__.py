"""Codecs: what travels. A codec turns a vector into a frame and back; its memory lives in the peer."""

from collections.abc import Mapping
from typing import Protocol

from dfl_lora.codecs.fp32 import Fp32
from dfl_lora.codecs.frames import Frame
from dfl_lora.tensors import Tensors

Memory = Mapping[str, Tensors]


class Codec(Protocol):
    """Encode and decode; `memory` is the sender's own vectors and may be changed in place."""

    def encode(self, x: Tensors, memory: Memory) -> Frame: ...

    def decode(self, frame: Frame, like: Tensors) -> Tensors | None:
        """Returns the vector as it was sent, or None where the frame is not one of the layout of `like`."""
        ...


CODECS: dict[str, Codec] = {"fp32": Fp32()}
