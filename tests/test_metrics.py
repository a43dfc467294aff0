"""Metrics: closed forms, scikit-learn as the oracle, and what a run tells of them."""

import json
import runpy
import subprocess
import sys
from math import nan, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as oracle

from dfl_lora.cli.screen import comparison, told
from dfl_lora.metrics import METRICS, Answers, accuracy, ends_of, f1, key_of, loss, matthews, recorded
from dfl_lora.records import ending, spread
from tiny import Content, call, labelled, text, toy, written

PAIRS = {"path": "builtin/pairs", "train": "train[:60]", "validation": "validation[:24]"}


def answers(truth: list[int], given: list[int], num_labels: int = 2, loss: float = 0.5) -> Answers:
    return Answers(np.array(truth), np.array(given), loss, num_labels)


MIXED = answers([1, 1, 1, 0, 0, 0, 0, 1], [1, 1, 0, 0, 0, 1, 0, 1])
"""3 true and 1 false positive, 1 false and 3 true negatives."""
THREE = answers([0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 2, 0], num_labels=3)


def test_the_metrics_have_their_closed_forms() -> None:
    assert accuracy(MIXED) == 6 / 8
    assert f1(MIXED) == pytest.approx(2 * 3 / (2 * 3 + 1 + 1))
    assert matthews(MIXED) == pytest.approx((3 * 3 - 1 * 1) / sqrt(4 * 4 * 4 * 4))
    assert loss(MIXED) == 0.5


def test_with_three_labels_f1_is_the_mean_over_the_labels() -> None:
    assert f1(THREE) == pytest.approx((2 / 4 + 4 / 5 + 2 / 3) / 3)
    assert accuracy(THREE) == pytest.approx(4 / 6)


def test_with_three_labels_f1_stays_the_mean_over_labels_where_the_rows_have_only_two_of_them() -> None:
    two = answers([0, 0, 1, 1], [0, 1, 1, 1], num_labels=3)
    assert f1(two) == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert f1(answers([0, 0, 1, 1], [0, 1, 1, 1])) == pytest.approx(4 / 5)


@given(st.integers(2, 5), st.data())
@settings(max_examples=60, deadline=None)
def test_the_metrics_are_those_of_scikit_learn(num_labels: int, data: st.DataObject) -> None:
    labels = st.lists(st.integers(0, num_labels - 1), min_size=1, max_size=30)
    truth = data.draw(labels)
    said = data.draw(st.lists(st.integers(0, num_labels - 1), min_size=len(truth), max_size=len(truth)))
    own, average = answers(truth, said, num_labels), "binary" if num_labels == 2 else "macro"
    assert accuracy(own) == oracle.accuracy_score(truth, said)
    assert f1(own) == oracle.f1_score(truth, said, average=average, zero_division=0)
    if len({*truth, *said}) > 1:
        assert matthews(own) == oracle.matthews_corrcoef(truth, said)


@pytest.mark.parametrize(("truth", "given"), [([0, 0], [0, 0]), ([1, 1], [1, 1]), ([0, 1], [1, 1]), ([0, 0], [0, 1])])
def test_where_labels_or_answers_do_not_vary_there_is_no_correlation(truth: list[int], given: list[int]) -> None:
    assert matthews(answers(truth, given)) == 0


def test_right_wrong_and_nothing_found_are_the_ends_of_the_scales() -> None:
    right, wrong = answers([0, 1, 1], [0, 1, 1]), answers([0, 1, 1], [1, 0, 0])
    assert [METRICS[name](right) for name in ("accuracy", "f1", "matthews")] == [1, 1, 1]
    assert [METRICS[name](wrong) for name in ("accuracy", "f1", "matthews")] == [0, 0, pytest.approx(-1)]
    assert f1(answers([0, 0], [0, 0])) == 0


def test_pooled_answers_count_each_row_once() -> None:
    one, other = answers([1, 0, 1], [1, 0, 0], loss=1.0), answers([1], [1], loss=3.0)
    pooled = Answers.pooled([one, other])
    assert (pooled.truth.tolist(), pooled.given.tolist()) == ([1, 0, 1, 1], [1, 0, 0, 1])
    assert (pooled.loss, pooled.num_labels) == ((3 * 1.0 + 3.0) / 4, 2)
    assert f1(pooled) == pytest.approx(4 / 5) != np.mean([f1(one), f1(other)])


def test_only_of_the_loss_less_is_better() -> None:
    assert {name: ends_of(key_of(name)) for name in METRICS} == {
        "accuracy": ("min", "max"), "f1": ("min", "max"), "matthews": ("min", "max"), "loss": ("max", "min"),
    }  # fmt: skip


def test_a_run_records_accuracy_and_loss_whatever_its_metric() -> None:
    assert {name: [key_of(each) for each in recorded(name)] for name in METRICS} == {
        "accuracy": ["accuracy", "eval_loss"], "loss": ["accuracy", "eval_loss"],
        "f1": ["accuracy", "f1", "eval_loss"], "matthews": ["accuracy", "matthews", "eval_loss"],
    }  # fmt: skip


def test_the_tables_that_a_recipe_reads_load_nothing_heavy() -> None:
    heavy = "{'torch', 'sklearn', 'datasets', 'transformers', 'scipy', 'pandas'}"
    code = f"import sys, dfl_lora.metrics, dfl_lora.data.glue; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def finished(folder: Path, content: Content) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Runs a recipe in folder `run` and returns the lines of its rounds and its summary."""
    assert call("run", written(folder / "recipe.yaml", content), "--out", folder / "run", "--json") == 0
    lines = [json.loads(line) for line in (folder / "run" / "rounds.jsonl").read_text().splitlines()]
    return lines, json.loads((folder / "run" / "summary.json").read_text())


