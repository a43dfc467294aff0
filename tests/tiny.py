"""Tiny recipes and tables, and the command line called in this process."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from dfl_lora.cli import main
from dfl_lora.data.generator import sentences

Content = dict[str, Any]
Rows = list[dict[str, Any]]
ONE_THREAD = {"threads": 1, "dtype": "float32"}
TOY: Content = {
    "name": "toy",
    "model": {"name_or_path": "toy"},
    "lora": {"r": 2, "target_modules": ["first", "second"]},
    "task": {"kind": "toy"},
    "data": {"path": "builtin/toy"},
    "method": {"schedule": "lora"},
    "peers": {"num_peers": 3, "topology": "ring"},
    "train": {"rounds": 2, "local": {"steps": 2}, "batch_size": 4},
    "evaluate": {"rows": 50},
    "compute": ONE_THREAD,
}


def call(*words: object) -> int:
    """Runs one command in this process and returns its exit code."""
    return main([str(word) for word in words])


def merged(content: Mapping[str, Any], parts: Mapping[str, Any]) -> Content:
    """Returns a recipe with parts set over it, key by key."""
    result = {key: dict(value) if isinstance(value, dict) else value for key, value in content.items()}
    for key, value in parts.items():
        result[key] = {**result.get(key, {}), **value} if isinstance(value, dict) else value
    return result


def toy(**parts: Any) -> Content:
    """Returns the toy's recipe with other parts."""
    return merged(TOY, parts)


def text(model: Path, train: Path, validation: Path, /, **parts: Any) -> Content:
    """Returns a recipe on text in files, for three peers and two rounds of two steps."""
    content = {
        "name": "text",
        "model": {"name_or_path": str(model)},
        "lora": {"r": 2, "target_modules": ["q_lin", "v_lin"]},
        "data": {"path": str(train), "validation": str(validation)},
        "method": {"schedule": "lora"},
        "peers": {"num_peers": 3, "topology": "ring"},
        "train": {"rounds": 2, "local": {"steps": 2}, "batch_size": 4},
        "compute": ONE_THREAD,
    }
    return merged(content, parts)


def written(path: Path, content: object) -> Path:
    """Writes YAML, or text as it is, and returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def labelled(num_rows: int, split: str = "train") -> Rows:
    """Returns rows of a sentence and its label, 0 and 1 in turn and at random."""
    return [{"sentence": row["sentence"], "label": row["label"]} for row in sentences(split, num_rows)]


def files_of(folder: Path) -> dict[str, bytes | None]:
    """Returns everything below a folder: the content of each file, None for a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def failing(error: BaseException, after: int = 0) -> Callable[..., None]:
    """Returns a function of the operating system that fails from its `after`-th call on."""
    calls = 0

    def fail(*_: object, **__: object) -> None:
        nonlocal calls
        calls += 1
        if calls > after:
            raise error

    return fail
