"""`dfl-lora check RECIPE`: everything that is known of a run before it runs."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dfl_lora.cli.options import Json, Settings
from dfl_lora.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from dfl_lora.check import Check


def check(
    recipe: Annotated[Path | None, typer.Argument(help="A recipe file, such as recipes/demo.yaml.")] = None,
    settings: Settings = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema of recipes and nothing else.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show a recipe resolved, a row as the model reads it, who holds what, what W predicts, bytes and memory."""
    from dfl_lora.reading import load_recipe

    if schema:
        if recipe is not None or settings:
            raise UserError("--schema tells what may stand in any recipe; leave out the recipe and --set, or --schema.")
        from dfl_lora.recipe import Recipe

        print(json.dumps(Recipe.model_json_schema(), indent=1))
        return
    if recipe is None:
        raise UserError("Give a recipe file, such as recipes/demo.yaml, or --schema for what may stand in one.")
    resolved = load_recipe(recipe, settings or ())
    from dfl_lora.preflight import preflight

    preflight(resolved)
    from dfl_lora import check as checks

    found = checks.check(resolved)
    if as_json:
        print(json.dumps(found.as_json()))
    else:
        show(found)


def show(found: "Check") -> None:
    """Prints what was found, the resolved recipe first."""
    from rich.console import Console
    from rich.markup import escape

    from dfl_lora.cli.screen import WIDTH

    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
    console.print(escape(found.recipe.to_yaml()))
    console.print(counts(found))
    console.print(facts(found))


def counts(found: "Check") -> "Table":
    """Returns the rows of each label at each peer."""
    from rich.markup import escape
    from rich.table import Table

    labels = found.partition["labels"] if len(found.partition["labels"]) > 1 else []
    table = Table("peer", *map(escape, labels), "rows")
    for i, row in enumerate(found.partition["counts"]):
        table.add_row(str(i), *(f"{n:,}" for n in row if labels), f"{sum(row):,}")
    return table


def facts(found: "Check") -> "Table":
    """Returns everything else that was found, a line each."""
    from rich.markup import escape
    from rich.table import Table

    from dfl_lora.data.shares import shares, short
    from dfl_lora.report.page import size

    graph, sent, memory, rows = found.graph, found.sent, found.memory, found.partition["counts"]
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("digest", found.digest)
    table.add_row("partition", str(shares(rows)))
    for note, count in found.partition["notes"].items():
        table.add_row("rows", escape(f"{count:,} {note}"))
    if found.carried:
        table.add_row("adapters", f"carry the tokenizer and {found.carried}")
    if found.sample is not None:
        label = "" if found.sample.label is None else f" -> {found.sample.label}"
        table.add_row("first row", escape(found.sample.text + label))
        told = [f"{found.sample.num_tokens} tokens"]
        if found.sample.cut is not None:
            told.append(f"{found.sample.cut:,} of {sum(map(sum, rows)):,} rows reach max_length and may be cut")
        table.add_row("", "; ".join(told))
    over = f" over {graph.num_rounds} rounds" if graph.num_rounds > 1 else ""
    table.add_row("graph", escape(f"{graph.topology}: {graph.num_edges:,} edges{over}, W {graph.mixing}"))
    exchanges = short(graph.exchanges_to_a_thousandth)
    noun = "exchange" if exchanges == "1" else "exchanges"
    speed = f"spectral gap {short(graph.spectral_gap)}, {exchanges} {noun} to a thousandth"
    expected = f"{short(graph.expected_consensus)} ({short(graph.expected_profile)} of the ring's)"
    table.add_row("agreement", f"{speed}, expected consensus {expected}")
    held = ", ".join(f"{count:,} {role}" for role, count in found.numbers.items() if count)
    table.add_row("numbers", held)
    table.add_row(
        "a peer sends",
        f"{size(sent.bytes_per_peer_and_round)} a round, {size(sent.bytes_per_peer)} in all; "
        f"all of them {short(sent.messages_per_round)} messages a round",
    )
    for name, value in memory.parts().items():
        table.add_row(f"memory: {name}", size(value))
    table.add_row("memory: in all", f"{size(memory.total)}; {size(memory.available)} available")
    table.add_row("peers that fit", f"{memory.peers_that_fit:,}")
    return table
