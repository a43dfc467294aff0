"""int8: stochastic rounding on a grid of each tensor's own. 1 byte a number, and 4 a tensor.

    s = max |x| / 127 over a tensor,   q = floor(x / s + u),   u uniform in [0, 1)

so that E[s q] = x and |s q - x| <= s. Second moments (the part `v` of a message) go as bfloat16 instead: on a grid most
of them would be zero, and steps divide by their roots. Draws are named by peer, round and exchange, so that a run gives
the same bits again, and a simulation those of real peers.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dfl_lora.codecs.frames import Frame
from dfl_lora.streams import torch_stream
from dfl_lora.tensors import Layout, Tensors

LEVELS = 127
SECOND_MOMENTS = "v/"


@dataclass(frozen=True)
class Int8:
    """Sends integers `q`, the scales `s` of the tensors, and second moments `v`, where there are any."""

    seed: int
    name: str = "int8"
    memory: tuple[str, ...] = ()

    def encode(self, x: Tensors, memory: object, name: tuple[int, int, int]) -> Frame:
        size, sizes = rounded(x.layout)
        flat = x.flat[:size].float()
        scales = torch.stack([part.abs().max() for part in torch.split(flat, sizes)]) / LEVELS
        draws = torch.rand(size, generator=torch_stream(self.seed, "codec", *name)).to(flat.device)
        steps = (flat / spread(scales, sizes).clamp(min=torch.finfo(torch.float32).tiny) + draws).floor()
        body = {"q": steps.clamp(-LEVELS, LEVELS).to(torch.int8).cpu(), "s": scales.cpu()}
        if size < x.layout.size:
            body["v"] = x.flat[size:].to(torch.bfloat16).cpu()
        return Frame(self.name, x.layout.digest, body)

    def decode(self, frame: Frame, like: Tensors) -> Tensors | None:
        """Returns s q, and v as it was sent; None where the frame is not of the layout of `like`."""
        size, sizes = rounded(like.layout)
        wanted = {"q": (torch.int8, size), "s": (torch.float32, len(sizes))}
        if size < like.layout.size:
            wanted["v"] = (torch.bfloat16, like.layout.size - size)
        body = frame.body
        if frame.codec != self.name or frame.layout != like.layout.digest or body.keys() != wanted.keys():
            return None
        if any((body[key].dtype, body[key].shape) != (dtype, (count,)) for key, (dtype, count) in wanted.items()):
            return None
        numbers = body["q"].to(like.flat) * spread(body["s"].to(like.flat), sizes)
        return like.with_flat(torch.cat([numbers, body["v"].to(like.flat)]) if "v" in body else numbers)

    def take(self, x: Tensors, add: Callable[[Tensors], Tensors], memory: object) -> Tensors:
        return add(x)


def rounded(layout: Layout) -> tuple[int, list[int]]:
    """Returns how many numbers are rounded, which are the first of a layout, and the sizes of their tensors."""
    sizes = [e.stop - e.start for e in layout.entries if not e.name.startswith(SECOND_MOMENTS)]
    return sum(sizes), sizes


def spread(scales: Tensor, sizes: list[int]) -> Tensor:
    """Returns each tensor's scale for each of its numbers."""
    return scales.repeat_interleave(torch.tensor(sizes, dtype=torch.int64, device=scales.device))
