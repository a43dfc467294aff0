"""A run directory before a run: whether it may be used, and what an earlier run left there. No torch here."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dfl_lora.errors import UserError
from dfl_lora.files import is_partial, remove

Line = dict[str, Any]
"""A line of rounds.jsonl."""
RECIPE = "recipe.yaml"
LEFT = (
    "checkpoint/latest.json", "checkpoint", "adapters", "rounds.jsonl", "summary.json", "partition.json",
    "report.html", "answers-gsm8k.jsonl", "log.txt", "status.json", "events.jsonl", "events.jsonl.1", RECIPE,
)  # fmt: skip
"""In the order of removal: first what makes a checkpoint one, last what makes the folder a run."""
NODE = "node"
"""A folder that may lie in a run directory before there is a run: its keys, its roster, its node file."""


def prepare(run: Path, resume: bool, overwrite: bool) -> None:
    """Checks that the run directory may be used; an existing run needs --resume or --overwrite."""
    if resume and overwrite:
        raise UserError("--resume goes on with a run and --overwrite starts it anew; give one of them.")
    place = next((p for p in (run, *run.parents) if p.exists()), run)
    if place.exists() and not place.is_dir():
        raise UserError(f"{place} is a file; give a folder with --out.")
    if not (run / RECIPE).exists():
        if run.exists() and not all(p.name == NODE or is_partial(p) for p in run.iterdir()):
            raise UserError(f"{run} holds files that are no run; give another folder with --out, or empty it.")
        return
    if not (resume or overwrite):
        raise UserError(
            f"There is a run in {run} already; go on with --resume, replace it with --overwrite, or use --out."
        )


@contextmanager
def held(run: Path) -> Iterator[None]:
    """Keeps other processes from writing to an existing run directory; the system lets go of it however one ends."""
    descriptor = os.open(run, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"Another process is writing to {run}; wait until it has ended, or give another folder with --out."
            ) from None
        yield
    finally:
        os.close(descriptor)


def is_held(run: Path) -> bool:
    """Tells whether a process is writing to a run directory now."""
    try:
        with held(run):
            return False
    except UserError:
        return True


def check_log(path: Path) -> None:
    """Raises where a log cannot be a file of that name."""
    folder = next(f for f in path.absolute().parents if f.exists())
    if path.is_dir() or not folder.is_dir():
        raise UserError(
            f"--log_path is {path}, but {path if path.is_dir() else folder} is "
            f"{'a directory' if path.is_dir() else 'a file'}; give a file in a folder."
        )


def clear(run: Path) -> None:
    """Removes what an earlier run left, and nothing else."""
    for name in LEFT:
        remove(run / name)
    for peer in run.glob("peer-[0-9]*"):
        remove(peer)


def read_lines(run: Path, done: int) -> list[Line]:
    """Returns the lines of the first `done` rounds; raises where rounds.jsonl does not have them.

    A torn last line is the mark of a killed process.
    """
    path, lines = run / "rounds.jsonl", list[Line]()
    for text in path.read_bytes().splitlines()[:done] if path.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:
            break
        if not isinstance(line, dict) or line.get("round") != len(lines) + 1:
            break
        lines.append(line)
    if len(lines) < done:
        raise UserError(f"{path} has {len(lines)} rounds, the checkpoint {done}; use --overwrite.")
    return lines
