"""Peers whose vectors lie in mapped files: the same numbers, and nothing left behind."""

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dfl_lora import machine, store
from dfl_lora.build import build, resolve_store
from dfl_lora.reading import load_recipe, resolve
from dfl_lora.recipe import Compute
from interrupting import Commands, Ground, Stop, partials
from tiny import call, files_of, toy, written

DISK = {"threads": 1, "dtype": "float32", "store": "disk"}


def rounds(run: Path) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def mapped(folder: Path) -> list[str]:
    """What this process has mapped of files of a folder that have no name."""
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if f"{folder}/" in line]


def test_a_matrix_on_disk_is_zero_and_its_file_has_no_name(tmp_path: Path) -> None:
    matrix = store.zeros(tmp_path / "run", 3, 5, torch.float64)
    assert files_of(tmp_path) == {}
    assert (matrix.shape, matrix.dtype, matrix.count_nonzero()) == ((3, 5), torch.float64, 0)
    matrix[1] = 1.0
    assert matrix.sum() == 5
    assert len(mapped(tmp_path)) == 1
    del matrix
    assert mapped(tmp_path) == []


def test_a_matrix_of_nothing_needs_no_file(tmp_path: Path) -> None:
    assert store.zeros(tmp_path, 3, 0, torch.float32).shape == (3, 0)


def test_a_store_that_finds_no_room_says_so_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(OSError) as told:
        store.zeros(tmp_path, 2**24, 2**24, torch.float32)
    assert told.value.errno in (errno.ENOSPC, errno.EFBIG)
    assert told.value.filename == str(tmp_path)
    assert files_of(tmp_path) == {}


def test_where_room_cannot_be_reserved_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fallocate")
    monkeypatch.setattr(store, "PIECE", 1000)
    matrix = store.zeros(tmp_path, 7, 100, torch.float32)
    assert matrix.count_nonzero() == 0 and matrix.shape == (7, 100)
    with (tmp_path / "a").open("wb") as file:
        store.reserve(file.fileno(), 2500)
    assert (tmp_path / "a").read_bytes() == bytes(2500)


def test_auto_is_disk_where_peers_are_more_than_half_of_what_the_machine_has() -> None:
    half = machine.total_memory() // 2
    assert resolve_store(Compute(), half) == "memory"
    assert resolve_store(Compute(), half + 1) == "disk"
    assert resolve_store(Compute(store="memory"), 10**18) == "memory"
    assert resolve_store(Compute(store="disk"), 1) == "disk"


def test_peers_on_disk_are_one_file_for_each_quantity(tmp_path: Path) -> None:
    federation = build(resolve(toy(compute=DISK)), folder=tmp_path / "run")
    arrays = federation.peers.arrays()
    assert len(mapped(tmp_path)) == len(arrays) - 1 == 3  # the counters stay in memory
    whole = build(resolve(toy()))
    assert federation.digest == whole.digest
    assert all(torch.equal(arrays[name], matrix) for name, matrix in whole.peers.arrays().items())


@pytest.fixture(scope="module")
def in_memory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory")
    assert call("run", written(folder / "toy.yaml", toy()), "--out", folder / "run", "--json") == 0
    return folder / "run"


def test_a_run_on_disk_ends_with_the_bits_of_one_in_memory(in_memory: Path, tmp_path: Path) -> None:
    recipe, run = written(tmp_path / "toy.yaml", toy(compute=DISK)), tmp_path / "run"
    assert call("run", recipe, "--out", run, "--json") == 0
    assert rounds(run) == rounds(in_memory)
    for kind in ("checkpoint", "adapters"):
        assert files_of(run / kind) == files_of(in_memory / kind)
    stores = [load_recipe(folder / "recipe.yaml").compute.store for folder in (run, in_memory)]
    assert stores == ["disk", "memory"]
    assert {p.name for p in run.iterdir()} == {p.name for p in in_memory.iterdir()}


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    with Commands() as commands:
        yield Ground(commands, tmp_path_factory.mktemp("on-disk"), toy(compute=DISK))


def test_a_run_on_disk_that_was_killed_leaves_no_store_and_goes_on_to_the_same_end(ground: Ground) -> None:
    assert ground.stopped(before=".latest.json").code == -9
    assert [name for name in partials(ground.run) if "latest" not in name] == []
    assert ground.goes_on(True)


def test_a_disk_without_room_for_the_peers_is_one_sentence_and_exit_2(ground: Ground) -> None:
    end = ground.stopped(largest_file=40)
    assert (end.code, end.said.count("\n")) == (2, 1)
    assert str(ground.run) in end.said and "limit of its size" in end.said
    assert not ground.run.exists() and not list(ground.run.parent.glob(".*"))
    assert ground.command(Stop(str(ground.run))).code == 0
