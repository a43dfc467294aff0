"""Labels are numbers with names, whatever the column holds, and rows become tokens once."""

import os
import re
import stat
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from transformers import PreTrainedTokenizerBase

from dfl_lora.data.batches import TokenSource
from dfl_lora.data.glue import TASKS, Columns
from dfl_lora.data.labels import check_several, names_of, occurring
from dfl_lora.data.sources import load_rows
from dfl_lora.data.tasks import Tokenization, common_names, label_ids, label_names, text_of
from dfl_lora.errors import UserError
from dfl_lora.metrics import METRICS
from encoders import tokenizer_of
from real import real
from tiny import labelled

SENTENCE = Columns(("sentence",))
NAMED = Columns(("sentence",), names=("bad", "good", "neither"))
TRAIN = labelled(12)


def table_of(labels: list[object], feature: object = None) -> Dataset:
    columns = {"sentence": ["a"] * len(labels), "label": labels}
    features = Features({"sentence": Value("string"), "label": feature}) if feature else None
    return Dataset.from_dict(columns, features=features)


GLUE = {
    "cola": ("sentence", "unacceptable acceptable", "matthews"),
    "mnli": ("premise hypothesis", "entailment neutral contradiction", "accuracy"),
    "mrpc": ("sentence1 sentence2", "not_equivalent equivalent", "f1"),
    "qnli": ("question sentence", "entailment not_entailment", "accuracy"),
    "qqp": ("question1 question2", "not_duplicate duplicate", "f1"),
    "rte": ("sentence1 sentence2", "entailment not_entailment", "accuracy"),
    "sst2": ("sentence", "negative positive", "accuracy"),
    "wnli": ("sentence1 sentence2", "not_entailment entailment", "accuracy"),
}
"""Columns and label order of nyu-mll/glue on the hub, and the metric of the benchmark."""


def test_the_tasks_are_those_of_glue_that_are_classifications() -> None:
    found = {name: (" ".join(c.text), " ".join(c.names or ()), c.metric) for name, c in TASKS.items()}
    assert found == GLUE
    assert {columns.label for columns in TASKS.values()} == {"label"}
    assert {columns.metric for columns in TASKS.values()} <= set(METRICS)


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
        (table_of([2, 0]), NAMED, ("bad", "good", "neither"), [2, 0]),
        (table_of(["neither", "bad"]), NAMED, ("bad", "good", "neither"), [2, 0]),
        (table_of([1, 0], ClassLabel(names=["good", "bad"])), NAMED, ("bad", "good", "neither"), [0, 1]),
        (table_of([1, 0], ClassLabel(names=["0", "1"])), NAMED, ("bad", "good", "neither"), [1, 0]),
    ],
)  # fmt: skip
def test_labels_are_numbers_with_names(rows: Dataset, columns: Columns, names: tuple[str, ...], ids: list[int]) -> None:
    assert label_names(rows, columns, "rows") == names
    assert label_ids(rows, columns, names, "rows").tolist() == ids


def test_peers_whose_columns_order_the_names_otherwise_mean_the_same_labels() -> None:
    tables = [table_of([0, 1], ClassLabel(names=["no", "yes"])), table_of([0, 1], ClassLabel(names=["yes", "no"]))]
    names = common_names(label_names(rows, SENTENCE, "here") for rows in tables)
    assert names == ("no", "yes")
    assert [label_ids(rows, SENTENCE, names, "here").tolist() for rows in tables] == [[0, 1], [1, 0]]


@pytest.mark.parametrize(
    ("labels", "columns", "allowed"),
    [
        ([0, 2], TASKS["sst2"], "0 to 1 or negative, positive"),
        (["negative", "neutral"], TASKS["sst2"], "0 to 1 or negative, positive"),
        (["good", "Good"], NAMED, "0 to 2 or bad, good, neither"),
        (["good", "1"], NAMED, "0 to 2 or bad, good, neither"),
        ([2, 3], NAMED, "0 to 2 or bad, good, neither"),
        ([0, -1], SENTENCE, "0 to 0 or 0"),
        ([14, -2], SENTENCE, "0 to 14 or 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ..."),
    ],
)  # fmt: skip
def test_a_label_out_of_range_names_its_row(labels: list[object], columns: Columns, allowed: str) -> None:
    rows = table_of(labels)
    says = f"Row 1 of 'here' has the label {labels[1]!r} in column 'label'; allowed are {allowed}."
    with pytest.raises(UserError, match=re.escape(says)):
        label_ids(rows, columns, label_names(rows, columns, "here"), "here")


def test_a_name_that_the_recipe_does_not_know_is_refused_where_the_column_has_names_of_its_own() -> None:
    rows = table_of([0, 1], ClassLabel(names=["good", "great"]))
    with pytest.raises(UserError, match="Row 1 of 'here' has the label 'great'"):
        label_ids(rows, NAMED, label_names(rows, NAMED, "here"), "here")


