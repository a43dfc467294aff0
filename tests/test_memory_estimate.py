"""What a run will need of memory is predicted before it runs."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch

from dfl_lora import machine
from dfl_lora.build import Federation, build
from dfl_lora.data.batches import Batch
from dfl_lora.learners.stacked import StackedLearner
from dfl_lora.measures import consensus, factors
from dfl_lora.memory import (
    Alive,
    Estimate,
    estimate,
    evaluation_pass,
    evaluation_passes,
    law_of,
    measuring,
    peak_of,
    scratch,
    size_of,
    training_pass,
    training_passes,
)
from dfl_lora.reading import resolve
from tiny import Content, text, toy, written

PREDICT = """
import json, sys
from pathlib import Path
from dfl_lora.memory import estimate
from dfl_lora.reading import load_recipe
from dfl_lora.running import build
print(json.dumps(estimate(build(load_recipe(Path(sys.argv[1]), sys.argv[2:]))).as_json()))
"""
"""Imports what a run imports."""
NOTHING = [Batch({}, np.zeros(0, dtype=np.int64), torch.zeros(0), 0, {})]


def federation(content: Content) -> Federation:
    return build(resolve(content))


def of_toy(num_peers: int, available: int | None = None) -> Estimate:
    return estimate(federation(toy(peers={"num_peers": num_peers})), available)


def printed(*words: object) -> Content:
    """Returns the JSON that a python process of its own prints."""
    result = subprocess.run([sys.executable, *map(str, words)], check=True, capture_output=True, text=True)
    return cast(Content, json.loads(result.stdout))


def test_a_thousand_small_peers_need_little_more_than_the_libraries_and_that_is_predicted(tmp_path: Path) -> None:
    """Within a fifth; all pairs of factors would be 25 GB."""
    many = toy(peers={"num_peers": 1000}, lora={"r": 16}, data={"partition": {"min_size": 1}})
    recipe = written(tmp_path / "many.yaml", many)
    predicted = printed("-c", PREDICT, recipe)
    peak = printed("-m", "dfl_lora", "run", recipe, "--out", tmp_path / "run", "--json")["peak_rss_bytes"]
    assert predicted["peers"] + predicted["measures"] < predicted["process"] / 5
    assert predicted["total"] == pytest.approx(peak, rel=0.2)


def test_what_peers_hold_grows_with_their_number_and_their_checkpoint_does_not() -> None:
    three, six = of_toy(3), of_toy(6)
    assert six.peers == 2 * three.peers > 0
    assert six.checkpoint == three.checkpoint > 0
    assert six.export == 2 * three.export
    assert six.base == three.base > 0


@pytest.mark.parametrize("num_peers", [3, 30, 3000])
def test_the_measures_need_what_is_predicted(num_peers: int) -> None:
    """Within a third; of many peers no more than of a few blocks."""
    peers = scratch(federation(toy(lora={"r": 8})).peers, num_peers)
    with Alive(2**40) as alive:
        consensus(factors(peers), num_peers)
    assert measuring(peers, num_peers) == pytest.approx(alive.peaks[0], rel=1 / 3)
    assert measuring(peers, num_peers) < 50 * 2**20


def test_an_estimate_moves_no_peer() -> None:
    f = federation(toy())
    before = {name: matrix.clone() for name, matrix in f.peers.arrays().items()}
    estimate(f)
    assert all(torch.equal(matrix, before[name]) for name, matrix in f.peers.arrays().items())


def test_more_memory_fits_more_peers_and_none_fits_none() -> None:
    there = of_toy(3)
    assert there.available > there.total and there.peers_that_fit > 3
    assert of_toy(3, available=0).peers_that_fit == 0
    some, more = (of_toy(3, available=there.total + extra).peers_that_fit for extra in (2**26, 2**30))
    assert 3 < some < more


def test_the_peak_is_that_of_loading_where_loading_needs_more() -> None:
    there = of_toy(3)
    assert replace(there, loading=2 * there.total).total == 2 * there.total


def test_parts_add_up_to_the_peak_and_are_pure_data() -> None:
    there = replace(of_toy(3), loading=0)
    assert sum(there.parts().values()) == there.total
    assert json.loads(json.dumps(there.as_json()))["total"] == there.total


def test_a_tensor_counts_while_it_lives_and_a_view_or_an_older_one_does_not() -> None:
    older = torch.ones(1000)

    def run(batches: Sequence[Batch]) -> None:
        older.add_(1).view(10, 100)
        for _ in range(3):
            torch.ones(2000).view(20, 100)

    assert peak_of(run, NOTHING) == [4 * 2000, 4 * 2000]
    assert peak_of(run, NOTHING, large=4000) == [4 * 2000, 0]
    assert peak_of(lambda batches: None, NOTHING) == [0, 0]


def test_a_tensor_at_the_address_of_an_older_one_that_died_counts() -> None:
    def run(batches: Sequence[Batch]) -> None:
        kept = []
        for _ in range(50):
            torch.from_numpy(np.ones(10)).add_(1)  # made out of the dispatcher's sight
            kept.append(torch.ones(1000))

    assert peak_of(run, NOTHING) == [50 * 4000, 50 * 4000]


@pytest.mark.parametrize("batch_size", [5, 8])
def test_a_large_pass_needs_what_small_ones_of_its_length_say(model: Path, rows: Path, batch_size: int) -> None:
    content = text(model, rows / "train.csv", rows / "validation.csv", train={"batch_size": batch_size})
    f = federation(content)
    learner = f.learner
    assert isinstance(learner, StackedLearner)
    step, forward = training_pass(learner, f.peers, f.method.schedule(1)), evaluation_pass(learner, f.peers)
    for run, found in (
        (step, training_passes(learner, f.peers)),
        (forward, evaluation_passes(learner, f.peers)),
    ):
        largest = max(found, key=size_of)
        assert law_of(run, largest, 4096)(1) == pytest.approx(peak_of(run, largest), rel=0.05)


def test_a_pass_grows_with_the_peers_up_to_its_budget_of_tokens(model: Path, rows: Path) -> None:
    f = federation(text(model, rows / "train.csv", rows / "validation.csv"))
    learner = f.learner
    assert isinstance(learner, StackedLearner)
    largest = max(training_passes(learner, f.peers), key=size_of)
    law = law_of(training_pass(learner, f.peers, f.method.schedule(1)), largest, 4096)
    assert law(1)[0] < law(4)[0] <= law(1000)[0] == law(10_000)[0]


def test_a_limit_of_a_control_group_counts_as_what_the_machine_has(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("400000\n")
    assert machine.available_memory(tmp_path) == 600_000
    assert machine.memory_limit(tmp_path) == 1_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.memory_limit(tmp_path) is None
    assert machine.available_memory(tmp_path) > 1_000_000


def test_a_quota_of_a_control_group_counts_as_the_processors_there_are(tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert machine.processors(tmp_path) == 0.5
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert machine.processors(tmp_path) >= 1
