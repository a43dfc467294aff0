"""Simulation and real peers agree to the bit, on a sample of SST-2, however the peers are spread over processes."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from dfl_lora.founding import NODE, ROSTER
from dfl_lora.membership.identity import create_identity
from dfl_lora.membership.roster import Member, first_roster, write_roster
from dfl_lora.up import free_ports

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("DFL_LORA_DATA", ROOT.parent / "shared" / "data"))
SAMPLE = {
    "data.train": "train[:3000]",
    "data.partition": "dirichlet(alpha=0.5)",
    "train.rounds": 3,
    "train.local.steps": 3,
    "evaluate.rows": 60,
    "compute.threads": 1,
}
METHODS = {
    "lora": {"method": "{schedule: lora}"},
    "freeze_a": {"method": "{schedule: freeze_a}"},
    "default": {"method": "{correction: k_gt, mixer: chebyshev(k=2), codec: int8}"},
    "core": {
        "method": "{schedule: core, correction: k_gt, mixer: chebyshev(k=2), codec: int8}",
        "lora.init": "orthonormal",
    },
}
GROUPS = ([[0, 1], [2, 3, 4, 5], [6]], [[0, 2, 4, 6], [1, 3, 5]])

needs_data = pytest.mark.skipif(not (DATA / "glue").is_dir(), reason=f"no glue in {DATA}; set DFL_LORA_DATA")


def words(method: str) -> list[str]:
    settings = [f"{key}={value}" for key, value in (SAMPLE | METHODS[method]).items()]
    return [word for setting in settings for word in ("--set", setting)]


def start(*given: object) -> "subprocess.Popen[str]":
    environment = os.environ | {"DFL_LORA_DATA": str(DATA), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, "-m", "dfl_lora", *map(str, given)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finished(*processes: "subprocess.Popen[str]") -> None:
    for process in processes:
        said, _ = process.communicate(timeout=600)
        assert process.returncode == 0, said


def adapters(run: Path) -> dict[str, bytes]:
    """Returns the bytes of every peer's adapter below a folder, by the peer's name."""
    files = run.rglob("adapters/peer-*/adapter_model.safetensors")
    return {file.parent.name: file.read_bytes() for file in files}


def hosted_by(groups: Sequence[Sequence[int]], folder: Path) -> list[Path]:
    """Makes a federation whose members host these peers; returns their folders."""
    folders = [folder / f"member-{k}" for k in range(len(groups))]
    members = []
    for own, peers, port in zip(folders, groups, free_ports(len(groups)), strict=True):
        members.append(Member.of(create_identity(own / "identity"), peers, [f"127.0.0.1:{port}"]))
        node = {"peers": list(peers), "listen": f"127.0.0.1:{port}"}
        (own / NODE).write_text(yaml.safe_dump(node))
    roster = first_roster(Ed25519PrivateKey.generate(), "", sum(map(len, groups)), members)
    for own in folders:
        write_roster(own / ROSTER, roster)
    return folders


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_simulation_and_federation_agree_to_the_bit(method: str, tmp_path: Path) -> None:
    recipe, settings = ROOT / "recipes" / "glue_sst2.yaml", words(method)
    finished(start("run", recipe, "--out", tmp_path / "simulated", *settings))
    simulated = adapters(tmp_path / "simulated")
    assert len(simulated) == 7
    assert len(set(simulated.values())) == 7
    finished(start("up", recipe, "--out", tmp_path / "up", *settings))
    assert adapters(tmp_path / "up") == simulated
    for k, groups in enumerate(GROUPS):
        folders = hosted_by(groups, tmp_path / f"groups-{k}")
        finished(*(start("peer", recipe, "--node", folder / NODE, *settings) for folder in folders))
        assert adapters(tmp_path / f"groups-{k}") == simulated
