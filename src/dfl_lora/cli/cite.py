"""`dfl-lora cite RECIPE`: BibTeX of what a recipe uses."""

from pathlib import Path
from typing import Annotated

import typer

from dfl_lora.cli.options import Settings


def cite(
    recipe: Annotated[Path, typer.Argument(help="A recipe file, such as recipes/demo.yaml.")],
    settings: Settings = None,
) -> None:
    """Print BibTeX of the methods, the model and the data set that a recipe uses, and of nothing else."""
    from dfl_lora.citing import bibtex
    from dfl_lora.reading import load_recipe

    print(*bibtex(load_recipe(recipe, settings or ())), sep="\n", end="")
