"""What frozen layers below the adapters make is kept, and changes nothing."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from dfl_lora.build import Federation, build
from dfl_lora.data.generator import sentences
from dfl_lora.errors import UserError
from dfl_lora.learners import activations
from dfl_lora.learners.stacked import StackedLearner
from dfl_lora.memory import estimate
from dfl_lora.metrics import Answers
from dfl_lora.models.below import Below
from dfl_lora.models.firsts import FirstsOnly
from dfl_lora.reading import resolve
from encoders import Family, distances, equal_bits, start_apart, write_encoder

TARGETS = {"bert": ["query", "value"], "roberta": ["query", "dense"], "distilbert": ["q_lin", "v_lin"]}
FAMILIES: tuple[Family, ...] = ("bert", "roberta", "distilbert")


@pytest.fixture(params=FAMILIES)
def content(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A recipe whose last layer alone carries adapters."""
    monkeypatch.setenv("DFL_LORA_CACHE", str(tmp_path / "cache"))
    Dataset.from_list(sentences("train", 40)).save_to_disk(tmp_path / "rows")
    return {
        "model": {"name_or_path": str(write_encoder(request.param, tmp_path / "base"))},
        "lora": {"r": 4, "target_modules": TARGETS[request.param], "layers_to_transform": [1]},
        "task": {"max_length": 40},
        "data": {"path": str(tmp_path / "rows"), "train": "train[:32]", "validation": "train[32:]"},
        "peers": {"num_peers": 2, "topology": "complete"},
        "train": {"rounds": 3, "local": {"epochs": 1}, "batch_size": 8, "learning_rate": 5e-3},
        "compute": {"dtype": "float32", "threads": 1},
    }


def trained(content: Mapping[str, Any], *, keep: bool = True, learner: str = "stacked") -> tuple[Federation, Answers]:
    f = build(resolve(content), learner=learner)
    if isinstance(f.learner, StackedLearner):
        assert f.learner.num_below == 1 and f.learner.kept is not None
        f.learner.kept = f.learner.kept if keep else None
    start_apart(f.peers, 0.02)
    for t in (1, 2, 3):
        f.learner.train(f.peers, f.method.schedule(t), t)
    return f, f.learner.evaluate(f.peers)[1]


def calls_of_below(f: Federation) -> list[int]:
    """Returns a list that grows with each pass in which the frozen layers are called."""
    assert isinstance(f.learner, StackedLearner)
    called = list[int]()
    below = next(m for m in f.learner.model.modules() if isinstance(m, Below))
    below.layers[0].register_forward_pre_hook(lambda *_: called.append(1))
    return called


def test_kept_activations_change_no_bit_and_equal_plain_peft(content: dict[str, Any]) -> None:
    kept, answers = trained(content)
    again, same_answers = trained(content)
    anew, others = trained(content, keep=False)
    for f in (again, anew):
        assert all(equal_bits(m, f.peers.arrays()[name]) for name, m in kept.peers.arrays().items())
    assert answers.loss == same_answers.loss == others.loss
    reference, _ = trained(content, learner="sequential")
    assert max(distances(kept.peers, reference.peers).values()) < 1e-5


def test_frozen_layers_are_called_once_for_each_row(content: dict[str, Any]) -> None:
    f = build(resolve(content))
    called = calls_of_below(f)
    for t in (1, 2, 3):
        f.learner.train(f.peers, f.method.schedule(t), t)
    first = len(called)
    assert first > 0
    f.learner.train(f.peers, f.method.schedule(4), 4)
    assert len(called) == first
    other = build(resolve(content))
    called = calls_of_below(other)
    other.learner.train(other.peers, other.method.schedule(1), 1)
    assert not called


def test_a_row_that_was_damaged_is_made_anew(content: dict[str, Any], tmp_path: Path) -> None:
    kept, _ = trained(content)
    for file in (tmp_path / "cache" / "activations").glob("*.hidden"):
        damaged = np.memmap(file, dtype=np.float32, mode="r+")
        damaged[::7] = np.nan
        damaged.flush()
    again, _ = trained(content)
    assert all(equal_bits(m, again.peers.arrays()[name]) for name, m in kept.peers.arrays().items())


def test_other_weights_and_other_layers_find_nothing_kept(content: dict[str, Any], tmp_path: Path) -> None:
    trained(content)
    files = set((tmp_path / "cache" / "activations").iterdir())
    Path(content["model"]["name_or_path"], "model.safetensors").unlink()
    write_encoder("bert", Path(content["model"]["name_or_path"]), seed=1)
    content["lora"]["target_modules"] = TARGETS["bert"]
    trained(content)
    assert files < set((tmp_path / "cache" / "activations").iterdir())


def test_a_disk_without_room_keeps_nothing_and_changes_nothing(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, _ = trained(content, keep=False)
    monkeypatch.setattr(activations, "SPARE", 1 << 40)
    full, _ = trained(content)
    assert all(equal_bits(m, full.peers.arrays()[name]) for name, m in kept.peers.arrays().items())
    assert not list((tmp_path / "cache" / "activations").iterdir())


def test_with_the_dropout_of_the_base_nothing_is_kept(content: dict[str, Any]) -> None:
    f = build(resolve(content | {"train": content["train"] | {"dropout": True}}))
    assert isinstance(f.learner, StackedLearner)
    assert f.learner.num_below == 0 and f.learner.kept is None
    assert any(isinstance(m, FirstsOnly) for m in f.learner.model.modules())


@pytest.mark.parametrize(
    ("lora", "sentence"),
    [
        ({"layers_to_transform": [5]}, "layer 5 has no module of target_modules; layers that have one are 0, 1"),
        ({"target_modules": "all-linear"}, "layers_to_transform needs target_modules to be a list of names"),
        ({"layers_to_transform": []}, "layers_to_transform"),
    ],
)
def test_layers_that_are_not_there_are_refused(content: dict[str, Any], lora: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        build(resolve(content | {"lora": content["lora"] | lora}))


def test_what_is_kept_is_nobody_elses(content: dict[str, Any], tmp_path: Path) -> None:
    trained(content)
    assert (tmp_path / "cache" / "activations").stat().st_mode & 0o777 == 0o700
    assert all(f.stat().st_mode & 0o777 == 0o600 for f in (tmp_path / "cache" / "activations").iterdir())
    assert torch.get_num_threads() == 1


def test_an_estimate_of_memory_keeps_nothing(content: dict[str, Any], tmp_path: Path) -> None:
    """It cuts batches, whose rows are no longer those of their table."""
    content["task"]["max_length"] = 6  # so that rows are of one length
    assert estimate(build(resolve(content))).total > 0
    kept = tmp_path / "cache" / "activations"
    assert not any(np.memmap(file, dtype=np.uint64, mode="r").any() for file in kept.glob("*.checksums"))


def test_another_configuration_of_the_same_weights_finds_nothing_kept(content: dict[str, Any], tmp_path: Path) -> None:
    trained(content)
    files = set((tmp_path / "cache" / "activations").iterdir())
    config = Path(content["model"]["name_or_path"], "config.json")
    config.write_text(
        json.dumps(
            json.loads(config.read_text()) | {"layer_norm_eps": 1e-4, "activation": "relu", "hidden_act": "relu"}
        )
    )
    trained(content)
    assert len(set((tmp_path / "cache" / "activations").iterdir())) == 2 * len(files)


def test_a_table_that_an_evaluation_opened_is_written_in_training(content: dict[str, Any]) -> None:
    f = build(resolve(content))
    f.learner.evaluate(f.peers)
    f.learner.train(f.peers, f.method.schedule(1), 1)
