"""docs/extending.md is true: one file and one row make a method, which inherits the laws and runs from a recipe."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")


def block(head: str) -> tuple[str, str]:
    """Returns what a fenced block says of itself after `head`, and its content."""
    found = re.search(rf"```{head}(\S*)\n(.*?)```", PAGE, re.DOTALL)
    assert found is not None
    return found.group(1), found.group(2)


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with the page's file and row."""
    folder = tmp_path_factory.mktemp("extended")
    for part in ("src", "tests"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    path, content = block("python file=")
    (folder / path).write_text(content, encoding="utf-8")
    path, content = block("python row=")
    line, row = content.strip("\n").split("\n\n")
    table = (folder / path).read_text(encoding="utf-8")
    table = table.replace("\nfrom dfl_lora.corrections.k_gt", f"\n{line}\nfrom dfl_lora.corrections.k_gt")
    (folder / path).write_text(table.replace('    "none": none,\n', f'    "none": none,\n{row}\n'), encoding="utf-8")
    return folder


def run(folder: Path, *command: str) -> str:
    here = {**os.environ, "PYTHONPATH": str(folder / "src"), "DFL_LORA_CACHE": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=folder, env=here, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_new_row_inherits_the_laws(extended: Path) -> None:
    laws = ["tests/laws/test_gossip.py", "tests/laws/test_taken_back.py", "tests/laws/test_corrections.py"]
    said = run(extended, "pytest", "-vv", "-p", "no:cacheprovider", "-k", "damped and not du14", *laws)
    passed = [line for line in said.splitlines() if "PASSED" in line]
    assert len(passed) > 100 and all("damped" in line for line in passed)


def test_a_new_row_runs_from_a_recipe(extended: Path) -> None:
    (extended / "damped.yaml").write_text(block("yaml recipe")[1], encoding="utf-8")
    summary = json.loads(run(extended, "dfl_lora", "run", "damped.yaml", "--out", "out", "--json"))
    assert summary["rounds"] == 3 and summary["bytes_sent_per_peer"] > 0
    assert "share: 0.7" in (extended / "out" / "recipe.yaml").read_text(encoding="utf-8")
