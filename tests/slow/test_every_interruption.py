"""Law 5 at every moment: whatever file a run is about to change when it stops, it goes on to the same end."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from interrupting import Commands, Ground, Stop, partials
from tiny import text, toy

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def commands() -> Iterator[Commands]:
    with Commands() as commands:
        yield commands


@pytest.fixture(scope="module", params=["toy", "text"])
def ground(
    request: pytest.FixtureRequest,
    commands: Commands,
    model: Path,
    rows: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Ground:
    """A run of the toy, and one on text that leaves adapters."""
    train = {"rounds": 3, "local": {"steps": 1}, "order": "seed"}
    parts = {"train": train, "output": {"checkpoint_every": 2}}
    content = (
        toy(**parts) if request.param == "toy" else text(model, rows / "train.csv", rows / "validation.csv", **parts)
    )
    return Ground(commands, tmp_path_factory.mktemp(request.param), content)


def test_a_run_killed_before_any_change_of_a_file_ends_as_if_nobody_had(ground: Ground) -> None:
    assert [k for k in range(ground.changes) if ground.stopped(at=k).code != -9 or not ground.goes_on(True)] == []


def test_a_disk_that_is_full_from_any_change_on_leaves_nothing_half_written(ground: Ground) -> None:
    for k in range(ground.changes):
        end = ground.stopped(way="full", at=k)
        assert (k, end.code, "The disk is full: " in end.said, partials(ground.run)) == (k, 2, True, [])
        assert (k, ground.goes_on(True)) == (k, True)


def test_a_run_killed_again_and_again_ends_as_if_nobody_had(ground: Ground) -> None:
    ground.stopped(at=20)
    for k in range(8, ground.changes, 3):
        ground.command(Stop(str(ground.run), at=k), "--resume")
    assert ground.goes_on(True)
