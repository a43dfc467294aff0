"""A saved partition: the rows of every peer of a run, from its partition.json, so that a run can be repeated.

The file holds, beside what a report tells, "num_rows", "rows" (the row numbers of each peer, in the order in which
it reads them) and "counts" (rows of each label of each peer). The sha256 of the rows' canonical JSON names them
wherever the file lies. Only json and numpy are needed here: the recipe writes that name down.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dfl_lora.errors import UserError

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Saved:
    """The rows of each peer, of how many they are, the rows of each label [peers][labels], and the rows' sha256."""

    rows: tuple[Rows, ...]
    num_rows: int
    counts: list[list[int]]
    sha256: str


def rows_digest(rows: Sequence[Rows]) -> str:
    """Returns the sha256 of the row numbers: their canonical JSON, a list for each peer."""
    content = json.dumps([part.tolist() for part in rows], separators=(",", ":"))
    return hashlib.sha256(content.encode()).hexdigest()


def read_saved(path: Path) -> Saved:
    """Reads the partition of a run's directory or partition.json; raises one sentence where it is damaged."""
    file = path.expanduser()
    file = file / "partition.json" if file.is_dir() else file
    try:
        return saved_of(json.loads(file.read_text()))
    except FileNotFoundError:
        raise UserError(
            f"There is no partition at {file}; give the directory of a run, or its partition.json."
        ) from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        detail = f"it has no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise UserError(
            f"Cannot read a partition from {file}: {detail}; give the partition.json of a run as it was written."
        ) from None


def saved_of(content: Any) -> Saved:
    """Returns the checked content of a partition.json, or raises with what is wrong."""
    if not isinstance(content, dict):
        raise TypeError(f"it holds {type(content).__name__}, not a mapping")
    rows, num_rows, counts = content["rows"], content["num_rows"], content["counts"]
    if rows is None:
        raise ValueError("every peer of that run had a folder of its own (data.per_peer), so no rows were shared out")
    if type(num_rows) is not int or not lists(rows) or not lists(counts):
        raise TypeError("num_rows must be a whole number, rows and counts a list of whole numbers for each peer")
    if len(counts) != len(rows):
        raise ValueError(f"it has rows of {len(rows)} peers, but counts of {len(counts)}")
    seen = set[int]()
    for peer, part in enumerate(rows):
        if not part:
            raise ValueError(f"peer {peer} has no rows")
        for row in part:
            if not 0 <= row < num_rows:
                raise ValueError(f"row {row} of peer {peer} is not between 0 and {num_rows - 1}")
            if row in seen:
                raise ValueError(f"row {row} is given twice, the second time to peer {peer}")
            seen.add(row)
    arrays = tuple(np.array(part, dtype=np.int64) for part in rows)
    return Saved(arrays, num_rows, counts, rows_digest(arrays))


def lists(value: object) -> bool:
    """Tells whether a value is a list of lists of whole numbers, at least one list."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(part, list) and all(type(number) is int for number in part) for part in value)
    )
