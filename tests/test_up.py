"""A federation of processes on one machine: as the simulation, in folders of their own, and nobody is left behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

from dfl_lora import machine, up
from dfl_lora.build import build
from dfl_lora.membership.roster import read_roster
from dfl_lora.reading import resolve
from dfl_lora.records import merged
from dfl_lora.strict_yaml import read_yaml, yaml_text
from encoders import equal_bits
from tiny import call, text, toy, written

PATIENCE_S = 120
CLOCKED = {"seconds", "peak_rss_bytes", "tokens_per_second"}
LONG = {"rounds": 100_000, "local": {"steps": 1}}


def lines_of(run: Path) -> list[dict[str, Any]]:
    path = run / "rounds.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture(scope="module")
def runs(model: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `up`, a federation of three processes, and `run`, the simulation of its recipe."""
    folder = tmp_path_factory.mktemp("up")
    recipe = written(folder / "text.yaml", text(model, rows / "train.csv", rows / "validation.csv"))
    assert call("run", recipe, "--out", folder / "run", "--json") == 0
    assert call("up", recipe, "--out", folder / "up") == 0
    return folder


def test_a_federation_of_processes_is_the_simulation(runs: Path) -> None:
    whole = load_file(runs / "run" / "checkpoint" / "state-000002.safetensors")
    for peer in range(3):
        own = load_file(runs / "up" / f"peer-{peer:03d}" / "checkpoint" / "state-000002-settled.safetensors")
        assert all(equal_bits(own[name][0], whole[name][peer]) for name in whole)
    summary, simulated = (json.loads((runs / run / "summary.json").read_text()) for run in ("up", "run"))
    assert {k: v for k, v in summary.items() if k not in CLOCKED} == {
        k: v for k, v in simulated.items() if k not in CLOCKED
    }
    unknown = ("consensus_error", "product_disagreement", "relative_disagreement")
    for line, own in zip(lines_of(runs / "run"), lines_of(runs / "up"), strict=True):
        last = line["round"] == 2
        expected = line if last else line | dict.fromkeys(unknown)
        assert {k: v for k, v in own.items() if k != "seconds"} == {k: v for k, v in expected.items() if k != "seconds"}


def test_the_folder_of_a_federation_holds_what_all_share_and_a_run_for_each_peer(runs: Path) -> None:
    assert sorted(f.name for f in (runs / "up").iterdir()) == [
        "adapters", "log.txt", "partition.json", "peer-000", "peer-001", "peer-002", "recipe.yaml", "report.html",
        "rounds.jsonl", "summary.json",
    ]  # fmt: skip
    assert [f.name for f in (runs / "up" / "adapters").iterdir()] == ["consensus"]
    for peer in range(3):
        own = runs / "up" / f"peer-{peer:03d}"
        assert [f.name for f in (own / "adapters").iterdir()] == [own.name]
        assert (own / "report.html").exists() and lines_of(own)[-1]["hosted"] == [peer]
        for key in ("key.pem", "tls.pem"):
            assert (own / "node" / "identity" / key).stat().st_mode & 0o777 == 0o600
    assert not list((runs / "up").rglob("*.key")), "the organiser's key is thrown away"
    said = (runs / "up" / "log.txt").read_text()
    assert said.count("round ") == 2 and "report: " in said


@pytest.mark.parametrize("which", [["--peer", 1], ["--consensus"]])
def test_adapters_of_a_federation_are_exported(which: list[object], runs: Path, tmp_path: Path) -> None:
    for run in ("up", "run"):
        assert call("export", runs / run, *which, "--to", tmp_path / run) == 0
    up_, run = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("up", "run"))
    assert up_.keys() == run.keys() and all(equal_bits(up_[name], run[name]) for name in up_)


