"""Rows of causal runs: who holds which, and what is told of them before they are trained on."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from decoders import byte_tokenizer, recipe, texts
from dfl_lora import machine
from dfl_lora.build import build
from dfl_lora.data.causal import CausalTokenization
from dfl_lora.data.formats import EMPTY
from dfl_lora.data.sources import Excerpt, load_rows
from dfl_lora.reading import resolve
from real import real
from speaking import ROWS, write_llama, write_questions
from tiny import call, written

GAPS = (0, 3, 4, 17, 39)
"""Rows of which nothing can be learnt."""


def with_gaps(folder: Path, **changes: Any) -> dict[str, Any]:
    """Returns a recipe whose rows are prompts and completions, some of them without a completion."""
    rows = [{"prompt": row["text"][:12], "completion": "" if i in GAPS else row["text"]}
            for i, row in enumerate(texts(40))]  # fmt: skip
    (folder / "gaps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"path": str(folder / "gaps.jsonl"), "validation": "train[-20:]", "train": "train"}
    return recipe(folder, data=data | changes.pop("data", {}), task={"bad_rows": "skip"} | changes.pop("task", {}))


def partition_of(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "partition.json").read_text())
    return found


def tokens_of(content: dict[str, Any]) -> list[list[list[int]]]:
    """Returns the tokens of each row of each peer."""
    found = []
    for shard in build(resolve(content)).data.peers.train.values():
        source: Any = shard.source
        spans = [(source.offsets[row], source.offsets[row + 1]) for row in shard.rows]
        found.append([source.columns["input_ids"][start:end].tolist() for start, end in spans])
    return found


@pytest.mark.parametrize(
    ("file", "data", "says"),
    [
        ("rows.jsonl", {"train": "train[50%:]", "validation": "train[:50%]"}, "11 rows of '{}' (train[50%:])"),
        ("rows.jsonl", {"train": "train[:5]", "validation": "train[-4:]"}, "4 rows of '{}' (train[-4:])"),
        ("train/validation.jsonl", {"path": "train"}, "21 rows of '{}' (validation)"),
        ("rows.jsonl", {"path": "train", "validation": "rows.jsonl"}, "21 rows of '{}' cannot"),
    ],
)
def test_a_bad_row_is_told_by_its_split_and_its_number_in_it(
    file: str, data: dict[str, str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = recipe(tmp_path)
    rows = [{"text": row["text"] if i < 20 else ""} for i, row in enumerate(texts(21))]
    write_questions(tmp_path / "train" / "train.jsonl", texts(20))
    write_questions(tmp_path / file, rows)
    named = {key: str(tmp_path / value) for key, value in data.items() if (tmp_path / value).exists()}
    content["data"] = {"path": str(tmp_path / file), "partition": "iid"} | data | named
    place = content["data"]["path"] if "cannot" not in says else content["data"]["validation"]
    assert call("run", written(tmp_path / "recipe.yaml", content), "--out", tmp_path / "run") == 2
    said = capsys.readouterr().err
    assert says.format(place) in said and "the first is row 20." in said and said.count("\n") == 1


def test_a_run_on_the_saved_rows_of_one_that_left_some_out_has_the_same_rows(tmp_path: Path) -> None:
    first = with_gaps(tmp_path)
    assert call("run", written(tmp_path / "a.yaml", first), "--out", tmp_path / "a", "--json") == 0
    saved = {"partition": {"kind": "saved", "path": str(tmp_path / "a")}}
    second = with_gaps(tmp_path, data=saved)
    assert call("run", written(tmp_path / "b.yaml", second), "--out", tmp_path / "b", "--json") == 0
    one, other = partition_of(tmp_path / "a"), partition_of(tmp_path / "b")
    assert one["rows"] == other["rows"] and one["num_rows"] == other["num_rows"] == 40
    assert sorted(row for part in one["rows"] for row in part) == [i for i in range(40) if i not in GAPS]
    assert tokens_of(first) == tokens_of(second)


def test_saved_rows_that_would_be_left_out_now_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("run", written(tmp_path / "a.yaml", with_gaps(tmp_path)), "--out", tmp_path / "a", "--json") == 0
    path = tmp_path / "gaps.jsonl"
    saved = {"partition": {"kind": "saved", "path": str(tmp_path / "a")}}
    content = written(tmp_path / "b.yaml", with_gaps(tmp_path, data=saved))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[7]["completion"] = ""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert call("run", content, "--out", tmp_path / "b") == 2
    assert f"Row 7 of '{path}' is a saved peer's, and is left out here" in capsys.readouterr().err


THINGS = ("boat", "sail", "bread", "cake")
ALPACA = [
    {"instruction": f"Name a {thing}.", "input": "quickly" if i % 2 else "", "output": f"A {thing} of {i}."}
    for i, thing in enumerate(THINGS * 10)
]


@pytest.mark.parametrize("name", ["alpaca_demo", "gsm8k"])
def test_what_rows_say_is_their_columns_without_a_word_of_a_template(name: str) -> None:
    (folder,) = real(name)
    rows = load_rows(str(folder), None, "train").select(range(300))
    made = CausalTokenization(byte_tokenizer(), "digest", 8192, "right", None, "refuse").rows(Excerpt(rows, "here"))
    names = ("instruction", "output", "input") if name == "alpaca_demo" else ("question", "answer")
    assert made.contents == ["\n".join(row[name] for name in names if row[name]) for row in rows]


def test_rows_that_are_cut_or_left_out_are_counted_once_and_told_of_which(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """40 rows, 5 of them gaps; what is trained on is `train`, what is evaluated on its last 20."""
    content = with_gaps(tmp_path, task={"max_length": 40}, data={"partition": "iid"})
    lengths = [len(row["text"][:12]) + len(row["text"]) + 1 for i, row in enumerate(texts(40)) if i not in GAPS]
    cut, late = sum(n > 40 for n in lengths), sum(n > 40 for n in lengths[-19:])
    assert 0 < late < cut < len(lengths)
    path = written(tmp_path / "recipe.yaml", content)
    notes = {
        "of 40 training rows cut at 40 tokens": cut, f"of 40 training rows left out: {EMPTY}": 5,
        "of 20 validation rows cut at 40 tokens": late, f"of 20 validation rows left out: {EMPTY}": 1,
    }  # fmt: skip
    assert call("check", path, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["partition"]["notes"] == notes and found["sample"]["cut"] is None
    assert call("check", path) == 0
    shown = capsys.readouterr().out
    assert call("run", path, "--out", tmp_path / "run") == 0
    said = " ".join(capsys.readouterr().out.split())
    for note, count in notes.items():
        assert f"{count} {note}" in " ".join(shown.split()) and f"{count} {note}" in said
    assert "may be cut" not in shown and "1 rows" not in said


def test_topics_are_told_by_the_words_of_the_columns_alone(tmp_path: Path) -> None:
    (tmp_path / "alpaca.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ALPACA))
    data = {
        "path": str(tmp_path / "alpaca.jsonl"), "train": "train", "validation": "train[-8:]",
        "partition": {"kind": "topic", "groups": 4, "alpha": 0.5, "min_size": 5},
    }  # fmt: skip
    model = {"name_or_path": str(write_llama(tmp_path / "of-more-positions"))}
    found = build(resolve(recipe(tmp_path, data=data, model=model, task={"max_length": 320}))).data
    assert {name.split(", ")[0] for name in found.labels} == set(THINGS)
    assert {word for name in found.labels for word in name.split(", ")} <= {*THINGS, "quickly"}
    assert [sum(column) for column in zip(*found.counts, strict=True)] == [10, 10, 10, 10]


def test_gsm8k_trains_with_the_folder_of_its_splits_as_the_rows_to_evaluate_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, whole = write_llama(tmp_path / "model"), tmp_path / "gsm8k"
    write_questions(whole / "train.jsonl", ROWS)
    write_questions(whole / "test.jsonl", ROWS[:2])
    for i in (1, 2):
        write_questions(tmp_path / f"client_{i}.jsonl", ROWS[2 * i : 2 * i + 2])
    words = ("--model_checkpoint", model, "--dataset_path_template", tmp_path / "client_{i}.jsonl",
             "--val_dataset_path_template", whole, "--num_clients", 2, "--lora_r", 2, "--lora_alpha", 4,
             "--target_modules", "q_proj", "--training_type", "DFL-LoRA", "--dataset_type", "gsm8k", "--name", "ring",
             "--num_rounds", 1, "--log_path", tmp_path / "log", "--out", tmp_path / "run", "--json",
             "--set", "compute.threads=1", "--set", "compute.dtype=float32")  # fmt: skip
    assert call("train", *words) == 0
    assert json.loads(capsys.readouterr().out)["eval_loss"]["mean"] > 0
    content = {**yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())}
    shards = build(resolve(content)).data.peers.validation.values()
    assert [len(shard.rows) for shard in shards] == [2, 2]


def test_tokens_that_the_tokenizer_has_already_are_not_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = recipe(tmp_path, task={"tokens": "seed"})
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]", "unk_token": "<unk>"})
    tokenizer.save_pretrained(tmp_path / "model")
    assert call("run", written(tmp_path / "recipe.yaml", content), "--out", tmp_path / "run") == 2
    said = capsys.readouterr().err
    assert "task.tokens seed has no effect on this base" in said and said.count("\n") == 1


def test_check_tells_the_passes_that_fit_where_memory_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, told = written(tmp_path / "recipe.yaml", recipe(tmp_path)), []
    for available in (2**40, 0):
        monkeypatch.setattr(machine, "available_memory", lambda available=available: available)
        assert call("check", path, "--json") == 0
        told.append(json.loads(capsys.readouterr().out)["recipe"]["compute"]["group_tokens"])
    assert told[1] < told[0]


def test_the_table_of_rows_without_labels_or_groups_has_one_column(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path / "recipe.yaml", recipe(tmp_path, data={"partition": "iid"}))
    assert call("check", path) == 0
    said = capsys.readouterr().out
    (header,) = (line for line in said.splitlines() if "peer" in line and "rows" in line and "┃" in line)
    assert [cell.strip() for cell in header.strip("┃").split("┃")] == ["peer", "rows"]
