"""Rows: where they come from, how they become tokens and batches, and who gets which."""

import json
import os
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from dfl_lora.data.batches import Order, Shard, TokenSource, VectorSource, evaluation_batches
from dfl_lora.data.sources import BUILTIN, load_rows, peer_path
from dfl_lora.data.tasks import TASKS, Columns, Tokenization, label_ids, label_names
from dfl_lora.errors import UserError
from encoders import tokenizer_of
from tiny import labelled

REAL = Path(os.environ.get("DFL_LORA_DATA") or Path(__file__).parents[2] / "shared" / "data")
SENTENCE = Columns(("sentence",))
TRAIN, HELD = labelled(12), labelled(4, "validation")


def parquet(folder: Path) -> Path:
    Dataset.from_list(TRAIN).to_parquet(folder / "train.parquet")
    return folder / "train.parquet"


def csv(folder: Path) -> Path:
    Dataset.from_list(TRAIN).to_pandas().to_csv(folder / "train.csv", index=False)
    return folder / "train.csv"


def jsonl(folder: Path) -> Path:
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in TRAIN))
    return folder / "train.jsonl"


def saved_table(folder: Path) -> Path:
    Dataset.from_list(TRAIN).save_to_disk(str(folder / "saved"))
    return folder / "saved"


def saved_splits(folder: Path) -> Path:
    splits = {"train": Dataset.from_list(TRAIN), "validation": Dataset.from_list(HELD)}
    DatasetDict(splits).save_to_disk(str(folder / "saved"))
    return folder / "saved"


def folder_of_files(folder: Path) -> Path:
    (folder / "rows").mkdir()
    Dataset.from_list(TRAIN).to_parquet(folder / "rows" / "train.parquet")
    Dataset.from_list(HELD).to_parquet(folder / "rows" / "validation.parquet")
    return folder / "rows"


Place = Callable[[Path], Path]


@pytest.mark.parametrize("place", [parquet, csv, jsonl, saved_table, saved_splits, folder_of_files])
def test_rows_are_the_same_from_any_place(place: Place, tmp_path: Path) -> None:
    rows = load_rows(str(place(tmp_path)), None, "train")
    assert [{"sentence": row["sentence"], "label": row["label"]} for row in rows] == TRAIN


@pytest.mark.parametrize("place", [saved_splits, folder_of_files])
def test_a_place_with_splits_gives_the_one_asked_for(place: Place, tmp_path: Path) -> None:
    path = str(place(tmp_path))
    assert load_rows(path, None, "validation")["sentence"][:] == [row["sentence"] for row in HELD]
    with pytest.raises(UserError, match=r"no split 'valid'; it has train, validation. Did you mean 'validation'"):
        load_rows(path, None, "valid")


def test_a_file_of_one_table_is_any_split(tmp_path: Path) -> None:
    assert len(load_rows(str(parquet(tmp_path)), None, "validation")) == 12


def test_a_folder_with_configurations_gives_the_one_asked_for(tmp_path: Path) -> None:
    folder = folder_of_files(tmp_path)
    configs = [
        f"- config_name: {n}\n  data_files: [{{split: train, path: {n}.parquet}}]" for n in ("train", "validation")
    ]
    (folder / "README.md").write_text("---\nconfigs:\n" + "\n".join(configs) + "\n---\n")
    assert len(load_rows(str(folder), "validation", "train")) == 4
    assert len(load_rows(str(folder), "train", "train")) == 12
    with pytest.raises(UserError, match=r"\(config other\)"):
        load_rows(str(folder), "other", "train")


def test_the_built_in_sentences_have_two_splits() -> None:
    assert len(load_rows(BUILTIN, None, "validation")) == 500
    with pytest.raises(UserError, match="no split 'test'; it has train, validation"):
        load_rows(BUILTIN, None, "test")


def test_a_tilde_in_a_path_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    parquet(tmp_path)
    assert len(load_rows("~/train.parquet", None, "train")) == 12


def test_a_name_that_the_hub_does_not_give_is_an_error_that_says_what_may_be_given() -> None:
    with pytest.raises(UserError, match=r"'no/such-rows'.*Give a folder.*builtin/sentences") as refusal:
        load_rows("no/such-rows", "sst2", "train")
    assert "\n" not in str(refusal.value) and "(config sst2)" in str(refusal.value)


def test_templates_count_peers_from_1() -> None:
    assert peer_path("a/client_{i}/{}.csv", 0) == "a/client_1/1.csv"
    assert peer_path("a/client_{}", 6) == "a/client_7"
    assert peer_path("a/client", 6) == "a/client"


def table_of(labels: list[object], feature: object = None) -> Dataset:
    columns = {"sentence": ["a"] * len(labels), "label": labels}
    features = Features({"sentence": Value("string"), "label": feature}) if feature else None
    return Dataset.from_dict(columns, features=features)