def test_an_adapter_that_is_not_there_is_told_with_those_that_are(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("export", runs / "up", "--peer", 7, "--to", tmp_path / "to") == 2
    assert "it has consensus, peer-000, peer-001, peer-002" in capsys.readouterr().err


def test_status_of_a_peer_is_found_by_its_node_file(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("status", runs / "up" / "peer-001" / "node" / "node.yaml", "--json") == 0
    status = json.loads(capsys.readouterr().out)
    assert (status["state"], status["rounds_done"], status["alive"]) == ("finished", 2, False)
    assert sorted(peer for member in status["network"]["members"] for peer in member["peers"]) == [0, 2]


def test_an_existing_federation_is_not_replaced_unasked(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("up", runs / "text.yaml", "--out", runs / "up") == 2
    assert "There is a run in" in capsys.readouterr().err


def test_two_foundings_share_no_run_and_no_key(tmp_path: Path) -> None:
    federation, rosters = build(resolve(toy())), []
    for _ in range(2):
        up.found(federation, tmp_path)
        rosters.append(read_roster(tmp_path / "peer-000" / "node" / "roster.json"))
    one, other = rosters
    assert one.run != other.run and one.organiser != other.organiser
    assert not {m.id for m in one.members} & {m.id for m in other.members}
    assert one.recipe == federation.digest and one.num_peers == 3


def test_processes_share_the_processors_unless_the_recipe_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = resolve(toy(compute={"threads": "auto"}))
    for processors, threads in ((2.0, 1), (7.5, 2), (0.5, 1)):
        monkeypatch.setattr(machine, "processors", lambda n=processors: n)
        assert up.with_threads(recipe).compute.threads == threads
    assert up.with_threads(resolve(toy(compute={"threads": 5}))).compute.threads == 5


def test_ports_are_free_and_not_of_those_that_calls_going_out_take() -> None:
    ports = up.free_ports(20)
    lowest = int(up.OUTGOING.read_text().split()[0]) if up.OUTGOING.exists() else 49152
    assert len(set(ports)) == 20 and all(up.LOWEST_PORT <= port < max(lowest, 2 * up.LOWEST_PORT) for port in ports)
    for port in ports:
        with socket.socket() as listening:
            listening.bind((up.HOST, port))


def test_lines_of_peers_make_the_line_of_all(tmp_path: Path) -> None:
    """A peer that was absent has no loss, and one whose loss is not finite has null."""
    line = {
        "hosted": [0], "round": 3, "loss": {}, "loss_per_peer": [1.0], "accuracy": {"per_peer": [0.5]},
        "bytes_sent_per_peer": 10.0, "messages": 2, "refused": {"malformed": 1}, "skipped_steps": 1,
        "seconds": {"train": 1.0, "total": 2.0}, "tokens": 7,
    }  # fmt: skip
    other = line | {
        "hosted": [1],
        "loss_per_peer": [None],
        "accuracy": {"per_peer": [1.0]},
        "seconds": {"train": 3.0, "total": 3.5},
    }
    both = merged([line, other])
    assert both["loss"] == {"mean": 1.0, "min": 1.0, "max": 1.0} and both["loss_per_peer"] == [1.0, None]
    assert both["accuracy"] == {"mean": 0.75, "min": 0.5, "max": 1.0, "per_peer": [0.5, 1.0]}
    assert (both["bytes_sent_per_peer"], both["messages"], both["tokens"]) == (10.0, 4, 14)
    assert both["refused"] == {"malformed": 2} and both["seconds"] == {"train": 3.0, "total": 3.5}
    assert merged([line | {"loss_per_peer": [None]}])["loss"] == {"mean": None, "min": None, "max": None}


def test_what_is_written_as_yaml_is_read_as_it_was() -> None:
    """A digest that begins with 58e1 once was read as a number, or not at all."""
    for content in ({"digest": "58e17d" + "ab" * 29}, {"name": "12e3"}, {"rate": 1e-3}, {"text": "1e-3"}):
        assert read_yaml(yaml_text(content)) == content


def started(recipe: Path, run: Path) -> "subprocess.Popen[str]":
    words = [sys.executable, "-m", "dfl_lora", "up", str(recipe), "--out", str(run)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def until(happens: Callable[[], object], patience_s: float = PATIENCE_S) -> None:
    """Waits until something is so."""
    end = time.monotonic() + patience_s
    while not happens():
        assert time.monotonic() < end
        time.sleep(0.05)


def at_work(run: Path) -> list[psutil.Process]:
    """Returns the processes of the peers once all of them have finished a few rounds."""
    until(lambda: len(lines_of(run)) >= 3)
    pids = [json.loads((run / f"peer-{peer:03d}" / "status.json").read_text())["pid"] for peer in range(3)]
    return [psutil.Process(pid) for pid in pids]


def test_a_peer_that_dies_is_told_by_name_and_the_others_go_on(tmp_path: Path) -> None:
    recipe = written(tmp_path / "toy.yaml", toy(train={"rounds": 150, "local": {"steps": 1}}))
    process = started(recipe, tmp_path / "up")
    at_work(tmp_path / "up")[1].kill()
    out, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 3
    assert "peer 1 ended with exit code -9; it said last:" in out
    assert "peer 1 (exit code -9) did not reach the end; the others went on without it" in " ".join(said.split())
    assert [len(lines_of(tmp_path / "up" / f"peer-{peer:03d}")) for peer in (0, 2)] == [150, 150]
    assert len(lines_of(tmp_path / "up")) == 150 and not (tmp_path / "up" / "summary.json").exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_no_process_outlives_the_federation(number: signal.Signals, tmp_path: Path) -> None:
    process = started(written(tmp_path / "toy.yaml", toy(train=LONG)), tmp_path / "up")
    children = at_work(tmp_path / "up")
    process.send_signal(number)
    _, said = process.communicate(timeout=PATIENCE_S)
    until(lambda: not any(child.is_running() for child in children), patience_s=20)
    if number == signal.SIGTERM:
        assert (process.returncode, said.count("\n")) == (130, 1) and "go on with --resume" in said


@pytest.mark.slow
def test_an_interrupted_federation_goes_on(tmp_path: Path) -> None:
    recipe = written(tmp_path / "toy.yaml", toy(train={"rounds": 600, "local": {"steps": 1}}))
    process = started(recipe, tmp_path / "up")
    at_work(tmp_path / "up")
    process.terminate()
    process.communicate(timeout=PATIENCE_S)
    first = read_roster(tmp_path / "up" / "peer-000" / "node" / "roster.json").run
    assert call("up", recipe, "--out", tmp_path / "up", "--resume", "--json") == 0
    assert len(lines_of(tmp_path / "up")) == 600
    assert read_roster(tmp_path / "up" / "peer-000" / "node" / "roster.json").run != first


@pytest.mark.slow
def test_a_peer_that_cannot_begin_ends_the_federation(tmp_path: Path) -> None:
    """Its neighbours would wait ten minutes for it."""
    recipe = written(tmp_path / "toy.yaml", toy(train=LONG))
    process = started(recipe, tmp_path / "up")
    until(lambda: (tmp_path / "up" / "peer-002" / "node" / "node.yaml").exists())
    (tmp_path / "up" / "peer-002" / "node" / "node.yaml").write_text("peers: [9]")
    out, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 3 and "no round was over, so all were stopped" in " ".join(said.split())
    assert "peer 2 ended with exit code 2; it said last:" in out
