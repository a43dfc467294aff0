"""`dfl-lora bench`: a tiny run of the whole, its page, and mistakes."""

import json
from pathlib import Path
from typing import Any

import pytest

from benched import SCOPE, tiny_material
from dfl_lora.bench.page import page
from dfl_lora.bench.suite import bench, bench_scale
from dfl_lora.bench.targets import Target, ratio, targets
from tiny import call

Result = dict[str, Any]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """What a tiny benchmark measured, through JSON."""
    said = list[str]()
    found = bench(tiny_material(tmp_path_factory.mktemp("bench")), SCOPE, None, said.append)
    assert said
    return json.loads(json.dumps(found))  # type: ignore[no-any-return]


def test_every_arm_is_told_as_run_or_with_the_reason_why_not(result: Result) -> None:
    assert [cell["method"] for cell in result["headline"]] == ["LoRA", "DFL-LoRA"]
    for cell in result["headline"]:
        assert {f"{n}, {p}" for n in ("seed", "seed+", "peft-switch", "peft-mixed", "ours", "flower tuned")
                for p in ("fp32", "bf16")} <= cell["arms"].keys()  # fmt: skip
        for arm in cell["arms"].values():
            assert arm["gate"]["passed"] if arm["ran"] else arm["reason"]
        assert cell["arms"]["ours, fp32"]["parts"].keys() == {"data", "forward", "backward", "optimiser", "rest"}
    assert {(c["num_peers"], c["tokens"]) for c in result["grid"]} == {(1, 64)}


def test_every_target_is_told_with_its_measure_or_the_reason(result: Result) -> None:
    assert any(t["measured"] for t in result["targets"])
    assert all(t["reason"] for t in result["targets"] if t["passed"] is None)
    assert targets(result) == result["targets"]


def test_an_arm_that_failed_the_gate_has_no_ratio(result: Result) -> None:
    arms = result["headline"][0]["arms"]
    assert ratio(arms, "seed, fp32", "ours, fp32", "round_s")[0]
    failed = arms | {"seed, fp32": arms["seed, fp32"] | {"gate": arms["seed, fp32"]["gate"] | {"passed": False}}}
    assert ratio(failed, "seed, fp32", "ours, fp32", "round_s") == (None, "seed, fp32: it failed the gate")
    cell = result["headline"][0] | {"arms": failed}
    told = page(result | {"headline": [cell], "targets": []}, None)
    line = next(line for line in told.splitlines() if line.startswith("| seed, fp32"))
    assert "**failed**" in line and "|  |" in line


@pytest.mark.parametrize(
    ("target", "passed"),
    [
        (Target("", 8, 8.0), True),
        (Target("", 8, 7.9), False),
        (Target("", 0.5, 0.5, at_least=False), True),
        (Target("", 0.5, 0.6, at_least=False), False),
        (Target("", 8, None, "no bfloat16"), None),
    ],
)
def test_a_target_is_passed_missed_or_not_measured(target: Target, passed: bool | None) -> None:
    assert target.passed is passed


def test_the_page_and_the_picture_are_written_from_the_numbers(result: Result, tmp_path: Path) -> None:
    (tmp_path / "out.json").write_text(json.dumps(result))
    assert call("bench", "--read", tmp_path / "out.json", "--docs", tmp_path / "page.md") == 0
    told = (tmp_path / "page.md").read_text()
    assert all(t["name"] in told for t in result["targets"])
    assert f"{result['headline'][0]['arms']['ours, fp32']['round_s']['median']:.2f} (" in told
    assert "figures/page.png" in told
    assert (tmp_path / "figures" / "page.png").read_bytes().startswith(b"\x89PNG")


def test_a_result_is_printed_as_json(result: Result, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out.json").write_text(json.dumps(result))
    assert call("bench", "--read", tmp_path / "out.json", "--json") == 0
    assert json.loads(capsys.readouterr().out) == result


def test_the_scale_test_alone_has_a_page(tmp_path: Path) -> None:
    assert "# Benchmarks" in page(bench_scale(tiny_material(tmp_path), SCOPE, 1, print), None)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--read", "nowhere.json"], "nowhere.json"),
        (["--read", "empty.json"], "is not a result of dfl-lora bench"),
        (["--read", "empty.json", "--quick"], "--read measures nothing"),
        (["--quick", "--out", "no/folder/x.json"], "There is no folder no/folder"),
        (["--quick", "--docs", "no/folder/x.md"], "There is no folder no/folder"),
        (["--minutes", "0.1"], "greater than or equal to 0.5"),
    ],
)
def test_mistakes_are_one_sentence(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.json").write_text("{}")
    assert call("bench", *words) == 2
    told = capsys.readouterr().err
    assert said in told and told.count("\n") == 1
