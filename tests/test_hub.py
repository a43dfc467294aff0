"""Whether the hub is there, asked once and cheaply."""

import os
from pathlib import Path

import pytest

from dfl_lora import hub

PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No proxy, empty caches, and a hub at an address of this machine."""
    for name in (*PROXIES, "HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")


def test_a_known_address_may_be_the_hub() -> None:
    assert hub.reachable()
    assert hub.settle("model", "owner/name")
    assert "HF_HUB_OFFLINE" not in os.environ


def test_an_unknown_address_without_a_proxy_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://no-such-host.invalid")
    assert not hub.reachable()
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:3128")
    assert hub.reachable()


@pytest.mark.parametrize("value", ["1", "true", "ON", "yes"])
def test_a_hub_that_is_switched_off_is_not_there(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    assert not hub.reachable()


def test_without_the_hub_its_library_is_told_so_and_what_was_fetched_is_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://no-such-host.invalid")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert not hub.settle("dataset", "owner/rows")
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    (tmp_path / "hub" / "models--owner--name").mkdir(parents=True)
    (tmp_path / "datasets" / "owner___rows").mkdir(parents=True)
    assert hub.settle("model", "owner/name") and not hub.settle("model", "owner/other")
    assert hub.settle("dataset", "owner/rows") and not hub.settle("dataset", "owner/name")


def test_the_folders_of_the_caches_may_be_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "a"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "b"))
    (tmp_path / "a" / "datasets--owner--rows").mkdir(parents=True)
    (tmp_path / "b" / "owner___other").mkdir(parents=True)
    assert hub.fetched("dataset", "owner/rows") and hub.fetched("dataset", "owner/other")
