"""A look at rows without the library that loads them: is there a table, with these columns, this many rows and labels.

It reads what files say of themselves: the schema of parquet and Arrow files, the header of a .csv, the configurations
in the front matter of a README.md, the list of files of a save_to_disk folder. Where it cannot tell, it says nothing:
the rows are loaded and checked whole later.
"""

import csv
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dfl_lora import hub
from dfl_lora.data.generator import built_in
from dfl_lora.data.places import (
    BUILTIN_COLUMNS,
    BUILTIN_ROWS,
    ENDINGS,
    TOO_LONG,
    WHOLE,
    broken_line,
    cannot_load,
    check_config,
    check_ending,
    check_no_slice,
    is_local,
    name_and_slice,
    no_rows,
    split_among,
)

LARGE = 64 * 2**20
"""Bytes of text beyond which a file is not read for a glance."""
MANY = 2_000_000
"""Rows beyond which values are not read for a glance."""
STEMS = ("train", "validation", "test")

Read = Callable[[str], list[object] | None]


@dataclass(frozen=True)
class Glance:
    """The columns of a table, how many rows it has (None: not known), and how to read a column (None: not told)."""

    columns: tuple[str, ...]
    num_rows: int | None
    read: Read
    class_labels: Mapping[str, tuple[str, ...]]


def glance(path: str, config: str | None, split: str) -> Glance | None:
    """Returns what is to be seen of the rows of a split; None where nothing is. Raises where they cannot be loaded."""
    check_config(path, config)
    name, cut = name_and_slice(split)
    if path in BUILTIN_COLUMNS:
        return cut_to(builtin(path, split_among(BUILTIN_ROWS, name, path)), cut, path, split)
    place = Path(path).expanduser()
    if not place.exists():
        check_no_slice(path)
        if is_local(path):
            raise cannot_load(path, config, "there is no such file or folder", False)
        if not hub.settle("dataset", path):
            raise cannot_load(path, config, hub.NOT_HERE, False)
        return None
    try:
        table = file_at(place) if place.is_file() else folder_at(place, path, config, name)
    except UnicodeDecodeError:
        raise cannot_load(path, config, "its text is not in UTF-8", place.is_file()) from None
    except (Damaged, OSError) as error:
        raise cannot_load(path, config, " ".join(str(error).split()).rstrip("."), place.is_file()) from None
    return None if table is None else cut_to(table, cut, path, split)


class Damaged(Exception):
    """What is wrong with a file, in words that fit after a colon."""


def builtin(path: str, split: str) -> Glance:
    def read(name: str) -> list[object]:
        return [row[name] for row in built_in(path, split)]

    return Glance(BUILTIN_COLUMNS[path], BUILTIN_ROWS[split], read, {})


def cut_to(table: Glance, cut: str | None, path: str, split: str) -> Glance:
    """Returns a table cut to a slice such as [:1000]; raises where no rows are left."""
    match = re.fullmatch(r"\[(-?\d+)?:(-?\d+)?\]", cut or "[:]")
    if match is None:
        return Glance(table.columns, None, lambda name: None, table.class_labels)
    part = slice(*(int(end) if end else None for end in match.groups()))
    left = None if table.num_rows is None else len(range(table.num_rows)[part])
    if left == 0:
        raise no_rows(path, split)

    def read(name: str) -> list[object] | None:
        values = table.read(name)
        return None if values is None else values[part]

    return Glance(table.columns, left, read, table.class_labels)


def folder_at(place: Path, path: str, config: str | None, split: str) -> Glance | None:
    """Looks into a folder: one of save_to_disk, one whose README.md names its files, or one with a file for a split."""
    if (place / "dataset_dict.json").is_file():
        splits = load_json(place / "dataset_dict.json").get("splits", [])
        place = place / split_among(splits, split, path)
    if (place / "dataset_info.json").is_file():
        return saved_at(place)
    if not any(place.iterdir()):
        raise Damaged("the folder is empty")
    files = configured(place, config) if (place / "README.md").is_file() else by_stem(place)
    return None if files is None else file_at(files[split_among(files, split, path)])


