"""The token cache: arrays made once and memory-mapped from a private folder, each entry named by its content."""

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = Mapping[str, NDArray[Any]]


def cached(key: str, make: Callable[[], Arrays]) -> dict[str, np.memmap[Any, Any]]:
    """Returns the arrays of an entry, memory-mapped; they are made where the entry is missing or damaged."""
    folder = cache_folder() / key
    arrays = read_arrays(folder)
    if not arrays:
        shutil.rmtree(folder, ignore_errors=True)
        write_arrays(folder, make())
        arrays = read_arrays(folder)
    return arrays


def write_arrays(folder: Path, arrays: Arrays) -> None:
    """Writes arrays to the folder of an entry, which appears whole or not at all."""
    partial = Path(tempfile.mkdtemp(dir=folder.parent))
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


def read_arrays(folder: Path) -> dict[str, np.memmap[Any, Any]]:
    """Returns the memory-mapped arrays of an entry; nothing where it is missing or damaged."""
    try:
        return {f.stem: np.lib.format.open_memmap(f, mode="r") for f in sorted(folder.glob("*.npy"))}
    except (OSError, ValueError):
        return {}


def cache_place(kind: str = "tokens") -> Path:
    """Returns where caches of a kind are, made or not: under DFL_LORA_CACHE, or dfl-lora under the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    root = os.environ.get("DFL_LORA_CACHE") or Path(cache).expanduser() / "dfl-lora"
    return Path(root) / kind


def cache_folder() -> Path:
    """Returns the private folder of token caches (mode 0700), made where it is missing."""
    folder = cache_place()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder.chmod(0o700)
    return folder
