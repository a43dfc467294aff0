"""Labels: names or whole numbers from 0, checked row by row and made into numbers."""

import re
from collections.abc import Collection, Iterable, Sequence
from reprlib import repr as shortened
from typing import cast

import numpy as np
from numpy.typing import NDArray

from dfl_lora.data.glue import Columns
from dfl_lora.errors import UserError

NUMBER = re.compile(r"-?\d+(\.\d*)?")
"""As a table of text has it. Where all labels are numbers and some are fractions, the column holds no labels."""
MOST_LABELS = 1000
"""A column that would make more labels is taken for a mistake, such as the numbers of the rows."""

ABSENT = {"NA", "N/A", "nan", "NaN", "NULL", "null", "None"}
"""What tables write for a value that is not there: beside whole numbers it is no name."""


def names_of(values: Sequence[str | int], own: Sequence[str] | None, columns: Columns, path: str) -> tuple[str, ...]:
    """Returns the names of the labels: the task's, the column's `own` (of a ClassLabel), or the values found."""
    if columns.names is not None:
        return columns.names
    if own is not None:
        return tuple(own)
    texts, numbers = {v for v in values if isinstance(v, str)}, [v for v in values if isinstance(v, int)]
    if texts and numbers:
        raise UserError(
            f"Column '{columns.label}' of '{path}' mixes names, such as {shortened(min(texts))}, with numbers, such as "
            f"{numbers[0]}; write all labels as names, or all as whole numbers from 0."
        )
    absent = texts & ABSENT
    if absent and len(texts) > len(absent) and all(text.lstrip("-").isdecimal() for text in texts - absent):
        row = next(row for row, v in enumerate(values) if v in absent)
        raise UserError(
            f"Row {row} of '{path}' has the label {values[row]!r} in column '{columns.label}', whose others "
            "are numbers; give the row a label, or leave it out."
        )
    count = len(texts) or 1 + max(numbers)
    if count > MOST_LABELS:
        raise UserError(
            f"Column '{columns.label}' of '{path}' would make {count:,} labels, such as {shortened(values[0])} and "
            f"{shortened(values[-1])}, but at most {MOST_LABELS:,} are allowed; name another column in task.label."
        )
    return tuple(sorted(texts)) if texts else tuple(str(i) for i in range(count))


def checked(values: Sequence[object], name: str, path: str) -> list[str | int]:
    """Returns a label column of names or whole numbers; raises with the first row that has neither."""
    numeric = all(NUMBER.fullmatch(str(v)) for v in values if v is not None)
    wrong = [row for row, v in enumerate(values) if not isinstance(v, str | int) or (numeric and "." in str(v))]
    if wrong:  # other software writes whole numbers as fractions beside an empty one
        row = values.index(None) if None in values else wrong[0]
        raise UserError(
            f"Row {row} of '{path}' has the label {values[row]!r} in column '{name}'; labels are names or whole "
            "numbers from 0: correct it, or name another column in task.label."
        )
    if all(v == -1 for v in values):
        raise UserError(
            f"Every row of '{path}' has the label -1 in column '{name}', which says that this split has no labels, "
            "as those for testing in GLUE; use another split, such as validation."
        )
    return cast(list[str | int], list(values))


def occurring(names: Sequence[str], ids: NDArray[np.int64]) -> set[str]:
    """Returns the names of the labels that rows have."""
    return {names[i] for i in np.unique(ids)}


def check_several(found: Collection[str], path: str) -> None:
    """Raises where there is nothing to tell apart."""
    if len(found) < 2:
        raise UserError(f"All labels in '{path}' are {', '.join(found)}; give rows of two labels or more.")


def common_names(found: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    """Returns the label names of several tables: the longest, where it has all of them, else all in order."""
    found = list(found)
    longest, every = max(found, key=len), sorted({name for names in found for name in names})
    return longest if set(every) <= set(longest) else tuple(every)


def numbers_of(
    values: Sequence[str | int], own: Sequence[str] | None, names: Sequence[str], column: str, path: str
) -> NDArray[np.int64]:
    """Returns the labels as numbers; raises with the first row whose label is not one of `names`.

    The numbers of a ClassLabel (`own` names) that shares names with `names` count as those names: their order may be
    another.
    """
    if own is not None and not set(own).isdisjoint(names):
        named = dict(enumerate(own))
        values = [named.get(v, v) if isinstance(v, int) else v for v in values]
    numbers = {name: i for i, name in enumerate(names)}
    ids = [numbers.get(v, -1) if isinstance(v, str) else v for v in values]
    for row, i in enumerate(ids):
        if not 0 <= i < len(names):
            more = ", ..." if len(names) > 10 else ""
            raise UserError(
                f"Row {row} of '{path}' has the label {values[row]!r} in column '{column}'; "
                f"allowed are 0 to {len(names) - 1} or {', '.join(names[:10])}{more}."
            )
    return np.asarray(ids, dtype=np.int64)
