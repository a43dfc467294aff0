"""A process with some of the peers: what it writes, what it cannot know, and what a reader of it sees."""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import psutil
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors.torch import load_file

from dfl_lora.build import Federation, build
from dfl_lora.check import Silence
from dfl_lora.cli.screen import Screen
from dfl_lora.hosting import contract_of
from dfl_lora.membership.identity import create_identity, load_identity
from dfl_lora.membership.reception import listen_at
from dfl_lora.membership.roster import Member, first_roster, read_roster, write_roster
from dfl_lora.node import load_node
from dfl_lora.reading import load_recipe, resolve
from dfl_lora.report.page import NOTHING, holdings, peers, read_run
from dfl_lora.running import open_run
from dfl_lora.up import HOST, free_ports
from encoders import equal_bits
from network.attackers import admitted, context_of, dialled
from network.processes import until
from tiny import Content, call, files_of, text, toy, written

PATIENCE_S = 120


def found(folder: Path, hosts: Sequence[Sequence[int]], **node: Any) -> list[Path]:
    """Makes a federation on loopback, a member for each group of peers, and returns the node files."""
    ports, homes = free_ports(len(hosts)), [folder / f"member-{number}" for number in range(len(hosts))]
    members = [
        Member.of(create_identity(home / "identity"), group, [f"{HOST}:{port}"])
        for home, group, port in zip(homes, hosts, ports, strict=True)
    ]
    roster = first_roster(Ed25519PrivateKey.generate(), "", sum(map(len, hosts)), members)
    for home, member in zip(homes, members, strict=True):
        write_roster(home / "roster.json", roster)
        own = {"peers": list(member.peers), "listen": member.addresses[0], **node}
        written(home / "node.yaml", own)
    return [home / "node.yaml" for home in homes]


def peer(recipe: Path, node: Path, files: tuple[int, int] | None = None) -> "subprocess.Popen[str]":
    """Starts a peer that may have so many files open: at first, and when it asks for more."""
    words = [sys.executable, "-m", "dfl_lora", "peer", str(recipe), "--node", str(node), "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def limit() -> None:
        if files is not None:
            resource.setrlimit(resource.RLIMIT_NOFILE, files)

    pipe = subprocess.PIPE
    return subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True, env=environment, preexec_fn=limit)


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("codec", ["fp32", "top_k"])
def test_two_processes_end_with_the_bits_of_the_simulation(codec: str, tmp_path: Path) -> None:
    """By the seed's order, so that they gossip before the first round as well."""
    recipe = written(tmp_path / "toy.yaml", toy(train={"order": "seed"}, method={"codec": codec}))
    assert call("run", recipe, "--out", tmp_path / "run", "--json") == 0
    nodes = found(tmp_path, [[0, 2], [1]])
    for process in [peer(recipe, node) for node in nodes]:
        _, said = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0, said
    whole = load_file(tmp_path / "run" / "checkpoint" / "state-000002.safetensors")
    for node, ids in zip(nodes, ([0, 2], [1]), strict=True):
        run = node.parent / "run"
        own = load_file(run / "checkpoint" / "state-000002-settled.safetensors")
        assert all(equal_bits(own[name], whole[name][ids]) for name in whole)
        assert [line["loss_per_peer"] for line in lines_of(run)] == [
            [line["loss_per_peer"][i] for i in ids] for line in lines_of(tmp_path / "run")
        ]
        events = [json.loads(line)["event"] for line in (run / "events.jsonl").read_text().splitlines()]
        assert "linked" in events and "failed-edge" not in events
    began = monotonic()
    assert call("peer", recipe, "--node", nodes[0], "--resume", "--json") == 0  # the others are gone: nothing is left
    assert monotonic() - began < PATIENCE_S


