"""Files and folders that appear whole or not at all."""

import errno
import os
from pathlib import Path

import pytest

from dfl_lora.files import append, is_partial, new_folder, sweep, write_atomically
from tiny import failing, files_of

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    for content in (b"one", b"another"):
        write_atomically(tmp_path / "a", content)
        assert files_of(tmp_path) == {"a": content}
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644


def test_a_file_may_be_given_piece_by_piece(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a", (memoryview(b"one"), b"", b"two"))
    assert files_of(tmp_path) == {"a": b"onetwo"}


def test_a_piece_that_cannot_be_made_leaves_the_old_file(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a", b"one")
    with pytest.raises(ZeroDivisionError):
        write_atomically(tmp_path / "a", (bytes([1 // k]) for k in (1, 0)))
    assert files_of(tmp_path) == {"a": b"one"}


@pytest.mark.parametrize("call", ["fsync", "replace", "chmod"])
def test_a_file_that_cannot_be_finished_leaves_the_old_one_and_names_it(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_atomically(tmp_path / "a", b"one")
    monkeypatch.setattr(os, call, failing(FULL))
    with pytest.raises(OSError, match=f"{tmp_path / 'a'}") as raised:
        write_atomically(tmp_path / "a", b"another")
    assert raised.value.errno == errno.ENOSPC
    assert files_of(tmp_path) == {"a": b"one"}


def test_an_interruption_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomically(tmp_path / "a", b"one")
    monkeypatch.setattr(os, "fsync", failing(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "a", b"another")
    assert files_of(tmp_path) == {"a": b"one"}


def test_a_file_system_that_cannot_sync_folders_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync = os.fsync

    def only_files(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):  # noqa: PTH112
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", only_files)
    write_atomically(tmp_path / "a", b"one")
    assert files_of(tmp_path) == {"a": b"one"}


def test_another_error_of_the_folder_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", failing(OSError(errno.EIO, "broken"), after=1))
    with pytest.raises(OSError, match="broken"):
        write_atomically(tmp_path / "a", b"one")


@pytest.mark.parametrize("older", [None, "folder", "file"])
def test_a_folder_takes_the_place_of_what_was_there(older: str | None, tmp_path: Path) -> None:
    if older == "file":
        (tmp_path / "a").write_text("old")
    elif older == "folder":
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "old").touch()
    with new_folder(tmp_path / "a") as partial:
        (partial / "new").write_text("1")
    assert files_of(tmp_path) == {"a": None, "a/new": b"1"}


def test_a_folder_that_cannot_be_finished_leaves_the_old_one(tmp_path: Path) -> None:
    def half() -> None:
        with new_folder(tmp_path / "a") as partial:
            (partial / "new").write_text("1")
            raise KeyError

    (tmp_path / "a").mkdir()
    with pytest.raises(KeyError):
        half()
    assert files_of(tmp_path) == {"a": None}


def test_text_is_added_to_the_end_and_an_error_names_the_file(tmp_path: Path) -> None:
    for text, synced in (("one\n", False), ("zwölf\n", True)):
        append(tmp_path / "a", text, synced=synced)
    assert (tmp_path / "a").read_text(encoding="utf-8") == "one\nzwölf\n"
    with pytest.raises(OSError, match=f"{tmp_path}"):
        append(tmp_path, "text")


def test_only_what_was_never_finished_is_swept_away(tmp_path: Path) -> None:
    for name in (".a.x.partial", "kept", ".hidden", "b.partial"):
        (tmp_path / name).touch()
    (tmp_path / ".c.y.partial" / "deep").mkdir(parents=True)
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / ".d.z.partial").touch()
    sweep(tmp_path)
    assert sorted(files_of(tmp_path)) == [".hidden", "b.partial", "inside", "kept"]
    assert not is_partial(tmp_path / ".hidden")
