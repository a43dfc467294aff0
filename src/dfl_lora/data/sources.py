"""Where rows come from: the built-in generator, files, folders (also save_to_disk), and hub names.

A file is one table, whichever split is asked for. Of a .tsv, quotation marks are text and no field holds a tab
or a new line, as in GLUE's own files. The split `validation` of data that has two, as MNLI, is validation_matched.
"""

import csv
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import datasets
import numpy as np
import pandas
import pyarrow
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    ReadInstruction,
    Value,
    get_dataset_config_names,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetGenerationError
from numpy.typing import NDArray
from pandas.errors import EmptyDataError, ParserWarning
from pyarrow import compute

from dfl_lora.data.generator import BUILTINS as BUILTINS
from dfl_lora.data.generator import built_in
from dfl_lora.data.places import (
    BUILTIN_ROWS,
    TOO_LONG,
    WHOLE,
    broken_line,
    cannot_load,
    check_alone,
    check_column,
    check_config,
    check_ending,
    name_and_slice,
    no_rows,
    split_among,
)
from dfl_lora.data.places import peer_path as peer_path
from dfl_lora.errors import UserError

datasets.disable_progress_bars()
datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs is said in our own sentence
BUILTIN = "builtin/sentences"
TABLE: dict[str, Any] = {
    "index_col": False,  # else a row longer than the header moves every value by a column
    "keep_default_na": False,  # None, NA and null are words
    "na_values": [""],
}
READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".parquet": ("parquet", {}),
    ".csv": ("csv", TABLE),
    ".tsv": ("csv", TABLE | {"sep": "\t", "quoting": csv.QUOTE_NONE}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
}

Rows = TypeVar("Rows", Dataset, DatasetDict)


@dataclass(frozen=True)
class Excerpt:
    """The rows of a split, or some of them."""

    rows: Dataset
    path: str
    split: str = ""
    """As it was asked for; empty where the rows are a table without splits."""
    numbers: Sequence[int] | None = None
    """Which rows of the split these are; None: the first ones."""

    @property
    def where(self) -> str:
        """Where the rows are from, in words."""
        return f"'{self.path}' ({self.split})" if self.split else f"'{self.path}'"

    def number(self, row: int) -> int:
        """Returns which row of the split one of these is."""
        return row if self.numbers is None else int(self.numbers[row])

    def select(self, rows: NDArray[np.int64]) -> "Excerpt":
        """Returns some of the rows, by their numbers among these."""
        return replace(self, rows=self.rows.select(rows), numbers=[self.number(row) for row in rows])

    def filled(self, name: str) -> list[object]:
        """Returns a column as a list; raises with the first row that has no value in it."""
        values = column(self.rows, name, self.path)
        if None in values:
            raise UserError(
                f"Row {self.number(values.index(None))} of {self.where} has no value in column '{name}', so it is in "
                "no group; fill or remove it."
            )
        return values


def load_rows(path: str, config: str | None, split: str, *, alone: bool = False) -> Dataset:
    """Returns the rows of `excerpt`."""
    return excerpt(path, config, split, alone=alone).rows


def excerpt(path: str, config: str | None, split: str, *, alone: bool = False) -> Excerpt:
    """Returns the rows of one split; raises a sentence that names what is there where it cannot.

    One table without splits is `train`, or with `alone` whatever is asked for: a path given for these rows only.
    """
    place = Path(path).expanduser()
    check_config(path, config)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", ParserWarning)
            loaded = read(path, place, config)
    except UserError:
        raise
    except Exception as error:  # loaders raise many kinds; each means that these rows are not to be had
        broken = place.is_file() or isinstance(error, DatasetGenerationError)
        raise cannot_load(path, config, reason(error, place), broken) from None
    if isinstance(loaded, Dataset) and not alone:
        check_alone(path, split)
    found = pick(loaded, split, path)
    if not len(found.rows):
        raise no_rows(path, split)
    return found


