"""Options that several commands share, in kebab-case and snake_case."""

from pathlib import Path
from typing import Annotated

import typer

Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set a recipe key, e.g. --set train.rounds=5.")
]
Out = Annotated[Path | None, typer.Option("--out", help="The run directory; default runs/NAME.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in the directory from its checkpoint.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the run in the directory.")]
Base = Annotated[
    str | None, typer.Option("--base", metavar="NAME_OR_PATH", help="The base model, where it lies elsewhere now.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")]


def both(name: str) -> tuple[str, str]:
    """Returns a flag in snake_case and in kebab-case."""
    return f"--{name}", f"--{name.replace('_', '-')}"
