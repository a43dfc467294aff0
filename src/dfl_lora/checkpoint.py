"""Resume points: everything a run needs to go on to the bit, as safetensors and JSON.

The state is written under a name of its own; `latest.json` names it with its sha256 and is replaced
atomically, so that a process killed at any moment leaves the last whole checkpoint in force.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save

from dfl_lora.errors import UserError
from dfl_lora.files import write_atomically
from dfl_lora.latest import LATEST, damaged, read_latest, seal_of
from dfl_lora.peers import Peers


@dataclass(frozen=True)
class Checkpoint:
    """The round that is over, and what the caller wanted kept with it."""

    round: int
    kept: Mapping[str, Any]


def save_checkpoint(folder: Path, peers: Peers, round: int, digest: str, kept: Mapping[str, Any]) -> None:
    """Writes the state of all hosted peers after a round; older states are removed once it is in force."""
    folder.mkdir(parents=True, exist_ok=True)
    content = save({name: matrix.contiguous().cpu() for name, matrix in peers.arrays().items()})
    name = f"state-{round:06d}.safetensors"
    write_atomically(folder / name, content)
    latest = {
        "file": name,
        "sha256": hashlib.sha256(content).hexdigest(),
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
    try:
        content = (folder / Path(latest["file"]).name).read_bytes()
        intact = hashlib.sha256(content).hexdigest() == latest["sha256"]
        arrays = load(content) if intact else {}
        kept, round, recipe = dict(latest["kept"]), int(latest["round"]), latest["recipe_digest"]
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise damaged(folder, f"{type(error).__name__}: {error}") from None
    if not intact:
        raise damaged(folder, "its sha256 is not the recorded one")
    same_peers = latest["peers"] == list(peers.ids) and latest["layout_digest"] == peers.layout.digest
    if recipe != digest or not same_peers:
        raise UserError(
            f"The checkpoint in {folder} belongs to another recipe (digest {str(recipe)[:12]}, not {digest[:12]}); "
            "resume with the recipe it was started with, or start anew with --overwrite."
        )
    own = peers.arrays()
    if {k: (v.shape, v.dtype) for k, v in arrays.items()} != {k: (v.shape, v.dtype) for k, v in own.items()}:
        raise damaged(folder, "its tensors are not this run's")
    for name, matrix in own.items():
        matrix.copy_(arrays[name])
    tidy(folder, latest["file"])
    return Checkpoint(round, kept)


def tidy(folder: Path, state: str) -> None:
    """Removes older states than the one in force, and what a killed process had not finished."""
    for old in folder.iterdir():
        if old.name not in (state, LATEST):
            old.unlink()
