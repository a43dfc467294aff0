"""Classification tasks: which columns are text, what the labels are called, and rows made into tokens."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from reprlib import repr as shortened
from typing import Any, cast

import numpy as np
from datasets import ClassLabel, Dataset
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from dfl_lora.data.batches import TokenSource
from dfl_lora.data.glue import TASKS as TASKS
from dfl_lora.data.glue import Columns as Columns
from dfl_lora.data.sources import column
from dfl_lora.errors import UserError

MOST_LABELS = 1000
"""A column that would make more labels is taken for a mistake, such as the numbers of the rows."""


def label_names(rows: Dataset, columns: Columns, path: str) -> tuple[str, ...]:
    """Returns the names of the labels: the task's, the column's ClassLabel names, or the values found."""
    values, feature = label_values(rows, columns.label, path), rows.features[columns.label]
    if columns.names is not None:
        return columns.names
    if isinstance(feature, ClassLabel):
        return tuple(feature.names)
    texts, numbers = {v for v in values if isinstance(v, str)}, [v for v in values if isinstance(v, int)]
    count = len(texts) or 1 + max(numbers)
    if count > MOST_LABELS:
        raise UserError(
            f"Column '{columns.label}' of '{path}' would make {count:,} labels, such as {shortened(values[0])} and "
            f"{shortened(values[-1])}, but at most {MOST_LABELS:,} are allowed; name another column in task.label."
        )
    return tuple(sorted(texts)) if texts else tuple(str(i) for i in range(count))


def label_values(rows: Dataset, name: str, path: str) -> list[str | int]:
    """Returns a label column of names or whole numbers; raises with the first row that has neither."""
    values = column(rows, name, path)
    wrong = [row for row, v in enumerate(values) if not isinstance(v, str | int)]
    if wrong:
        row = (
            values.index(None) if None in values else wrong[0]
        )  # csv makes whole numbers fractions beside an empty one
        raise UserError(
            f"Row {row} of '{path}' has the label {values[row]!r} in column '{name}'; labels are names or whole "
            "numbers from 0: correct it, or name another column in task.label."
        )
    if all(v == -1 for v in values):
        raise UserError(
            f"Every row of '{path}' has the label -1 in column '{name}', which says that this split has no labels, "
            "as those for testing in GLUE; use another split, such as validation."
        )
    return cast(list[str | int], values)


def fixed_names(rows: Dataset, columns: Columns) -> bool:
    """Tells whether the label names are known without looking at the rows."""
    return columns.names is not None or isinstance(rows.features.get(columns.label), ClassLabel)


def common_names(found: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    """Returns the label names of several tables: the longest, where it has all of them, else all in order."""
    found = list(found)
    longest, every = max(found, key=len), sorted({name for names in found for name in names})
    return longest if set(every) <= set(longest) else tuple(every)


def label_ids(
    rows: Dataset, columns: Columns, names: Sequence[str], path: str
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Returns the labels as numbers; raises with the first row whose label is not one of `names`.

    The numbers of a ClassLabel that shares names with `names` count as those names: their order may be another.
    """
    values, feature = label_values(rows, columns.label, path), rows.features[columns.label]
    if isinstance(feature, ClassLabel) and not set(feature.names).isdisjoint(names):
        own = dict(enumerate(feature.names))
        values = [own.get(v, v) if isinstance(v, int) else v for v in values]
    numbers = {name: i for i, name in enumerate(names)}
    ids = [numbers.get(v, -1) if isinstance(v, str) else v for v in values]
    for row, i in enumerate(ids):
        if not 0 <= i < len(names):
            more = ", ..." if len(names) > 10 else ""
            raise UserError(
                f"Row {row} of '{path}' has the label {values[row]!r} in column '{columns.label}'; "
                f"allowed are 0 to {len(names) - 1} or {', '.join(names[:10])}{more}."
            )
    return np.asarray(ids, dtype=np.int64)


@dataclass(frozen=True)
class Tokenization:
    """How text becomes tokens; its parts and the text name the cache entry."""

    tokenizer: PreTrainedTokenizerBase
    digest: str
    max_length: int
    truncation_side: str

    def source(self, rows: Dataset, columns: Columns, names: Sequence[str], path: str) -> TokenSource:
        """Tokenises rows once and returns them memory-mapped from a private cache, named by their content."""
        texts = [text_of(rows, name, path) for name in columns.text]
        labels = label_ids(rows, columns, names, path)
        key = hashlib.sha256(
            json.dumps([self.digest, self.max_length, self.truncation_side, texts]).encode()
        ).hexdigest()
        folder = cache_folder() / key
        arrays = read_arrays(folder)
        if not arrays:
            shutil.rmtree(folder, ignore_errors=True)
            self.write(folder, texts)
            arrays = read_arrays(folder)
        offsets = np.asarray(arrays.pop("offsets"))
        pads = {"input_ids": int(self.tokenizer.pad_token_id or 0), "token_type_ids": 0}
        return TokenSource(arrays, offsets, labels, pads, self.max_length)

    def write(self, folder: Path, texts: Sequence[Sequence[str]]) -> None:
        """Writes the ragged token columns to a cache folder, which appears whole or not at all."""
        self.tokenizer.truncation_side = self.truncation_side
        tokens: Mapping[str, list[list[int]]] = self.tokenizer(
            *texts, truncation=True, max_length=self.max_length, return_attention_mask=False
        )
        partial = Path(tempfile.mkdtemp(dir=folder.parent))
        arrays: dict[str, NDArray[Any]] = {
            name: np.asarray([t for row in rows for t in row], dtype=np.int32) for name, rows in tokens.items()
        }
        arrays["offsets"] = np.cumsum([0, *map(len, tokens["input_ids"])], dtype=np.int64)
        try:
            for name, array in arrays.items():
                content = BytesIO()
                np.save(content, array)  # np.save to a full disk raises an error that does not say so
                (partial / f"{name}.npy").write_bytes(content.getvalue())
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process wrote the same entry first
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def text_of(rows: Dataset, name: str, path: str) -> list[str]:
    """Returns a text column; raises with the first row that has none."""
    values = column(rows, name, path)
    for row, v in enumerate(values):
        if not isinstance(v, str | int | float):  # a table may hold a text such as 42 as a number
            found = "no text" if v is None else f"a {type(v).__name__}, not a text,"
            raise UserError(f"Row {row} of '{path}' has {found} in column '{name}'; correct or remove it.")
    return [str(v) for v in values]


def read_arrays(folder: Path) -> dict[str, np.memmap[Any, Any]]:
    """Returns the memory-mapped columns of a cache entry; nothing where it is missing or damaged."""
    try:
        return {f.stem: np.lib.format.open_memmap(f, mode="r") for f in sorted(folder.glob("*.npy"))}
    except (OSError, ValueError):
        return {}


def cache_folder() -> Path:
    """Returns the private folder of token caches (mode 0700): DFL_LORA_CACHE, or dfl-lora under the user's cache."""
    root = (
        os.environ.get("DFL_LORA_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "dfl-lora"
    )
    folder = Path(root) / "tokens"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder.chmod(0o700)
    return folder
