"""Splits on disk: every partition by name, folders that appear together, and what is shown of them."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, load_from_disk

from dfl_lora.data.shares import shares
from dfl_lora.data.splits import View, chart, joined_texts, label_columns, read_client, read_split, table
from dfl_lora.errors import UserError
from real import real
from tiny import call, labelled

ROWS = 90


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of sentences with their labels, a number of their own, a domain, and a second label column."""
    rows = [
        {**row, "idx": i, "domain": f"d{i % 9}", "stars": ["low", "mid", "top"][i % 3]}
        for i, row in enumerate(labelled(ROWS))
    ]
    path = tmp_path_factory.mktemp("data") / "train.parquet"
    Dataset.from_list(rows).to_parquet(path)
    return path


def clients(to: Path, num_clients: int) -> list[list[dict[str, Any]]]:
    return [load_from_disk(str(to / f"client_{i + 1}")).to_list() for i in range(num_clients)]


def split(kind: str, data: Path, to: Path, *words: object) -> list[list[int]]:
    """Runs `split` for three clients and returns the numbers of their rows."""
    assert call("split", kind, "--dataset_path", data, "--output_path", to, "--num_clients", 3, *words) == 0
    return [[row["idx"] for row in rows] for rows in clients(to, 3)]


BY_SIZE = ("iid", "dirichlet", "quantity(alpha=2)", "natural(column=domain)", "linear", "square", "exponential")
BY_TEXT = ("length(groups=3)", "topic(groups=4)")


@pytest.mark.parametrize(
    ("kind", "split_type"),
    [("gsm8k", how) for how in (*BY_SIZE, *BY_TEXT)]
    + [
        ("glue", how)
        for how in (*BY_SIZE, *BY_TEXT, "shards(per_peer=1)", "pathological(labels_per_peer=1)", "dirichlet(alpha=3)")
    ],
)
def test_every_partition_splits_by_name(kind: str, split_type: str, data: Path, tmp_path: Path) -> None:
    found = split(kind, data, tmp_path, "--split_type", split_type, "--min_size", 2)
    assert sorted(row for rows in found for row in rows) == list(range(ROWS)) and min(map(len, found)) >= 2


def test_alpha_is_that_of_the_flag_unless_the_name_says_it(data: Path, tmp_path: Path) -> None:
    def found(name: str, split_type: str, *words: object) -> list[list[int]]:
        return split("glue", data, tmp_path / name, "--split_type", split_type, *words)

    default, same = found("a", "dirichlet"), found("b", "dirichlet", "--alpha", 0.25)
    named, over = found("c", "dirichlet(alpha=3)", "--alpha", 0.25), found("d", "dirichlet", "--alpha", 3)
    assert default == same != named == over


def test_a_split_of_rows_without_labels_by_dirichlet_is_one_of_sizes(data: Path, tmp_path: Path) -> None:
    one = split("gsm8k", data, tmp_path / "one", "--split_type", "dirichlet", "--alpha", 1)
    assert one == split("gsm8k", data, tmp_path / "other", "--split_type", "quantity(alpha=1)")


@pytest.mark.parametrize("split_type", BY_TEXT)
def test_a_split_by_what_rows_hold_is_a_function_of_the_seed(split_type: str, data: Path, tmp_path: Path) -> None:
    one, same, other = (
        split("gsm8k", data, tmp_path / name, "--split_type", split_type, "--seed", seed)
        for name, seed in (("one", 0), ("same", 0), ("other", 1))
    )
    assert one == same != other


def test_texts_of_rows_are_question_and_answer_or_every_column_of_text_but_the_label() -> None:
    questions = [{"id": "a1", "answer": "4", "question": "2 + 2?"}, {"id": "a2", "answer": None, "question": "?"}]
    asked = Dataset.from_list(questions)
    assert joined_texts(asked, None, "asked") == ["2 + 2?\n4", "?\n"]
    told = Dataset.from_list([{"title": "Boats", "stars": 5, "text": "They sail.", "label": "sea"}])
    assert joined_texts(told, None, "told") == ["Boats\nThey sail.\nsea"]
    assert joined_texts(told, label_columns(None, "label"), "told") == ["Boats\nThey sail."]
    with pytest.raises(UserError, match="'numbers' has no column of text to group rows by; its columns are stars"):
        joined_texts(told.select_columns("stars"), None, "numbers")


