"""Prints one table of finished runs: python scripts/compare.py RUN..."""

import json
import sys
from pathlib import Path

from rich.console import Console

from dfl_lora.cli.screen import WIDTH, comparison


def main(runs: list[str]) -> None:
    """Reads RUN/summary.json of each run and prints them as rows of one table."""
    summaries = {Path(run).name: json.loads((Path(run) / "summary.json").read_text()) for run in runs}
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    console.print(comparison(summaries))
    for run in runs:
        console.print(f"report: {run}/report.html", highlight=False)


if __name__ == "__main__":
    main(sys.argv[1:])
