"""The largest numbers of a vector alone: what `top_k` and `choco` put into a frame.

    q = v where |v| is among the k largest, else 0,   k = ceil(share P),   ||q - v||^2 <= (1 - share) ||v||^2

A number takes 8 bytes, 4 of which say where it stands: a share of 0.1 is a fifth of the bytes of fp32. k is known from
the layout, so that all bodies of an exchange have one shape. Where magnitudes are equal, v alone says which are taken.
"""

from math import ceil

import torch
from torch import Tensor

from dfl_lora.codecs.frames import Frame
from dfl_lora.tensors import Tensors


def num_kept(share: float, size: int) -> int:
    """Returns ceil(share size), rounding apart: 0.1 of 70 is 7, not 7.000000000000001."""
    return ceil(round(share * size, 6))


def encode(codec: str, share: float, v: Tensors) -> tuple[Frame, Tensor]:
    """Returns a frame of indices `i`, in order, and the numbers `v` there, and q; what is not finite is the largest."""
    kept = v.flat.abs().topk(num_kept(share, v.layout.size), sorted=False).indices.sort().values
    numbers = v.flat[kept].to(torch.float32)
    frame = Frame(codec, v.layout.digest, {"i": kept.to(torch.int32).cpu(), "v": numbers.cpu()})
    return frame, filled(kept, numbers, v)


def decode(codec: str, share: float, frame: Frame, like: Tensors) -> Tensors | None:
    """Returns q in the dtype of `like`; None where the frame is not of its layout, or indices are not in order."""
    if frame.codec != codec or frame.layout != like.layout.digest or frame.body.keys() != {"i", "v"}:
        return None
    i, v, shape = frame.body["i"], frame.body["v"], (num_kept(share, like.layout.size),)
    if (i.dtype, i.shape, v.dtype, v.shape) != (torch.int32, shape, torch.float32, shape):
        return None
    return like.with_flat(filled(i, v, like)) if in_order(i, like.layout.size) else None


def in_order(i: Tensor, size: int) -> bool:
    """Tells whether indices are those of a vector, each above the one before."""
    return not len(i) or (bool((i[1:] > i[:-1]).all()) and int(i[0]) >= 0 and int(i[-1]) < size)


def filled(i: Tensor, v: Tensor, like: Tensors) -> Tensor:
    """Returns a vector of zeros but for the numbers v at i."""
    q = torch.zeros_like(like.flat)
    q[i.to(q.device, torch.int64)] = v.to(q)
    return q
