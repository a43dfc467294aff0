"""What others see of a real peer: status.json, events.jsonl, and `dfl-lora status`."""

import json
import logging
import time
from pathlib import Path
from typing import Any

import pytest

from dfl_lora import watching
from dfl_lora.errors import UserError
from dfl_lora.run_directory import held
from dfl_lora.watching import Watch, read_status, sentence
from tiny import call, failing, written

ID = "abcdefgh" + "2" * 44
ABOUT = {"name": "toy", "rounds": 9, "member": ID, "peers": [1], "listen": "127.0.0.1:7000", "insecure": False}
NEIGHBOUR = {
    "id": ID, "peers": [2, 3], "state": "linked", "since": "2030-01-01T00:00:00+00:00", "round": 5, "lag": None,
    "bytes_sent": 2000, "bytes_received": 3_000_000, "links": 2, "refused": {"hash": 4},
}  # fmt: skip


def event(kind: str, why: str = "", peers: tuple[int, ...] = (2,)) -> dict[str, Any]:
    return {"event": kind, "member": ID, "peers": list(peers), "why": why, "address": "10.0.0.4:7000"}


def network() -> dict[str, Any]:
    return {"epoch": 3, "members": [NEIGHBOUR]}


def until(happens: Any) -> None:
    """Waits until something is so."""
    end = time.monotonic() + 20
    while not happens():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_status_tells_the_round_the_network_and_how_it_ended(tmp_path: Path) -> None:
    said = list[str]()
    with Watch(tmp_path, ABOUT, said.append) as watch:
        assert read_status(tmp_path)["state"] == "starting"
        with watch.of(network):
            watch.turn("running", 4)
            until(lambda: read_status(tmp_path)["rounds_done"] == 4)
        assert read_status(tmp_path)["network"] == network()
    status = read_status(tmp_path)
    assert (status["state"], status["network"], status["alive"]) == ("finished", network(), False)
    assert ABOUT.items() <= status.items()


@pytest.mark.parametrize(("error", "state"), [(KeyboardInterrupt, "stopped"), (RuntimeError, "failed")])
def test_status_tells_how_a_process_ended(error: type[BaseException], state: str, tmp_path: Path) -> None:
    with pytest.raises(error), Watch(tmp_path, ABOUT, print):
        raise error
    assert read_status(tmp_path)["state"] == state


def test_status_is_written_at_most_once_a_second(tmp_path: Path) -> None:
    seen = set[int]()
    with Watch(tmp_path, ABOUT, print) as watch:
        end = time.monotonic() + 2.5
        while time.monotonic() < end:
            watch.turn("running", watch.round + 1)
            seen.add((tmp_path / "status.json").stat().st_ino)
            time.sleep(0.01)
    assert 2 <= len(seen) <= 4


def test_every_event_is_a_line_and_a_person_is_told_once_a_minute(tmp_path: Path) -> None:
    said = list[str]()
    with Watch(tmp_path, ABOUT, said.append) as watch:
        for happened in (event("linked"), event("lost", "the link ended"), event("late"), event("linked")):
            watch.happened(happened)
    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["linked", "lost", "late", "linked"]
    assert all(line["time"].startswith("20") and line["member"] == ID for line in lines)
    assert said == ["peer 2 (abcdefgh) joined: 10.0.0.4:7000", "peer 2 (abcdefgh) lost: the link ended"]


def test_events_fill_no_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "LARGEST_LOG", 10_000)
    with Watch(tmp_path, ABOUT, lambda said: None) as watch:
        for number in range(1000):
            watch.happened(event("refused", f"hash: {number}"))
    assert sum(log.stat().st_size for log in tmp_path.glob("events.jsonl*")) <= 20_000
    assert sorted(log.name for log in tmp_path.glob("events.jsonl*")) == ["events.jsonl", "events.jsonl.1"]


def test_a_full_disk_ends_neither_the_network_nor_the_watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = list[str]()
    with Watch(tmp_path, ABOUT, said.append) as watch:
        monkeypatch.setattr(watching, "write_atomically", failing(OSError(28, "No space left on device")))
        monkeypatch.setattr(logging.StreamHandler, "emit", lambda self, record: self.handleError(record))
        watch.happened(event("linked"))
        watch.write()
    assert said


def test_events_are_sentences() -> None:
    assert sentence(event("failed-edge", "round 3", (0, 2))) == "peers 0, 2 (abcdefgh) left out of a round: round 3"
    nobody = {"event": "waiting", "member": None, "peers": [1, 2], "why": "no link yet"}
    assert sentence(nobody) == "peers 1, 2 waited for: no link yet"


def test_a_run_directory_without_status_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    node = written(tmp_path / "node.yaml", {"peers": [1]})
    assert call("status", node) == 2
    assert "There is no status.json in" in capsys.readouterr().err
    for content in ("{", "[]"):
        (tmp_path / "status.json").write_text(content)
        with pytest.raises(UserError, match="cannot be read"):
            read_status(tmp_path)


def test_status_shows_whether_the_process_lives_and_each_neighbour(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    node = written(tmp_path / "node.yaml", {"peers": [1], "output": "."})
    with Watch(tmp_path, ABOUT, print) as watch, watch.of(network), held(tmp_path):
        watch.turn("running", 4)
        until(lambda: read_status(tmp_path)["rounds_done"] == 4)
        assert call("status", node) == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert "toy: peer 1 (abcdefgh), running," in shown and "is alive, 4 of 9 rounds" in shown
        for cell in ("2, 3", "linked", "5", "–", "2 kB", "3 MB", "4 hash"):
            assert f" {cell} " in shown
        left = (tmp_path / "status.json").read_bytes()
    (tmp_path / "status.json").write_bytes(left)  # as if it had been killed
    assert call("status", node) == 0
    assert "(abcdefgh), killed, process" in " ".join(capsys.readouterr().out.split())
    assert call("status", node, "--json") == 0
    assert json.loads(capsys.readouterr().out) == json.loads(left) | {"alive": False}
