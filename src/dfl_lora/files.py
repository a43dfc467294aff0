"""Files and folders that appear whole or not at all.

Each is written beside its place under a name of its own (`.NAME.*.partial`), synced, and renamed into place; the
folder that holds it is synced as well, so that the new name outlives a power cut. What a killed process leaves is
known by that ending and swept away by the next one.
"""

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp, mkstemp

ENDING = ".partial"


def write_atomically(path: Path, content: bytes | Iterable[bytes | memoryview]) -> None:
    """Writes a file, given whole or piece by piece, whole or not at all; an error of the disk names the file."""
    descriptor, name = mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=ENDING)
    partial = Path(name)
    try:
        with naming(path):
            with os.fdopen(descriptor, "wb") as file:
                for piece in [content] if isinstance(content, bytes) else content:
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
            partial.chmod(0o644)
            partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def append(path: Path, text: str, *, synced: bool = False) -> None:
    """Adds text to the end of a file; an error of the disk names the file. `synced` waits until it is on the disk."""
    with naming(path), path.open("a", encoding="utf-8") as file:
        file.write(text)
        if synced:
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Gives errors of the disk the name of the file that is written."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Gives a place to fill, which becomes the folder when the block ends well, over an older one, and else is gone."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=ENDING))
    partial.chmod(0o755)
    try:
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                with file.open("rb") as written:
                    os.fsync(written.fileno())
        if folder.exists():
            old = partial.with_name(f".old{partial.name}")
            folder.rename(old)
            partial.rename(folder)
            remove(old)
        else:
            partial.rename(folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Removes what killed processes had begun to write into a folder and the folders in it."""
    for partial in [p for p in folder.rglob(f".*{ENDING}") if is_partial(p)]:
        remove(partial)


def is_partial(path: Path) -> bool:
    """Tells a file or folder that was never finished by its name."""
    return path.name.startswith(".") and path.name.endswith(ENDING)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on the disk, where the file system can do so."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
