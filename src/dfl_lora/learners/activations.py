"""What the frozen layers below the first adapted one made of each row, kept on disk from one step to the next.

One memory-mapped file of numbers [tokens, d] and one of checksums [rows] for each table of rows, named by a digest of
everything they depend on: the layers themselves, configuration, precision, versions, kind of processor, tokens. A row
without its checksum (not made yet, or written by half when the machine went down) is made anew, so that nothing is
trusted because it is there. The bits are those that the layers make in any pass; where the disk has no room nothing is
kept.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dfl_lora.data.batches import Batch, TokenSource
from dfl_lora.models.packing import Packing
from dfl_lora.store import reserve

SPARE = 2
"""The disk must have this many times the room that is needed."""


@dataclass(frozen=True)
class Table:
    """The kept numbers of one table of rows."""

    source: TokenSource
    hidden: Tensor  # [tokens, d]
    checksums: NDArray[np.uint64]  # [rows]

    def row(self, number: int) -> Tensor:
        """Returns the place of a row [its tokens, d]."""
        return self.hidden[int(self.source.offsets[number]) : int(self.source.offsets[number + 1])]

    def get(self, rows: Sequence[int]) -> list[Tensor] | None:
        """Returns some rows; None where one of them is not there as it was written."""
        found = [self.row(number) for number in rows]
        whole = all(self.checksums[number] == checksum(own) for number, own in zip(rows, found, strict=True))
        return found if whole else None

    def put(self, rows: Sequence[int], made: Sequence[Tensor]) -> None:
        for number, own in zip(rows, made, strict=True):
            self.row(number).copy_(own)
            self.checksums[number] = checksum(own)


@dataclass
class Activations:
    """The tables of one base, one precision and one number of layers, which `name` says."""

    folder: Path
    name: Sequence[str | int]
    width: int
    dtype: torch.dtype
    tables: dict[str, Table | None] = field(default_factory=dict)

    def get(self, batches: Sequence[Batch], packing: Packing) -> Tensor | None:
        """Returns [T, d] of a pass; None where a row of it is not kept."""
        found = list[Tensor]()
        for batch in batches:
            table = self.table(batch)
            rows = None if table is None or batch.rows is None else table.get(batch.rows.tolist())
            if rows is None:
                return None
            found.append(torch.cat(rows))
        return packing.pack(found, 0)

    def put(self, batches: Sequence[Batch], packing: Packing, made: Tensor) -> None:
        """Keeps what a pass made, [T, d]."""
        for batch, span in zip(batches, packing.token_spans, strict=True):
            table = self.table(batch)
            if table is not None and batch.rows is not None:
                own = made[span.start : span.start + batch.tokens].cpu()
                table.put(batch.rows.tolist(), torch.split(own, batch.lengths.tolist()))

    def table(self, batch: Batch) -> Table | None:
        """Returns the table that a batch is of; None where its rows are not from one, or there is no room."""
        source = batch.source
        if not isinstance(source, TokenSource) or not source.digest:
            return None
        if source.digest not in self.tables:
            with torch.inference_mode(False):  # an evaluation may open what training writes to
                self.tables[source.digest] = self.open(source)
        return self.tables[source.digest]

    def open(self, source: TokenSource) -> Table | None:
        """Returns a table whose files are there in full, made where they are not."""
        content = json.dumps([*self.name, self.width, str(self.dtype), source.digest])
        path = self.folder / hashlib.sha256(content.encode()).hexdigest()
        tokens, rows = int(source.offsets[-1]), len(source.lengths)
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.folder.chmod(0o700)
            allocate(path.with_suffix(".hidden"), tokens * self.width * self.dtype.itemsize)
            allocate(path.with_suffix(".checksums"), rows * 8)
        except OSError:
            return None
        count = tokens * self.width
        hidden = torch.from_file(str(path.with_suffix(".hidden")), shared=True, size=count, dtype=self.dtype)
        checksums = np.memmap(path.with_suffix(".checksums"), dtype=np.uint64, mode="r+", shape=(rows,))
        return Table(source, hidden.view(tokens, self.width), checksums)


def allocate(path: Path, size: int) -> None:
    """Makes a file of `size` bytes that the disk really has; raises OSError where it has no room.

    A file grows and never shrinks: another process may have it mapped.
    """
    if path.exists() and path.stat().st_size >= size:
        return
    if shutil.disk_usage(path.parent).free < SPARE * size:
        raise OSError("no room")
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        reserve(handle, size)
    finally:
        os.close(handle)


def checksum(row: Tensor) -> np.uint64:
    """Returns 64 bits of the bytes of a row, never 0, which says that there is none."""
    digest = hashlib.blake2b(row.contiguous().view(torch.uint8).numpy().data, digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little") | 1)
