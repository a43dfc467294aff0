"""Which resume point is in force: `latest.json`, sealed by the sha256 of its own content. No torch here."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dfl_lora.errors import UserError

LATEST = "latest.json"
KEYS = {"file", "sha256", "round", "recipe_digest", "layout_digest", "peers", "kept"}


def read_latest(folder: Path) -> dict[str, Any] | None:
    """Returns what is said of the last state; None where there is none. Raises where it is damaged."""
    if not (folder / LATEST).exists():
        return None
    try:
        latest = json.loads((folder / LATEST).read_text(encoding="utf-8"))
        sealed = latest.pop("seal") == seal_of(latest) and latest.keys() == KEYS
        there = (folder / Path(latest["file"]).name).is_file()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(folder, f"{type(error).__name__}: {error}") from None
    if not sealed:
        raise damaged(folder, "its sha256 is not the recorded one")
    if not there:
        raise damaged(folder, f"{latest['file']} is missing")
    return dict(latest)


def seal_of(latest: Mapping[str, Any]) -> str:
    """Returns the sha256 of the canonical JSON of everything else in latest.json."""
    return hashlib.sha256(json.dumps(latest, sort_keys=True).encode()).hexdigest()


def damaged(folder: Path, why: str) -> UserError:
    return UserError(f"The checkpoint in {folder} is damaged ({why}); start anew with --overwrite.")
