"""`dfl-lora export`: what was trained, as a PEFT adapter folder or a merged model."""

from pathlib import Path
from typing import Annotated

import typer

from dfl_lora.cli.options import Base, Overwrite
from dfl_lora.errors import UserError


def export(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    to: Annotated[Path, typer.Option("--to", help="The folder to write; it must not exist.")],
    peer: Annotated[int | None, typer.Option("--peer", min=0, help="A peer's adapter, counted from 0.")] = None,
    consensus: Annotated[bool, typer.Option("--consensus", help="The mean of all peers.")] = False,
    merge: Annotated[bool, typer.Option("--merge", help="Merge it into the base and write a whole model.")] = False,
    base: Base = None,
    overwrite: Overwrite = False,
) -> None:
    """Write one adapter of a finished run as a PEFT folder, or merged into the base model."""
    if (peer is None) == (not consensus):
        raise UserError("Say which adapter: give exactly one of --peer K and --consensus.")
    if base is not None and not merge:
        raise UserError("--base has no effect without --merge, which alone reads the base; leave it out.")
    if to.exists() and not overwrite:
        raise UserError(f"{to} exists; give another folder with --to, or use --overwrite.")
    ours = (to / "adapter_config.json").is_file() or (to / "config.json").is_file()
    if to.exists() and (not ours or (to / "recipe.yaml").exists()):
        raise UserError(
            f"{to} is no exported adapter or model, so it is not overwritten; give another folder with --to."
        )
    from dfl_lora.exports import export_run

    export_run(run, "consensus" if peer is None else f"peer-{peer:03d}", to, merge, base)
    print(f"wrote {to}")