@pytest.mark.parametrize(
    ("rows", "columns", "names", "ids"),
    [
        (table_of([1, 0, 2]), SENTENCE, ("0", "1", "2"), [1, 0, 2]),
        (table_of([1, 1]), SENTENCE, ("0", "1"), [1, 1]),
        (table_of([0, 1, 1], ClassLabel(names=["no", "yes"])), SENTENCE, ("no", "yes"), [0, 1, 1]),
        (table_of(["yes", "no", "yes"]), SENTENCE, ("no", "yes"), [1, 0, 1]),
        (table_of([1, 0]), TASKS["sst2"], ("negative", "positive"), [1, 0]),
        (table_of(["positive", "negative"]), TASKS["sst2"], ("negative", "positive"), [1, 0]),
        (table_of([2, 0]), TASKS["mnli"], ("entailment", "neutral", "contradiction"), [2, 0]),
        (table_of(["not_entailment"]), TASKS["qnli"], ("entailment", "not_entailment"), [1]),
        (table_of([True, False]), SENTENCE, ("0", "1"), [1, 0]),
    ],
)  # fmt: skip
def test_labels_are_numbers_with_names(rows: Dataset, columns: Columns, names: tuple[str, ...], ids: list[int]) -> None:
    assert label_names(rows, columns, "rows") == names
    assert label_ids(rows, columns, names, "rows").tolist() == ids


@pytest.mark.parametrize(
    ("labels", "columns"),
    [([0, 2], TASKS["sst2"]), (["negative", "neutral"], TASKS["sst2"]), ([0, -1], SENTENCE), ([0, None], SENTENCE)],
)  # fmt: skip
def test_a_label_out_of_range_names_its_row(labels: list[object], columns: Columns) -> None:
    rows = table_of(labels)
    with pytest.raises(UserError, match=f"Row 1 of 'here' has the label {labels[1]!r} in column 'label'; allowed are"):
        label_ids(rows, columns, label_names(rows, columns, "here"), "here")


@pytest.mark.parametrize("labels", [[0.5, 1.0], [None, None], [[0], [1]]])
def test_labels_that_are_no_classes_are_a_users_mistake(labels: list[object]) -> None:
    rows = table_of(labels)
    with pytest.raises(UserError, match="'label'"):
        label_ids(rows, SENTENCE, label_names(rows, SENTENCE, "here"), "here")


class Counting:
    """A tokenizer that counts how often it is called."""

    def __init__(self) -> None:
        self.inner, self.calls = tokenizer_of("bert"), 0
        self.pad_token_id = self.inner.pad_token_id
        self.truncation_side = ""

    def __call__(self, *texts: list[str], **options: object) -> object:
        self.calls += 1
        self.inner.truncation_side = self.truncation_side
        return self.inner(*texts, **options)


def tokenization(counting: Counting | None = None, max_length: int = 48, side: str = "right") -> Tokenization:
    return Tokenization(cast(PreTrainedTokenizerBase, counting or Counting()), "digest", max_length, side)


