"""Whole runs of causal language models: from the recipe to adapters that plain PEFT loads."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from decoders import recipe
from dfl_lora.build import build
from dfl_lora.data.batches import TokenSource
from dfl_lora.fitting import fitted, largest, roughly
from dfl_lora.learners.stacked import StackedLearner
from dfl_lora.memory import estimate
from dfl_lora.models.base import locate, max_tokens, quiet
from dfl_lora.models.causal import head_of, hidden_states
from dfl_lora.models.packing import Packing
from dfl_lora.reading import load_recipe, resolve
from encoders import equal_bits
from speaking import write_llama
from tiny import call, written

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("causal")
    assert call("run", written(folder / "recipe.yaml", recipe(folder)), "--out", folder / "run", "--json") == 0
    return folder / "run"


def test_a_run_tells_loss_and_next_token_accuracy_and_learns(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [1, 2]
    assert lines[1]["eval_loss"]["mean"] < lines[0]["eval_loss"]["mean"]
    assert 0 <= lines[1]["accuracy"]["mean"] <= 1 and lines[1]["tokens"] > 0
    summary = json.loads((run / "summary.json").read_text())
    assert summary["metric"] == "loss" and summary["eval_loss"]["consensus"] < lines[0]["eval_loss"]["mean"]
    partition = json.loads((run / "partition.json").read_text())
    assert all(name.endswith("tokens") for name in partition["labels"]) and len(partition["labels"]) == 3
    assert sum(map(sum, partition["counts"])) == 40
    assert (run / "report.html").exists()


def test_an_adapter_is_plain_pefts_and_merges(run: Path, tmp_path: Path) -> None:
    """Law 7: plain PEFT on the published base gives the engine's logits, and so does the merged model."""
    adapter = run / "adapters" / "consensus"
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("CAUSAL_LM", None)
    base_folder = run.parent / "model"
    with quiet():
        base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
        plain = PeftModel.from_pretrained(base, str(adapter)).eval()
    assert call("export", run, "--consensus", "--merge", "--to", tmp_path / "merged") == 0
    with quiet():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    tokens = torch.tensor(AutoTokenizer.from_pretrained(tmp_path / "merged")("the cat ran home").input_ids)
    federation = build(load_recipe(run / "recipe.yaml"))
    assert isinstance(federation.learner, StackedLearner)
    from dfl_lora.checkpoint import load_checkpoint

    load_checkpoint(run / "checkpoint", federation.peers, federation.digest)
    logits = engine_logits(federation.learner, federation.peers.consensus().adapter(0), tokens)
    with torch.no_grad():
        for model in (plain, merged):
            assert torch.allclose(model(tokens.unsqueeze(0)).logits[0], logits, rtol=1e-4, atol=1e-5)


