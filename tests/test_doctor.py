"""What `dfl-lora doctor` says of this machine, and of one that is broken."""

import json
import re
import resource
from datetime import UTC, datetime
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from dfl_lora import doctor
from dfl_lora.recipe import Compute
from tiny import call

NOW = datetime(2026, 11, 22, tzinfo=UTC)
RESOLVED = Compute(dtype="float32", attention="sdpa", group_tokens=4096, device="cpu", threads=4)


def test_a_sound_machine_has_no_error_and_says_versions_and_what_auto_becomes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call("doctor", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in found["checks"]}
    assert {"python", "torch", "processor", "memory", "gpu", "compute", "clock", "ports", "hub"} <= rows.keys()
    assert {row["status"] for row in found["checks"]} <= {"ok", "warning"}
    assert all(bool(row["advice"]) == (row["status"] != "ok") for row in found["checks"])
    assert found["versions"]["torch"] == rows["torch"]["value"]
    assert found["compute"]["dtype"] in ("float32", "bfloat16")


def test_the_table_has_a_line_for_each_row_and_no_colours_where_no_terminal_is(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call("doctor") == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert all(re.search(rf"^(ok|warning) +{name}", out, re.MULTILINE) for name in ("torch", "clock", "token cache"))


def test_an_error_ends_with_exit_code_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("DFL_LORA_CACHE", str(tmp_path / "file"))
    assert call("doctor", "--json") == 2


@pytest.mark.parametrize(
    ("needed", "status"),
    [("torch>=2.9", "ok"), ("torch<1", "error"), ("a-library-that-nobody-wrote>=1", "error")],
)
def test_a_library_that_is_missing_or_outside_its_range_is_an_error(needed: str, status: str) -> None:
    found = doctor.library(Requirement(needed))
    assert found.status == status
    assert status == "ok" or needed in found.advice


def test_little_memory_is_a_warning() -> None:
    assert doctor.memory(2**34, 2**33, None).status == "ok"
    assert doctor.memory(2**34, 2**30, 2**31) == doctor.Check(
        "memory",
        "warning",
        "1.0 GiB of 16.0 GiB available, limited to 2.0 GiB",
        "End other programs; `dfl-lora check RECIPE` says what a run needs.",
    )


def test_more_threads_than_processors_are_a_warning() -> None:
    assert doctor.compute(RESOLVED, 4.0).status == "ok"
    found = doctor.compute(RESOLVED, 1.5)
    assert found.status == "warning" and "compute.threads to 1" in found.advice


def test_a_folder_that_is_not_there_yet_is_judged_by_where_it_would_be_made(tmp_path: Path) -> None:
    assert doctor.place("cache", tmp_path / "a" / "b", "error").status == "ok"
    assert not (tmp_path / "a").exists() and not list(tmp_path.iterdir())


@pytest.mark.parametrize("otherwise", ["warning", "error"])
def test_a_folder_that_cannot_be_written_to_is_as_bad_as_the_caller_says(otherwise: doctor.Status) -> None:
    found = doctor.place("cache", Path("/proc/cache"), otherwise)
    assert found.status == otherwise and found.advice


def test_a_clock_in_1980_is_an_error_and_one_that_nothing_keeps_right_a_warning() -> None:
    assert doctor.clock(NOW.replace(year=1980), True).status == "error"
    assert [doctor.clock(NOW, kept).status for kept in (True, None, False)] == ["ok", "ok", "warning"]


def test_no_loopback_port_is_an_error() -> None:
    assert doctor.loopback(["127.0.0.1"]).status == "ok"
    assert doctor.loopback(["192.0.2.77"]).status == "error"


def test_a_machine_with_a_loopback_address_alone_is_warned() -> None:
    assert doctor.addresses(["127.0.0.1", "::1", "fe80::1%eth0", "00:00:5e:00:53:01"]).status == "warning"
    found = doctor.addresses(["127.0.0.1", "192.0.2.2", "2001:db8::5", "00:00:5e:00:53:01"])
    assert found == doctor.Check("addresses", "ok", "192.0.2.2, 2001:db8::5")


def test_the_hub_is_told_from_the_environment_without_the_password_of_a_proxy() -> None:
    assert doctor.hub({}).value == "allowed, not tried"
    given = {"HF_HUB_OFFLINE": "1", "https_proxy": "http://user:secret@proxy.example:3128"}
    assert doctor.hub(given).value == "offline (HF_HUB_OFFLINE), https_proxy proxy.example"


def test_a_proxy_or_endpoint_that_is_no_url_is_said_and_survived() -> None:
    found = doctor.hub({"HTTP_PROXY": "secret@[", "HF_ENDPOINT": "not a url"})
    assert found.status == "warning" and "secret" not in found.value
    assert "HTTP_PROXY" in found.value and "HF_ENDPOINT" in found.value


def test_no_embedded_model_is_a_warning_and_a_damaged_one_an_error(tmp_path: Path) -> None:
    assert doctor.embedded(None).status == "warning"
    assert doctor.embedded(tmp_path).status == "error"
    (tmp_path / "model.safetensors").write_bytes(b"other weights")
    assert doctor.embedded(tmp_path).status == "error"


def test_few_open_files_are_a_warning() -> None:
    assert doctor.open_files(256).status == "warning"
    assert doctor.open_files(4096).status == "ok"
    assert doctor.open_files(resource.RLIM_INFINITY).value == "no limit"