def test_length_counts_characters_and_a_small_alpha_keeps_long_texts_apart(data: Path, tmp_path: Path) -> None:
    """Texts of 1 to 30 characters: clients of equal shares have like means, clients of few groups have not."""
    rows = [{"question": "q" * (1 + i % 30), "answer": "", "idx": i} for i in range(ROWS)]
    Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")

    def spread(alpha: float) -> float:
        out = tmp_path / f"{alpha}"
        split("gsm8k", tmp_path / "train.parquet", out, "--split_type", "length(groups=5)", "--alpha", alpha)
        means = [texts.mean for texts in read_split(out, 3, None).characters]
        return max(means) - min(means)

    assert spread(0.05) > 8 > 3 > spread(1000)


def test_another_label_column_and_a_slice_of_another_split_are_shared_out(data: Path, tmp_path: Path) -> None:
    rows = Dataset.from_parquet(str(data))
    DatasetDict({"train": rows.select(range(9)), "held": rows}).save_to_disk(str(tmp_path / "all"))
    words = ("--label", "stars", "--split", "held[:30]", "--split_type", "pathological(labels_per_peer=1)")
    found = split("glue", tmp_path / "all", tmp_path / "out", *words)
    assert sorted(row for rows in found for row in rows) == list(range(30))
    assert [len({row["stars"] for row in rows}) for rows in clients(tmp_path / "out", 3)] == [1, 1, 1]


