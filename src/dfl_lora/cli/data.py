"""`dfl-lora split` and `view-split`: the seed's data tools."""

import json
import re
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from dfl_lora.cli.options import Json, Overwrite, both
from dfl_lora.errors import UserError

if TYPE_CHECKING:
    from dfl_lora.data.glue import Columns

Kind = Literal["glue", "gsm8k"]
ALPHA = 0.25
FEWEST = re.compile(r"\bmin_size\s*=\s*([^\s,)]+)")
Task = Annotated[str | None, typer.Option("--task", help="A task of GLUE, for its label names.")]
Label = Annotated[str | None, typer.Option("--label", help="The label column; 'label' if it is not given.")]


def split(
    dataset: Annotated[Kind, typer.Argument(help="glue: labelled rows; gsm8k: rows without labels.")],
    dataset_path: Annotated[str, typer.Option(*both("dataset_path"), help="Folder, file or hub name of the data.")],
    output_path: Annotated[Path, typer.Option(*both("output_path"), help="Where client_1 ... client_N are written.")],
    num_clients: Annotated[int, typer.Option(*both("num_clients"), min=1)] = 7,
    split_type: Annotated[
        str, typer.Option(*both("split_type"), help="A partition, such as dirichlet, topic or 'shards(per_peer=2)'.")
    ] = "iid",
    alpha: Annotated[
        float | None,
        typer.Option("--alpha", help="Dirichlet's concentration, 0.25 unless given: smaller, more skewed."),
    ] = None,
    min_size: Annotated[int, typer.Option(*both("min_size"), min=1, help="The fewest rows of a client.")] = 1,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    config: Annotated[str | None, typer.Option("--config", help="Configuration of a data set with several.")] = None,
    source: Annotated[str, typer.Option("--split", help="The split shared out, or a slice, train[:1000].")] = "train",
    task: Task = None,
    label: Label = None,
    overwrite: Overwrite = False,
) -> None:
    """Share a data set out to client_1 ... client_N, folders that datasets.load_from_disk reads.

    The partitions: iid, dirichlet, quantity, shards, pathological, length(groups=10), topic(groups=10),
    natural(column=NAME), linear, square, exponential, saved(path=RUN). length counts characters, not tokens, and topic
    compares words: of question and answer where gsm8k has both, else of all columns of text but the label.
    """
    from dfl_lora.choices import choice, options_of
    from dfl_lora.data.partition import PARTITIONS
    from dfl_lora.data.sources import excerpt
    from dfl_lora.data.splits import earlier, shared_out, write_split
    from dfl_lora.reading import parse

    if alpha is not None and not 0 < alpha < inf:
        raise UserError(f"--alpha is {alpha:g}; Dirichlet needs a finite number above 0.")
    if fewest := FEWEST.search(split_type):
        raise UserError(f"--split_type is '{split_type}'; the fewest rows of a client are --min_size {fewest[1]}.")
    how = parse(choice(PARTITIONS, "iid"), split_type, "--split_type")
    if alpha is not None and "alpha" not in how.options:
        takers = ", ".join(name for name, partition in PARTITIONS.items() if "alpha" in options_of(partition))
        raise UserError(f"--alpha has no effect on {how.kind}; leave it out, or use {takers}.")
    if "alpha" in how.options and "alpha" not in how.model_fields_set:
        how = how.model_copy(update={"alpha": ALPHA if alpha is None else alpha})
    earlier(output_path, overwrite)  # before the work
    columns = columns_of(dataset, task, label)
    found = excerpt(dataset_path, config, source)
    parts = shared_out(found, columns, how, num_clients, seed, min_size)
    write_split(found.rows, parts, output_path, overwrite)
    print(f"{num_clients} clients in {output_path}: {', '.join(str(len(part)) for part in parts)} rows")


def view_split(
    base_path: Annotated[Path, typer.Option(*both("base_path"), help="The folder of client_1 ... client_N.")],
    num_clients: Annotated[int, typer.Option(*both("num_clients"), min=1)],
    dataset_type: Annotated[Kind, typer.Option(*both("dataset_type"))] = "glue",
    task: Task = None,
    label: Label = None,
    as_json: Json = False,
) -> None:
    """Show who holds what: a table of rows for each label, how unequal they are, and a bar chart beside the folders.

    Of gsm8k, whose rows have no labels, the table says how many characters the texts of a client have.
    """
    from dataclasses import asdict

    from dfl_lora.data.shares import shares
    from dfl_lora.data.splits import read_split

    view = read_split(base_path, num_clients, columns_of(dataset_type, task, label))
    unequal = shares(view.counts)
    if as_json:
        characters = [asdict(texts) for texts in view.characters]
        print(json.dumps({"labels": view.labels, "counts": view.counts, **asdict(unequal), "characters": characters}))
        return
    from rich.console import Console

    from dfl_lora.data.splits import chart, table

    Console().print(table(view))
    print(unequal)
    print(f"chart: {chart(view, base_path / 'split.png')}")


def columns_of(dataset: Kind, task: str | None, label: str | None) -> "Columns | None":
    """Returns where the labels are; None for gsm8k, which has none."""
    from dfl_lora.data.splits import label_columns

    if dataset == "glue":
        return label_columns(task, label or "label")
    if task is not None or label is not None:
        raise UserError("--task and --label have no effect with gsm8k, whose rows have no labels; leave them out.")
    return None
