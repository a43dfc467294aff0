"""Randomness by name: every draw of a run comes from stream(seed, "purpose", peer, round).

Two draws with different names never share numbers, so that who else is present, how peers are grouped
and where a run was resumed change nothing. Privacy noise never comes from here.
"""

import hashlib
import json
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def stream(seed: int, *name: str | int) -> int:
    """Returns the 63-bit seed that belongs to a name: sha256 of the canonical JSON of [seed, *name]."""
    digest = hashlib.sha256(json.dumps([seed, *name]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def torch_stream(seed: int, *name: str | int) -> "torch.Generator":
    """Returns a fresh CPU generator for a name; drawn on the CPU so that devices agree."""
    import torch  # heavy: rows are drawn without it

    return torch.Generator().manual_seed(stream(seed, *name))


def numpy_stream(seed: int, *name: str | int) -> np.random.Generator:
    """Returns a fresh NumPy generator for a name."""
    return np.random.default_rng(stream(seed, *name))