def read(path: str, place: Path, config: str | None) -> Dataset | Mapping[str, Dataset]:
    """Reads what is built in, a file, a folder, or what the hub has."""
    if path in BUILTINS:
        return builtin(path)
    if not place.exists():
        return load_dataset(path, config)
    if place.is_file():
        check_ending(place)
        reader, options = READERS[place.suffix]
        text = as_text([place])
        return as_written(load_dataset(reader, data_files=str(place), split="train", **options, **text), text)
    if (place / "dataset_info.json").exists() or (place / "dataset_dict.json").exists():
        return load_from_disk(str(place))
    files = sorted(file for file in place.rglob("*") if file.suffix in READERS)
    endings = {file.suffix for file in files}
    if len(endings) != 1 or (config is None and len(get_dataset_config_names(str(place))) > 1):
        return load_dataset(str(place), config)  # of several configurations the library names all, but not with options
    text = as_text(files)
    return as_written(load_dataset(str(place), config, **READERS[endings.pop()][1], **text), text)


def as_text(files: Sequence[Path]) -> dict[str, Features]:
    """Returns the option by which tables of one header are read as text, as they are written; nothing for others.

    What a reader guesses of numbers depends on other rows: beside an empty field 11 would become 11.0, and 1.50 is 1.5.
    """
    if files[0].suffix not in (".csv", ".tsv"):
        return {}
    options = READERS[files[0].suffix][1]
    headers = {tuple(pandas.read_csv(file, nrows=0, **options).columns) for file in files}
    return {"features": Features({name: Value("string") for name in headers.pop()})} if len(headers) == 1 else {}


def as_written(loaded: Rows, text: Mapping[str, Features]) -> Rows:
    """Returns tables that were read as text with numbers in columns of whole ones, of which nothing is lost by it."""
    tables = list(loaded.values()) if isinstance(loaded, DatasetDict) else [loaded]
    for name in text.get("features", ()):
        if all(is_whole(table.data.column(name)) for table in tables):
            loaded = loaded.cast_column(name, Value("int64"))
    return loaded


def is_whole(column: pyarrow.ChunkedArray) -> bool:
    """Tells a column of whole numbers, each written as it would be written again."""
    return column.null_count == 0 and all(
        compute.all(compute.match_substring_regex(chunk, WHOLE)).as_py() is not False for chunk in column.chunks
    )


@cache
def builtin(path: str) -> Mapping[str, Dataset]:
    """Returns the splits of a built-in table."""
    return {split: Dataset.from_list(built_in(path, split)) for split in BUILTIN_ROWS}


def reason(error: BaseException, place: Path) -> str:
    """Returns what is wrong with the data, in the words of the library where they say it best."""
    chain = [error]
    while (behind := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(behind)
    kinds = tuple(map(type, chain))
    if UnicodeDecodeError in kinds:
        return "its text is not in UTF-8"
    if {EmptyDataError, StopIteration, IndexError} & set(kinds) or "corresponds to no data" in str(error):
        return "it has no rows"
    if ParserWarning in kinds:
        return TOO_LONG
    if place.suffix == ".jsonl" and place.is_file() and (found := broken_line(place)):
        return found
    cause = error.__cause__ if isinstance(error, DatasetGenerationError) else error
    text = " ".join(str(cause).split()).removeprefix("Error tokenizing data. C error: ")
    return text.rstrip(".") or type(error).__name__


def pick(loaded: Dataset | Mapping[str, Dataset], split: str, path: str) -> Excerpt:
    """Returns the split of a dictionary of splits, or the table where there is only one; `train[:1000]` is a slice."""
    name, cut = name_and_slice(split)
    rows = loaded if isinstance(loaded, Dataset) else loaded[split_among(loaded, name, path)]
    if cut is None:
        return Excerpt(rows, path, "" if isinstance(loaded, Dataset) else split)
    try:
        (part,) = ReadInstruction.from_spec(f"rows{cut}").to_absolute({"rows": len(rows)})
    except (ValueError, AssertionError):
        raise UserError(
            f"'{split}' is no slice of the {len(rows)} rows of '{path}'; "
            f"write such as {name}[:1000], {name}[-500:] or {name}[10%:20%]."
        ) from None
    chosen = range(len(rows))[part.from_ : part.to]
    return Excerpt(rows.select(chosen or []), path, split, chosen)  # the library refuses a range that is empty


def column(rows: Dataset, name: str, path: str) -> list[object]:
    """Returns a column as a list, or raises with the columns there are."""
    check_column(rows.column_names, name, path)
    try:
        values: list[object] = rows[name][:]  # whole: row by row takes 100 times as long
        return values
    except UnicodeDecodeError:  # of .jsonl files the library finds it out this late
        raise UserError(f"The text in column '{name}' of '{path}' is not in UTF-8; save it in UTF-8.") from None
