"""`dfl-lora run`: the run directory, what the screen says, settings, and going on after a stop."""

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from tiny import ONE_THREAD, Content, call, failing, files_of, text, toy, written

LINE_KEYS = {
    "round", "loss", "accuracy", "consensus_error", "product_disagreement", "relative_disagreement",
    "bytes_sent_per_peer", "messages", "seconds", "tokens",
}  # fmt: skip
SUMMARY_KEYS = {
    "recipe_digest", "num_peers", "rounds", "accuracy", "consensus_error", "product_disagreement",
    "relative_disagreement", "bytes_sent_per_peer", "seconds", "tokens_per_second", "mfu", "peak_rss_bytes", "versions",
}  # fmt: skip
SECONDS = {"train", "exchange", "wait", "evaluate", "total"}
ADAPTER_FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors"]


def finished(folder: Path, content: Content, *words: object) -> Path:
    """Runs a recipe in folder `run` and returns it."""
    run = folder / "run"
    assert call("run", written(folder / "recipe.yaml", content), "--out", run, "--json", *words) == 0
    return run


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]


def summary_of(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "summary.json").read_text()))


def without_clocks(run: Path) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, bytes | None]]:
    """Returns what a run leaves that does not depend on the clock: lines, summary, adapters and checkpoint."""
    clocks = {"seconds", "tokens_per_second", "peak_rss_bytes"}
    lines = [{k: v for k, v in line.items() if k not in clocks} for line in lines_of(run)]
    summary = {k: v for k, v in summary_of(run).items() if k not in clocks}
    files = {name: content for name, content in files_of(run).items() if name.endswith(".safetensors")}
    return lines, summary, files


Tensors = dict[str, torch.Tensor]


def adapter_of(run: Path, name: str) -> Tensors:
    return dict(load_file(run / "adapters" / name / "adapter_model.safetensors"))


def test_help_imports_no_torch() -> None:
    words = [sys.executable, "-X", "importtime", "-m", "dfl_lora", "--help"]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60)
    loaded = set(re.findall(r"\|\s+(\w+)$", done.stderr, re.MULTILINE))
    assert "dfl_lora" in loaded and loaded.isdisjoint({"torch", "transformers", "peft", "datasets", "matplotlib"})
    for verb in ("run", "train", "split", "view-split", "export", "eval", "chat"):
        assert re.search(rf"\b{verb}\b", done.stdout)


@pytest.mark.parametrize("verb", ["run", "train", "split", "view-split", "export", "eval", "chat"])
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(verb, "--help") == 0
    assert "Usage: dfl-lora" in capsys.readouterr().out


def test_the_run_directory_of_the_toy_is_as_the_contract_says(toy_run: Path) -> None:
    assert sorted(f.name for f in toy_run.iterdir()) == [
        "checkpoint", "log.txt", "partition.json", "recipe.yaml", "report.html", "rounds.jsonl", "summary.json",
    ]  # fmt: skip
    assert sorted(f.name for f in (toy_run / "checkpoint").iterdir()) == ["latest.json", "state-000002.safetensors"]


def test_the_run_directory_of_a_text_run_holds_an_adapter_of_each_peer_and_of_the_consensus(text_run: Path) -> None:
    assert sorted(f.name for f in text_run.iterdir()) == [
        "adapters", "checkpoint", "log.txt", "partition.json", "recipe.yaml", "report.html", "rounds.jsonl",
        "summary.json",
    ]  # fmt: skip
    adapters = text_run / "adapters"
    assert sorted(f.name for f in adapters.iterdir()) == ["consensus", "peer-000", "peer-001", "peer-002"]
    for folder in adapters.iterdir():
        assert sorted(f.name for f in folder.iterdir()) == ADAPTER_FILES


def test_a_line_of_rounds_has_the_keys_of_the_contract(text_run: Path) -> None:
    lines = lines_of(text_run)
    assert [line["round"] for line in lines] == [1, 2]
    for line in lines:
        assert line.keys() >= LINE_KEYS
        assert line["loss"].keys() == {"mean", "min", "max"}
        assert line["accuracy"].keys() == {"mean", "min", "max", "per_peer"} and len(line["accuracy"]["per_peer"]) == 3
        assert line["seconds"].keys() == SECONDS
        assert line["seconds"]["total"] >= sum(line["seconds"].values()) - line["seconds"]["total"]
        assert (line["messages"], line["refused"], line["skipped_steps"]) == (6, {}, 0)
        assert line["loss"]["min"] <= line["loss"]["mean"] <= line["loss"]["max"]
        assert line["tokens"] > 0 and line["bytes_sent_per_peer"] > 0


