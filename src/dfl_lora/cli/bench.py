"""`dfl-lora bench`: what a round costs here, and what it costs with the tools everyone has."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from dfl_lora.cli.options import Json
from dfl_lora.errors import UserError

Minutes = Annotated[float | None, typer.Option(help="What the whole may take; default 45, with --quick 5.", min=0.5)]


def bench(
    quick: Annotated[bool, typer.Option("--quick", help="Less of everything, in 5 minutes.")] = False,
    scale: Annotated[bool, typer.Option("--scale", help="The scale test alone: 8 to 4,096 peers.")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="Write every number to this JSON file.")] = None,
    docs: Annotated[Path | None, typer.Option("--docs", help="Write the page, and figures/NAME.png beside it.")] = None,
    read: Annotated[Path | None, typer.Option("--read", help="Measure nothing: take the numbers of this file.")] = None,
    minutes: Minutes = None,
    as_json: Json = False,
) -> None:
    """Measure this machine: seconds, memory and arithmetic of a round against the seed, PEFT and Flower."""
    if read is not None and (quick or scale or minutes is not None or out is not None):
        raise UserError("--read measures nothing; give it with --docs or --json alone.")
    for path in (out, docs):
        if path is not None and not path.resolve().parent.is_dir():
            raise UserError(
                f"There is no folder {path.parent} to write {path.name} to; make it, or give another place."
            )
    result = measured(quick, scale, minutes) if read is None else numbers_in(read)
    from dfl_lora.files import write_atomically

    if out is not None:
        write_atomically(out, json.dumps(result, indent=1).encode())
    if docs is not None:
        write_page(result, docs)
    if as_json:
        print(json.dumps(result))
    else:
        from dfl_lora.bench.page import target_table

        print("\n".join(target_table(result["targets"])))


def measured(quick: bool, scale: bool, minutes: float | None) -> dict[str, Any]:
    """Measures, and says on standard error what is under way."""
    from dfl_lora.bench.cells import material
    from dfl_lora.bench.suite import FULL, QUICK, bench_scale
    from dfl_lora.bench.suite import bench as whole

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    return (bench_scale if scale else whole)(material(), QUICK if quick else FULL, minutes, say)


def numbers_in(path: Path) -> dict[str, Any]:
    """Returns the result in a file; raises where it is none."""
    try:
        result = json.loads(path.read_text())
    except (ValueError, UnicodeDecodeError):
        result = None
    if not isinstance(result, dict) or not {"machine", "headline", "mixing", "scale", "targets"} <= result.keys():
        raise UserError(f"{path} is not a result of dfl-lora bench; write one with --out.")
    return result


def write_page(result: dict[str, Any], docs: Path) -> None:
    from dfl_lora.bench.figure import figure
    from dfl_lora.bench.page import page
    from dfl_lora.files import write_atomically

    picture = docs.parent / "figures" / f"{docs.stem}.png"
    picture.parent.mkdir(exist_ok=True)
    write_atomically(picture, figure(result))
    write_atomically(docs.with_suffix(".json"), json.dumps(result).encode())
    write_atomically(docs, page(result, f"figures/{picture.name}").encode())
