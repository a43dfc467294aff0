"""Every test is offline, and every cache it fills is gone when the session ends."""

import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

CACHES = pytest.StashKey[Path]()


def pytest_configure(config: pytest.Config) -> None:
    """Sets the environment before a test module imports a library that reads it once, when it is loaded."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background: commands would not hear Ctrl-C
        signal.signal(signal.SIGINT, signal.default_int_handler)
    caches = tempfile.TemporaryDirectory(prefix="dfl-lora-tests-")
    config.add_cleanup(caches.cleanup)
    config.stash[CACHES] = Path(caches.name)
    config.addinivalue_line("filterwarnings", "ignore:unclosed file .*[ct]sv:ResourceWarning")  # datasets' csv reader
    for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_ASSETS_CACHE", "HF_XET_CACHE", "DFL_LORA_MODEL"):
        os.environ.pop(name, None)
    os.environ |= {"HF_HOME": f"{caches.name}/hf", "HF_HUB_OFFLINE": "1", "DFL_LORA_CACHE": f"{caches.name}/dfl-lora"}


@pytest.fixture(autouse=True)
def private_caches(pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Points the project's own cache, which is read at each use, at the session's folder again."""
    monkeypatch.setenv("DFL_LORA_CACHE", str(pytestconfig.stash[CACHES] / "dfl-lora"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def threads_restored() -> Iterator[None]:
    """A run sets the number of threads that its recipe says; the next test starts with the machine's own."""
    torch = sys.modules.get("torch")
    threads = torch.get_num_threads() if torch else 0
    yield
    if torch:
        torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny DistilBERT with random weights: two blocks, hidden size 32, 48 positions."""
    from encoders import write_encoder

    return write_encoder("distilbert", tmp_path_factory.mktemp("models") / "tiny-distilbert")


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.csv (40 rows), validation.csv (12), and client_1.csv ... client_3.csv (10 each)."""
    from datasets import Dataset

    from tiny import labelled

    folder, train = tmp_path_factory.mktemp("rows"), labelled(40)
    tables = {"train": train, "validation": labelled(12, "validation")}
    tables |= {f"client_{i + 1}": train[10 * i : 10 * i + 10] for i in range(3)}
    for name, table in tables.items():
        Dataset.from_list(table).to_pandas().to_csv(folder / f"{name}.csv", index=False)
    return folder


@pytest.fixture(scope="session")
def toy_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the toy in folder `run`, with its recipe beside it; copy it before you change it."""
    from tiny import call, toy, written

    folder = tmp_path_factory.mktemp("toy")
    assert call("run", written(folder / "toy.yaml", toy()), "--out", folder / "run", "--json") == 0
    return folder / "run"


@pytest.fixture(scope="session")
def text_run(tmp_path_factory: pytest.TempPathFactory, model: Path, rows: Path) -> Path:
    """A finished run of three peers on text in folder `run`, its recipe beside it; copy it before you change it."""
    from tiny import call, text, written

    folder = tmp_path_factory.mktemp("text")
    recipe = written(folder / "text.yaml", text(model, rows / "train.csv", rows / "validation.csv"))
    assert call("run", recipe, "--out", folder / "run", "--json") == 0
    return folder / "run"
