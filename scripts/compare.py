"""Prints one table of finished runs, and draws their curves: python scripts/compare.py RUN... [--figure PATH]."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console

from dfl_lora.cli.screen import WIDTH, comparison


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run directories.")],
    figure: Annotated[Path | None, typer.Option("--figure", help="Draw accuracy and consensus error here.")] = None,
) -> None:
    """Read RUN/summary.json and RUN/rounds.jsonl of each run and show them together."""
    summaries = {run.name: json.loads((run / "summary.json").read_text()) for run in runs}
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    console.print(comparison(summaries))
    for run in runs:
        console.print(f"report: {run}/report.html", highlight=False)
    if figure is not None:
        draw({run.name: read(run) for run in runs}).savefig(figure, dpi=120)


def read(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]


def draw(curves: dict[str, list[dict[str, Any]]]) -> Figure:
    """Returns two panels: accuracy (mean, worst to best as a band) and consensus error, by round."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    accuracy, error = figure.subplots(1, 2)
    for name, lines in curves.items():
        scored = [line for line in lines if "accuracy" in line]
        rounds = [line["round"] for line in scored]
        accuracy.plot(rounds, [line["accuracy"]["mean"] for line in scored], label=name)
        low, high = ([line["accuracy"][key] for line in scored] for key in ("min", "max"))
        accuracy.fill_between(rounds, low, high, alpha=0.2)
        error.plot([line["round"] for line in lines], [line["consensus_error"] for line in lines], label=name)
    accuracy.set(xlabel="round", ylabel="accuracy: mean, worst to best peer")
    error.set(xlabel="round", ylabel="consensus error", yscale="log")
    for axes in (accuracy, error):
        axes.grid(alpha=0.3)
    accuracy.legend()
    return figure


if __name__ == "__main__":
    typer.run(compare)
