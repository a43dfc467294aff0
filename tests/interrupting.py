"""Commands in processes of their own that stop at a chosen change of a folder: killed, signalled, or on a full disk.

Python reports every file that is opened, renamed or removed to audit hooks before it happens, so each moment between
two changes of a run directory can be had. The processes are forked from one that has loaded the engine and run once.
"""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, Self

PATIENCE_S = 120
CLOCKED = {"seconds", "peak_rss_bytes", "tokens_per_second"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.chmod")
SIGNALS = {"kill": signal.SIGKILL, "interrupt": signal.SIGINT, "terminate": signal.SIGTERM}


@dataclass(frozen=True)
class Stop:
    """What happens before the `at`-th change (from 0) below `folder`, or before the first of a file named `before`."""

    folder: str
    way: str = "kill"
    """A signal: kill, interrupt, terminate; or full: the disk is full from then on."""
    at: int | None = None
    before: str | None = None
    largest_file: int | None = None
    """Bytes beyond which no file can grow."""


@dataclass(frozen=True)
class Ended:
    """The exit code (-9 where killed), what was said on stderr, and how many changes there were."""

    code: int
    said: str
    changes: int


class Commands:
    """The process from which commands are forked; a context."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.communicate(timeout=PATIENCE_S)

    def run(self, words: Sequence[object], stop: Stop) -> Ended:
        """Runs one command of the project in a process of its own, stopped as `stop` says."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps([[str(word) for word in words], asdict(stop)]) + "\n")
        self.process.stdin.flush()
        return Ended(**json.loads(self.process.stdout.readline()))


class Ground:
    """A folder in which the run of a recipe is stopped and resumed, and what it leaves where nobody stops it."""

    def __init__(self, commands: Commands, folder: Path, content: Mapping[str, Any]) -> None:
        self.commands, self.run = commands, folder / "run"
        self.recipe = folder / "recipe.yaml"
        self.recipe.write_text(json.dumps(content))
        whole = self.command(Stop(str(self.run)))
        assert whole.code == 0, whole.said
        self.changes, self.rounds, self.end = whole.changes, rounds_of(self.run), end_of(self.run)

    def command(self, stop: Stop, *more: str) -> Ended:
        return self.commands.run(["run", self.recipe, "--out", self.run, "--json", *more], stop)

    def stopped(self, **how: Any) -> Ended:
        """Starts the run anew and stops it."""
        shutil.rmtree(self.run, ignore_errors=True)
        return self.command(Stop(str(self.run), **how))

    def goes_on(self, to_the_end: bool) -> bool:
        """Resumes the run to its last round, or to its end, and tells whether all is as if nobody had stopped it."""
        end = self.command(Stop(str(self.run), before=None if to_the_end else ".summary.json"), "--resume")
        if end.code != (0 if to_the_end else -9) or rounds_of(self.run) != self.rounds:
            return False
        return not to_the_end or end_of(self.run) == self.end


def rounds_of(run: Path) -> dict[str, Any]:
    """Returns what the rounds of a run left, but for the time they took."""
    lines = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    log = (run / "log.txt").read_text().splitlines()
    return {
        "lines": [{k: v for k, v in line.items() if k not in CLOCKED} for line in lines],
        "log": [line.rpartition("  ")[0] for line in log if line.startswith("round ")],
        "checkpoint": {f.name: f.read_bytes() for f in (run / "checkpoint").iterdir()},
        "partition": (run / "partition.json").read_bytes(),
    }


def end_of(run: Path) -> dict[str, Any]:
    """Returns the summary of a run but for time and memory, its adapters, and the names of all its files."""
    summary = json.loads((run / "summary.json").read_text())
    return {
        "summary": {k: v for k, v in summary.items() if k not in CLOCKED},
        "files": sorted(str(f.relative_to(run)) for f in run.rglob("*")),
        "adapters": [f.read_bytes() for f in sorted(run.glob("adapters/*/*"))],
    }


def partials(run: Path) -> list[str]:
    return [f.name for f in run.rglob(".*")]


def serve() -> None:
    """What the process does: run the toy once, then fork a process for each line of stdin and tell how it ended."""
    from dfl_lora.cli import main
    from tiny import toy, written

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    with TemporaryDirectory() as folder:
        main(["run", str(written(Path(folder) / "toy.yaml", toy())), "--out", f"{folder}/run", "--json"])
    for line in sys.stdin:
        words, stop = json.loads(line)
        answers.write(json.dumps(asdict(forked(words, Stop(**stop)))) + "\n")
        answers.flush()


def forked(words: list[str], stop: Stop) -> Ended:
    """Runs one command in a forked process and returns how it ended."""
    said, counted = os.pipe(), os.pipe()
    process = os.fork()
    if process == 0:
        signal.alarm(PATIENCE_S)
        os.dup2(said[1], 2)
        command(words, stop, counted[1])
    for end in (said[1], counted[1]):
        os.close(end)
    with os.fdopen(said[0]) as text, os.fdopen(counted[0]) as dots:
        answer = text.read(), len(dots.read())
    return Ended(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), *answer)


def command(words: list[str], stop: Stop, counts: int) -> None:
    """Runs one command as the command line does and ends the process."""
    from dfl_lora.__main__ import console_entry

    sys.addaudithook(watcher(stop, counts))
    if stop.largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (stop.largest_file, resource.RLIM_INFINITY))
    sys.argv = ["dfl-lora", *words]
    code = 1
    try:
        console_entry()
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def watcher(stop: Stop, counts: int) -> Callable[[str, tuple[object, ...]], None]:
    """Returns an audit hook that counts the changes below a folder and does before one of them what is asked."""
    seen, reached = 0, False

    def watch(event: str, given: tuple[object, ...]) -> None:
        nonlocal seen, reached
        writes = event == "open" and isinstance(given[2], int) and bool(given[2] & WRITING)
        if not (writes or event in CHANGES) or not str(given[0]).startswith(stop.folder):
            return
        os.write(counts, b".")
        now = seen == stop.at or (stop.before is not None and stop.before in str(given[0]))
        first, reached, seen = now and not reached, reached or now, seen + 1
        if stop.way == "full" and reached and (writes or event in ("os.mkdir", "os.rename")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(given[0]))
        if stop.way in SIGNALS and first:
            os.kill(os.getpid(), SIGNALS[stop.way])

    return watch


if __name__ == "__main__":
    serve()