def test_strangers_who_open_every_connection_they_can_end_neither_a_peer_nor_its_links(tmp_path: Path) -> None:
    """It may have 64 files open, and 256 if it asks: half of them are for who dials."""
    recipe = written(tmp_path / "toy.yaml", toy(peers={"num_peers": 2, "topology": "ring"}, train={"rounds": 10**6}))
    nodes = found(tmp_path, [[0], [1]])
    members = read_roster(nodes[0].parent / "roster.json").members
    listens = max((0, 1), key=lambda i: members[i].id)  # the smaller id dials
    run, port = nodes[listens].parent / "run", int(members[listens].addresses[0].rpartition(":")[2])
    processes = [peer(recipe, node, (64, 256) if i == listens else None) for i, node in enumerate(nodes)]
    honest, attacked = context_of(load_identity(nodes[1 - listens].parent / "identity"), tmp_path), processes[listens]

    def goes_on() -> None:
        rounds = len(lines_of(run))
        until(lambda: len(lines_of(run)) > rounds + 5 or attacked.poll() is not None)
        assert attacked.poll() is None, attacked.communicate()

    try:
        until(lambda: (run / "rounds.jsonl").exists() and lines_of(run), PATIENCE_S)
        with ExitStack() as strangers:
            for _ in range(400):
                strangers.enter_context(dialled(port))
            goes_on()
            assert 128 < psutil.Process(attacked.pid).num_fds() < 256
        until(lambda: admitted(port, honest))
        goes_on()
        assert "lost" not in {json.loads(line)["event"] for line in (run / "events.jsonl").read_text().splitlines()}
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def text_peer(folder: Path, model: Path, rows: Path, *, own_rows: bool) -> Federation:
    """Returns peer 1 of three on text, with its share of a table, or with rows that only it can read."""
    node: Content = {"peers": [1]} | ({"data": {"per_peer": str(rows / "client_2.csv")}} if own_rows else {})
    recipe = resolve(text(model, rows / "train.csv", rows / "validation.csv", task={"name": "sst2"}))
    return build(load_node(written(folder / "node.yaml", node)).over(recipe), [1])


@pytest.mark.parametrize("own_rows", [False, True])
def test_a_run_of_some_peers_says_what_it_knows_and_null_where_it_does_not(
    own_rows: bool, model: Path, rows: Path, tmp_path: Path
) -> None:
    run, federation = tmp_path / "run", text_peer(tmp_path, model, rows, own_rows=own_rows)
    run.mkdir()
    with Screen(run) as screen:
        running = open_run(federation, run, [screen], resume=False)
        running.begin(Silence())
        running.go(Silence())
        summary = running.end()
    line = lines_of(run)[-1]
    assert line["hosted"] == summary["hosted"] == [1] and summary["num_peers"] == 3
    assert len(line["loss_per_peer"]) == len(line["accuracy"]["per_peer"]) == 1
    unknown = ("consensus_error", "product_disagreement", "relative_disagreement")
    assert all(line[key] is summary[key] is None for key in unknown)
    assert summary["accuracy"]["consensus"] is None and summary["accuracy"]["ci95"] == 0
    assert [folder.name for folder in (run / "adapters").iterdir()] == ["peer-001"]
    read = read_run(run)
    assert read.partition is not None
    assert np.isnan(read.partition.counts[[0, 2]]).all() == own_rows and np.isfinite(read.partition.counts[1]).all()
    assert [row[2] == NOTHING for row in holdings(read.partition)] == [own_rows, False, own_rows]
    assert [finals[0] == NOTHING for _, finals, _ in peers(read)] == [True, False, True]
    assert (run / "report.html").stat().st_size > 10_000
    said = (run / "log.txt").read_text()
    assert "peer 1 in this process" in said and "disagreement –  consensus error –" in said
    assert "not finite" not in said


