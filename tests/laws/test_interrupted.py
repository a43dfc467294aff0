"""Law 5, the hard way: a run stopped at any moment leaves its last checkpoint usable and nothing half-written.

Whatever stopped it (SIGKILL, Ctrl-C, SIGTERM, a full disk), `--resume` ends with what the whole run ended with.
"""

from collections.abc import Iterator

import pytest

from dfl_lora.run_directory import held
from interrupting import Commands, Ground, Stop, partials
from tiny import files_of, toy

CONTENT = toy(train={"rounds": 3, "local": {"steps": 1}, "order": "seed"}, output={"checkpoint_every": 2})
THIN, RARE = 3, 9
"""In the fast suite one moment in three is tried, and one in nine to the page at the end; tests/slow tries all."""


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    with Commands() as commands:
        yield Ground(commands, tmp_path_factory.mktemp("interrupted"), CONTENT)


def test_a_run_killed_before_any_change_of_a_file_goes_on_to_the_same_rounds(ground: Ground) -> None:
    tried = range(0, ground.changes, THIN)
    assert [k for k in tried if ground.stopped(at=k).code != -9 or not ground.goes_on(k % RARE == 0)] == []


def test_a_disk_that_is_full_from_any_change_on_is_one_sentence_and_the_run_goes_on_when_there_is_room(
    ground: Ground,
) -> None:
    for k in range(0, ground.changes, RARE):
        end = ground.stopped(way="full", at=k)
        assert (end.code, end.said.count("\n"), "The disk is full: " in end.said) == (2, 1, True), (k, end)
        assert (k, partials(ground.run)) == (k, [])
        assert (k, ground.goes_on(False)) == (k, True)


@pytest.mark.parametrize("size", [0, 100, 1500, 2500, 20_000])
def test_a_limit_on_the_size_of_files_is_one_sentence_and_the_run_goes_on_without_it(size: int, ground: Ground) -> None:
    end = ground.stopped(largest_file=size)
    assert (end.code, end.said.count("\n")) == (2, 1), end
    assert "limit of its size" in end.said and str(ground.run) in end.said
    assert partials(ground.run) == []
    assert ground.goes_on(True)


@pytest.mark.parametrize("way", ["interrupt", "terminate"])
@pytest.mark.parametrize("before", [".recipe.yaml", ".state-000002", ".latest.json", ".summary.json"])
def test_ctrl_c_and_a_request_to_end_are_one_line_and_the_run_goes_on(way: str, before: str, ground: Ground) -> None:
    end = ground.stopped(way=way, before=before)
    kept = before == ".summary.json"
    assert (end.code, "go on with --resume" in end.said, end.said.count("\n")) == (130, kept, 1)
    assert partials(ground.run) == []
    assert ground.goes_on(before == ".summary.json")


@pytest.mark.parametrize("how", ["--resume", "--overwrite"])
def test_two_processes_never_write_to_one_run(how: str, ground: Ground) -> None:
    ground.stopped(before=".summary.json")
    left = files_of(ground.run)
    with held(ground.run):
        end = ground.command(Stop(str(ground.run)), how)
    assert (end.code, "Another process" in end.said) == (2, True)
    assert files_of(ground.run) == left
    assert ground.goes_on(False)