def test_the_view_of_a_split_says_how_unequal_it_is(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    split("glue", data, tmp_path, "--split_type", "linear")
    capsys.readouterr()
    words = ("view-split", "--base_path", tmp_path, "--num_clients", 3)
    assert call(*words, "--task", "sst2", "--json") == 0
    view = json.loads(capsys.readouterr().out)
    assert view["labels"] == ["negative", "positive"] and view["sizes"] == {
        "mean": 30,
        "min": 15,
        "max": 45,
        "ratio": 3,
    }
    assert (view["label_skew"], view["effective_labels"]) == (
        shares(view["counts"]).label_skew, shares(view["counts"]).effective_labels,
    )  # fmt: skip
    assert call(*words) == 0
    assert "Rows: mean 30, 15 to 45 (ratio 3); label skew 0." in capsys.readouterr().out
    assert call(*words, "--label", "stars", "--json") == 0
    assert json.loads(capsys.readouterr().out)["labels"] == ["low", "mid", "top"]
    assert call(*words, "--dataset_type", "gsm8k") == 0
    shown = capsys.readouterr().out
    assert "Rows: mean 30, 15 to 45 (ratio 3)\n" in shown and "median" in shown


def test_the_view_of_rows_without_labels_says_how_long_their_texts_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i, lengths in enumerate(([3, 4, 9], [20, 30]), 1):
        rows = [{"question": "q" * (n - 2), "answer": "a", "idx": 0} for n in lengths]
        Dataset.from_list(rows).save_to_disk(str(tmp_path / f"client_{i}"))
    words = ("view-split", "--base_path", tmp_path, "--num_clients", 2, "--dataset_type", "gsm8k")
    assert call(*words, "--json") == 0
    view = json.loads(capsys.readouterr().out)
    assert view["labels"] == ["rows"] and view["counts"] == [[3], [2]] and view["sizes"]["mean"] == 2.5
    assert view["characters"] == [{"mean": pytest.approx(16 / 3), "median": 4}, {"mean": 25, "median": 25}]
    shown = table(read_split(tmp_path, 2, None))
    assert [column.header for column in shown.columns] == [
        "client", "rows", "share", "mean characters", "median characters",
    ]  # fmt: skip
    assert [next(iter(column.cells)) for column in shown.columns] == ["client_1", "3", "60.0%", "5", "4"]


def test_rows_without_any_text_are_shown_by_their_number_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Dataset.from_list([{"idx": 3}]).save_to_disk(str(tmp_path / "client_1"))
    words = ("view-split", "--base_path", tmp_path, "--num_clients", 1, "--dataset_type", "gsm8k")
    assert call(*words) == 0 and "characters" not in capsys.readouterr().out
    assert call(*words, "--json") == 0 and json.loads(capsys.readouterr().out)["characters"] == []


@pytest.mark.parametrize("split_type", ["length", "topic", "dirichlet"])
def test_the_real_gsm8k_is_split_without_naming_its_only_configuration(
    split_type: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder,) = real("gsm8k")
    words = ("--num_clients", 7, "--split_type", split_type, "--min_size", 50)
    assert call("split", "gsm8k", "--dataset_path", folder, "--output_path", tmp_path, *words) == 0
    capsys.readouterr()
    view = ("view-split", "--base_path", tmp_path, "--num_clients", 7, "--dataset_type", "gsm8k", "--json")
    assert call(*view) == 0
    found = json.loads(capsys.readouterr().out)
    assert sum(map(sum, found["counts"])) == 7473 and found["sizes"]["min"] >= 50
    means = [texts["mean"] for texts in found["characters"]]
    assert max(means) > (1.5 if split_type == "length" else 1.0) * min(means)


@pytest.mark.parametrize(("words", "parts"), [
    (("gsm8k", "--split_type", "shards"), ("shards(per_peer=2) needs labels", "gsm8k has none", "quantity", "natural")),
    (("gsm8k", "--split_type", "pathological"), ("needs labels",)),
    (("gsm8k", "--split_type", "length(groups=80)"), ("different lengths, too few for 80 groups", "use at most")),
    (("gsm8k", "--split_type", "topic(groups=91)"), ("90 rows have 90 different contents", "too few for 91 groups")),
    (("gsm8k", "--split_type", "topic(groups=0)"), ("groups", "greater than or equal to 1")),
    (("gsm8k", "--task", "sst2"), ("--task and --label have no effect with gsm8k",)),
    (("glue", "--split_type", "shard"), ("--split_type", "'shard'", "Did you mean 'shards'")),
    (("glue", "--split_type", "shards(per_pear=2)"), ("per_pear", "Did you mean 'per_peer'")),
    (("glue", "--split_type", "shards(per_peer=0)"), ("per_peer", "greater than or equal to 1")),
    (("glue", "--split_type", "natural"), ("column", "required")),
    (("glue", "--split_type", "natural(column=domian)"), ("'domian'", "Did you mean 'domain'")),
    (("glue", "--split_type", "pathological(labels_per_peer=3)"), ("more labels than the 2",)),
    (("glue", "--split_type", "dirichlet", "--alpha", "nan"), ("--alpha is nan", "above 0")),
    (("glue", "--task", "sst3"), ("Unknown task 'sst3'", "Did you mean 'sst2'")),
    (("glue", "--split", "train[5:2:1]"), ("train[5:2:1]",)),
    (("glue", "--label", "lable"), ("'lable'", "Did you mean 'label'")),
])  # fmt: skip
def test_a_split_that_cannot_be_is_one_sentence_and_writes_nothing(
    words: tuple[str, ...], parts: tuple[str, ...], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, *flags = words
    assert call("split", kind, "--dataset_path", data, "--output_path", tmp_path / "out", *flags) == 2
    said = capsys.readouterr().err
    assert [part for part in parts if part not in said] == [], said
    assert said.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_client_folder_of_several_splits_is_an_error(tmp_path: Path) -> None:
    DatasetDict({"train": Dataset.from_list(labelled(3))}).save_to_disk(str(tmp_path))
    with pytest.raises(UserError, match="holds several splits"):
        read_client(tmp_path)


def test_the_table_and_the_chart_of_a_split_show_every_client(tmp_path: Path) -> None:
    view = View(("no", "yes"), [[3, 1], [0, 4]])
    shown = table(view)
    assert [list(column.cells) for column in shown.columns] == [
        ["client_1", "client_2"], ["3", "0"], ["1", "4"], ["4", "4"], ["50.0%", "50.0%"],
    ]  # fmt: skip
    assert chart(view, tmp_path / "split.png").stat().st_size > 1000