def tokens_of(source: TokenSource, row: int, column: str = "input_ids") -> list[int]:
    return [int(t) for t in source.columns[column][source.offsets[row] : source.offsets[row + 1]]]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of this test's own."""
    monkeypatch.setenv("DFL_LORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_tokens_are_made_once_and_memory_mapped_from_a_private_cache(cache: Path) -> None:
    rows, first, second = Dataset.from_list(TRAIN), Counting(), Counting()
    one = tokenization(first).source(rows, SENTENCE, ("0", "1"), "here")
    other = tokenization(second).source(rows, SENTENCE, ("0", "1"), "there")
    assert (first.calls, second.calls) == (1, 0)
    assert all(isinstance(column, np.memmap) and not column.flags.writeable for column in other.columns.values())
    assert tokens_of(one, 5) == tokens_of(other, 5)
    entries = list((cache / "tokens").iterdir())
    assert len(entries) == 1 and len(entries[0].name) == 64
    for folder in (cache / "tokens", *entries):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_cache_that_others_could_read_is_closed(cache: Path) -> None:
    (cache / "tokens").mkdir(parents=True, mode=0o755)
    (cache / "tokens").chmod(0o755)
    tokenization().source(Dataset.from_list(TRAIN), SENTENCE, ("0", "1"), "here")
    assert stat.S_IMODE((cache / "tokens").stat().st_mode) == 0o700


def test_without_a_variable_the_cache_is_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DFL_LORA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tokenization().source(Dataset.from_list(TRAIN), SENTENCE, ("0", "1"), "here")
    assert len(list((tmp_path / "dfl-lora" / "tokens").iterdir())) == 1


def test_another_text_length_side_or_tokenizer_is_another_entry(cache: Path) -> None:
    rows = Dataset.from_list(TRAIN)
    others = [
        (tokenization(), rows),
        (tokenization(max_length=12), rows),
        (tokenization(side="left"), rows),
        (replace(tokenization(), digest="other"), rows),
        (tokenization(), Dataset.from_list(TRAIN[:5])),
    ]
    for how, what in others:
        how.source(what, SENTENCE, ("0", "1"), "here")
    assert len(list((cache / "tokens").iterdir())) == len(others)


def test_an_entry_that_another_process_wrote_first_is_taken(cache: Path) -> None:
    rows, counting = Dataset.from_list(TRAIN), Counting()
    how = tokenization(counting)
    source = how.source(rows, SENTENCE, ("0", "1"), "here")
    (entry,) = (cache / "tokens").iterdir()
    how.write(entry, [[str(row["sentence"]) for row in TRAIN]])
    assert list((cache / "tokens").iterdir()) == [entry] and tokens_of(source, 0) != []


def test_a_damaged_cache_entry_is_made_again(cache: Path) -> None:
    rows = Dataset.from_list(TRAIN)
    before = [tokens_of(tokenization().source(rows, SENTENCE, ("0", "1"), "here"), i) for i in range(12)]
    for file in (cache / "tokens").rglob("*.npy"):
        os.truncate(file, 40)
    after = tokenization().source(rows, SENTENCE, ("0", "1"), "here")
    assert [tokens_of(after, i) for i in range(12)] == before


def test_rows_are_cut_on_the_side_that_the_recipe_says(cache: Path) -> None:
    rows = Dataset.from_dict({"sentence": ["a b c d e f g h"], "label": [0]})
    whole = tokens_of(tokenization().source(rows, SENTENCE, ("0",), "here"), 0)
    right = tokens_of(tokenization(max_length=5).source(rows, SENTENCE, ("0",), "here"), 0)
    left = tokens_of(tokenization(max_length=5, side="left").source(rows, SENTENCE, ("0",), "here"), 0)
    assert right == [*whole[:4], whole[-1]] and left == [whole[0], *whole[-4:]]


def test_pairs_are_read_together_with_their_types(cache: Path) -> None:
    rows = Dataset.from_dict({"premise": ["a b"], "hypothesis": ["c d e"], "label": [1]})
    source = tokenization().source(rows, TASKS["mnli"], TASKS["mnli"].names or (), "here")
    vocabulary = tokenizer_of("bert").get_vocab()
    words = ["[CLS]", "a", "b", "[SEP]", "c", "d", "e", "[SEP]"]
    assert tokens_of(source, 0) == [vocabulary[word] for word in words]
    assert tokens_of(source, 0, "token_type_ids") == [0, 0, 0, 0, 1, 1, 1, 1]
    assert source.labels.tolist() == [1] and source.lengths.tolist() == [8]


def source_of(lengths: list[int], max_length: int = 48) -> TokenSource:
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    tokens = np.arange(1, offsets[-1] + 1, dtype=np.int32)
    return TokenSource({"input_ids": tokens}, offsets, np.arange(len(lengths)) % 2, {"input_ids": 0}, max_length)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.data())
@settings(max_examples=40, deadline=None)
def test_a_batch_is_padded_to_a_multiple_of_8_that_its_own_rows_decide(lengths: list[int], data: st.DataObject) -> None:
    source = source_of(lengths)
    rows = np.array(data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=6)))
    batch = source.collate(rows)
    longest = max(lengths[row] for row in rows)
    width = batch.inputs["input_ids"].shape[1]
    assert width % 8 == 0 and longest <= width < longest + 8
    assert batch.shape == (len(rows), width) and batch.tokens == sum(lengths[row] for row in rows)
    for i, row in enumerate(rows):
        own = source.columns["input_ids"][source.offsets[row] : source.offsets[row + 1]].tolist()
        assert batch.inputs["input_ids"][i].tolist() == own + [0] * (width - len(own))
        assert batch.inputs["attention_mask"][i].tolist() == [1] * len(own) + [0] * (width - len(own))
    assert batch.labels.tolist() == source.labels[rows].tolist()


def test_a_batch_is_never_padded_beyond_what_the_base_can_read() -> None:
    assert source_of([9, 10], max_length=12).collate(np.array([0, 1])).shape == (2, 12)


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
    read = [int(row[0]) for batch in batches for row in batch.inputs["input_ids"]]
    assert sorted(read) == sorted((source.offsets[:-1] + 1).tolist())
    widths = [batch.inputs["attention_mask"].sum(1).max().item() for batch in batches]
    assert widths == sorted(widths)


@pytest.mark.skipif(
    not (REAL / "glue").is_dir(), reason=f"no real data in {REAL}: set DFL_LORA_DATA to a folder with glue/"
)
@pytest.mark.parametrize(
    ("task", "train", "validation"), [("sst2", 67_349, 872), ("qnli", 4_463, 1_000), ("mnli", 8_466, 2_002)]
)
def test_real_tasks_are_read_with_all_their_rows_and_labels(task: str, train: int, validation: int) -> None:
    columns = TASKS[task]
    for split, num_rows in (("train", train), ("validation", validation)):
        rows = load_rows(str(REAL / "glue"), task, split)
        assert len(rows) == num_rows and set(columns.text) <= set(rows.column_names)
        names = label_names(rows, columns, task)
        assert len(set(label_ids(rows, columns, names, task).tolist())) == len(names)
