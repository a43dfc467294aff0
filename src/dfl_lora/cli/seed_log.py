"""The seed's log, line by line, so that its users' parsers go on working. Clients count from 1."""

import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from dfl_lora.build import Federation
from dfl_lora.files import naming
from dfl_lora.rounds import Record
from dfl_lora.run_directory import Line
from dfl_lora.running import Start


class Handler(logging.FileHandler):
    """A file handler that does not swallow a full disk."""

    def handleError(self, record: logging.LogRecord) -> None:
        with naming(Path(self.baseFilename)):
            raise


class SeedLog:
    """Writes `time - INFO - line` to a file; a new run starts it anew, a resumed one cuts it back to its checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.logger = logging.Logger("dfl_lora.seed", logging.INFO)
        self.rounds = 0
        self.differences: list[float | None] = []
        self.accuracies: list[list[float]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handler in self.logger.handlers:
            handler.close()

    def started(self, federation: Federation, lines: Sequence[Line], start: Start | None) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        there = cut_back(self.path, len(lines))
        handler = Handler(self.path, mode="a" if there else "w")
        handler.setFormatter(logging.Formatter("%(asctime)s - %(levelname)s - %(message)s"))
        self.rounds = federation.recipe.train.rounds
        self.accuracies = [[] for _ in federation.peers]
        if start is not None:
            self.differences.append(start.consensus_error)
            self.append(start.accuracies)
        self.logger.disabled = there > 0
        self.logger.addHandler(handler)
        for i, accuracy in enumerate(start.accuracies if start else (), 1):
            self.logger.info("Initial accuracy of client %d: %s", i, accuracy)
        for line in lines:
            self.logger.disabled = line["round"] <= there
            self.tell(line, {i: loss for i, loss in enumerate(line["loss_per_peer"]) if loss is not None})
        self.logger.disabled = False

    def append(self, accuracies: Sequence[float]) -> None:
        for history, accuracy in zip(self.accuracies, accuracies, strict=False):
            history.append(accuracy)

    def finished_round(self, record: Record, line: Line) -> None:
        self.tell(line, {i: progress.loss for i, progress in record.progress.items()})

    def tell(self, line: Line, losses: Mapping[int, float]) -> None:
        """Writes the lines of a round, in which the peers of `losses` took part, and keeps its history."""
        t, info = line["round"], self.logger.info
        info("Round %d/%d", t, self.rounds)
        before = line.get("accuracy_before_mixing", {}).get("per_peer")
        for i, loss in losses.items():
            scored = f", Accuracy: {before[i]}" if before else ""
            info("Client %d - Loss: %s%s", i + 1, loss, scored)
        info("Round %d - Parameter Difference: %s", t, line["consensus_error"])
        self.differences.append(line["consensus_error"])
        if "accuracy" in line:
            self.append(line["accuracy"]["per_peer"])
            for i, accuracy in enumerate(line["accuracy"]["per_peer"], 1):
                info("Accuracy of client %d after round %d: %s", i, t, accuracy)
        info("Parameter Difference record: %s", self.differences)
        info("Accuracies after round %d: %s", t, self.accuracies)

    def ended(self, summary: Mapping[str, Any], run: Path) -> None:
        pass


def cut_back(path: Path, done: int) -> int:
    """Cuts a log after the last of its first `done` rounds that is told to the end; returns that round, 0 for none."""
    if not done or not path.is_file():
        return 0
    content = path.read_bytes()
    ends = {int(end[1]): end.end() for end in re.finditer(rb" - Accuracies after round (\d+): .*\n", content)}
    last = max((t for t in ends if t <= done), default=0)
    if last:
        os.truncate(path, ends[last])
    return last
