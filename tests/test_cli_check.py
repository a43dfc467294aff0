"""What is known before a run is what the run finds."""

import json
from pathlib import Path
from typing import Any

import pytest

from dfl_lora.recipe import Recipe
from tiny import call, files_of, text, toy, written

SETTINGS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "frozen A": ("method.schedule=freeze_a",),
    "private head": ("method.head=private", "peers.topology=star"),
    "by turns, what is trained alone": ("method.schedule=alternating(mix=trained)", "train.rounds=3"),
    "shared A": ("method.schedule=share_a", "method.head=frozen"),
    "core": ("method.schedule=core", "lora.init=orthonormal"),
    "the seed's order": ("train.order=seed", "train.rounds=3"),
    "some absent": ("peers.num_peers=5", "peers.topology=complete", "peers.participation=0.5", "train.rounds=5"),
    "some absent of seven": ("peers.num_peers=7", "peers.topology=link4", "peers.participation=0.5", "train.rounds=9"),
    "nobody talks": ("peers.topology=none",),
    "graphs in turn": ("peers.num_peers=7", "peers.topology=base(k=1)", "train.rounds=8", "train.order=seed"),
    "graphs drawn": ("peers.num_peers=7", "peers.topology=epidemic(s=1)", "train.rounds=6", "peers.participation=0.8"),
    "a last round of many exchanges": ("method.mixer=closing", "peers.num_peers=5"),
    "agreement now and then": ("method.mixer=gossip_pga(every=2)", "peers.num_peers=5", "train.rounds=5"),
    "second moments now and then": ("method.correction=k_gt(second_moments=2)", "train.rounds=5"),
    "sums along a tree": ("method.mixer=relay_sum", "peers.num_peers=5", "peers.topology=star"),
    "alone": ("peers.num_peers=1",),
}


def checked(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    capsys.readouterr()
    assert call("check", *words, "--json") == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    return found


def sets(settings: tuple[str, ...]) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


@pytest.mark.parametrize("case", SETTINGS)
def test_what_is_predicted_is_what_the_run_sends_and_who_holds_what(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = written(tmp_path / "toy.yaml", toy())
    found = checked(capsys, recipe, *sets(SETTINGS[case]))
    assert call("run", recipe, *sets(SETTINGS[case]), "--out", tmp_path / "run", "--json") == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    assert found["sent"]["bytes_per_peer"] == summary["bytes_sent_per_peer"]
    mean = sum(line["bytes_sent_per_peer"] for line in lines) / len(lines)
    assert found["sent"]["bytes_per_peer_and_round"] == pytest.approx(mean, rel=1e-12)
    assert found["sent"]["messages_per_round"] == sum(line["messages"] for line in lines) / len(lines)
    assert found["digest"] == summary["recipe_digest"]
    kept = json.loads((tmp_path / "run" / "partition.json").read_text())
    assert {key: kept[key] for key in found["partition"]} == found["partition"]


def test_a_check_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = written(tmp_path / "toy.yaml", toy())
    before = files_of(tmp_path)
    checked(capsys, recipe)
    assert files_of(tmp_path) == before


def test_the_sample_is_the_first_row_as_the_model_reads_it(
    model: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = text(model, rows / "train.csv", rows / "validation.csv", task={"max_length": 12})
    found = checked(capsys, written(tmp_path / "text.yaml", content))
    sample = found["sample"]
    assert sample["num_tokens"] == 12 and sample["label"] in ("0", "1")
    assert sample["text"].startswith("[CLS]") and sample["text"].endswith("[SEP]")
    assert 0 < sample["cut"] <= sum(map(sum, found["partition"]["counts"]))
    assert found["numbers"]["each"] == sum(found["numbers"][role] for role in ("A", "B", "head"))


def test_vectors_have_no_sample_and_a_frozen_role_is_common(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = checked(capsys, written(tmp_path / "toy.yaml", toy(method={"schedule": "freeze_a"})))
    assert found["sample"] is None
    assert found["numbers"]["A"] == 0 < found["numbers"]["common"]


def test_the_recipe_of_a_check_is_resolved_and_reads_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = checked(capsys, written(tmp_path / "toy.yaml", toy()), "--set", "peers.topology=erdos_renyi(p=0.9)")
    again = Recipe.model_validate(found["recipe"])
    assert again.compute.dtype == "float32" and again.digest == found["digest"]
    assert str(again.peers.topology) == "erdos_renyi(p=0.9, seed=0)"


def test_a_person_reads_digest_graph_bytes_memory_and_the_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("check", written(tmp_path / "toy.yaml", toy())) == 0
    said = capsys.readouterr().out
    for word in ("digest", "ring: 3 edges", "spectral gap", "a peer sends", "memory", "peers that fit", "num_peers: 3"):
        assert word in said, word


def test_of_a_graph_that_changes_all_rounds_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, seven = written(tmp_path / "toy.yaml", toy()), "peers.num_peers=7"
    found = checked(capsys, recipe, "--set", seven, "--set", "peers.topology=base(k=1)")["graph"]
    assert (found["topology"], found["mixing"]) == ("base(k=1)", "its own")
    assert (found["num_edges"], found["num_rounds"]) == (9, 5)
    assert found["spectral_gap"] == 1 and found["exchanges_to_a_thousandth"] == 5
    assert call("check", recipe, "--set", seven, "--set", "peers.topology=random_matching") == 0
    assert "random_matching(seed=0): 21 edges over 50 rounds, W metropolis" in capsys.readouterr().out


def test_peers_that_never_agree_are_told_without_a_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = checked(capsys, written(tmp_path / "toy.yaml", toy()), "--set", "peers.topology=none")
    assert found["graph"]["expected_consensus"] is None and found["graph"]["exchanges_to_a_thousandth"] is None
    assert found["graph"]["spectral_gap"] == 0 and found["sent"]["bytes_per_peer"] == 0


def test_the_schema_tells_every_key_with_its_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("check", "--schema") == 0
    schema = json.loads(capsys.readouterr().out)
    assert set(schema["properties"]) == set(Recipe.model_fields)
    assert schema["additionalProperties"] is False
    assert schema["$defs"]["Train"]["properties"]["learning_rate"]["description"] == "At the start."
    assert schema["$defs"]["erdos_renyi"]["properties"]["p"]["maximum"] == 1


def test_a_check_without_a_recipe_says_what_to_give(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("check") == 2
    assert "recipes/demo.yaml" in capsys.readouterr().err


def test_a_recipe_that_cannot_run_is_refused_as_a_run_refuses_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = written(tmp_path / "toy.yaml", toy())
    for setting in ("peers.topology=torus", "lora.target_modules=[nowhere]", "data.partition.min_size=9999"):
        said = []
        for words in (("check", recipe), ("run", recipe, "--out", tmp_path / "run")):
            assert call(*words, "--set", setting) == 2
            said.append(capsys.readouterr().err)
        assert said[0] == said[1]
        assert not (tmp_path / "run").exists()
