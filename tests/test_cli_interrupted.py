"""Ctrl-C and a request to end, from the first import to the end of the interpreter: one line, exit code 130."""

import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from interrupting import Commands, Ground, Stop
from tiny import toy

SIGNALS = (signal.SIGINT, signal.SIGTERM)
COMMAND = "from dfl_lora.__main__ import console_entry; console_entry()"
AT_IMPORT = """
import os, sys
def watch(event, given):
    if event == "import" and given[0] == "{name}":
        os.kill(os.getpid(), {number})
sys.addaudithook(watch)
"""
IN_AN_EXEC = """
import os, sys
left = ["torch", "exec"]
def watch(event, given):
    if event == "import" and given[0] in left:
        left.remove(given[0])
    if event == "exec" and left == ["exec"] and given[0].co_filename == "<string>":
        left.clear()
        os.kill(os.getpid(), {number})
sys.addaudithook(watch)
"""
AT_THE_END = "import atexit, os; atexit.register(os.kill, os.getpid(), {number})\n"


def ended(before: str, *words: str) -> tuple[int, str]:
    """Runs the entry point in a process of its own and returns its exit code and what it said on stderr."""
    with TemporaryDirectory() as folder:  # a module: Python itself ends by SIGINT after some, and never after -c
        (Path(folder) / "stopped.py").write_text(before + COMMAND)
        command = [sys.executable, "-m", "stopped", *words]
        environment = os.environ | {"PYTHONPATH": folder}
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    return done.returncode, done.stderr


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("name", ["dfl_lora.cli", "typer", "networkx", "pydantic"])
def test_an_interruption_of_the_start_is_one_line(name: str, number: signal.Signals) -> None:
    code, said = ended(AT_IMPORT.format(name=name, number=int(number)), "--help")
    assert (code, said) == (130, "dfl-lora: Interrupted before anything was done.\n")


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("before", [AT_IMPORT.replace("{name}", "torch"), IN_AN_EXEC], ids=["import", "exec"])
def test_an_interruption_while_the_engine_is_loaded_is_one_line(
    before: str, number: signal.Signals, tmp_path: Path
) -> None:
    recipe = Path(__file__).parents[1] / "recipes" / "demo.yaml"
    words = ("run", str(recipe), "--out", str(tmp_path / "run"))
    code, said = ended(before.format(number=int(number)), *words)
    assert (code, said.count("\n"), said[:21]) == (130, 1, "dfl-lora: Interrupted")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_after_the_end_changes_nothing(number: signal.Signals) -> None:
    assert ended(AT_THE_END.format(number=int(number)), "check") == (
        2, "dfl-lora: Give a recipe file, such as recipes/demo.yaml, or --schema for what may stand in one.\n",
    )  # fmt: skip


def test_the_installed_command_and_the_module_have_one_entry() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"dfl-lora": "dfl_lora.__main__:console_entry"}


def test_an_earlier_run_is_not_gone_on_with_in_place_of_the_interrupted_one(tmp_path: Path) -> None:
    with Commands() as commands:
        ground = Ground(commands, tmp_path, toy(train={"rounds": 3, "local": {"steps": 1}}))
        for before, kept in ((".recipe.yaml", False), (".latest.json", False), (".summary.json", True)):
            end = ground.command(Stop(str(ground.run), way="interrupt", before=before), "--overwrite")
            assert (before, end.code, "--resume" in end.said) == (before, 130, kept)
        end = ground.command(Stop(str(ground.run), way="interrupt", before=".rounds.jsonl"), "--resume")
        assert (end.code, "--resume" in end.said) == (130, True)