@pytest.mark.parametrize(
    ("labels", "row"),
    [([0.5, 1.0], 0), ([1.0, None], 1), ([0, None], 1), ([None, None], 0), (["a", None], 1), ([[0], [1]], 0)],
)  # fmt: skip
@pytest.mark.parametrize("columns", [SENTENCE, NAMED], ids=["no names", "names"])
def test_fractions_lists_and_nothing_are_no_labels(labels: list[object], row: int, columns: Columns) -> None:
    says = f"Row {row} of 'here' has the label {labels[row]!r} in column 'label'; labels are names or whole numbers"
    with pytest.raises(UserError, match=re.escape(says)):
        label_names(table_of(labels), columns, "here")
    with pytest.raises(UserError, match=re.escape(says)):
        label_ids(table_of(labels), columns, ("0", "1"), "here")


@pytest.mark.parametrize("columns", [SENTENCE, TASKS["sst2"]], ids=["no names", "names"])
@pytest.mark.parametrize("feature", [None, ClassLabel(names=["negative", "positive"])])
def test_a_split_of_which_every_label_is_minus_1_has_no_labels(columns: Columns, feature: object) -> None:
    rows = table_of([-1, -1, -1], feature)
    for ask in (lambda: label_names(rows, columns, "here"), lambda: label_ids(rows, columns, ("0", "1"), "here")):
        with pytest.raises(UserError, match=r"Every row of 'here' has the label -1 in column 'label', .* no labels"):
            ask()


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (list(range(1001)), "would make 1,001 labels, such as 0 and 1000"),
        ([3, 67_348], "would make 67,349 labels, such as 3 and 67348"),
        ([f"row {i}" for i in range(2000)], "would make 2,000 labels, such as 'row 0' and 'row 1999'"),
        ([f"{'a long text ' * 9}{i}" for i in range(2000)], "such as 'a long text .* and 'a long .{,40}"),
    ],
)  # fmt: skip
def test_a_column_of_too_many_labels_is_taken_for_a_mistake(labels: list[object], says: str) -> None:
    with pytest.raises(UserError, match=f"{says}, but at most 1,000 are allowed; name another column in task.label"):
        label_names(table_of(labels), SENTENCE, "here")


def test_a_thousand_labels_are_allowed() -> None:
    assert len(label_names(table_of(list(range(1000))), SENTENCE, "here")) == 1000


@pytest.mark.parametrize(
    ("texts", "found"), [(["a", None], "no text"), ([["a"], ["b"]], "a list"), ([{"x": 1}, {"x": 2}], "a dict")]
)
def test_a_row_without_text_is_an_error_that_names_it(texts: list[object], found: str) -> None:
    row = texts.index(None) if None in texts else 0
    with pytest.raises(UserError, match=f"Row {row} of 'here' has {found}.* in column 'sentence'; correct or remove"):
        text_of(Dataset.from_dict({"sentence": texts}), "sentence", "here")


def test_numbers_where_text_should_be_are_read_as_text() -> None:
    assert text_of(Dataset.from_dict({"sentence": [42, 7]}), "sentence", "here") == ["42", "7"]


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


@pytest.mark.parametrize(
    ("task", "train", "validation"), [("sst2", 67_349, 872), ("qnli", 4_463, 1_000), ("mnli", 8_466, 2_002)]
)
def test_real_tasks_are_read_with_all_their_rows_and_labels(task: str, train: int, validation: int) -> None:
    (folder,), columns = real("glue"), TASKS[task]
    for split, num_rows in (("train", train), ("validation", validation)):
        rows = load_rows(str(folder), task, split)
        assert len(rows) == num_rows and set(columns.text) <= set(rows.column_names)
        names = label_names(rows, columns, task)
        assert len(set(label_ids(rows, columns, names, task).tolist())) == len(names)


def test_names_and_numbers_in_one_column_of_labels_are_told_apart_in_the_sentence() -> None:
    with pytest.raises(
        UserError, match="'label' of 'here' mixes names, such as 'zero', with numbers, such as 0; write"
    ):
        names_of([0, 1, "zero"], None, SENTENCE, "here")


def test_labels_that_all_are_one_are_refused_whatever_names_there_are() -> None:
    names = ("bad", "good")
    assert occurring(names, np.array([1, 1])) == {"good"} and occurring(names, np.array([0, 1])) == set(names)
    with pytest.raises(UserError, match="All labels in 'here' are good; give rows of two labels or more"):
        check_several(occurring(names, np.array([1, 1])), "here")


@pytest.mark.parametrize("absent", ["NA", "nan", "null", "None", "N/A"])
def test_a_value_that_is_not_there_is_no_name_among_whole_numbers(absent: str) -> None:
    with pytest.raises(UserError, match=f"Row 2 of .* has the label '{absent}'"):
        names_of(["0", "1", absent, "1"], None, SENTENCE, "rows.csv")
    assert names_of(["yes", absent, "no"], None, SENTENCE, "rows.csv") == (*sorted({"yes", absent, "no"}),)
