"""`dfl-lora split` and `view-split`: the seed's data tools."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from dfl_lora.cli.options import Json, Overwrite, both

Kind = Literal["glue", "gsm8k"]


def split(
    dataset: Annotated[Kind, typer.Argument(help="glue: labelled rows; gsm8k: rows without labels, skewed by size.")],
    dataset_path: Annotated[str, typer.Option(*both("dataset_path"), help="Folder, file or hub name of the data.")],
    output_path: Annotated[Path, typer.Option(*both("output_path"), help="Where client_1 ... client_N are written.")],
    num_clients: Annotated[int, typer.Option(*both("num_clients"), min=1)] = 7,
    split_type: Annotated[Literal["iid", "dirichlet"], typer.Option(*both("split_type"))] = "iid",
    alpha: Annotated[float, typer.Option("--alpha", help="Dirichlet's concentration: smaller is more skewed.")] = 0.25,
    min_size: Annotated[int, typer.Option(*both("min_size"), min=1, help="The fewest rows of a client.")] = 1,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    config: Annotated[str | None, typer.Option("--config", help="Configuration of a data set with several.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Share a data set out to client_1 ... client_N, folders that datasets.load_from_disk reads."""
    from dfl_lora.data.splits import write_split

    sizes = write_split(
        dataset, dataset_path, config, output_path, num_clients, split_type, alpha, min_size, seed, overwrite
    )
    print(f"{num_clients} clients in {output_path}: {', '.join(map(str, sizes))} rows")


def view_split(
    base_path: Annotated[Path, typer.Option(*both("base_path"), help="The folder of client_1 ... client_N.")],
    num_clients: Annotated[int, typer.Option(*both("num_clients"), min=1)],
    dataset_type: Annotated[Kind, typer.Option(*both("dataset_type"))] = "glue",
    as_json: Json = False,
) -> None:
    """Show who holds what: a table of rows for each label, and a bar chart beside the folders."""
    from dfl_lora.data.splits import read_split

    view = read_split(base_path, num_clients, dataset_type)
    if as_json:
        print(json.dumps({"labels": view.labels, "counts": view.counts}))
        return
    from rich.console import Console

    from dfl_lora.data.splits import chart, table

    Console().print(table(view))
    print(f"chart: {chart(view, base_path / 'split.png')}")
