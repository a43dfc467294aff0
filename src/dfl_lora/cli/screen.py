"""What a person sees of a run: a line for each round while it goes, a table at the end. The same goes to log.txt.

The log of a run that goes on is written anew from the lines of its rounds, so that each round stands in it once.
"""

import sys
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from dfl_lora.build import Federation
from dfl_lora.files import append, write_atomically
from dfl_lora.metrics import ends_of, key_of
from dfl_lora.records import hosts_all
from dfl_lora.report.page import size
from dfl_lora.rounds import Record
from dfl_lora.run_directory import Line
from dfl_lora.running import Start
from dfl_lora.watching import whose

WIDTH = 120


class Screen:
    """Live on a terminal; only the beginning and the end where there is none; nothing at all if quiet."""

    def __init__(self, run: Path, quiet: bool = False) -> None:
        self.run = run
        self.console = Console(quiet=quiet, highlight=False, width=None if sys.stdout.isatty() else WIDTH)
        live = self.console.is_terminal and not quiet
        columns = (TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.progress = Progress(*columns, console=self.console, disable=not live)
        self.task = self.progress.add_task("rounds", total=None)
        self.live = live
        self.keys = ["accuracy"]

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def say(self, text: str, *, always: bool = False) -> None:
        """Prints a line, where someone watches or `always`, and appends it to log.txt."""
        if self.live or always:
            self.console.print(text, markup=False)
        append(self.run / "log.txt", f"{text}\n")

    def started(self, federation: Federation, lines: Sequence[Line], start: Start | None) -> None:
        recipe, topology = federation.recipe, federation.topology
        here = "" if hosts_all(federation) else f", {whose(federation.peers.ids)} in this process"
        self.progress.update(self.task, total=recipe.train.rounds, completed=len(lines))
        write_atomically(self.run / "log.txt", b"")
        self.keys = keys_of(str(recipe.evaluate.metric))
        head = "" if recipe.task.kind == "causal_lm" else f"head {recipe.method.head}, "
        self.say(
            f"{recipe.name}: {topology.num_peers} peers on {recipe.peers.topology.kind} ({topology}){here}, "
            f"{recipe.method.schedule}, {head}{federation.peers.layout.size:,} numbers a peer, "
            f"{recipe.compute.dtype} {recipe.compute.attention}, digest {federation.digest[:12]}",
            always=True,
        )
        if federation.export is not None and federation.export.carried:
            self.say(f"adapters carry the tokenizer and {federation.export.carried}", always=True)
        if federation.short:
            self.say(federation.short, always=True)
        for note, count in federation.data.notes.items():
            self.say(f"{count:,} {note}", always=True)
        for line in lines:
            self.say(told(line, self.keys))
        if lines:
            self.say(f"going on after round {len(lines)}", always=True)

    def finished_round(self, record: Record, line: Line) -> None:
        self.tell(line, record.round)

    def happened(self, sentence: str) -> None:
        """Shows what happened on the network; it is kept in events.jsonl."""
        self.console.print(sentence, markup=False)

    def tell(self, line: Line, furthest: int) -> None:
        """Says a round that all peers have finished, of whom the fastest is at the end of round `furthest`."""
        self.say(told(line, self.keys) + (f"  (fastest peer: {furthest})" if furthest > line["round"] else ""))
        self.progress.update(self.task, completed=line["round"])

    def ended(self, summary: Mapping[str, Any], run: Path) -> None:
        self.progress.stop()
        table = comparison({summary["name"]: summary})
        self.console.print(table)
        drawn = StringIO()
        Console(file=drawn, width=WIDTH).print(table)
        append(self.run / "log.txt", drawn.getvalue())
        self.say(f"report: {run / 'report.html'}", always=True)


def told(line: Line, keys: Sequence[str]) -> str:
    """Returns what is said of a round, with the metrics of these keys where it was evaluated."""
    measured = [(key, line[key]) for key in keys if key in line]
    scored = "".join(f"{key} {share(m['mean'])} (worst {share(m[ends_of(key)[0]])})  " for key, m in measured)
    return (
        f"round {line['round']:3d}  loss {number(line['loss']['mean'])}  {scored}"
        f"disagreement {apart(line['relative_disagreement'])}  "
        f"consensus error {apart(line['consensus_error'])}  sent {size(line['bytes_sent_per_peer'])} a peer  "
        f"{line['seconds']['total']:.1f} s"
    )


def keys_of(metric: str) -> list[str]:
    """Returns the keys of what is shown of a run: accuracy, and its own metric where that is another."""
    return list(dict.fromkeys(("accuracy", key_of(metric))))


def share(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3f}"


def number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def apart(value: float | None) -> str:
    """Returns a distance of the peers from agreement, a dash where it is not known."""
    return "–" if value is None else number(value)


def comparison(summaries: Mapping[str, Mapping[str, Any]]) -> Table:
    """Returns one table of several runs: accuracy and their own metrics, mean and worst, the disagreements, bytes."""
    accuracy, *others = dict.fromkeys(
        key for summary in summaries.values() for key in keys_of(summary.get("metric", "accuracy"))
    )
    table = Table(title=None)
    table.add_column("run", no_wrap=True, min_width=max(map(len, summaries)))
    for name in (
        f"{accuracy}\nmean",
        "95 % CI",
        "worst peer",
        "consensus\nmodel",
        *(f"{key}\n(worst)" for key in others),
    ):
        table.add_column(name, justify="right")
    for name in ("consensus\nerror", "product\ndisagreement", "bytes\na peer", "seconds"):
        table.add_column(name, justify="right")
    for name, summary in summaries.items():
        scored = summary[accuracy]
        table.add_row(
            name,
            share(scored["mean"]),
            "–" if len(summary.get("hosted", "many")) == 1 else f"± {share(scored['ci95'])}",
            share(scored["min"]),
            "–" if "hosted" in summary else share(scored["consensus"]),
            *(with_worst(summary.get(key), key) for key in others),
            apart(summary["consensus_error"]),
            apart(summary["product_disagreement"]),
            size(summary["bytes_sent_per_peer"]),
            f"{summary['seconds']['total']:.0f}",
        )
    return table


def with_worst(measured: Mapping[str, Any] | None, key: str) -> str:
    """Returns the mean of a metric over peers and the worst of them, a dash where a run did not record it."""
    return f"{share(measured['mean'])} ({share(measured[ends_of(key)[0]])})" if measured else "–"
