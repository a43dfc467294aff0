"""Where rows come from: the built-in generator, files, folders (also save_to_disk), and hub names."""

import re
from collections.abc import Mapping
from pathlib import Path

import datasets
from datasets import Dataset, ReadInstruction, load_dataset, load_from_disk

from dfl_lora.data.generator import sentences
from dfl_lora.errors import UserError, nearest

datasets.disable_progress_bars()
BUILTIN = "builtin/sentences"
BUILTIN_ROWS = {"train": 4000, "validation": 500}
READERS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json"}


def load_rows(path: str, config: str | None, split: str) -> Dataset:
    """Returns the rows of one split; raises a sentence that names what is there where it cannot."""
    if path == BUILTIN:
        if split not in BUILTIN_ROWS:
            raise UserError(f"{BUILTIN} has no split '{split}'; it has {', '.join(BUILTIN_ROWS)}.")
        return Dataset.from_list(sentences(split, BUILTIN_ROWS[split]))
    place = Path(path).expanduser()
    try:
        loaded = read(place, config) if place.exists() else load_dataset(path, config)
    except UserError:
        raise
    except Exception as error:  # loaders raise many kinds; each means that these rows are not to be had
        detail = " ".join(str(error).split()) or type(error).__name__
        which = f" (config {config})" if config else ""
        raise UserError(
            f"Cannot load data from '{path}'{which}: {detail} Give a folder, a .parquet, .csv or .jsonl file, "
            f"a save_to_disk folder, {BUILTIN}, or a hub name with the network on."
        ) from None
    return pick(loaded, split, path)


def read(place: Path, config: str | None) -> Dataset | Mapping[str, Dataset]:
    """Reads a file or a folder."""
    if place.is_file():
        if place.suffix not in READERS:
            raise UserError(f"Cannot read {place}: the ending must be one of {', '.join(READERS)}.")
        return load_dataset(READERS[place.suffix], data_files=str(place), split="train")
    if (place / "dataset_info.json").exists() or (place / "dataset_dict.json").exists():
        return load_from_disk(str(place))
    return load_dataset(str(place), config)


SLICE = re.compile(r"([^\[\]]+)(\[.*\])?")


def pick(loaded: Dataset | Mapping[str, Dataset], split: str, path: str) -> Dataset:
    """Returns the split of a dictionary of splits, or the table where there is only one; `train[:1000]` is a slice."""
    match = SLICE.fullmatch(split)
    name = match.group(1) if match else split
    if not isinstance(loaded, Dataset) and name not in loaded:
        raise UserError(f"'{path}' has no split '{name}'; it has {', '.join(loaded)}.{nearest(name, loaded)}")
    rows = loaded if isinstance(loaded, Dataset) else loaded[name]
    if match is None or match.group(2) is None:
        return rows
    try:
        (part,) = ReadInstruction.from_spec(split).to_absolute({name: len(rows)})
    except (ValueError, AssertionError) as error:
        raise UserError(f"'{split}' is no slice of the {len(rows)} rows of '{path}': {error}.") from None
    return rows.select(range(part.from_ or 0, len(rows) if part.to is None else part.to))


def peer_path(template: str, peer: int) -> str:
    """Returns the path of a peer (ids from 0) from a template with {i} or {}, which count from 1."""
    return template.replace("{i}", str(peer + 1)).replace("{}", str(peer + 1))


def is_template(path: str) -> bool:
    return "{i}" in path or "{}" in path


def column(rows: Dataset, name: str, path: str) -> list[object]:
    """Returns a column as a list, or raises with the columns there are."""
    if name not in rows.column_names:
        raise UserError(
            f"'{path}' has no column '{name}'; its columns are {', '.join(rows.column_names)}."
            f"{nearest(name, rows.column_names)}"
        )
    return list(rows[name])
