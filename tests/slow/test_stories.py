"""The real Llama of 260,032 parameters: it goes on as it is known to, and learns from stories of many peers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from dfl_lora.build import Federation, build
from dfl_lora.learners.stacked import StackedLearner
from dfl_lora.models.causal import head_of, hidden_states
from dfl_lora.models.packing import Packing
from dfl_lora.reading import load_recipe
from real import DATA, real
from tiny import call

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "tinystories.yaml"


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the model; the recipe finds it and the stories."""
    model, _ = real("models/stories260K-llama", "tinystories")
    monkeypatch.setenv("DFL_LORA_DATA", str(DATA))
    return model


def continued(federation: Federation, adapter: dict[str, torch.Tensor] | None, count: int) -> list[int]:
    """Returns the greedy continuation of `<s>` that the engine gives, with an adapter or on the bare base."""
    learner = federation.learner
    assert isinstance(learner, StackedLearner)
    current, model, tokens = learner.current, learner.model, [1]
    current.tensors = {name: value.unsqueeze(0) for name, value in (adapter or {}).items()}
    head = head_of(model)  # type: ignore[arg-type]
    for _ in range(count):
        current.packing = Packing([np.array([len(tokens)])], [len(tokens)], learner.device, learner.dtype, causal=True)
        packed = current.packing.pack([torch.tensor(tokens)], 0)
        with torch.inference_mode():
            hidden = hidden_states(model, {"input_ids": packed}, current)  # type: ignore[arg-type]
            tokens.append(int(head(hidden)[len(tokens) - 1].argmax()))
    return tokens[1:]


@pytest.mark.slow
def test_the_engine_goes_on_as_the_model_is_known_to_with_and_without_fresh_adapters(folder: Path) -> None:
    golden = (folder / "GOLDEN_greedy_256.txt").read_text()
    federation = build(load_recipe(RECIPE))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for adapter in (None, federation.peers.adapter(0)):
        tokens = continued(federation, adapter, 256)
        assert tokenizer.decode(tokens, skip_special_tokens=True).strip() == golden.strip()


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["lora", "freeze_a"])
def test_peers_with_stories_of_other_topics_bring_the_loss_below_the_bases(
    schedule: str, folder: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(RECIPE, [f"method.schedule={schedule}"])
    federation = build(recipe)
    base = federation.learner.evaluate(federation.peers.consensus([0]))[0].loss
    words: list[Any] = ["run", RECIPE, "--set", f"method.schedule={schedule}", "--out", tmp_path / "run", "--json"]
    assert call(*words) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    print(f"{schedule}: base {base:.4f}, {summary['eval_loss']}")
    assert summary["eval_loss"]["consensus"] < base
    assert max(summary["eval_loss"]["per_peer"]) < base
