"""Batches: which rows a peer reads next, and how they are padded."""

from dataclasses import replace

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dfl_lora.data.batches import Order, Shard, TokenSource, VectorSource, evaluation_batches


def source_of(lengths: list[int], max_length: int = 48) -> TokenSource:
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    tokens = np.arange(1, offsets[-1] + 1, dtype=np.int32)
    return TokenSource({"input_ids": tokens}, offsets, np.arange(len(lengths)) % 2, {"input_ids": 0}, max_length)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.data())
@settings(max_examples=40, deadline=None)
def test_a_batch_holds_its_rows_without_padding_and_padded_to_a_multiple_of_8(
    lengths: list[int], data: st.DataObject
) -> None:
    source = source_of(lengths)
    rows = np.array(data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=6)))
    batch = source.collate(rows)
    own = [source.columns["input_ids"][source.offsets[row] : source.offsets[row + 1]].tolist() for row in rows]
    assert batch.inputs["input_ids"].tolist() == [token for row in own for token in row]
    assert batch.lengths.tolist() == [len(row) for row in own] and batch.tokens == sum(map(len, own))
    longest, padded = max(map(len, own)), batch.padded()
    assert batch.width % 8 == 0 and longest <= batch.width < longest + 8
    for i, row in enumerate(own):
        assert padded["input_ids"][i].tolist() == row + [0] * (batch.width - len(row))
        assert padded["attention_mask"][i].tolist() == [1] * len(row) + [0] * (batch.width - len(row))
    assert batch.labels.tolist() == source.labels[rows].tolist()


def test_a_batch_is_never_padded_beyond_what_the_base_can_read() -> None:
    assert source_of([9, 10], max_length=12).collate(np.array([0, 1])).width == 12


def numbered(num_rows: int) -> Shard:
    """Returns a peer's rows, of which each holds its own number."""
    numbers = torch.arange(2 * num_rows)
    source = VectorSource(numbers[:, None].double(), numbers)
    return Shard(source, np.arange(num_rows, 2 * num_rows))


def rows_of(order: Order, shard: Shard, peer: int, cursor: int) -> list[int]:
    return [int(label) for label in order.batch(shard, peer, cursor).labels]


def test_an_epoch_reads_every_row_once_and_its_last_batch_may_be_short() -> None:
    shard, order = numbered(10), Order(seed=0, batch_size=4, shuffle=True)
    assert shard.num_batches(4) == 3
    batches = [rows_of(order, shard, 0, cursor) for cursor in range(3)]
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert sorted(row for batch in batches for row in batch) == list(range(10, 20))


def test_a_batch_is_named_by_seed_peer_and_cursor_whenever_it_is_read() -> None:
    shard, order = numbered(10), Order(seed=0, batch_size=4, shuffle=True)
    forward = [rows_of(order, shard, 1, cursor) for cursor in range(9)]
    backward = [rows_of(order, shard, 1, cursor) for cursor in reversed(range(9))]
    assert forward == backward[::-1]
    assert forward != [rows_of(order, shard, 2, cursor) for cursor in range(9)]
    assert forward != [rows_of(replace(order, seed=1), shard, 1, cursor) for cursor in range(9)]


def test_every_epoch_draws_a_new_order_unless_rows_are_read_in_theirs() -> None:
    shard, shuffled = numbered(30), Order(seed=0, batch_size=30, shuffle=True)
    epochs = [rows_of(shuffled, shard, 0, epoch) for epoch in range(4)]
    assert len({tuple(epoch) for epoch in epochs}) == 4
    straight = replace(shuffled, shuffle=False)
    assert [rows_of(straight, shard, 0, epoch) for epoch in range(2)] == [list(range(30, 60))] * 2


@given(st.lists(st.integers(1, 30), min_size=1, max_size=20), st.integers(1, 7))
@settings(max_examples=30, deadline=None)
def test_evaluation_reads_every_row_once_shortest_first(lengths: list[int], batch_size: int) -> None:
    source = source_of(lengths)
    shard = Shard(source, np.arange(len(lengths))[::-1])
    batches = list(evaluation_batches(shard, batch_size))
    read = [int(row[0]) for batch in batches for row in batch.padded()["input_ids"]]
    assert sorted(read) == sorted((source.offsets[:-1] + 1).tolist())
    widths = [batch.lengths.max() for batch in batches]
    assert widths == sorted(widths)
