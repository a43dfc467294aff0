"""Splits on disk: every partition by name, folders that appear together, and what is shown of them."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, load_from_disk

from dfl_lora.data.shares import shares
from dfl_lora.data.splits import View, chart, read_client, table
from dfl_lora.errors import UserError
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


@pytest.mark.parametrize(
    ("kind", "split_type"),
    [("gsm8k", how) for how in BY_SIZE]
    + [
        ("glue", how)
        for how in (*BY_SIZE, "shards(per_peer=1)", "pathological(labels_per_peer=1)", "dirichlet(alpha=3)")
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
    assert "Rows: mean 30, 15 to 45 (ratio 3)\n" in capsys.readouterr().out


@pytest.mark.parametrize(("words", "parts"), [
    (("gsm8k", "--split_type", "shards"), ("shards(per_peer=2) needs labels", "gsm8k has none", "quantity", "natural")),
    (("gsm8k", "--split_type", "pathological"), ("needs labels",)),
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