def engine_logits(learner: StackedLearner, adapter: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """Returns the logits [tokens, words] that the engine gives of one row with one adapter."""
    current, model = learner.current, learner.model
    count = np.array([len(tokens)])
    current.packing = Packing([count], [len(tokens)], learner.device, learner.dtype, causal=True)
    current.tensors = {name: value.unsqueeze(0) for name, value in adapter.items()}
    with torch.no_grad():
        hidden = hidden_states(model, {"input_ids": current.packing.pack([tokens], 0)}, current)  # type: ignore[arg-type]
        return head_of(model)(hidden)[: len(tokens)]  # type: ignore[arg-type]


def test_a_run_is_resumed_to_the_bit_and_peers_in_several_processes_are_the_simulation(run: Path) -> None:
    whole = build(load_recipe(run / "recipe.yaml"))
    alone = build(load_recipe(run / "recipe.yaml"), [1])
    for t in (1, 2):
        whole.learner.train(whole.peers, whole.method.schedule(t), t)
        alone.learner.train(alone.peers, alone.method.schedule(t), t)
    assert equal_bits(whole.peers.x[1], alone.peers.x[0])


def test_conv1d_models_run_and_their_adapters_load(tmp_path: Path) -> None:
    path = written(tmp_path / "recipe.yaml", recipe(tmp_path, "gpt2", train={"rounds": 1}))
    assert call("run", path, "--out", tmp_path / "run", "--json") == 0
    config = json.loads((tmp_path / "run/adapters/consensus/adapter_config.json").read_text())
    assert config["fan_in_fan_out"] is True
    with quiet():
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
        plain = PeftModel.from_pretrained(base, str(tmp_path / "run/adapters/peer-000")).eval()
    federation = build(load_recipe(tmp_path / "run/recipe.yaml"))
    assert isinstance(federation.learner, StackedLearner)
    from dfl_lora.checkpoint import load_checkpoint

    load_checkpoint(tmp_path / "run/checkpoint", federation.peers, federation.digest)
    tokens = torch.arange(20)
    logits = engine_logits(federation.learner, federation.peers.adapter(0), tokens)
    with torch.no_grad():
        assert torch.allclose(plain(tokens.unsqueeze(0)).logits[0], logits, rtol=1e-4, atol=1e-5)


def test_capped_and_windowed_attention_runs(tmp_path: Path) -> None:
    path = written(tmp_path / "recipe.yaml", recipe(tmp_path, "gemma2", train={"rounds": 1}))
    assert call("run", path, "--out", tmp_path / "run", "--json") == 0


def test_added_tokens_lie_at_the_mean_and_travel_with_the_adapter(tmp_path: Path) -> None:
    content = recipe(tmp_path, task={"tokens": "seed"}, train={"rounds": 1})
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
        model.resize_token_embeddings(258, mean_resizing=False)
        model.save_pretrained(tmp_path / "model")
    assert call("run", written(tmp_path / "recipe.yaml", content), "--out", tmp_path / "run", "--json") == 0
    adapter = tmp_path / "run/adapters/consensus"
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    assert tokenizer.pad_token == "[PAD]" and tokenizer.unk_token == "<unk>" and tokenizer.eos_token == "</s>"
    assert "resize_token_embeddings" in (adapter / "README.md").read_text()
    with quiet():
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    old = base.get_input_embeddings().weight.detach().clone()
    assert call("export", tmp_path / "run", "--consensus", "--merge", "--to", tmp_path / "merged") == 0
    with quiet():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    new = merged.get_input_embeddings().weight
    assert len(tokenizer) == 260 == len(new) and len(old) == 258
    assert torch.allclose(new[258:], old.mean(0).expand(2, -1), atol=1e-6)
    head = merged.get_output_embeddings().weight
    assert torch.allclose(head[258:], head[:258].mean(0).expand(2, -1), atol=1e-6)
    assert torch.equal(new[: len(old)], old)


def test_groups_shrink_where_memory_is_short_and_no_bit_changes(tmp_path: Path) -> None:
    asked = resolve(recipe(tmp_path))
    plain, small = build(asked), build(asked)
    assert fitted(plain, asked) is plain and largest(plain) == 3
    shrunk = fitted(small, asked, available=1)
    assert largest(shrunk) == 1 and shrunk.recipe.compute.group_tokens < plain.recipe.compute.group_tokens
    said = r"about \d[\d,]* MiB .* and 0 MiB are there, with one peer a pass; lower train.batch_size"
    assert re.match(said, shrunk.short)
    assert not plain.short
    for federation in (plain, shrunk):
        federation.learner.train(federation.peers, federation.method.schedule(1), 1)
    assert equal_bits(plain.peers.x, shrunk.peers.x)
    kept = resolve(recipe(tmp_path, compute={"group_tokens": 64}))
    assert fitted(build(kept), kept, available=1).recipe.compute.group_tokens == 64


def test_a_batch_larger_than_a_pass_is_not_taken_for_a_small_one(tmp_path: Path) -> None:
    """A peer's batch is never cut, so that the bound that spares a look at memory grows with it."""
    federation = build(resolve(recipe(tmp_path, train={"batch_size": 24})))
    assert isinstance(federation.learner, StackedLearner)
    federation.learner.group_tokens = 32
    found = estimate(federation)
    assert roughly(federation.learner) > found.training + found.heap


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": {"head": "private"}}, "method.head private has no effect"),
        ({"evaluate": {"metric": "f1"}}, "evaluate.metric f1 is of labels"),
        ({"task": {"label": "topic"}}, "label has no effect on kind causal_lm"),
        ({"task": {"format": "alpaca"}}, "instruction"),
        ({"task": {"name": "sst2"}}, "sst2 is a task of classification"),
        ({"data": {"partition": "dirichlet(alpha=0.5)"}}, "is by label"),
        ({"lora": {"target_modules": ["q_proj", "lm_head"]}}, "'lm_head' belongs to the output of a causal language"),
        ({"lora": {"target_modules": ".*(q_proj|lm_head)"}}, "'lm_head' belongs to the output of a causal language"),
        ({"lora": {"target_modules": ["query"]}}, "candidates are"),
    ],
)
def test_what_has_no_effect_or_cannot_be_is_refused_in_one_sentence(
    changes: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path / "recipe.yaml", recipe(tmp_path, **changes))
    assert call("run", path, "--out", tmp_path / "run") == 2
    told = capsys.readouterr().err
    assert said in told and told.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_an_encoder_is_no_causal_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = recipe(tmp_path, model={"name_or_path": "all-MiniLM-L6-v2"})
    assert call("run", written(tmp_path / "recipe.yaml", content), "--out", tmp_path / "run") == 2
    assert "causal_lm takes decoders" in capsys.readouterr().err


