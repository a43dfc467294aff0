"""Batches: which rows a peer reads next, as tensors without padding, and padded as plain models read them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import ceil
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dfl_lora.streams import numpy_stream

Rows = NDArray[np.int64]

PAD_TO = 8
"""Padded lengths are a multiple of this."""
PEERS = 1 << 17
"""Peers whose order of rows is remembered from one batch to the next, of one epoch each."""


@dataclass(frozen=True)
class Batch:
    """The rows of one step: their tokens one row after the other, by name [tokens, ...], and what is to be learnt."""

    inputs: Mapping[str, Tensor]
    lengths: Rows
    """The tokens of each row."""
    labels: Tensor
    """Of each row [rows], or the token that follows each token [tokens]; below 0 where nothing is learnt."""
    width: int
    """The length that rows are padded to, which depends on this batch alone."""
    pads: Mapping[str, int]
    """What columns are padded with; empty where a row is one vector."""
    source: "Source | None" = None
    """The table that the rows are of, and their numbers in it; None where they are of none."""
    rows: Rows | None = None

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())

    @property
    def num_learnt(self) -> int:
        """The rows or tokens whose label is learnt."""
        return int((self.labels >= 0).sum())

    @property
    def truth(self) -> Rows:
        """The labels that are learnt."""
        labels: Rows = self.labels.numpy()
        return labels[labels >= 0]

    @property
    def is_token(self) -> Tensor:
        """[rows, width] which places of the padded rows are tokens."""
        return torch.arange(self.width) < torch.from_numpy(self.lengths)[:, None]

    def parts(self, num_rows: int) -> list["Batch"]:
        """Returns the batch cut into batches of at most so many rows."""
        if len(self.lengths) <= num_rows or self.source is None or self.rows is None:
            return [self]
        cuts = range(num_rows, len(self.rows), num_rows)
        return [self.source.collate(rows) for rows in np.split(self.rows, cuts)]

    def padded(self) -> dict[str, Tensor]:
        """Returns the inputs as plain models read them: [rows, width] each, with an attention mask."""
        if not self.pads:
            return dict(self.inputs)
        is_token = self.is_token
        inputs = {"attention_mask": is_token.long()}
        for name, values in self.inputs.items():
            inputs[name] = torch.full(is_token.shape, self.pads[name]).masked_scatter_(is_token, values)
        return inputs


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
        here = slice(index * self.batch_size, (index + 1) * self.batch_size)
        return shard.rows[shuffled(self.seed, peer, epoch, len(shard))[here] if self.shuffle else here]

    def batch(self, shard: Shard, peer: int, cursor: int) -> Batch:
        """Returns batch number `cursor` of a peer, counted over all epochs."""
        return shard.source.collate(self.rows(shard, peer, cursor))


def shuffled(seed: int, peer: int, epoch: int, num_rows: int) -> Rows:
    """Returns the order in which a peer reads its rows in an epoch."""
    last = last_order(seed, peer, num_rows)
    if epoch not in last:
        last.clear()
        last[epoch] = numpy_stream(seed, "order", peer, epoch).permutation(num_rows)
    return last[epoch]


@lru_cache(maxsize=PEERS)
def last_order(seed: int, peer: int, num_rows: int) -> dict[int, Rows]:
    """Returns where the order of a peer's last epoch is kept."""
    return {}


def evaluation_batches(shard: Shard, batch_size: int, num_tokens: int | None = None) -> Iterator[Batch]:
    """Yields every row once, sorted by length: so many rows at a time, or fewer that have at most so many tokens."""
    rows, start = shard.by_length, 0
    lengths = shard.source.lengths[rows]
    while start < len(rows):
        count = min(batch_size, len(rows) - start)
        if num_tokens is not None:
            count = max(1, int((np.cumsum(lengths[start : start + count]) <= num_tokens).sum()))
        yield shard.source.collate(rows[start : start + count])
        start += count


@dataclass(frozen=True)
class TokenSource:
    """Tokenised rows, ragged: row i is tokens[offsets[i]:offsets[i + 1]] of each column."""

    columns: Mapping[str, NDArray[np.int32]]
    offsets: Rows
    labels: Rows
    pad_values: Mapping[str, int]
    max_length: int
    digest: str = ""
    """Of the texts and of how they became tokens; empty where that is not known."""
    targets: NDArray[np.int32] | None = None
    """The token that is to follow each token, below 0 where it is not learnt; None where rows have labels."""

    @cached_property
    def lengths(self) -> Rows:
        return np.diff(self.offsets)

    def collate(self, rows: Rows) -> Batch:
        lengths = self.lengths[rows]
        longest = int(lengths.max())
        width = min(PAD_TO * ceil(longest / PAD_TO), max(self.max_length, longest))
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        places = np.repeat(self.offsets[rows], lengths) + within
        inputs = {name: torch.from_numpy(values[places].astype(np.int64)) for name, values in self.columns.items()}
        labels = self.labels[rows] if self.targets is None else self.targets[places].astype(np.int64)
        return Batch(inputs, lengths, torch.from_numpy(labels), width, self.pad_values, self, rows)


@dataclass(frozen=True)
class VectorSource:
    """Rows that are plain vectors [n, d] with labels: the toy's data."""

    inputs: Tensor
    labels: Tensor

    @cached_property
    def lengths(self) -> Rows:
        return np.ones(len(self.labels), dtype=np.int64)

    def collate(self, rows: Rows) -> Batch:
        index = torch.from_numpy(rows)
        return Batch({"inputs": self.inputs[index]}, self.lengths[rows], self.labels[index], 1, {})
