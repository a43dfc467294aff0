"""Batches as other tools make them: rectangles, padded to a length that the caller chooses."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from dfl_lora.bench.setting import Setting
from dfl_lora.data.batches import Rows, Shard, TokenSource


@dataclass(frozen=True)
class Rectangle:
    """Model inputs by name [rows, width], labels [rows]."""

    inputs: dict[str, Tensor]
    labels: Tensor


@dataclass
class Reader:
    """Reads a setting's rows in its own order.

    `longest_of`: rows are padded to the longest of their block of that many rows, as `datasets.map` with
    `padding="longest"` pads; None: to the longest of the batch.
    """

    setting: Setting
    longest_of: int | None = None
    widths: dict[int, Rows] = field(default_factory=dict)

    def rows(self, peer: int, cursor: int) -> Rows:
        """Returns the rows of batch number `cursor` of a peer."""
        return self.setting.work.order.rows(self.setting.data.train[peer], peer, cursor)

    def batch(self, peer: int, cursor: int) -> Rectangle:
        """Returns batch number `cursor` of a peer."""
        return self.joined([(peer, self.rows(peer, cursor))])

    def joined(self, parts: Sequence[tuple[int, Rows]]) -> Rectangle:
        """Returns several peers' rows as one rectangle."""
        train = self.setting.data.train
        width = max(self.width(train[peer], rows) for peer, rows in parts)
        return rectangle([(train[peer].source, rows) for peer, rows in parts], width)

    def validation(self, peer: int, num_rows: int) -> Iterator[Rectangle]:
        """Yields a peer's validation rows in their order, `num_rows` at a time."""
        shard = self.setting.data.validation[peer]
        for start in range(0, len(shard), num_rows):
            rows = shard.rows[start : start + num_rows]
            yield rectangle([(shard.source, rows)], self.width(shard, rows))

    def width(self, shard: Shard, rows: Rows) -> int:
        if self.longest_of is None:
            return int(shard.source.lengths[rows].max())
        if id(shard) not in self.widths:
            self.widths[id(shard)] = block_widths(shard, self.longest_of)
        return int(self.widths[id(shard)][rows].max())


def block_widths(shard: Shard, size: int) -> Rows:
    """Returns, by row number, the longest length in a row's block of `size` rows of the shard, in its order."""
    lengths = shard.source.lengths[shard.rows]
    widths = np.zeros(len(shard.source.lengths), dtype=np.int64)
    for start in range(0, len(lengths), size):
        widths[shard.rows[start : start + size]] = lengths[start : start + size].max()
    return widths


def rectangle(parts: Sequence[tuple[object, Rows]], width: int) -> Rectangle:
    """Returns rows of token sources padded on the right to one width."""
    spans, labels = list[tuple[TokenSource, int, int]](), list[int]()
    for source, rows in parts:
        assert isinstance(source, TokenSource)
        spans += [(source, int(source.offsets[r]), int(source.offsets[r + 1])) for r in rows]
        labels += source.labels[rows].tolist()
    first = spans[0][0]
    arrays = {name: np.full((len(spans), width), first.pad_values[name], dtype=np.int64) for name in first.columns}
    mask = np.zeros((len(spans), width), dtype=np.int64)
    for i, (source, start, stop) in enumerate(spans):
        mask[i, : stop - start] = 1
        for name, array in arrays.items():
            array[i, : stop - start] = source.columns[name][start:stop]
    inputs = {name: torch.from_numpy(array) for name, array in (arrays | {"attention_mask": mask}).items()}
    return Rectangle(inputs, torch.tensor(labels))