def test_partition_json_with_no_rows_at_all_is_no_partition(model: Path, rows: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    running = open_run(text_peer(tmp_path, model, rows, own_rows=True), run, [], resume=False)
    running.begin(Silence())
    running.go(Silence())
    running.end()
    partition = json.loads((run / "partition.json").read_text())
    (run / "partition.json").write_text(json.dumps(partition | {"counts": [[None, None]] * 3}))
    with pytest.raises(ValueError, match="counts must be the numbers of rows of at least one peer"):
        read_run(run)


def test_the_contract_is_of_the_start_and_not_of_a_checkpoint() -> None:
    whole, one = build(resolve(toy())), build(resolve(toy()), [2])
    assert contract_of(whole) == contract_of(one)
    other = build(resolve(toy(train={"seed": 1})))
    assert contract_of(other).start != contract_of(whole).start
    frozen = build(resolve(toy(method={"schedule": "freeze_a"})))
    assert contract_of(frozen).frozen != contract_of(whole).frozen


def alone(folder: Path, **keys: Any) -> tuple[Path, Path]:
    """Returns the recipe of one toy peer, and its node file: a federation of one."""
    recipe = written(folder / "toy.yaml", toy(peers={"num_peers": 1, "topology": "none"}, **keys))
    return recipe, found(folder, [[0]])[0]


def test_a_finished_run_is_resumed_without_any_neighbour_or_port(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe, node = alone(tmp_path)
    assert call("peer", recipe, "--node", node) == 0
    state = (node.parent / "run" / "checkpoint" / "state-000002-settled.safetensors").read_bytes()
    assert call("peer", recipe, "--node", node) == 2
    assert "There is a run in" in capfd.readouterr().err
    with listen_at(read_roster(node.parent / "roster.json").members[0].addresses[0]):
        assert call("peer", recipe, "--node", node, "--resume", "--json") == 0
    assert json.loads(capfd.readouterr().out)["rounds"] == 2
    assert (node.parent / "run" / "checkpoint" / "state-000002-settled.safetensors").read_bytes() == state
    assert "assembling" not in (node.parent / "run" / "events.jsonl").read_text()


def test_what_needs_every_message_is_refused_before_anybody_listens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = written(tmp_path / "toy.yaml", toy(method={"codec": "choco"}))
    node, home, out = found(tmp_path, [[0], [1], [2]])[0], tmp_path / "home", tmp_path / "out"
    for words in (
        ("peer", recipe, "--node", node, "--out", out),
        ("up", recipe, "--out", out),
        ("found", recipe, "--to", home, "--address", f"{HOST}:7000"),
    ):
        assert call(*words) == 2
        assert capsys.readouterr().err == (
            "dfl-lora: codec choco does not go with real peers: messages between them can be lost, "
            "and it needs every one; use codec top_k.\n"
        )
    assert not home.exists() and not out.exists()


def test_the_recipe_of_another_founding_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, node = alone(tmp_path)
    identity = load_node(node).identity_folder
    entry = Member.of(create_identity(tmp_path / "new"), [0], ["127.0.0.1:7000"])
    write_roster(node.parent / "roster.json", first_roster(Ed25519PrivateKey.generate(), "0" * 64, 1, [entry]))
    (tmp_path / "new").rename(identity.with_name("new"))
    written(node, {"peers": [0], "identity": "new", "listen": "127.0.0.1:7000"})
    assert call("peer", recipe, "--node", node) == 2
    assert "The federation was founded on the recipe with digest 000000000000" in capsys.readouterr().err
    assert not (node.parent / "run").exists()


def test_insecure_warns_at_every_start(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    recipe, node = alone(tmp_path)
    written(node, {"peers": [0], "listen": read_roster(node.parent / "roster.json").members[0].addresses[0],
                   "insecure": True})  # fmt: skip
    for start in ([], ["--overwrite"]):
        assert call("peer", recipe, "--node", node, "--json", *start) == 0
        assert "warning: insecure is set" in capfd.readouterr().err
    assert json.loads((node.parent / "run" / "status.json").read_text())["insecure"]
    assert "insecure: nothing is encrypted" in (node.parent / "run" / "events.jsonl").read_text()


def test_what_is_written_down_is_everybodys_recipe_and_not_where_the_rows_are(tmp_path: Path) -> None:
    recipe, node = alone(tmp_path)
    assert call("peer", recipe, "--node", node, "--json") == 0
    assert load_recipe(node.parent / "run" / "recipe.yaml").data == load_recipe(recipe).data


def test_a_port_that_is_taken_leaves_nothing_behind_and_replaces_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, (node, _) = written(tmp_path / "toy.yaml", toy(peers={"num_peers": 2})), found(tmp_path, [[0], [1]])
    run, address = node.parent / "run", read_roster(node.parent / "roster.json").members[0].addresses[0]
    with listen_at(address):
        assert call("peer", recipe, "--node", node) == 2
        assert f"Cannot listen at {address}" in capsys.readouterr().err
        assert files_of(run) == {}
        shutil.copytree(earlier_run(tmp_path), run, dirs_exist_ok=True)
        before = files_of(run)
        assert call("peer", recipe, "--node", node, "--overwrite") == 2
        assert files_of(run) == before


def earlier_run(folder: Path) -> Path:
    assert call("run", written(folder / "earlier.yaml", toy()), "--out", folder / "earlier", "--json") == 0
    return folder / "earlier"