def test_the_summary_has_the_keys_of_the_contract(text_run: Path) -> None:
    summary, lines = summary_of(text_run), lines_of(text_run)
    assert summary.keys() >= SUMMARY_KEYS
    assert summary["accuracy"].keys() == {"mean", "min", "max", "per_peer", "ci95", "consensus"}
    assert (summary["num_peers"], summary["rounds"], summary["mfu"]) == (3, 2, None)
    assert summary["bytes_sent_per_peer"] == sum(line["bytes_sent_per_peer"] for line in lines)
    assert summary["seconds"].keys() == SECONDS
    assert summary["seconds"]["train"] == pytest.approx(sum(line["seconds"]["train"] for line in lines))
    assert summary["tokens_per_second"] > 0 and summary["peak_rss_bytes"] > 2**20
    assert summary["versions"].keys() >= {"python", "torch", "transformers", "peft", "dfl-lora"}
    for key in ("consensus_error", "product_disagreement", "relative_disagreement"):
        assert summary[key] == lines[-1][key]


def test_the_bytes_of_a_round_are_the_vector_times_the_neighbours(tmp_path: Path, toy_run: Path) -> None:
    def bytes_of(run: Path) -> float:
        return float(lines_of(run)[0]["bytes_sent_per_peer"])

    path = finished(tmp_path, toy(peers={"topology": {"kind": "edges", "edges": [[0, 1], [1, 2]]}}))
    per_neighbour = bytes_of(toy_run) / 2
    assert bytes_of(path) == pytest.approx(per_neighbour * 4 / 3)
    assert lines_of(path)[0]["messages"] == 4
    vector = 4 * 163  # float32: A and B of rank 2 on 8 x 16 and 16 x 16, a head of 16 x 3 + 3
    assert vector < per_neighbour < vector + 100


def test_the_first_gossip_of_the_seeds_order_is_counted(tmp_path: Path) -> None:
    run = finished(tmp_path, toy(), "--set", "train.order=seed", "--set", "train.rounds=1")
    assert summary_of(run)["bytes_sent_per_peer"] == 2 * lines_of(run)[0]["bytes_sent_per_peer"] > 0


def test_a_run_in_which_every_peer_is_lost_fails_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = written(tmp_path / "toy.yaml", toy())
    words = ("--set", "train.learning_rate=1e39", "--set", "train.optimizer=sgd")
    assert call("run", recipe, "--out", tmp_path / "run", *words) == 3
    assert "every peer's adapter became non-finite" in capsys.readouterr().err
    assert not (tmp_path / "run" / "summary.json").exists()


def test_the_recipe_of_a_run_is_resolved_and_carries_its_digest(toy_run: Path) -> None:
    recipe = yaml.safe_load((toy_run / "recipe.yaml").read_text())
    assert recipe["digest"] == summary_of(toy_run)["recipe_digest"]
    assert recipe["compute"] == {
        **ONE_THREAD, "attention": "sdpa", "group_tokens": 4096, "device": "cpu", "store": "memory",
    }  # fmt: skip
    assert recipe["lora"]["lora_alpha"] == 16


def test_the_recipe_of_a_run_runs_again_with_the_same_result_where_there_is_nothing_to_resume(
    toy_run: Path, tmp_path: Path
) -> None:
    assert call("run", toy_run / "recipe.yaml", "--out", tmp_path / "again", "--resume", "--json") == 0
    assert without_clocks(tmp_path / "again") == without_clocks(toy_run)


def test_compute_auto_is_resolved_in_the_recipe_of_the_run(tmp_path: Path) -> None:
    content = toy(compute={"dtype": "auto"}, train={"rounds": 1})
    recipe = yaml.safe_load((finished(tmp_path, content) / "recipe.yaml").read_text())
    assert recipe["compute"]["dtype"] in ("float32", "bfloat16")
    assert recipe["compute"]["attention"] == ("eager" if recipe["compute"]["dtype"] == "bfloat16" else "sdpa")


