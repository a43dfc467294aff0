"""Damaged resume points: whichever byte is other, it is told, and nothing is loaded."""

import hashlib
import json
import shutil
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from dfl_lora import checkpoint, machine
from dfl_lora.build import Federation, build
from dfl_lora.checkpoint import PIECE, load_checkpoint, save_checkpoint
from dfl_lora.errors import UserError
from dfl_lora.files import write_atomically
from dfl_lora.latest import LATEST, read_latest, seal_of
from dfl_lora.peers import Peers
from dfl_lora.reading import resolve
from dfl_lora.tensors import Layout, Tensors
from tiny import toy

STATE = "state-000002.safetensors"


@pytest.fixture(scope="module")
def federation() -> Federation:
    return build(resolve(toy()))


@pytest.fixture
def folder(federation: Federation, tmp_path: Path) -> Path:
    """A resume point after round 2, over one after round 1."""
    for t in (1, 2):
        save_checkpoint(tmp_path, federation.peers, t, federation.digest, {"start": None})
    return tmp_path


def test_the_last_resume_point_is_the_only_one(folder: Path, federation: Federation) -> None:
    assert sorted(f.name for f in folder.iterdir()) == [LATEST, STATE]
    checkpoint = load_checkpoint(folder, federation.peers, federation.digest)
    assert checkpoint is not None and (checkpoint.round, checkpoint.kept) == (2, {"start": None})


def test_no_byte_of_what_names_the_state_can_be_other(folder: Path) -> None:
    content = (folder / LATEST).read_bytes()
    for position in range(len(content)):
        (folder / LATEST).write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        with pytest.raises(UserError, match="is damaged"):
            read_latest(folder)


@pytest.mark.parametrize("share", [k / 40 for k in range(40)])
def test_no_byte_of_the_state_can_be_other(share: float, folder: Path, federation: Federation) -> None:
    content, before = (folder / STATE).read_bytes(), federation.peers.x.clone()
    position = int(share * len(content))
    (folder / STATE).write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
    with pytest.raises(UserError, match="its sha256 is not the recorded one"):
        load_checkpoint(folder, federation.peers, federation.digest)
    assert (federation.peers.x == before).all()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("name", [LATEST, STATE])
def test_a_file_cut_short_is_damaged(name: str, share: float, folder: Path, federation: Federation) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError, match="is damaged"):
        load_checkpoint(folder, federation.peers, federation.digest)


def test_a_state_that_is_gone_is_named(folder: Path) -> None:
    (folder / STATE).unlink()
    with pytest.raises(UserError, match=f"damaged \\({STATE} is missing\\)"):
        read_latest(folder)


def test_a_state_is_a_file_of_safetensors(folder: Path, federation: Federation) -> None:
    content, arrays = (folder / STATE).read_bytes(), federation.peers.arrays()
    assert content == save(arrays)
    read = load(content)
    assert read.keys() == arrays.keys() and all(torch.equal(read[name], arrays[name]) for name in arrays)


def test_what_is_loaded_is_what_was_saved(folder: Path, federation: Federation) -> None:
    other = build(resolve(toy()))
    for number, matrix in enumerate(other.peers.arrays().values()):
        matrix.fill_(number)
    assert load_checkpoint(folder, other.peers, federation.digest) is not None
    assert save(other.peers.arrays()) == save(federation.peers.arrays())


def test_a_state_of_other_tensors_is_told_and_not_loaded(folder: Path, federation: Federation) -> None:
    """Whoever writes to the folder can seal what they like."""
    other, latest = save({"x": torch.zeros(3, 5)}), json.loads((folder / LATEST).read_text())
    (folder / STATE).write_bytes(other)
    del latest["seal"]
    latest["sha256"] = hashlib.sha256(other).hexdigest()
    (folder / LATEST).write_text(json.dumps(latest | {"seal": seal_of(latest)}))
    before = federation.peers.x.clone()
    with pytest.raises(UserError, match="its tensors are not this run's"):
        load_checkpoint(folder, federation.peers, federation.digest)
    assert torch.equal(federation.peers.x, before)


def test_neither_saving_nor_loading_copies_the_state(tmp_path: Path) -> None:
    """The file is hashed and written from the matrices' own memory, and read into it."""
    layout = Layout.of({"q.B": ("B", (50_000, 2))})
    start, nothing = Tensors(torch.ones(100_000), layout), Tensors(torch.zeros(0), Layout.of({}))
    peers = Peers(range(100), start, nothing, optimizer=("exp_avg",))  # 80 MB
    tracemalloc.start()
    before = machine.own_memory()
    save_checkpoint(tmp_path, peers, 1, "d", {})
    load_checkpoint(tmp_path, peers, "d")
    grown, traced = machine.own_memory() - before, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert max(grown, traced) < 2 * PIECE + 2**21
    assert torch.equal(peers.x, torch.ones(100, 100_000)) and not peers.optimizer["exp_avg"].any()


def test_what_a_killed_process_left_is_gone_after_the_next_load(folder: Path, federation: Federation) -> None:
    shutil.copy(folder / STATE, folder / "state-000001.safetensors")
    (folder / ".latest.json.x.partial").write_text("{")
    assert load_checkpoint(folder, federation.peers, federation.digest) is not None
    assert sorted(f.name for f in folder.iterdir()) == [LATEST, STATE]


def test_a_round_saved_again_replaces_its_state_only_once_the_new_one_is_in_force(
    folder: Path, federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(path: Path, content: object) -> None:
        if path.name == LATEST:
            raise KeyboardInterrupt
        write_atomically(path, content)  # type: ignore[arg-type]

    with monkeypatch.context() as moment:
        moment.setattr(checkpoint, "write_atomically", killed)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(folder, federation.peers, 2, federation.digest, {"settled": True})
    found = load_checkpoint(folder, federation.peers, federation.digest)
    assert found is not None and found.kept == {"start": None}
    save_checkpoint(folder, federation.peers, 2, federation.digest, {"settled": True})
    found = load_checkpoint(folder, federation.peers, federation.digest)
    assert found is not None and found.kept == {"settled": True}
    assert sorted(f.name for f in folder.iterdir()) == [LATEST, "state-000002-settled.safetensors"]


def test_a_state_elsewhere_is_never_read(folder: Path) -> None:
    latest = json.loads((folder / LATEST).read_text())
    (folder / LATEST).write_text(json.dumps(latest | {"file": "../secret"}))
    with pytest.raises(UserError, match="damaged"):
        read_latest(folder)
