"""Where rows may be, and what is said where they are not: no library of tables is needed for that."""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from dfl_lora.errors import UserError, nearest

BUILTIN_ROWS = {"train": 4000, "validation": 500}
BUILTIN_COLUMNS = {
    "builtin/sentences": ("sentence", "label", "domain"),
    "builtin/pairs": ("premise", "hypothesis", "label", "domain"),
}
ENDINGS = (".parquet", ".csv", ".tsv", ".json", ".jsonl")
PLACES = f"a folder, a {', '.join(ENDINGS)} file, a save_to_disk folder, {', '.join(BUILTIN_COLUMNS)}"
SAVED = ("dataset_info.json", "dataset_dict.json")
"""What save_to_disk writes into a folder."""
TOO_LONG = "its rows have more values than its header has names"
WHOLE = r"^(0|-?[1-9][0-9]{0,17})$"
"""A whole number of a table of text, which would be written so again."""
SLICE = re.compile(r"([^\[\]+]+)(\[[^\[\]]*\])?")


def peer_path(template: str, peer: int) -> str:
    """Returns the path of a peer (ids from 0) from a template with {i} or {}, which count from 1."""
    return template.replace("{i}", str(peer + 1)).replace("{}", str(peer + 1))


def is_local(path: str) -> bool:
    """Tells a path from what may be a name on the hub, which is NAME or OWNER/NAME."""
    return path.startswith(("/", ".", "~")) or path.count("/") > 1 or path.endswith(("/", *ENDINGS))


def check_no_slice(path: str) -> None:
    """Raises where a slice is put on a path."""
    if match := re.fullmatch(r"(.+)\[[^\[\]]*\]", path):
        raise UserError(
            f"There is no '{path}': a slice goes on the name of a split, as in data.train train[:1000], and not on a "
            f"path; give '{match.group(1)}' without it."
        )


def check_config(path: str, config: str | None) -> None:
    """Raises where a configuration is given to what has none."""
    place = Path(path).expanduser()
    single = path in BUILTIN_COLUMNS or place.is_file() or any((place / name).is_file() for name in SAVED)
    if config is not None and single:
        raise UserError(f"The configuration '{config}' has no effect on '{path}', which has none; remove it.")


def check_ending(file: Path) -> None:
    if file.suffix not in ENDINGS:
        raise UserError(f"Cannot read {file}: the ending must be one of {', '.join(ENDINGS)}.")


def cannot_load(path: str, config: str | None, why: str, broken: bool) -> UserError:
    """Returns the sentence for rows that are not to be had: damaged, or not there."""
    which = f" (config {config})" if config else ""
    advice = "; correct it, or give other data." if broken else f". Give {PLACES}, or a hub name with the network on."
    return UserError(f"Cannot load data from '{path}'{which}: {why}{advice}")


def broken_line(place: Path) -> str | None:
    """Returns which line of a .jsonl file is no JSON object, counted from 1; None where all are."""
    with place.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line) if line.strip() else {}
            except json.JSONDecodeError as error:
                return f"line {number} is not JSON ({error.msg} at character {error.pos + 1})"
            if not isinstance(row, dict):
                return f"line {number} is JSON, but no object such as {{...}}"
    return None


def name_and_slice(split: str) -> tuple[str, str | None]:
    """Returns the name of a split and its slice, such as train and [:1000]."""
    match = SLICE.fullmatch(split)
    if match is None:
        raise UserError(
            f"'{split}' is no split; write a name, or a slice of it such as train[:1000] or train[10%:20%]."
        )
    return match.group(1), match.group(2)


def split_among(splits: Iterable[str], name: str, path: str) -> str:
    """Returns the split of that name; `validation` of data that has two, as MNLI, is validation_matched."""
    splits = list(splits)
    if name in splits:
        return name
    if name == "validation" and "validation_matched" in splits:
        return "validation_matched"
    raise UserError(f"'{path}' has no split '{name}'; it has {', '.join(splits)}.{nearest(name, splits)}")


def check_alone(path: str, split: str) -> None:
    """Raises where another split than train is asked of one table without splits: it would be the same rows."""
    name, cut = name_and_slice(split)
    if cut is None and name != "train":
        raise UserError(
            f"'{path}' is one table of rows, the split train, and has no split '{name}'; give other rows a path of "
            "their own, or share these out by slices such as train[:90%] and train[90%:]."
        )


def is_alone(place: Path) -> bool:
    """Tells one table from a place of several splits."""
    return place.is_file() or (place / "dataset_info.json").is_file()


def no_rows(path: str, split: str) -> UserError:
    return UserError(f"'{path}' has no rows in '{split}'; give data, a split or a slice that has some.")


def check_column(columns: Iterable[str], name: str, path: str) -> None:
    """Raises with the columns there are where one is missing."""
    columns = list(columns)
    if name not in columns:
        raise UserError(
            f"'{path}' has no column '{name}'; its columns are {', '.join(columns)}.{nearest(name, columns)}"
        )


def check_text(values: Sequence[object], name: str, path: str) -> None:
    """Raises with the first row that has no text."""
    for row, v in enumerate(values):
        if not isinstance(v, str | int | float):  # a table may hold a text such as 42 as a number
            found = "no text" if v is None else f"a {type(v).__name__}, not a text,"
            raise UserError(f"Row {row} of '{path}' has {found} in column '{name}'; correct or remove it.")
