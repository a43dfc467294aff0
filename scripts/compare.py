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
from dfl_lora.metrics import key_of


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run directories.")],
    figure: Annotated[
        Path | None, typer.Option("--figure", help="Draw the metrics and the consensus error here.")
    ] = None,
) -> None:
    """Read RUN/summary.json and RUN/rounds.jsonl of each run and show them together."""
    summaries = {run.name: json.loads((run / "summary.json").read_text()) for run in runs}
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    console.print(comparison(summaries))
    for run in runs:
        console.print(f"report: {run}/report.html", highlight=False)
    if figure is not None:
        metrics = dict.fromkeys(["accuracy", *(summary.get("metric", "accuracy") for summary in summaries.values())])
        draw({run.name: read(run) for run in runs}, [key_of(name) for name in metrics]).savefig(figure, dpi=120)


def read(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]


def draw(curves: dict[str, list[dict[str, Any]]], keys: list[str]) -> Figure:
    """Returns a panel for each metric (mean, worst to best as a band) and one for the consensus error, by round."""
    figure = Figure(figsize=(4.5 * (1 + len(keys)), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    *panels, error = figure.subplots(1, 1 + len(keys))
    for name, lines in curves.items():
        for key, axes in zip(keys, panels, strict=True):
            scored = [line for line in lines if key in line]
            rounds = [line["round"] for line in scored]
            axes.plot(rounds, [line[key]["mean"] for line in scored], label=name)
            low, high = ([line[key][end] for line in scored] for end in ("min", "max"))
            axes.fill_between(rounds, low, high, alpha=0.2)
        error.plot([line["round"] for line in lines], [line["consensus_error"] for line in lines], label=name)
    for key, axes in zip(keys, panels, strict=True):
        axes.set(xlabel="round", ylabel=f"{key}: mean, worst to best peer")
    error.set(xlabel="round", ylabel="consensus error", yscale="log")
    for axes in (*panels, error):
        axes.grid(alpha=0.3)
    panels[0].legend()
    return figure


if __name__ == "__main__":
    typer.run(compare)
