"""What the command line refuses, and how it says so: an option without effect is a mistake."""

from pathlib import Path

import pytest

from dfl_lora.data.glue import TASKS
from tiny import call, toy, written

TRAIN = (
    "train", "--model_checkpoint", "nowhere/model", "--dataset_path_template", "nowhere/{i}",
    "--val_dataset_path_template", "nowhere/v", "--num_clients", 3, "--lora_r", 2, "--lora_alpha", 2,
    "--target_modules", "q", "--training_type", "LoRA", "--name", "ring",
)  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
def test_every_task_of_glue_can_be_trained(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(*TRAIN, "--dataset_type", task) == 2
    assert "nowhere/" in capsys.readouterr().err


@pytest.mark.parametrize("task", ["gsm", "rt"])
def test_another_task_is_refused_with_the_ones_there_are(task: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*TRAIN, "--dataset_type", task) == 2
    said = capsys.readouterr().err
    assert f"--dataset_type is '{task}'; allowed are {', '.join(TASKS)}, gsm8k." in said and said.count("\n") == 1


@pytest.mark.parametrize("words", [
    (*TRAIN, "--dataset_type", "rte", "--training_type", "lorra"),
    (*TRAIN, "--dataset_type", "rte", "--num_clients", "x"),
])  # fmt: skip
def test_a_value_that_is_none_of_an_options_is_told_in_two_sentences(
    words: tuple[object, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*words) == 2
    said = capsys.readouterr().err
    assert said.endswith(". See dfl-lora train --help.\n") and "Value error" not in said


@pytest.mark.parametrize(("words", "said"), [
    (("--split_type", "iid", "--alpha", 0.001), "--alpha has no effect on iid; leave it out, or use dirichlet, q"),
    (("--split_type", "shards", "--alpha", 0.25), "--alpha has no effect on shards"),
    (("--split_type", "dirichlet", "--alpha", "inf"), "--alpha is inf; Dirichlet needs a finite number above 0."),
    (("--split_type", "iid", "--alpha", "-1"), "--alpha is -1; Dirichlet needs a finite number above 0."),
    (("--split_type", "dirichlet(min_size=5)"), "the fewest rows of a client are --min_size 5."),
])  # fmt: skip
def test_an_option_of_a_split_without_effect_is_refused_before_data_is_read(
    words: tuple[object, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("split", "glue", "--dataset_path", "nowhere", "--output_path", tmp_path / "out", *words) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("words", [("toy.yaml",), ("--set", "train.rounds=5")])
def test_a_schema_is_printed_without_a_recipe(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert call("check", "--schema", *words) == 2
    assert "--schema" in capsys.readouterr().err


def test_one_exchange_is_not_many(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = written(tmp_path / "toy.yaml", toy(peers={"num_peers": 3, "topology": "complete"}))
    assert call("check", recipe) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "1 exchange to a thousandth" in said and "1 exchanges" not in said
