"""Splits on disk: client_1 ... client_N folders, a table of who holds what, and its bar chart."""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset, load_from_disk
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.markup import escape
from rich.table import Table

from dfl_lora.data import partition
from dfl_lora.data.sources import load_rows
from dfl_lora.data.tasks import Columns, common_names, label_ids, label_names
from dfl_lora.errors import UserError


@dataclass(frozen=True)
class View:
    """Rows of each label at each client [clients][labels]; without labels there is one column."""

    labels: tuple[str, ...]
    counts: list[list[int]]


def write_split(
    dataset: str, path: str, config: str | None, to: Path, num_clients: int,
    split_type: str, alpha: float, min_size: int, seed: int, overwrite: bool,
) -> list[int]:  # fmt: skip
    """Writes the folders, which appear together or not at all, and returns their sizes."""
    if alpha <= 0:
        raise UserError(f"--alpha is {alpha:g}; Dirichlet needs a number above 0.")
    folders = [to / f"client_{i + 1}" for i in range(num_clients)]
    existing = [f for f in to.glob("client_*") if f.is_dir() and f.name.removeprefix("client_").isdigit()]
    if existing and not overwrite:
        raise UserError(
            f"{to} holds a split already ({existing[0].name}, ...); use --overwrite or another --output_path."
        )
    rows = load_rows(path, config, "train")
    if dataset == "glue":
        columns = Columns(())
        labels = label_ids(rows, columns, label_names(rows, columns, path), path)
        parts = (
            partition.iid(labels, num_clients, seed, min_size)
            if split_type == "iid"
            else partition.dirichlet(labels, num_clients, seed, min_size, alpha)
        )
    elif split_type == "iid":
        parts = partition.iid(np.zeros(len(rows), dtype=np.int64), num_clients, seed, min_size)
    else:
        parts = partition.dirichlet_sizes(len(rows), num_clients, seed, min_size, alpha)
    to.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=to, prefix=".split-") as partial:
        for folder, part in zip(folders, parts, strict=True):
            rows.select(part).save_to_disk(str(Path(partial) / folder.name))
        for folder in existing:
            shutil.rmtree(folder)
        for folder in folders:
            (Path(partial) / folder.name).rename(folder)
    return [len(part) for part in parts]


def read_split(base: Path, num_clients: int, dataset: str) -> View:
    """Reads the folders back and counts their labels."""
    clients = [read_client(base / f"client_{i + 1}") for i in range(num_clients)]
    if dataset == "gsm8k":
        return View(("rows",), [[len(rows)] for rows in clients])
    columns, named = Columns(()), str(base)
    names = common_names(label_names(rows, columns, named) for rows in clients)
    return View(names, partition.counts([label_ids(rows, columns, names, named) for rows in clients], len(names)))


def read_client(folder: Path) -> Dataset:
    try:
        rows = load_from_disk(str(folder))
    except FileNotFoundError:
        raise UserError(
            f"There is no split folder {folder}; make it with dfl-lora split, or check --num_clients."
        ) from None
    if not isinstance(rows, Dataset):
        raise UserError(f"{folder} holds several splits; a client's folder holds one table of rows.")
    return rows


def table(view: View) -> Table:
    """Returns the counts and the shares as a table."""
    result = Table("client", *map(escape, view.labels), "rows", "share")
    total = sum(map(sum, view.counts))
    for i, counts in enumerate(view.counts, 1):
        result.add_row(f"client_{i}", *map(str, counts), str(sum(counts)), f"{sum(counts) / total:.1%}")
    return result


def chart(view: View, path: Path) -> Path:
    """Draws stacked bars, one for each client, and returns the path of the picture."""
    figure = Figure(figsize=(1.5 + 0.7 * len(view.counts), 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    names = [f"client_{i + 1}" for i in range(len(view.counts))]
    bottom = np.zeros(len(names))
    for number, label in enumerate(view.labels):
        heights = np.array([counts[number] for counts in view.counts])
        axes.bar(names, heights, bottom=bottom, label=label.replace("$", r"\$"))
        bottom += heights
    axes.set_ylabel("rows")
    axes.tick_params(axis="x", rotation=45)
    axes.legend(title="label", loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=120)
    return path
