"""`dfl-lora eval`: how good what was trained is, on rows it has not seen."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from dfl_lora.cli.interruption import Interrupted
from dfl_lora.cli.options import Base, Json
from dfl_lora.errors import UserError, nearest

if TYPE_CHECKING:
    from rich.table import Table

    from dfl_lora.evaluating import Line, Result

Place = Annotated[
    Path, typer.Argument(metavar="RUN_OR_ADAPTER", help="A run directory, an adapter folder or a model folder.")
]
Consensus = Annotated[bool, typer.Option("--consensus", help="The mean of all peers.")]
Sample = Annotated[
    bool, typer.Option("--sample", help="Draw tokens (temperature 0.1, top_k 40, top_p 0.95), not the likeliest.")
]
MaxNewTokens = Annotated[
    int | None, typer.Option("--max-new-tokens", min=1, help="How long what is written may be; default 256.")
]


def evaluate(
    trained: Place,
    task: Annotated[str, typer.Option("--task", help="gsm8k, or a task of GLUE such as sst2.")],
    data: Annotated[
        str | None, typer.Option("--data", metavar="PATH", help="Where the rows are; default the run's own.")
    ] = None,
    config: Annotated[str | None, typer.Option("--config", help="The configuration of data with several.")] = None,
    split: Annotated[
        str | None, typer.Option("--split", help="The split; default test for gsm8k, else validation.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Only the first so many rows.")] = None,
    peer: Annotated[
        list[int] | None, typer.Option("--peer", min=0, help="A peer's adapter, from 0; default all and the consensus.")
    ] = None,
    consensus: Consensus = False,
    base: Base = None,
    sample: Sample = False,
    max_new_tokens: MaxNewTokens = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", min=1, help="Rows at a time.")] = None,
    to: Annotated[
        Path | None,
        typer.Option(
            "--to",
            metavar="FILE.jsonl",
            help="Where answers go; default answers-gsm8k.jsonl of the run, of a folder here; numbered if there.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Evaluate what was trained: labels of GLUE, or answers to GSM8K of which the final number counts."""
    check_task(task, sample, max_new_tokens, to)
    check_places(trained, to)
    from dfl_lora import evaluating
    from dfl_lora.models.generation import sampling_of
    from dfl_lora.recipe import GSM8K
    from dfl_lora.trained import names_of, open_trained

    opened = open_trained(trained, base, names_of(peer or (), consensus))
    asked = evaluating.Asked(task, data, config, split, limit)
    writes, many = task == GSM8K, batch_size or (16 if task == GSM8K else 64)
    with progress() as tell, answers(to, trained if opened.is_run else Path(), writes) as (place, hear):
        result = evaluating.evaluate(opened, asked, sampling_of(sample, max_new_tokens), many, tell, hear)
    for note in result.notes:
        print(note, file=sys.stderr)
    if as_json:
        print(json.dumps({**result.as_json(), **({"answers": str(place)} if place else {})}))
        return
    show(result)
    if place is not None:
        print(f"wrote {place}")


@contextmanager
def answers(to: Path | None, folder: Path, writes: bool) -> "Iterator[tuple[Path | None, Callable[[Line], None]]]":
    """Gives a new file and what adds a line to it, so that what was said is there however the evaluation ends.

    Without `to` it is the first of answers-gsm8k.jsonl, answers-gsm8k-2.jsonl and so on in `folder` that is not there.
    """
    from dfl_lora.files import naming

    if not writes:
        yield None, lambda _: None
        return
    file, num_lines = opened(to, folder), 0
    place = Path(file.name)

    def hear(line: "Line") -> None:
        nonlocal num_lines
        with naming(place):
            print(json.dumps(line, ensure_ascii=False), file=file, flush=True)
        num_lines += 1

    try:
        with file:
            yield place, hear
    except KeyboardInterrupt:
        kept = f"the {num_lines:,} answers so far are in {place}" if num_lines else "nothing was said yet"
        raise Interrupted(f"Interrupted; {kept}.") from None
    finally:
        if not num_lines:
            place.unlink(missing_ok=True)


def opened(to: Path | None, folder: Path) -> TextIO:
    """Makes the file of the answers, never one that is there."""
    from dfl_lora.files import naming

    names = (f"answers-gsm8k{f'-{k}' if k > 1 else ''}.jsonl" for k in count(1))
    for place in [to] if to is not None else (folder / name for name in names):
        with naming(place), suppress(*([] if to is not None else [FileExistsError])):
            return place.open("x", encoding="utf-8")
    raise AssertionError("numbers do not end")


def check_task(task: str, sample: bool, max_new_tokens: int | None, to: Path | None) -> None:
    """Raises where there is no such task, or an option has no effect on it."""
    from dfl_lora.data.glue import TASKS
    from dfl_lora.recipe import GSM8K

    allowed = (GSM8K, *TASKS)
    if task not in allowed:
        raise UserError(f"--task is '{task}'; allowed are {', '.join(allowed)}.{nearest(task, allowed)}")
    for flag, value in (("--sample", sample), ("--max-new-tokens", max_new_tokens), ("--to", to)):
        if value and task != GSM8K:
            raise UserError(f"{flag} has no effect on {task}, for which no text is written; leave it out.")


def check_places(trained: Path, to: Path | None) -> None:
    """Raises where there is nothing to evaluate, or the answers cannot be written."""
    if not trained.is_dir():
        raise UserError(f"There is no folder {trained}; give a run directory, an adapter folder or a model folder.")
    if to is not None and to.exists():
        raise UserError(f"{to} exists; give another file with --to.")
    if to is not None and not to.parent.is_dir():
        raise UserError(f"There is no folder {to.parent} for --to {to}; make it, or give another file.")


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """Gives what shows how far each adapter is, on a terminal and away from the result."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bars:
        known = {}

        def tell(whose: str, done: int, total: int) -> None:
            if whose not in known:
                known[whose] = bars.add_task(whose, total=total)
            bars.update(known[whose], completed=done)

        yield tell


def show(result: "Result") -> None:
    """Prints a result: a row for each adapter, and what holds of all peers."""
    from rich.console import Console

    from dfl_lora.cli.screen import WIDTH

    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
    console.print(table_of(result))


def table_of(result: "Result") -> "Table":
    """Returns the metrics of each adapter, and the mean, lowest and highest over peers where there are several."""
    from rich.markup import escape
    from rich.table import Table

    metrics = result.metrics
    table = Table(f"{result.task}, {result.num_rows:,} rows")
    for metric in metrics:
        table.add_column(metric, justify="right")
    for whose, values in result.scores.items():
        table.add_row(escape(whose), *(f"{values[metric]:.4f}" for metric in metrics))
    spreads = [result.spread(metric) for metric in metrics]
    if len(spreads[0]["per_peer"]) > 1:
        table.add_section()
        for key in ("mean", "min", "max"):
            table.add_row(f"{key} over peers", *(f"{spread[key]:.4f}" for spread in spreads))
    return table
