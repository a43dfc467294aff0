"""`dfl-lora run RECIPE`: simulate all peers in this process."""

import json
from pathlib import Path
from typing import Annotated

import typer

from dfl_lora.cli.interruption import resumable
from dfl_lora.cli.options import Json, Out, Overwrite, Resume, Settings


def run(
    recipe: Annotated[Path, typer.Argument(help="A recipe file, such as recipes/demo.yaml.")],
    settings: Settings = None,
    out: Out = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Simulate all peers of a recipe in this process, and write a run directory."""
    from dfl_lora.preflight import check_resume, preflight
    from dfl_lora.reading import load_recipe
    from dfl_lora.run_directory import prepare

    resolved = load_recipe(recipe, settings or ())
    directory = out or Path(resolved.output.dir or f"runs/{resolved.name}")
    prepare(directory, resume, overwrite)
    preflight(resolved)
    if resume:
        check_resume(directory)
    with resumable(directory, resume):
        from dfl_lora.cli.screen import Screen
        from dfl_lora.simulate import run_recipe

        with Screen(directory, quiet=as_json) as screen:
            summary = run_recipe(resolved, directory, [screen], resume=resume, overwrite=overwrite)
    if as_json:
        print(json.dumps(summary))