def test_an_adapter_says_its_base_by_name_and_digest_and_never_by_a_path(text_run: Path, model: Path) -> None:
    for folder in (text_run / "adapters").iterdir():
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "tiny-distilbert" and "/" not in json.dumps(config)
        assert len(config["auto_mapping"]["base_weights_sha256"]) == 64
        assert (config["r"], config["lora_alpha"], config["peft_type"]) == (2, 16, "LORA")
        assert config["modules_to_save"] == ["classifier", "pre_classifier"]
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            assert file.metadata() == {"format": "pt"}
            names = set(file.keys())
        layer = "base_model.model.distilbert.transformer.layer.0.attention.q_lin"
        assert {f"{layer}.lora_A.weight", f"{layer}.lora_B.weight", "base_model.model.classifier.weight"} <= names
        readme = (folder / "README.md").read_text()
        assert "base_model: tiny-distilbert" in readme and str(model.parent) not in readme


def test_the_consensus_adapter_is_the_mean_of_all_factors_and_heads(text_run: Path) -> None:
    peers = [adapter_of(text_run, f"peer-00{k}") for k in range(3)]
    for name, value in adapter_of(text_run, "consensus").items():
        torch.testing.assert_close(value, torch.stack([peer[name] for peer in peers]).mean(0))


def test_the_code_in_the_readme_of_an_adapter_loads_it(text_run: Path, model: Path) -> None:
    folder = text_run / "adapters" / "peer-001"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own, about names that transformers deprecates
        base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=2)
        loaded = PeftModel.from_pretrained(base, str(folder)).eval()
    own = dict(loaded.named_parameters())
    for name, value in adapter_of(text_run, "peer-001").items():
        stem = name.removesuffix(".weight").removesuffix(".bias")
        kind = "modules_to_save.default" if "lora_" not in name else "default"
        assert torch.equal(own[f"{stem}.{kind}.{name.rpartition('.')[2]}"], value)


def test_without_a_terminal_only_the_beginning_and_the_end_are_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = written(tmp_path / "recipe.yaml", toy(train={"rounds": 3}))
    assert call("run", recipe, "--out", tmp_path / "run") == 0
    printed = capsys.readouterr()
    assert printed.err == "" and "\x1b" not in printed.out and "round  " not in printed.out
    assert printed.out.startswith("toy: 3 peers on ring (3 edges), lora, head shared, 163 numbers a peer")
    assert printed.out.rstrip().endswith(f"report: {tmp_path / 'run' / 'report.html'}")
    assert "worst peer" in printed.out
    log = (tmp_path / "run" / "log.txt").read_text()
    assert [line.split()[:2] for line in log.splitlines() if line.startswith("round")] == [
        ["round", "1"], ["round", "2"], ["round", "3"],
    ]  # fmt: skip
    assert all(word in log for word in ("loss", "accuracy", "disagreement", "consensus error", "sent", "report: "))


