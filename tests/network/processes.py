"""Members in processes of their own (worker.py), told what to do and heard line by line."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from dfl_lora.membership.identity import CERTIFICATE, KEY, TLS_KEY, Identity, pem, write_new
from dfl_lora.membership.roster import Roster, write_roster

T = TypeVar("T")
Line = Mapping[str, Any]
WORKER = Path(__file__).with_name("worker.py")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def until(look: Callable[[], T], seconds: float = 10.0) -> T:
    """Returns what `look` gives as soon as it is something; fails where it takes too long."""
    end = time.monotonic() + seconds
    while not (seen := look()):
        assert time.monotonic() < end, f"waited {seconds} s in vain"
        time.sleep(0.01)
    return seen


def keep_identity(identity: Identity, folder: Path) -> Path:
    """Writes an identity to a new folder."""
    folder.mkdir(mode=0o700)
    write_new(folder / KEY, pem(identity.key), 0o600)
    write_new(folder / TLS_KEY, identity.tls_key, 0o600)
    write_new(folder / CERTIFICATE, identity.certificate, 0o644)
    return folder


class Process:
    """A worker, from outside."""

    def __init__(
        self,
        folder: Path,
        identity: Identity,
        roster: Roster,
        edges: Sequence[tuple[int, int]],
        listen: str | None,
        limits: Mapping[str, float],
        size: int = 50,
    ) -> None:
        folder.mkdir()
        write_roster(folder / "roster.json", roster)
        member = roster.member(identity.id)
        spec = {
            "identity": str(keep_identity(identity, folder / "identity")), "roster": str(folder / "roster.json"),
            "hosted": member.peers if member else (), "edges": list(edges), "listen": listen, "limits": dict(limits),
            "size": size,
        }  # fmt: skip
        (folder / "spec.json").write_text(json.dumps(spec))
        self.lines: list[Line] = []
        command = [sys.executable, "-W", "error", str(WORKER), str(folder / "spec.json")]
        self.errors = (folder / "errors").open("w+")
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, cwd=WORKER.parents[1]
        )
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append({"heard": time.monotonic(), **json.loads(line)})

    def tell(self, **command: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()

    def answer(self, name: str, after: int = 0, seconds: float = 60) -> Line:
        """Returns the first answer of a name among the lines from number `after` on."""

        def look() -> Line | None:
            assert self.process.poll() is None or name == "end", (
                f"it ended with {self.process.poll()}: {self.said_wrong()}"
            )
            return next((line for line in self.lines[after:] if line.get("answer") == name), None)

        found = until(look, seconds)
        assert found is not None
        return found

    def ask(self, name: str, **more: Any) -> Line:
        """Tells a command and returns its answer."""
        after = len(self.lines)
        self.tell(do=name, **more)
        return self.answer(name, after)

    def look(self) -> Line:
        return self.ask("look")

    def events(self, name: str, member: str | None = None) -> list[Line]:
        return [e for e in self.lines if e.get("event") == name and (member is None or e["member"] == member)]

    def end(self) -> Line:
        """Waits until it has ended in good order, as it was told to, and returns its last words."""
        assert self.process.wait(30) == 0, self.said_wrong()
        self.reader.join(5)
        return self.answer("end")

    def send(self, what: signal.Signals) -> None:
        os.kill(self.process.pid, what)

    def said_wrong(self) -> str:
        self.errors.seek(0)
        return self.errors.read()[-3000:]

    def close(self) -> None:
        """Ends it in any case."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.reader.join(5)
        for stream in (self.process.stdin, self.process.stdout, self.errors):
            assert stream is not None
            with suppress(BrokenPipeError):
                stream.close()


def at_once(processes: Sequence[Process], name: str, **more: Any) -> list[Line]:
    """Gives several processes the same command at the same time and returns their answers."""
    after = [len(p.lines) for p in processes]
    for p in processes:
        p.tell(do=name, **more)
    return [p.answer(name, n) for p, n in zip(processes, after, strict=True)]
