"""The documentation names what there is."""

import re
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from changing import NAMES
from dfl_lora.citing import CITED, references
from dfl_lora.cli import app
from dfl_lora.codecs import CODECS
from dfl_lora.compatibility import CLASHES, OF_REAL_PEERS
from dfl_lora.corrections import CORRECTIONS
from dfl_lora.data.glue import TASKS
from dfl_lora.data.partition import PARTITIONS
from dfl_lora.metrics import METRICS
from dfl_lora.mixers import MIXERS
from dfl_lora.mixing import MIXINGS
from dfl_lora.models.placement import INITS
from dfl_lora.preflight import preflight
from dfl_lora.products import COMBINES
from dfl_lora.reading import resolve
from dfl_lora.schedules import SCHEDULES
from dfl_lora.topologies import TOPOLOGIES
from tiny import merged, toy

ROOT = Path(__file__).parents[1]
TABLES = {
    "topologies": TOPOLOGIES,
    "mixings": MIXINGS,
    "schedules": SCHEDULES,
    "corrections": CORRECTIONS,
    "mixers": MIXERS,
    "combines": COMBINES,
    "codecs": CODECS,
    "tasks": TASKS,
    "metrics": METRICS,
    "partitions": PARTITIONS,
}
METHODS = ROOT / "docs" / "methods"
PAGES = {path.name: path.read_text(encoding="utf-8") for path in METHODS.glob("*.md") if path.name != "README.md"}
INDEX = re.findall(
    r"^\| (\w+) \| `([^`]+)` \| .+ \| \[\w+\]\((\w+\.md)\) \|$", (METHODS / "README.md").read_text(), re.MULTILINE
)
"""Axis, value and page of every row of the table of methods."""
AS_IT_IS = {("correction", "none"), ("combine", "mean"), ("codec", "fp32")}
"""Rows that leave things as they are have no page."""
REFUSED = {f"  - {c.one} with {c.other}: {c.reason}." for c in (*CLASHES, *OF_REAL_PEERS)}

every_page = pytest.mark.parametrize("page", PAGES)


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


def test_what_is_advised_is_what_was_measured() -> None:
    """Every figure of an accuracy, an interval or a disagreement is one of the study's page."""
    advice, page = ((ROOT / "docs" / name).read_text() for name in ("how-to-choose.md", "results/README.md"))
    told, measured = (set(re.findall(r"-?\d\.\d{3,4}", text)) for text in (advice, page))
    assert told - measured == set() and len(told) > 10


def test_commands_named_in_the_documentation_exist() -> None:
    verbs = set(get_command(app).commands)  # type: ignore[attr-defined]
    for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        named = set(re.findall(r"dfl-lora ([a-z][a-z-]+)", path.read_text()))
        assert named <= verbs, path


def test_every_row_of_every_axis_of_a_method_has_a_page() -> None:
    axes = {"schedule": SCHEDULES, "correction": CORRECTIONS, "mixer": MIXERS, "combine": COMBINES, "codec": CODECS}
    wanted = {(axis, value) for axis, table in axes.items() for value in table} - AS_IT_IS
    wanted |= {("topology", name) for name in NAMES} | {("start", name) for name in INITS if name != "kaiming"}
    assert {(axis, value.split("(")[0]) for axis, value, _ in INDEX} == wanted
    assert {page for _, _, page in INDEX} == PAGES.keys()
    for _, value, page in INDEX:
        assert re.search(rf"`{value.split('(')[0]}\b", PAGES[page]), (value, page)


@pytest.mark.parametrize(("axis", "value", "page"), INDEX)
def test_a_page_cites_what_its_row_is_to_be_cited_by(axis: str, value: str, page: str) -> None:
    key = {"topology": "peers.topology", "start": "lora.init"}.get(axis, f"method.{axis}")
    row = CITED[key].get(value, ())
    assert keys_of(page) >= set(() if isinstance(row, str) else row)


@every_page
def test_a_page_cites_entries_that_exist_with_their_own_numbers(page: str) -> None:
    """Where a number stands before a key, it is that of the key's entry."""
    entries = references()
    assert keys_of(page) <= entries.keys()
    for number, key in re.findall(r"arXiv\s+(\d{4}\.\d{5}):\s+`(\w+)`", PAGES[page]):
        assert f"eprint = {{{number}}}" in entries[key], key


def keys_of(page: str) -> set[str]:
    """Returns the keys of entries that a page names."""
    return set(re.findall(r"`([a-z]+\d{4}[a-z0-9]*)`", PAGES[page]))


@every_page
def test_a_recipe_with_what_a_page_asks_for_can_run(page: str) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", PAGES[page], re.DOTALL)
    assert blocks
    for block in blocks:
        base = toy(peers={"num_peers": 7, "topology": "link3"}, train={"rounds": 25})
        preflight(resolve(merged(base, yaml.safe_load(block))))


@every_page
def test_the_tests_that_a_page_names_are_there(page: str) -> None:
    """And each is named with its file."""
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGES[page])
    assert 0 < len(named) == len(re.findall(r"test_\w+`", PAGES[page]))
    for path, test in named:
        assert f"def {test}(" in (ROOT / path).read_text(encoding="utf-8"), (path, test)


def test_what_is_refused_is_told_on_the_pages_in_the_words_of_the_table() -> None:
    told = {line for page in PAGES.values() for line in page.splitlines() if line.startswith("  - ")}
    assert told <= REFUSED
    assert {line for line in REFUSED - told if "topology matrix" not in line} == set()


def test_links_between_the_pages_of_the_documentation_lead_somewhere() -> None:
    for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        links = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
        assert [link for link in links if not (path.parent / link).exists()] == [], path
