"""What is said of an interrupted run: to go on with --resume, where a checkpoint of this very run is there."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dfl_lora.latest import LATEST


class Interrupted(Exception):
    """One sentence about what was interrupted, and what is left of it."""


@contextmanager
def resumable(run: Path, resume: bool) -> Iterator[None]:
    """Raises Interrupted in place of KeyboardInterrupt; a checkpoint from before counts only where it is resumed."""
    earlier = None if resume else written(run)
    try:
        yield
    except KeyboardInterrupt:
        kept = written(run) not in (None, earlier)
        how = "go on with --resume" if kept else "nothing was kept, since there is no checkpoint of this run yet"
        raise Interrupted(f"Interrupted; {how}.") from None


def written(run: Path) -> int | None:
    """Returns when the checkpoint in force was written, in nanoseconds; None where there is none."""
    try:
        return (run / "checkpoint" / LATEST).stat().st_mtime_ns
    except OSError:
        return None
