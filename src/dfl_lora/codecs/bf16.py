"""bf16: each number rounded to 8 significant bits. 2 bytes a number; |q - x| <= 2^-8 |x| above the smallest normal."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from dfl_lora.codecs.frames import Frame
from dfl_lora.tensors import Tensors


@dataclass(frozen=True)
class Bf16:
    """Sends the flat vector under the one name `x`, to the nearest bfloat16."""

    name: str = "bf16"
    memory: tuple[str, ...] = ()

    def encode(self, x: Tensors, memory: object, name: object) -> Frame:
        return Frame(self.name, x.layout.digest, {"x": x.flat.to(torch.bfloat16).cpu()})

    def decode(self, frame: Frame, like: Tensors) -> Tensors | None:
        """Returns the vector in the dtype of `like`, or None where the frame is not of its layout."""
        if frame.codec != self.name or frame.layout != like.layout.digest or frame.body.keys() != {"x"}:
            return None
        flat = frame.body["x"]
        fits = flat.shape == like.flat.shape and flat.dtype == torch.bfloat16
        return like.with_flat(flat.to(like.flat)) if fits else None

    def take(self, x: Tensors, add: Callable[[Tensors], Tensors], memory: object) -> Tensors:
        return add(x)
