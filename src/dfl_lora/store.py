"""Where the matrices of all peers lie: in memory, or in files that are mapped into it and may be larger than it.

One file for each quantity (x, exp_avg, ...), never one for each peer. A file is given all its room before it is used,
so that a full disk is told at the start and never by a fault in the middle of a step. It has no name: however the
process ends, the system takes the room back, and a run that goes on reads its checkpoint.
"""

import os
from mmap import mmap
from pathlib import Path
from tempfile import TemporaryFile

import torch
from torch import Tensor

from dfl_lora.files import naming

PIECE = 4 * 2**20


def zeros(place: Path | None, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Returns a matrix of zeros, in memory where `place` is None, else in a file of that folder or the next above."""
    size = rows * columns * dtype.itemsize
    if place is None or size == 0:
        return torch.zeros(rows, columns, dtype=dtype)
    folder = next(f for f in (place, *place.absolute().parents) if f.is_dir())
    with naming(place), TemporaryFile(dir=folder) as file:
        reserve(file.fileno(), size)
        mapped = mmap(file.fileno(), size)
    return torch.frombuffer(mapped, dtype=dtype).view(rows, columns)


def reserve(descriptor: int, num_bytes: int) -> None:
    """Gives an empty file its room on the disk; raises where there is too little."""
    try:
        os.posix_fallocate(descriptor, 0, num_bytes)
    except AttributeError:  # macOS: zeros are written, which takes longer
        nothing = bytes(PIECE)
        for start in range(0, num_bytes, PIECE):
            left = memoryview(nothing)[: num_bytes - start]
            while left:
                left = left[os.write(descriptor, left) :]
