"""Splits on disk: client_1 ... client_N folders, a table of who holds what, and its bar chart."""

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset, Value, load_from_disk
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.markup import escape
from rich.table import Table

from dfl_lora.choices import Choice
from dfl_lora.data import partition
from dfl_lora.data.glue import TASKS, Columns
from dfl_lora.data.partition import Rows
from dfl_lora.data.sources import Excerpt, column
from dfl_lora.data.tasks import common_names, label_ids, label_names
from dfl_lora.errors import UserError, nearest

QUESTION_ANSWER = ("question", "answer")
TEXT = ("string", "large_string")
NO_LABELS = ("rows",)


@dataclass(frozen=True)
class Characters:
    """How many characters the texts of a client's rows have."""

    mean: float
    median: float


@dataclass(frozen=True)
class View:
    """Rows of each label at each client [clients][labels]; without labels one column, and how long the texts are."""

    labels: tuple[str, ...]
    counts: list[list[int]]
    characters: tuple[Characters, ...] = ()


def label_columns(task: str | None, label: str) -> Columns:
    """Returns the label column, with the label names of a task of GLUE where one is named."""
    if task is not None and task not in TASKS:
        raise UserError(f"Unknown task '{task}'; allowed are {', '.join(TASKS)}.{nearest(task, TASKS)}")
    return Columns((), label, TASKS[task].names if task else None)


def shared_out(
    excerpt: Excerpt, columns: Columns | None, how: Choice, num_clients: int, seed: int, min_size: int
) -> list[Rows]:
    """Returns the row numbers of each client; without label columns, dirichlet is that of sizes."""
    rows, path = excerpt.rows, excerpt.path
    if columns is not None:
        labels = label_ids(rows, columns, label_names(rows, columns, path), path)
    elif how.kind in partition.BY_LABEL - {"dirichlet"}:
        allowed = [name for name in partition.PARTITIONS if name not in partition.BY_LABEL]
        raise UserError(
            f"--split_type {how} needs labels, and gsm8k has none; use dirichlet or quantity (both of sizes), "
            f"{', '.join(name for name in allowed if name != 'quantity')}."
        )
    else:
        labels = np.zeros(len(rows), dtype=np.int64)
    table = partition.Table(
        labels,
        excerpt.filled,
        lambda: lengths(joined_texts(rows, columns, path)),
        lambda: joined_texts(rows, columns, path),
    )
    if columns is None and how.kind == "dirichlet":
        return partition.quantity(table, num_clients, seed, min_size, alpha=how.options["alpha"])
    parts: list[Rows] = how.of(table, num_clients, seed, min_size)
    return parts


def text_columns(rows: Dataset, columns: Columns | None) -> list[str]:
    """Returns question and answer where rows without labels have both, else all columns of text but the label."""
    if columns is None and set(QUESTION_ANSWER) <= set(rows.column_names):
        return list(QUESTION_ANSWER)
    texts = [n for n, kind in rows.features.items() if isinstance(kind, Value) and kind.dtype in TEXT]
    return [name for name in texts if columns is None or name != columns.label]


def joined_texts(rows: Dataset, columns: Columns | None, path: str) -> list[str]:
    """Returns one text for each row, a line for each of its columns; raises where there is no such column."""
    names = text_columns(rows, columns)
    if not names:
        raise UserError(
            f"'{path}' has no column of text to group rows by; its columns are {', '.join(rows.column_names)}: "
            "use a partition by size."
        )
    texts = [column(rows, name, path) for name in names]
    return ["\n".join("" if text is None else str(text) for text in row) for row in zip(*texts, strict=True)]


def lengths(texts: Sequence[str]) -> Rows:
    """Returns how many characters each text has: a split knows no tokenizer."""
    return np.array([len(text) for text in texts], dtype=np.int64)


def write_split(rows: Dataset, parts: Sequence[Rows], to: Path, overwrite: bool) -> None:
    """Writes the folders, which appear together or not at all."""
    folders = [to / f"client_{i + 1}" for i in range(len(parts))]
    existing = earlier(to, overwrite)
    to.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=to, prefix=".split-") as partial:
        for folder, part in zip(folders, parts, strict=True):
            rows.select(part).save_to_disk(str(Path(partial) / folder.name))
        for folder in existing:
            shutil.rmtree(folder)
        for folder in folders:
            (Path(partial) / folder.name).rename(folder)


def earlier(to: Path, overwrite: bool) -> list[Path]:
    """Returns the folders of a split that is there already; raises where it must not be overwritten."""
    existing = [f for f in to.glob("client_*") if f.is_dir() and f.name.removeprefix("client_").isdigit()]
    if existing and not overwrite:
        raise UserError(
            f"{to} holds a split already ({existing[0].name}, ...); use --overwrite or another --output_path."
        )
    return existing


def read_split(base: Path, num_clients: int, columns: Columns | None) -> View:
    """Reads the folders back and counts their labels."""
    clients = [read_client(base / f"client_{i + 1}") for i in range(num_clients)]
    if columns is None:
        told = all(text_columns(rows, None) for rows in clients)
        characters = tuple(characters_of(rows, str(base)) for rows in clients if told)
        return View(NO_LABELS, [[len(rows)] for rows in clients], characters)
    named = str(base)
    names = common_names(label_names(rows, columns, named) for rows in clients)
    return View(names, partition.counts([label_ids(rows, columns, names, named) for rows in clients], len(names)))


def characters_of(rows: Dataset, path: str) -> Characters:
    found = lengths(joined_texts(rows, None, path)) if len(rows) else np.zeros(1)
    return Characters(float(np.mean(found)), float(np.median(found)))


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
    """Returns the counts, the shares and how long texts are as a table."""
    labels = () if view.labels == NO_LABELS else view.labels
    long = ("mean characters", "median characters") if view.characters else ()
    result = Table("client", *map(escape, labels), "rows", "share", *long)
    total = sum(map(sum, view.counts))
    for i, counts in enumerate(view.counts):
        told = [f"{n:,.0f}" for texts in view.characters[i : i + 1] for n in (texts.mean, texts.median)]
        cells = [str(n) for n in counts] if labels else []
        result.add_row(f"client_{i + 1}", *cells, str(sum(counts)), f"{sum(counts) / total:.1%}", *told)
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
