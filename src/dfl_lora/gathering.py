"""What the peers of a federation on one machine leave, put together: lines while they run, states at the end.

DIR/peer-000 ... are their run directories. DIR gets rounds.jsonl with a line of all for each round, and at the end what
only all together can tell: the consensus, how far from it they are, its adapter, and the report.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dfl_lora.build import Federation
from dfl_lora.checkpoint import load_checkpoint
from dfl_lora.errors import UserError
from dfl_lora.files import append, write_atomically
from dfl_lora.peers import Peers
from dfl_lora.records import consensus_of, finite, merged
from dfl_lora.run_directory import Line
from dfl_lora.running import Running
from dfl_lora.tensors import Tensors


def folder_of(run: Path, peer: int) -> Path:
    """Returns the run directory of a peer of the federation in `run`."""
    return run / f"peer-{peer:03d}"


class Lines:
    """The lines of one peer's rounds.jsonl, which another process writes."""

    def __init__(self, path: Path) -> None:
        self.path, self.lines = path, list[Line]()
        self.read_to, self.file = 0, 0

    def read(self) -> list[Line]:
        """Returns all lines there are by now; a file that was replaced is read anew."""
        try:
            file = self.path.stat().st_ino
        except FileNotFoundError:
            return self.lines
        if file != self.file:
            self.file, self.read_to, self.lines = file, 0, []
        with self.path.open("rb") as content:
            content.seek(self.read_to)
            whole = content.read().rpartition(b"\n")[0]
        if whole:
            self.lines += [json.loads(text) for text in whole.split(b"\n")]
            self.read_to += len(whole) + 1
        return self.lines


class Rounds:
    """The rounds of all peers, as far as each of them is."""

    def __init__(self, run: Path, peers: Sequence[int]) -> None:
        self.run, self.told = run, 0
        self.of = {peer: Lines(folder_of(run, peer) / "rounds.jsonl") for peer in peers}

    def read(self, without: Iterable[int] = ()) -> list[Line]:
        """Returns the rounds that all peers (but those) have finished since it was asked last, and writes them down."""
        lines = [own.read() for peer, own in self.of.items() if peer not in without]
        done = min(map(len, lines), default=0)
        new = [merged([own[t] for own in lines]) for t in range(self.told, done)]
        for line in new:
            append(self.run / "rounds.jsonl", json.dumps(line) + "\n")
        self.told = max(self.told, done)
        return new

    @property
    def furthest(self) -> int:
        """The last round that any peer has finished."""
        return max((len(own.lines) for own in self.of.values()), default=0)


def load_states(federation: Federation, run: Path) -> None:
    """Loads into the peers of a federation what each of them ended with in a process of its own."""
    peers = federation.peers
    start = Tensors(peers.x[0].clone(), peers.layout)
    for row, peer in enumerate(peers.ids):
        own = Peers([peer], start, peers.common, optimizer=peers.optimizer, memory=peers.memory)
        if load_checkpoint(folder_of(run, peer) / "checkpoint", own, federation.digest) is None:
            raise UserError(f"{folder_of(run, peer)} has no checkpoint; start the federation anew with --overwrite.")
        for name, matrix in peers.arrays().items():
            matrix[row] = own.arrays()[name][0]


def gather(running: Running) -> Line:
    """Writes what a federation leaves at its end, from what its peers left, and returns the summary."""
    f, run = running.federation, running.run
    load_states(f, run)
    running.check_finite()
    by_peer = [Lines(folder_of(run, peer) / "rounds.jsonl").read() for peer in f.peers.ids]
    lines = [merged(each) for each in zip(*by_peer, strict=True)]
    lines[-1] |= {key: finite(value) for key, value in asdict(consensus_of(f.peers)).items()}
    write_atomically(run / "rounds.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
    running.lines = lines
    summary = running.summary() | together([read_summary(folder_of(run, peer)) for peer in f.peers.ids])
    summary["tokens_per_second"] = sum(line["tokens"] for line in lines) / max(summary["seconds"]["train"], 1e-9)
    running.write_consensus()
    running.write_end(summary)
    return summary


def together(summaries: Sequence[Mapping[str, Any]]) -> Line:
    """Returns the bytes of a mean peer, the seconds of the slowest, and the memory of all processes."""
    parts = summaries[0]["seconds"]
    return {
        "bytes_sent_per_peer": sum(each["bytes_sent_per_peer"] for each in summaries) / len(summaries),
        "seconds": {part: max(each["seconds"][part] for each in summaries) for part in parts},
        "peak_rss_bytes": sum(each["peak_rss_bytes"] for each in summaries),
    }


def read_summary(run: Path) -> Line:
    return dict(json.loads((run / "summary.json").read_text(encoding="utf-8")))


def tail(path: Path, num_lines: int = 8, num_bytes: int = 4000) -> str:
    """Returns the last lines of a text file."""
    with path.open("rb") as content:
        content.seek(max(0, os.fstat(content.fileno()).st_size - num_bytes))
        return "\n".join(content.read().decode(errors="replace").splitlines()[-num_lines:])
