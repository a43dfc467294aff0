"""Batches: which rows a peer reads next, as tensors whose padded length depends on that batch alone."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dfl_lora.streams import numpy_stream

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """Model inputs by name, each [rows, ...], labels [rows], and the number of tokens that are not padding."""

    inputs: Mapping[str, Tensor]
    labels: Tensor
    tokens: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that decides who shares a pass: rows and padded length."""
        return tuple(next(iter(self.inputs.values())).shape)


class Source(Protocol):
    """A table of rows that can be put into a batch."""

    def collate(self, rows: Rows) -> Batch: ...

    @property
    def lengths(self) -> Rows:
        """The number of tokens of each row."""
        ...


@dataclass(frozen=True)
class Shard:
    """The rows of a source that belong to one peer."""

    source: Source
    rows: Rows

    def __len__(self) -> int:
        return len(self.rows)

    def num_batches(self, batch_size: int) -> int:
        """The number of batches of an epoch, the short last one counted."""
        return ceil(len(self.rows) / batch_size)

    @cached_property
    def by_length(self) -> Rows:
        """The rows in the order of their length, for evaluation."""
        return self.rows[np.argsort(self.source.lengths[self.rows], kind="stable")]


@dataclass(frozen=True)
class Order:
    """The order in which peers read: batch number c of a peer is the same whenever and with whomever it is read."""

    seed: int
    batch_size: int
    shuffle: bool

    def rows(self, shard: Shard, peer: int, cursor: int) -> Rows:
        """Returns the rows of batch number `cursor` of a peer, counted over all epochs."""
        epoch, index = divmod(cursor, shard.num_batches(self.batch_size))
        rows = shard.rows
        if self.shuffle:
            rows = rows[numpy_stream(self.seed, "order", peer, epoch).permutation(len(rows))]
        return rows[index * self.batch_size : (index + 1) * self.batch_size]

    def batch(self, shard: Shard, peer: int, cursor: int) -> Batch:
        """Returns batch number `cursor` of a peer, counted over all epochs."""
        return shard.source.collate(self.rows(shard, peer, cursor))


def evaluation_batches(shard: Shard, batch_size: int) -> Iterator[Batch]:
    """Yields every row once, sorted by length so that little is padded."""
    rows = shard.by_length
    for start in range(0, len(rows), batch_size):
        yield shard.source.collate(rows[start : start + batch_size])


PAD_TO = 8
"""Lengths are padded up to a multiple of this: peers meet in one pass more often, and kernels like it."""


@dataclass(frozen=True)
class TokenSource:
    """Tokenised rows, ragged: row i is tokens[offsets[i]:offsets[i + 1]] of each column."""

    columns: Mapping[str, NDArray[np.int32]]
    offsets: Rows
    labels: Rows
    pad_values: Mapping[str, int]
    max_length: int

    @cached_property
    def lengths(self) -> Rows:
        return np.diff(self.offsets)

    def collate(self, rows: Rows) -> Batch:
        lengths = self.lengths[rows]
        width = min(PAD_TO * ceil(int(lengths.max()) / PAD_TO), max(self.max_length, int(lengths.max())))
        spans = [slice(self.offsets[r], self.offsets[r + 1]) for r in rows]
        inputs = {name: padded([v[s] for s in spans], width, self.pad_values[name]) for name, v in self.columns.items()}
        inputs["attention_mask"] = torch.from_numpy((np.arange(width) < lengths[:, None]).astype(np.int64))
        return Batch(inputs, torch.from_numpy(self.labels[rows]), int(lengths.sum()))


def padded(rows: Sequence[NDArray[np.int32]], width: int, value: int) -> Tensor:
    """Returns ragged rows as one int64 tensor [rows, width], padded on the right."""
    result = np.full((len(rows), width), value, dtype=np.int64)
    for i, row in enumerate(rows):
        result[i, : len(row)] = row
    return torch.from_numpy(result)


@dataclass(frozen=True)
class VectorSource:
    """Rows that are plain vectors [n, d] with labels: the toy's data."""

    inputs: Tensor
    labels: Tensor

    @property
    def lengths(self) -> Rows:
        return np.ones(len(self.labels), dtype=np.int64)

    def collate(self, rows: Rows) -> Batch:
        index = torch.from_numpy(rows)
        return Batch({"inputs": self.inputs[index]}, self.labels[index], len(rows))