@pytest.mark.parametrize(("family", "target"), [("bloom", "query_key_value"), ("mamba", "in_proj")])
def test_a_family_that_the_engine_cannot_read_is_refused(
    family: str, target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = recipe(tmp_path, lora={"target_modules": [target]}, data={"partition": "iid"})
    shape = {"vocab_size": 260, "hidden_size": 32, "n_layer": 1, "n_head": 2, "num_hidden_layers": 1, "state_size": 4}
    with quiet():
        AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape)).save_pretrained(tmp_path / "model")
    assert call("run", written(tmp_path / "recipe.yaml", content), "--out", tmp_path / "run") == 2
    said = capsys.readouterr().err
    assert f"cannot read models of the family {family}" in said and said.count("\n") == 1


LONG_ROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "longest"),
    [
        ({"rope_parameters": LONG_ROPE}, 16),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, 64),
        ({"attention_chunk_size": 24}, 24),
    ],
)  # fmt: skip
def test_rows_are_cut_where_a_decoder_would_read_longer_ones_otherwise(
    change: dict[str, Any], longest: int, tmp_path: Path
) -> None:
    files = locate(str(write_llama(tmp_path / "llama")))
    config = tmp_path / "llama/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 64} | change))
    assert max_tokens(files, "causal_lm") == longest


def test_a_tokenizer_of_more_words_than_the_base_has_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = recipe(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    size = json.loads((tmp_path / "model/config.json").read_text())["vocab_size"]
    tokenizer.add_tokens([f"<|{i}|>" for i in range(size - len(tokenizer))])
    tokenizer.add_special_tokens({"eos_token": "<|end|>"})
    tokenizer.save_pretrained(tmp_path / "model")
    assert call("run", written(tmp_path / "recipe.yaml", content), "--out", tmp_path / "run") == 2
    said = capsys.readouterr().err
    assert "give a base that was saved with this tokenizer" in said and said.count("\n") == 1


def test_a_lacking_token_that_is_a_word_already_is_set_and_nothing_is_added(tmp_path: Path) -> None:
    content = recipe(tmp_path, task={"tokens": "seed"}, train={"rounds": 1})
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.add_tokens(["[PAD]", "<unk>"])
    assert tokenizer.pad_token is None and tokenizer.unk_token is None
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    assert call("run", written(tmp_path / "recipe.yaml", content), "--out", tmp_path / "run", "--json") == 0
    assert not any("embed" in name for name in load_file(tmp_path / "run/adapters/consensus/adapter_model.safetensors"))


def test_check_marks_the_trained_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pairs.jsonl").write_text(
        "".join(json.dumps({"prompt": f"say {i}: ", "completion": f"it is {i}"}) + "\n" for i in range(30))
    )
    content = recipe(tmp_path, data={"path": str(tmp_path / "pairs.jsonl"), "train": "train[:20]",
                                     "validation": "train[20:]", "partition": "iid"})  # fmt: skip
    assert call("check", written(tmp_path / "recipe.yaml", content), "--json") == 0
    text = json.loads(capsys.readouterr().out)["sample"]["text"]
    assert "say " in text and "«it is " in text and text.rstrip().endswith("»")


def test_rows_carry_targets_of_their_own_alone(tmp_path: Path) -> None:
    federation = build(resolve(recipe(tmp_path)))
    source = federation.data.peers.train[0].source
    assert isinstance(source, TokenSource) and source.targets is not None
    assert (source.targets[source.offsets[1:] - 1] < 0).all()
