"""What others can see of a real peer while it runs: status.json, how things stand, and events.jsonl, what happened.

status.json is replaced at most once a second, after rounds and events, and every few seconds in between, by a thread
of its own. events.jsonl has a line for each event and is rotated at 5 MB, so that it fills no disk. No key is
in either.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from logging import Formatter, Logger, LogRecord
from logging.handlers import RotatingFileHandler
from pathlib import Path
from threading import Event, Lock, Thread
from time import monotonic
from types import TracebackType
from typing import Any, Self

from dfl_lora.errors import UserError
from dfl_lora.files import write_atomically
from dfl_lora.membership.identity import SHOWN
from dfl_lora.run_directory import is_held

STATUS, EVENTS = "status.json", "events.jsonl"
LARGEST_LOG, OLDER_LOGS = 5_000_000, 1
"""Bytes of events.jsonl, and how many older ones are kept."""
PAUSE_S, AT_LEAST_S = 1.0, 5.0
"""status.json is replaced after so many seconds at the earliest, and at the latest."""
AGAIN_S = 60.0
"""The same is not said again to a person within so many seconds."""
SILENT = {"late"}
"""Events of which a person is not told: they are in events.jsonl."""
VERBS = {
    "linked": "joined", "failed-edge": "left out of a round", "taken-back": "taken back", "bye": "has finished",
    "dialling": "cannot be reached", "waiting": "waited for",
}  # fmt: skip
"""What is said where it is another word than the name of the event."""

Happened = Mapping[str, Any]
Look = Callable[[], Mapping[str, Any]]


class Log(RotatingFileHandler):
    """A log that loses a line where the disk takes none: the next line of rounds.jsonl raises of it."""

    def handleError(self, record: LogRecord) -> None: ...


class Watch:
    """Writes down how a real peer is doing; a context, in whose thread status.json is written."""

    def __init__(self, run: Path, about: Mapping[str, Any], tell: Callable[[str], None]) -> None:
        """`about` is what is known from the start; `tell` shows a sentence to a person."""
        self.run, self.about, self.tell = run, dict(about), tell
        self.state, self.round, self.started = "starting", 0, now()
        self.look: Look | None = None
        self.network: Mapping[str, Any] = {}
        self.told: dict[tuple[object, ...], float] = {}
        self.due, self.over, self.looking = Event(), Event(), Lock()
        self.logger, self.log = Logger("dfl_lora.events"), Log(run / EVENTS, "a", LARGEST_LOG, OLDER_LOGS, "utf-8")
        self.log.setFormatter(Formatter("%(message)s"))
        self.logger.addHandler(self.log)
        self.thread = Thread(target=self.keep_writing, name="status", daemon=True)

    def __enter__(self) -> Self:
        self.write()
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.state = "finished" if kind is None else "failed" if issubclass(kind, Exception) else "stopped"
        self.over.set()
        self.due.set()
        self.thread.join()
        self.log.close()
        self.write()

    @contextmanager
    def of(self, look: Look) -> Iterator[None]:
        """Asks `look` how things stand on the network, for as long as the block lasts."""
        with self.looking:
            self.look = look
        try:
            yield
        finally:
            with self.looking:
                self.network, self.look = look(), None

    def turn(self, state: str, round: int) -> None:
        """Notes what the process does now, and the last round that is over."""
        self.state, self.round = state, round
        self.due.set()

    def happened(self, event: Happened) -> None:
        """Notes an event of the network; a person is told, not twice of the same within a minute."""
        self.logger.info(json.dumps({"time": now(), **event}))
        key = (event["event"], event["member"], tuple(event["peers"]))
        if event["event"] not in SILENT and monotonic() - self.told.get(key, -AGAIN_S) >= AGAIN_S:
            if len(self.told) > 10_000:
                self.told.clear()
            self.told[key] = monotonic()
            self.tell(sentence(event))
        self.due.set()

    def keep_writing(self) -> None:
        while not self.over.wait(PAUSE_S):
            self.due.wait(AT_LEAST_S)
            self.due.clear()
            if not self.over.is_set():
                self.write()

    def write(self) -> None:
        """Replaces status.json; a full disk is for the rounds to raise of."""
        with self.looking:
            self.network = self.look() if self.look else self.network
        status = {
            **self.about,
            "pid": os.getpid(),
            "started": self.started,
            "time": now(),
            "state": self.state,
            "rounds_done": self.round,
            "network": dict(self.network),
        }
        try:
            write_atomically(self.run / STATUS, json.dumps(status, indent=1).encode())
        except OSError:
            self.due.set()


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def sentence(event: Happened) -> str:
    """Returns an event as a person reads it, such as "peer 3 (abcdefgh) joined: 10.0.0.4:7000"."""
    who = whose(event["peers"])
    member = f"({event['member'][:SHOWN]})" if event["member"] else ""
    what = VERBS.get(event["event"], event["event"])
    more = event["why"] or event.get("address") or ""
    return " ".join(filter(None, (who, member, what))) + (f": {more}" if more else "")


def whose(peers: Sequence[int]) -> str:
    """Returns such as "peer 3", "peers 0, 2", or nothing."""
    return "" if not peers else f"peer{'' if len(peers) == 1 else 's'} {', '.join(map(str, peers))}"


def read_status(run: Path) -> dict[str, Any]:
    """Returns what a peer wrote of itself last, with `alive`: whether its process is there now."""
    try:
        status = json.loads((run / STATUS).read_text(encoding="utf-8"))
        if not isinstance(status, dict):
            raise ValueError("it is no mapping")
    except FileNotFoundError:
        raise UserError(
            f"There is no {STATUS} in {run}; start the peer with dfl-lora peer, or give its run directory with --out."
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{run / STATUS} cannot be read ({error}); the peer writes it anew while it runs.") from None
    return status | {"alive": is_held(run)}
