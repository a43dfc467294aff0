"""The documentation names what there is."""

import re
from pathlib import Path

import pytest
from typer.main import get_command

from dfl_lora.cli import app
from dfl_lora.codecs import CODECS
from dfl_lora.compatibility import CLASHES, OF_REAL_PEERS
from dfl_lora.corrections import CORRECTIONS
from dfl_lora.data.glue import TASKS
from dfl_lora.data.partition import PARTITIONS
from dfl_lora.metrics import METRICS
from dfl_lora.mixers import MIXERS
from dfl_lora.mixing import MIXINGS
from dfl_lora.schedules import SCHEDULES
from dfl_lora.topologies import TOPOLOGIES

ROOT = Path(__file__).parents[1]
TABLES = {
    "topologies": TOPOLOGIES,
    "mixings": MIXINGS,
    "schedules": SCHEDULES,
    "corrections": CORRECTIONS,
    "mixers": MIXERS,
    "codecs": CODECS,
    "tasks": TASKS,
    "metrics": METRICS,
    "partitions": PARTITIONS,
}


@pytest.mark.parametrize("table", TABLES)
def test_every_row_of_every_table_is_documented(table: str) -> None:
    told = set(re.findall(r"`(\w+)`", (ROOT / "docs" / "recipe.md").read_text()))
    assert set(TABLES[table]) - told == set()


def test_what_does_not_go_together_is_documented_row_by_row() -> None:
    told = (ROOT / "docs" / "recipe.md").read_text()
    assert [c for c in (*CLASHES, *OF_REAL_PEERS) if f"| {c.one} | {c.other} | {c.reason} |" not in told] == []


def test_the_readme_lists_every_file_with_what_it_is() -> None:
    tree = (ROOT / "README.md").read_text().split("```text\n")[1].split("```")[0]
    listed = {line.split()[0] for line in tree.splitlines()}
    there = {str(path.relative_to(ROOT)) for path in (ROOT / "src").rglob("*.py") if path.read_text().strip()}
    there |= {str(path.relative_to(ROOT)) for path in (ROOT / "recipes").rglob("*.yaml")}
    assert there - listed == set()
    assert {name for name in listed if not (ROOT / name).exists()} == set()
    assert [line for line in tree.splitlines() if len(line.split()) < 2] == []


def test_commands_named_in_the_documentation_exist() -> None:
    verbs = set(get_command(app).commands)  # type: ignore[attr-defined]
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        named = set(re.findall(r"dfl-lora ([a-z][a-z-]+)", path.read_text()))
        assert named <= verbs, path
