"""Classification tasks: which columns are text, what the labels are called, and rows made into tokens."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from dfl_lora.data import labels
from dfl_lora.data.batches import TokenSource
from dfl_lora.data.glue import TASKS as TASKS
from dfl_lora.data.glue import Columns as Columns
from dfl_lora.data.labels import common_names as common_names
from dfl_lora.data.places import check_text
from dfl_lora.data.sources import column
from dfl_lora.data.token_cache import cache_place as cache_place
from dfl_lora.data.token_cache import cached, write_arrays


def label_names(rows: Dataset, columns: Columns, path: str) -> tuple[str, ...]:
    """Returns the names of the labels: the task's, the column's ClassLabel names, or the values found."""
    values = labels.checked(column(rows, columns.label, path), columns.label, path)
    return labels.names_of(values, own_names(rows, columns.label), columns, path)


def own_names(rows: Dataset, name: str) -> tuple[str, ...] | None:
    """Returns the names of a ClassLabel column."""
    feature = rows.features.get(name)
    return tuple(feature.names) if isinstance(feature, ClassLabel) else None


def fixed_names(rows: Dataset, columns: Columns) -> bool:
    """Tells whether the label names are known without looking at the rows."""
    return columns.names is not None or own_names(rows, columns.label) is not None


def label_ids(rows: Dataset, columns: Columns, names: Sequence[str], path: str) -> NDArray[np.int64]:
    """Returns the labels as numbers; raises with the first row whose label is not one of `names`."""
    values = labels.checked(column(rows, columns.label, path), columns.label, path)
    return labels.numbers_of(values, own_names(rows, columns.label), names, columns.label, path)


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
        ids = label_ids(rows, columns, names, path)
        key = hashlib.sha256(
            json.dumps([self.digest, self.max_length, self.truncation_side, texts]).encode()
        ).hexdigest()
        arrays = cached(key, lambda: self.tokens(texts))
        offsets = np.asarray(arrays.pop("offsets"))
        pads = {"input_ids": int(self.tokenizer.pad_token_id or 0), "token_type_ids": 0}
        return TokenSource(arrays, offsets, ids, pads, self.max_length, key)

    def write(self, folder: Path, texts: Sequence[Sequence[str]]) -> None:
        """Writes the ragged token columns to a cache folder, which appears whole or not at all."""
        write_arrays(folder, self.tokens(texts))

    def tokens(self, texts: Sequence[Sequence[str]]) -> dict[str, NDArray[Any]]:
        """Returns the token columns of the rows one after the other, and where each row begins."""
        self.tokenizer.truncation_side = self.truncation_side
        tokens: Mapping[str, list[list[int]]] = self.tokenizer(
            *texts, truncation=True, max_length=self.max_length, return_attention_mask=False
        )
        arrays: dict[str, NDArray[Any]] = {
            name: np.asarray([t for row in rows for t in row], dtype=np.int32) for name, rows in tokens.items()
        }
        arrays["offsets"] = np.cumsum([0, *map(len, tokens["input_ids"])], dtype=np.int64)
        return arrays


def text_of(rows: Dataset, name: str, path: str) -> list[str]:
    """Returns a text column; raises with the first row that has none."""
    values = column(rows, name, path)
    check_text(values, name, path)
    return [str(v) for v in values]
