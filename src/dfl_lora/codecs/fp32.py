"""fp32: the vector as it is. Lossless, 4 bytes a number."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from dfl_lora.codecs.frames import Frame
from dfl_lora.tensors import Tensors


@dataclass(frozen=True)
class Fp32:
    """Sends the flat vector under the one name `x` (in float64 only where the whole run is)."""

    name: str = "fp32"
    memory: tuple[str, ...] = ()

    def encode(self, x: Tensors, memory: object, name: object) -> Frame:
        return Frame(self.name, x.layout.digest, {"x": x.flat.cpu()})

    def decode(self, frame: Frame, like: Tensors) -> Tensors | None:
        """Returns the vector, or None where codec, layout, names, shape or dtype are not the expected ones."""
        if frame.codec != self.name or frame.layout != like.layout.digest or frame.body.keys() != {"x"}:
            return None
        flat = frame.body["x"]
        fits = isinstance(flat, torch.Tensor) and flat.shape == like.flat.shape and flat.dtype == like.flat.dtype
        return like.with_flat(flat.to(like.flat.device)) if fits else None

    def take(self, x: Tensors, add: Callable[[Tensors], Tensors], memory: object) -> Tensors:
        return add(x)