@pytest.mark.parametrize("metric", METRICS)
def test_a_run_tells_its_metric_wherever_it_tells_the_accuracy(metric: str, tmp_path: Path) -> None:
    key = key_of(metric)
    lines, summary = finished(tmp_path, toy(evaluate={"metric": metric, "before_mixing": True}))
    for line in lines:
        for name in dict.fromkeys(("accuracy", "eval_loss", key)):
            assert line[name].keys() == {"mean", "min", "max", "per_peer"} == line[f"{name}_before_mixing"].keys()
            assert line[name]["mean"] == pytest.approx(np.mean(line[name]["per_peer"]))
        assert not {"f1", "matthews"} - {key} & line.keys()
    assert summary["metric"] == metric
    assert summary[key].keys() == {"mean", "min", "max", "per_peer", "ci95", "consensus"} == summary["eval_loss"].keys()
    assert {end: summary[key][end] for end in lines[-1][key]} == lines[-1][key]
    log = (tmp_path / "run" / "log.txt").read_text()
    assert (
        f"{key} {summary[key]['mean']:.3f} (worst {summary[key][ends_of(key)[0]]:.3f})" in log
    ) and "accuracy" in log


def test_the_metric_of_a_recipe_is_the_tasks_own_where_it_names_none(tmp_path: Path, model: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in labelled(40)))
    slices = {"train": "train[:30]", "validation": "train[30:]"}
    lines, summary = finished(tmp_path, text(model, rows, rows, task={"name": "cola"}, data=slices))
    assert summary["metric"] == "matthews" and "matthews" in lines[-1]
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["evaluate"]["metric"] == "matthews"


@pytest.mark.parametrize(
    "task",
    [
        {"name": "mnli"},
        {"text": ["premise", "hypothesis"], "labels": ["entailment", "neutral", "contradiction"]},
    ],
)  # fmt: skip
def test_pairs_of_three_labels_are_trained_and_scored(task: dict[str, Any], tmp_path: Path, model: Path) -> None:
    content = text(model, Path(), Path(), task=task, data=PAIRS, evaluate={"metric": "f1"})
    lines, summary = finished(tmp_path, content)
    facts = json.loads((tmp_path / "run" / "partition.json").read_text())
    assert facts["labels"] == ["entailment", "neutral", "contradiction"]
    assert np.sum(facts["counts"], axis=0).tolist() == [20, 20, 20]
    assert 0 < summary["f1"]["consensus"] < 1 and len(lines) == 2


def test_a_loss_that_is_not_finite_is_null_in_a_line_and_in_the_summary() -> None:
    last = spread([nan, 1.0, 2.0]) | {"per_peer": [None, 1.0, 2.0]}
    assert last["mean"] is last["min"] is last["max"] is None
    end = ending(last, nan)
    assert end["consensus"] is None and end["ci95"] == pytest.approx(12.706204736 * 0.5)
    assert "eval_loss not finite (worst not finite)" in told(
        {
            "round": 1, "loss": {"mean": 1.0}, "eval_loss": last, "relative_disagreement": 0.1, "consensus_error": 0.1,
            "bytes_sent_per_peer": 1, "seconds": {"total": 1.0},
        },
        ["eval_loss"],
    )  # fmt: skip


def summary_of(metric: str | None, **measured: float) -> dict[str, Any]:
    scores = {
        key: {"mean": v, "min": v - 0.1, "max": v + 0.1, "ci95": 0.01, "consensus": v} for key, v in measured.items()
    }
    known = {"consensus_error": 0.1, "product_disagreement": 0.1, "bytes_sent_per_peer": 1, "seconds": {"total": 1.0}}
    return known | scores | ({"metric": metric} if metric else {})


def test_runs_of_several_metrics_are_compared_in_one_table() -> None:
    """A run from before metrics has accuracy alone."""
    table = comparison(
        {
            "old": summary_of(None, accuracy=0.5),
            "f1": summary_of("f1", accuracy=0.6, f1=0.7),
            "loss": summary_of("loss", accuracy=0.6, eval_loss=0.9),
        }
    )
    cells = {str(column.header).replace("\n", " "): list(column.cells) for column in table.columns}
    assert cells["accuracy mean"] == ["0.500", "0.600", "0.600"] and cells["worst peer"] == ["0.400", "0.500", "0.500"]
    assert cells["f1 (worst)"] == ["–", "0.700 (0.600)", "–"]
    assert cells["eval_loss (worst)"] == ["–", "–", "0.900 (1.000)"]


def test_the_figure_of_several_runs_has_a_panel_for_each_metric_and_one_for_the_consensus_error() -> None:
    draw = runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "compare.py"))["draw"]
    lines = [{"round": t, "consensus_error": 0.1, **summary_of("f1", accuracy=0.6, f1=0.7)} for t in (1, 2)]
    figure = draw({"one": lines, "other": [{"round": 1, "consensus_error": 0.2}]}, ["accuracy", "f1"])
    assert [axes.get_ylabel().split(":")[0] for axes in figure.axes] == ["accuracy", "f1", "consensus error"]
    assert [len(axes.lines[0].get_xdata()) for axes in figure.axes] == [2, 2, 2]
