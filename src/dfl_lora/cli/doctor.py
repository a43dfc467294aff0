"""`dfl-lora doctor`: what this machine can do, and what to do where something is not right."""

import json
from typing import TYPE_CHECKING

import typer

from dfl_lora.cli.options import Json

if TYPE_CHECKING:
    from rich.table import Table

    from dfl_lora.doctor import Diagnosis

COLOURS = {"ok": "green", "warning": "yellow", "error": "red"}
WIDTH = 120


def doctor(as_json: Json = False) -> None:
    """Show what this machine can do: versions, processor, memory, disk, clock, ports. Exit code 2 on an error."""
    from rich.console import Console

    from dfl_lora.doctor import diagnose

    diagnosis = diagnose()
    if as_json:
        print(json.dumps(diagnosis.as_json()))
    else:
        console = Console(highlight=False)
        console.width = console.width if console.is_terminal else WIDTH
        console.print(table(diagnosis))
    if not diagnosis.healthy:
        raise typer.Exit(2)


def table(diagnosis: "Diagnosis") -> "Table":
    """Returns a line for each row; the advice stands below the value."""
    from rich.markup import escape
    from rich.table import Table

    rows = Table.grid(padding=(0, 2))
    for check in diagnosis.checks:
        colour = COLOURS[check.status]
        rows.add_row(f"[{colour}]{check.status}[/{colour}]", check.name, escape(check.value))
        if check.advice:
            rows.add_row("", "", f"[{colour}]{escape(check.advice)}[/{colour}]")
    return rows