def configured(place: Path, config: str | None) -> dict[str, Path] | None:
    """Returns the file of each split of a configuration in README.md; None where there are none or several."""
    front = re.match(r"---\n(.*?)\n---", (place / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    try:
        configs = yaml.safe_load(front.group(1))["configs"] if front else None
        files = {entry["config_name"]: entry["data_files"] for entry in configs or ()}
    except (yaml.YAMLError, KeyError, TypeError, IndexError):
        return None
    if not files:
        return None
    if config is None and len(files) > 1 and "default" not in files:
        raise Damaged(f"it has several configurations; name one of {', '.join(map(str, files))} in data.config")
    if config is not None and config not in files:
        raise Damaged(f"it has no configuration '{config}'; it has {', '.join(map(str, files))}")
    chosen = files[config] if config is not None else files.get("default", next(iter(files.values())))
    entries = chosen if isinstance(chosen, list) else [chosen]
    plain = all(isinstance(entry, dict) and isinstance(entry.get("path"), str) for entry in entries)
    found = {str(entry["split"]): place / entry["path"] for entry in entries} if plain else {}
    return found if found and all(file.is_file() and file.suffix in ENDINGS for file in found.values()) else None


def by_stem(place: Path) -> dict[str, Path] | None:
    """Returns the files train, validation and test of a folder that holds nothing else."""
    files = {file.stem: file for file in place.iterdir()}
    plain = len(files) == len(list(place.iterdir())) and len({file.suffix for file in files.values()}) == 1
    known = plain and all(file.is_file() and file.suffix in ENDINGS and file.stem in STEMS for file in files.values())
    return {stem: files[stem] for stem in STEMS if stem in files} if known else None


def file_at(file: Path) -> Glance | None:
    """Looks into a file by its ending."""
    check_ending(file)
    if file.suffix == ".parquet":
        return parquet(file)
    if file.stat().st_size == 0:
        raise Damaged("it has no rows")
    if file.stat().st_size > LARGE:
        return None
    if file.suffix in (".csv", ".tsv"):
        return separated(file)
    return lines_of_json(file) if file.suffix == ".jsonl" else None


def parquet(file: Path) -> Glance:
    import pyarrow.parquet as pq  # takes a third of a second
    from pyarrow import ArrowException

    try:
        table = pq.ParquetFile(file)
        schema, num_rows = table.schema_arrow, table.metadata.num_rows
    except ArrowException as error:
        raise Damaged(str(error)) from None

    def read(name: str) -> list[object] | None:
        if num_rows > MANY:
            return None
        try:
            values: list[object] = table.read([name]).column(0).to_pylist()
        except (ArrowException, OSError) as error:
            raise Damaged(str(error)) from None
        return values

    return Glance(tuple(schema.names), num_rows, read, class_labels(schema.metadata))


def saved_at(place: Path) -> Glance | None:
    """Looks into a folder of save_to_disk."""
    import pyarrow as pa

    try:
        names = [entry["filename"] for entry in load_json(place / "state.json")["_data_files"]]
        streams = [pa.ipc.open_stream(pa.memory_map(str(place / name))) for name in names]
        tables = [stream.read_all() for stream in streams]
    except (KeyError, TypeError):
        return None
    except pa.ArrowException as error:
        raise Damaged(str(error)) from None
    if not tables:
        return None
    num_rows = sum(table.num_rows for table in tables)

    def read(name: str) -> list[object] | None:
        return None if num_rows > MANY else [value for table in tables for value in table.column(name).to_pylist()]

    return Glance(tuple(tables[0].column_names), num_rows, read, class_labels(tables[0].schema.metadata))


def class_labels(metadata: Mapping[bytes, bytes] | None) -> dict[str, tuple[str, ...]]:
    """Returns the names of the ClassLabel columns that `datasets` writes into a schema."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return {name: tuple(f["names"]) for name, f in features.items() if f.get("_type") == "ClassLabel"}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def separated(file: Path) -> Glance | None:
    """Looks into a .csv or .tsv."""
    how: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if file.suffix == ".tsv" else {}
    try:
        with file.open(encoding="utf-8-sig", newline="") as content:
            header, *rows = [row for row in csv.reader(content, **how) if row] or [[]]
    except csv.Error:
        return None
    if not rows:
        raise Damaged("it has no rows")
    if any(len(row) > len(header) for row in rows):
        raise Damaged(TOO_LONG)
    columns = {name: k for k, name in enumerate(header)}

    def read(name: str) -> list[object] | None:
        return typed([row[columns[name]] if columns[name] < len(row) else "" for row in rows])

    return Glance(tuple(header), len(rows), read, {})


def typed(values: Sequence[str]) -> list[object]:
    """Returns a .csv column as whole numbers, or as text with None for an empty one: see `sources.as_written`."""
    if all(re.fullmatch(WHOLE, value) for value in values):
        return [int(value) for value in values]
    return [value or None for value in values]


def lines_of_json(file: Path) -> Glance:
    """Looks into a .jsonl file."""
    if broken := broken_line(file):
        raise Damaged(broken)
    with file.open(encoding="utf-8-sig") as lines:  # str.splitlines would cut at U+2028, which JSON leaves in a text
        rows = [json.loads(line) for line in lines if line.strip()]
    if not rows:
        raise Damaged("it has no rows")
    columns = tuple(dict.fromkeys(name for row in rows for name in row))
    return Glance(columns, len(rows), lambda name: [row.get(name) for row in rows], {})


def load_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{file.name}: {error}") from None
    if not isinstance(content, dict):
        raise Damaged(f"{file.name} is no mapping")
    return content
