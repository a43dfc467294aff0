"""Resume points: everything a run needs to go on to the bit, as safetensors and JSON.

The state is written under a name of its own; `latest.json` names it with its sha256 and is replaced
atomically, so that a process killed at any moment leaves the last whole checkpoint in force.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dfl_lora.codecs.frames import Frame, in_order
from dfl_lora.errors import UserError
from dfl_lora.files import write_atomically
from dfl_lora.latest import LATEST, damaged, read_latest, seal_of
from dfl_lora.peers import Peers

PIECE = 4 * 2**20
"""Bytes that are written, hashed or read at a time."""


@dataclass(frozen=True)
class Checkpoint:
    """The round that is over, and what the caller wanted kept with it."""

    round: int
    kept: Mapping[str, Any]


def save_checkpoint(folder: Path, peers: Peers, round: int, digest: str, kept: Mapping[str, Any]) -> None:
    """Writes the state of all hosted peers after a round; older states are removed once it is in force."""
    folder.mkdir(parents=True, exist_ok=True)
    name, seen = f"state-{round:06d}.safetensors", hashlib.sha256()
    if (folder / name).exists():  # in force: a peer saves its last round again when it has settled with the others
        name = f"state-{round:06d}-settled.safetensors"

    def hashed() -> Iterator[bytes | memoryview]:
        for piece in pieces(peers.arrays()):
            seen.update(piece)
            yield piece

    write_atomically(folder / name, hashed())
    latest = {
        "file": name,
        "sha256": seen.hexdigest(),
        "round": round,
        "recipe_digest": digest,
        "layout_digest": peers.layout.digest,
        "peers": list(peers.ids),
        "kept": dict(kept),
    }
    write_atomically(folder / LATEST, json.dumps(latest | {"seal": seal_of(latest)}, indent=1).encode())
    tidy(folder, name)


def load_checkpoint(folder: Path, peers: Peers, digest: str) -> Checkpoint | None:
    """Loads the last state into the peers; None where there is none. Raises where it is damaged or of another run."""
    latest = read_latest(folder)
    if latest is None:
        return None
    kept, round, recipe = latest["kept"], latest["round"], latest["recipe_digest"]
    same_peers = latest["peers"] == list(peers.ids) and latest["layout_digest"] == peers.layout.digest
    try:
        with (folder / Path(latest["file"]).name).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != latest["sha256"]:
                raise damaged(folder, "its sha256 is not the recorded one")
            if recipe != digest or not same_peers:
                raise UserError(
                    f"The checkpoint in {folder} belongs to another recipe (digest {str(recipe)[:12]}, not "
                    f"{digest[:12]}); resume with the recipe it was started with, or start anew with --overwrite."
                )
            file.seek(0)
            if not read_into(peers.arrays(), file):
                raise damaged(folder, "its tensors are not this run's")
    except OSError as error:
        raise damaged(folder, f"{type(error).__name__}: {error}") from None
    tidy(folder, latest["file"])
    return Checkpoint(round, kept)


def read_into(arrays: Mapping[str, Tensor], file: BufferedReader) -> bool:
    """Reads a state into the matrices; False, with nothing read into them, where it holds others than these."""
    header = prefix(arrays)  # names, dtypes and shapes, and so the place of each number
    same = file.read(len(header)) == header
    for _, matrix in in_order(arrays) if same else ():
        own = matrix.cpu()  # itself, unless it lies on another device
        for piece in memory_of(own):
            file.readinto(piece)
        if own is not matrix:
            matrix.copy_(own)
    return same


def pieces(arrays: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """Yields the content of a safetensors file of these matrices: its header, then their own memory."""
    yield prefix(arrays)
    for _, matrix in in_order(arrays):
        yield from memory_of(matrix.cpu())


def prefix(arrays: Mapping[str, Tensor]) -> bytes:
    return Frame("", "", arrays).prefix


def memory_of(matrix: Tensor) -> Iterator[memoryview]:
    """Yields the bytes of a contiguous matrix, themselves and not a copy."""
    content = matrix.view(-1).view(torch.uint8).numpy().data
    return (content[start : start + PIECE] for start in range(0, len(content), PIECE))


def tidy(folder: Path, state: str) -> None:
    """Removes older states than the one in force, and what a killed process had not finished."""
    for old in folder.iterdir():
        if old.name not in (state, LATEST):
            old.unlink()