def test_on_a_terminal_each_round_is_a_line_as_it_ends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert call("run", written(tmp_path / "recipe.yaml", toy()), "--out", tmp_path / "run") == 0
    printed = " ".join(re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", capsys.readouterr().out).split())
    number = r"[\d.e+-]+"
    for t in (1, 2):
        assert re.search(
            rf"round {t} loss {number} accuracy {number} \(worst {number}\) disagreement {number} "
            rf"consensus error {number} sent {number} kB a peer {number} s",
            printed,
        )
    assert "2/2" in printed and re.search(r"\d:\d\d:\d\d", printed)  # the bar, and the time that is left


def test_the_run_directory_is_runs_and_the_name_unless_the_recipe_or_the_flag_says_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = written(tmp_path / "recipe.yaml", toy(train={"rounds": 1}))
    assert call("run", recipe, "--set", "name=other", "--json") == 0
    assert call("run", recipe, "--set", "output.dir=third", "--json") == 0
    assert [f.name for f in (tmp_path / "runs").iterdir()] == ["other"]
    assert (tmp_path / "third" / "summary.json").exists()
    assert summary_of(tmp_path / "runs" / "other")["name"] == "other"


def test_settings_reach_the_run(tmp_path: Path) -> None:
    settings = (
        "train.rounds=1",
        "train.local.epochs=1",
        "peers.topology=complete",
        "data.partition=dirichlet(alpha=1)",
    )
    run = finished(tmp_path, toy(), *(word for setting in settings for word in ("--set", setting)))
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    assert recipe["train"]["local"] == {"steps": None, "epochs": 1}
    assert (recipe["peers"]["topology"], recipe["data"]["partition"]["alpha"]) == ("complete", 1)
    facts = json.loads((run / "partition.json").read_text())
    assert lines_of(run)[0]["tokens"] == sum(map(sum, facts["counts"])) == 1000


def test_overwrite_replaces_a_run_and_leaves_other_files(text_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(text_run, tmp_path / "run"))
    (run / "notes.txt").write_text("mine")
    finished(tmp_path, toy(train={"rounds": 1}), "--overwrite")
    assert not (run / "adapters").exists() and len(lines_of(run)) == 1 and (run / "notes.txt").read_text() == "mine"
    assert "text" not in (run / "log.txt").read_text()
    assert [f.name for f in (run / "checkpoint").glob("state-*")] == ["state-000001.safetensors"]


@pytest.mark.parametrize(("checkpoint_every", "writes"), [(1, 16), (2, 16)])
def test_a_stopped_run_goes_on_to_the_result_of_the_whole_run(
    checkpoint_every: int, writes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the midst of writing a checkpoint: 3 files are synced before round 1, and 2 a checkpoint."""
    content = toy(
        train={"rounds": 5, "local": {"epochs": 1}, "batch_size": 64, "max_grad_norm": 1.0},
        data={"partition": "dirichlet(alpha=0.5)"},
        method={"schedule": "freeze_a", "head": "private"},
        evaluate={"rows": 50, "every": 2},
        output={"checkpoint_every": checkpoint_every},
    )
    whole = finished(tmp_path / "whole", content)
    recipe, run = written(tmp_path / "recipe.yaml", content), tmp_path / "run"
    with monkeypatch.context() as stopped:
        stopped.setattr(os, "fsync", failing(KeyboardInterrupt(), writes))
        assert call("run", recipe, "--out", run, "--json") == 130
    assert not (run / "summary.json").exists() and 0 < len(lines_of(run)) < 5
    assert call("run", recipe, "--out", run, "--resume", "--json") == 0
    assert without_clocks(run) == without_clocks(whole)


@pytest.fixture(scope="module")
def resumed(toy_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the finished toy run with a torn last line, resumed with other `compute`."""
    run = Path(shutil.copytree(toy_run, tmp_path_factory.mktemp("resumed") / "run"))
    with (run / "rounds.jsonl").open("a") as file:
        file.write('{"round": 3, "lo')
    settings = ("--set", "compute.dtype=bfloat16", "--set", "compute.group_tokens=8")
    assert call("run", toy_run.parent / "toy.yaml", "--out", run, "--resume", "--json", *settings) == 0
    return run


def test_a_resumed_run_says_so_and_each_round_stands_in_its_log_once(resumed: Path, toy_run: Path) -> None:
    log, whole = ((run / "log.txt").read_text().splitlines() for run in (resumed, toy_run))
    assert log.index("going on after round 2") == 3
    assert [line[:9] for line in log[1:3]] == ["round   1", "round   2"]
    assert log[:3] == whole[:3] and len(log) == len(whole) + 1


def test_a_resumed_run_computes_as_it_was_started(resumed: Path, toy_run: Path) -> None:
    assert (resumed / "recipe.yaml").read_bytes() == (toy_run / "recipe.yaml").read_bytes()


def test_a_torn_last_line_and_a_finished_run_are_resumed_to_the_same_end(resumed: Path, toy_run: Path) -> None:
    assert without_clocks(resumed) == without_clocks(toy_run)


def test_another_seed_gives_another_record(toy_run: Path, tmp_path: Path) -> None:
    assert without_clocks(finished(tmp_path, toy(train={"seed": 1})))[0] != without_clocks(toy_run)[0]


def test_peers_are_evaluated_every_few_rounds_and_after_the_last_and_json_prints_the_summary_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished(tmp_path, toy(train={"rounds": 5}, evaluate={"every": 3}))
    assert [line["round"] for line in lines_of(run) if "accuracy" in line] == [3, 5]
    assert summary_of(run)["accuracy"]["per_peer"] == lines_of(run)[-1]["accuracy"]["per_peer"]
    printed = capsys.readouterr()
    assert json.loads(printed.out) == summary_of(run) and printed.err == ""
    assert "round   1" in (run / "log.txt").read_text()


@pytest.fixture(scope="module")
def skewed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose peers differ much, evaluated before mixing as well."""
    content = toy(
        method={"head": "private"}, data={"partition": "dirichlet(alpha=0.1)"},
        train={"local": {"steps": 20}, "learning_rate": 0.05}, evaluate={"rows": None, "before_mixing": True},
    )  # fmt: skip
    return finished(tmp_path_factory.mktemp("skewed"), content)


def test_peers_are_evaluated_before_mixing_when_asked(skewed: Path) -> None:
    for line in lines_of(skewed):
        assert line["accuracy_before_mixing"].keys() == line["accuracy"].keys()
        assert line["accuracy_before_mixing"]["per_peer"] != line["accuracy"]["per_peer"]


def test_the_interval_is_students_over_peers(skewed: Path) -> None:
    accuracy = summary_of(skewed)["accuracy"]
    spread = torch.tensor(accuracy["per_peer"], dtype=torch.float64).std(correction=1).item()
    assert accuracy["ci95"] == pytest.approx(4.302652729911275 * spread / 3**0.5) and spread > 0


def test_a_loss_that_is_not_finite_is_null_and_does_not_stop_the_run(tmp_path: Path) -> None:
    content = toy(train={"optimizer": "sgd", "learning_rate": 1e38})
    lines = lines_of(finished(tmp_path, content))
    assert len(lines) == 2 and lines[-1]["loss"]["mean"] is None
    assert "NaN" not in json.dumps(lines) and "Infinity" not in json.dumps(lines)


@pytest.fixture(scope="module")
def unmoved(model: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one peer whose learning rate is too small to move anything; it leaves the consensus alone."""
    content = text(
        model, rows / "train.csv", rows / "validation.csv", peers={"num_peers": 1}, method={"head": "frozen"},
        train={"learning_rate": 1e-30, "rounds": 1}, output={"adapters": "consensus"},
    )  # fmt: skip
    return finished(tmp_path_factory.mktemp("unmoved"), content)


def test_only_the_consensus_adapter_is_written_when_asked(unmoved: Path) -> None:
    assert [f.name for f in (unmoved / "adapters").iterdir()] == ["consensus"]


@pytest.mark.parametrize(
    ("schedule", "head"), [("lora", "shared"), ("freeze_a", "shared"), ("lora", "private"), ("freeze_a", "frozen")]
)
def test_a_schedule_and_a_head_train_and_share_what_they_say(
    schedule: str, head: str, model: Path, rows: Path, unmoved: Path, tmp_path: Path
) -> None:
    content = text(
        model, rows / "train.csv", rows / "validation.csv",
        method={"schedule": schedule, "head": head}, peers={"topology": "complete"}, train={"learning_rate": 0.01},
    )  # fmt: skip
    run = finished(tmp_path, content)
    one, other = adapter_of(run, "peer-000"), adapter_of(run, "peer-001")
    start = adapter_of(unmoved, "consensus")
    moved = {kind_of(name) for name in one if not torch.equal(one[name], start[name])}
    apart = {kind_of(name) for name in one if not torch.allclose(one[name], other[name])}
    trained = {"lora": {"A", "B"}, "freeze_a": {"B"}}[schedule]
    assert moved == trained | ({"head"} if head != "frozen" else set())
    assert apart == ({"head"} if head == "private" else set())


def kind_of(name: str) -> str:
    return "A" if "lora_A" in name else "B" if "lora_B" in name else "head"


@pytest.mark.parametrize("schedule", ["lora", "freeze_a"])
def test_the_built_in_sentences_train_a_text_encoder(schedule: str, model: Path, tmp_path: Path) -> None:
    content = text(
        model, Path("builtin/sentences"), Path("unused"), method={"schedule": schedule}, evaluate={"rows": 32},
        lora={"target_modules": "all-linear"},
    )  # fmt: skip
    content["data"] = {"path": "builtin/sentences", "partition": "dirichlet(alpha=0.5, min_size=100)"}
    run = finished(tmp_path, content)
    facts = json.loads((run / "partition.json").read_text())
    assert facts["labels"] == ["0", "1"] and sum(map(sum, facts["counts"])) == 4000
    assert min(map(sum, facts["counts"])) >= 100
    assert (facts["topology"], facts["edges"]) == ("ring", [[0, 1], [0, 2], [1, 2]])
    error, disagreement = (lines_of(run)[-1][key] for key in ("consensus_error", "product_disagreement"))
    assert error >= disagreement * (1 - 1e-9) if schedule == "lora" else error == pytest.approx(disagreement)


def test_the_report_is_one_file_with_the_runs_name(text_run: Path) -> None:
    page = (text_run / "report.html").read_text()
    assert page.lstrip().lower().startswith("<!doctype html>") and "text" in page
    assert not re.search(r"""(?:src|href)=["']https?:""", page)
