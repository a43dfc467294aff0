"""The plan, the arithmetic, the processes and Flower's job of the benchmark."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benched import tiny_cell, tiny_material
from dfl_lora.bench.arms.flower import write_job
from dfl_lora.bench.cells import BUILT_IN, Cell, MethodName, material
from dfl_lora.bench.child import ask, peak_memory
from dfl_lora.bench.flops import Shape, shape_of
from dfl_lora.bench.gemm import rate
from dfl_lora.bench.planner import Plan, repeats
from dfl_lora.bench.scale import measured
from dfl_lora.bench.setting import federation_of, setting_of
from dfl_lora.bench.suite import FULL, QUICK, Scope, grid_cells, plan_of
from dfl_lora.models.base import load_encoder, locate
from dfl_lora.models.placement import Lora, place


def test_repeats_keep_the_budget_and_everyone_is_timed_once() -> None:
    costs = {"seed": 40.0, "fair": 10.0, "ours": 2.0}
    assert repeats(costs, 1000, 5) == {"seed": 5, "fair": 5, "ours": 5}
    assert repeats(costs, 0, 5) == {"seed": 1, "fair": 1, "ours": 1}
    tight = repeats(costs, 80, 5)
    assert tight == {"seed": 1, "fair": 3, "ours": 5}
    assert sum(tight[name] * costs[name] for name in costs) <= 80


def test_what_a_part_leaves_goes_to_those_after_it_and_a_late_part_gets_nothing() -> None:
    time = [0.0]
    plan = Plan(100, {"first": 1, "second": 1, "third": 2}, now=lambda: time[0])
    assert plan.share_s("first") == 25
    time[0] = 10.0
    assert plan.share_s("second") == 30
    time[0] = 80.0
    assert plan.share_s("third") == 20
    time[0] = 130.0
    assert plan.share_s("third") == 0


@pytest.mark.parametrize(("scope", "minutes"), [(FULL, 43), (QUICK, 4.5)])
def test_the_parts_share_out_the_whole_time(scope: Scope, minutes: float) -> None:
    plan = plan_of(scope, None)
    assert plan.total_s == 60 * minutes
    assert plan.share_s(next(iter(plan.weights))) < plan.total_s / 2
    assert plan.share_s("grid") == pytest.approx(plan.total_s, rel=0.01)  # the last part gets all that is left


def test_the_grid_holds_every_cell_of_at_most_16384_tokens() -> None:
    cells = list(grid_cells(FULL, mean_length=12.0))
    assert {(c.num_peers, c.tokens) for c in cells} == {
        *((n, t) for n in (1, 7, 16) for t in (64, 256, 1024)), (1, 4096), (64, 64), (64, 256),
    }  # fmt: skip
    assert len(cells) == 24
    assert [c.batch_size for c in cells if c.tokens == 256] == [21] * 8


def test_the_seeds_proportion_of_evaluated_rows() -> None:
    assert Cell("LoRA", 7, 16, 4).evaluated == 16
    assert Cell("LoRA", 7, 9621, 1).evaluated == 872
    assert Cell("LoRA", 7, 128, 10).evaluated == 116


def test_the_useful_work_of_the_22m_bert_is_0_0425_gf_a_token() -> None:
    files = locate("all-MiniLM-L6-v2")
    base = load_encoder(files, 2, "sdpa", torch.float32, seed=0)
    shape = shape_of(files, place(base.model, base.prefix, Lora(("query", "value"), 4, 32)), 2)
    assert (shape.frozen, shape.layers, shape.hidden, len(shape.modules)) == (10_616_832, 6, 384, 12)
    alone = Shape(shape.frozen, 0, 0, 0, (), 0)
    assert alone.train_flops(np.array([1]), frozen_a=False) / 1e9 == pytest.approx(0.0425, abs=5e-5)


def test_the_formula_counts_attention_lora_and_head() -> None:
    shape = Shape(frozen=10, layers=2, hidden=3, rank=2, modules=((3, 5),), head=7)
    lengths = np.array([4, 1])
    assert shape.train_flops(lengths, frozen_a=False) == 5 * (40 + 6 * 2 * 8) + 12 * 2 * 3 * 17 + 6 * 7 * 2
    assert shape.train_flops(lengths, frozen_a=True) == 5 * (40 + 2 * (4 * 3 + 6 * 5)) + 12 * 2 * 3 * 17 + 6 * 7 * 2
    assert shape.evaluation_flops(lengths) == 5 * (20 + 2 * 2 * 8) + 4 * 2 * 3 * 17 + 2 * 7 * 2


def test_the_roof_is_measured_in_both_precisions() -> None:
    assert rate(16, 8, torch.float32, repeats=1) > 0
    assert rate(16, 8, torch.bfloat16, repeats=1) > 0


def test_toy_peers_in_any_number_are_measured() -> None:
    told = measured("toy", 9, {})
    assert told["num_peers"] == 9 and told["rounds"] >= 2
    assert told["train_s"] > 0 and told["mix_s"] > 0
    assert told["state_bytes_per_peer"] % 12 == 0
    assert (peak_memory() or told["resident_bytes"]) >= told["resident_bytes"] > 0


def test_mixing_is_measured_against_copying_the_same_numbers() -> None:
    told = ask({"what": "mixing", "num_peers": 9, "num_numbers": 4096}, 100)
    assert told["ran"] and (told["num_peers"], told["num_numbers"]) == (9, 4096)
    assert told["share"] == told["copy_s"] / told["mix_s"] > 0


def test_a_process_that_fails_is_told_and_not_raised() -> None:
    told = ask({"what": "scale", "base": "toy", "num_peers": 0, "material": {}}, 100)
    assert told["ran"] is False and "ended with 1" in told["reason"]


def test_a_process_that_takes_too_long_is_told() -> None:
    told = ask({"what": "scale", "base": "toy", "num_peers": 8, "material": {}}, 0)
    assert told == {"ran": False, "reason": "it was stopped after 0 s, its share of the plan"}


def test_without_a_folder_of_data_sets_the_generator_is_used_and_said(tmp_path: Path) -> None:
    assert material([tmp_path]).path == BUILT_IN and "built-in" in material([tmp_path]).rows
    (tmp_path / "glue" / "sst2").mkdir(parents=True)
    assert material([tmp_path]).rows == "SST-2"


@pytest.mark.parametrize(("method", "train_a"), [("LoRA", True), ("DFL-LoRA", False)])
def test_flowers_job_holds_every_batch_and_the_start(method: MethodName, train_a: bool, tmp_path: Path) -> None:
    recipe = tiny_cell(method).recipe(tiny_material(tmp_path), 2, compute={"dtype": "float32", "threads": 1})
    setting = setting_of(federation_of(recipe))
    write_job(setting, 2, "float32", "tuned", tmp_path)
    job = json.loads((tmp_path / "job.json").read_text())
    assert (job["rounds"], job["steps"], job["num_peers"], job["train_a"]) == (2, 2, 3, train_a)
    assert [sum(row) for row in job["W"]] == pytest.approx([1, 1, 1])
    assert [len(rates) for rates in job["learning_rates"]] == [2, 2]
    data = load_file(tmp_path / "data.safetensors")
    batches = {key.rpartition("/")[0] for key in data}
    assert batches == {
        *(f"peer{i}/round{t}/step{s}" for i in range(3) for t in (1, 2) for s in (0, 1)), "validation/0",
    }  # fmt: skip
    assert {key.rpartition("/")[2] for key in data} == {"input_ids", "attention_mask", "token_type_ids", "labels"}
    assert load_file(tmp_path / "start.safetensors").keys() == setting.placement.layout.by_name.keys()
