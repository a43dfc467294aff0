"""What a recipe cites: a row for every value of every axis, and an entry for every key."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

import pytest

from dfl_lora.citing import ALWAYS, CITED, NAMED, bibtex, cited, references, row_of
from dfl_lora.codecs import CODECS
from dfl_lora.corrections import CORRECTIONS
from dfl_lora.data.glue import TASKS
from dfl_lora.data.partition import PARTITIONS
from dfl_lora.learners.optimizers import OPTIMIZERS
from dfl_lora.mixers import MIXERS
from dfl_lora.mixing import MIXINGS
from dfl_lora.products import COMBINES
from dfl_lora.reading import load_recipe, resolve
from dfl_lora.recipe import GSM8K, LoraPart
from dfl_lora.schedules import SCHEDULES
from dfl_lora.topologies import TOPOLOGIES
from tiny import call, toy

RECIPES = Path(__file__).parents[1] / "recipes"
FILES = sorted(path for path in RECIPES.rglob("*.yaml") if path.name != "study.yaml")
"""study.yaml is a list of arms and no recipe."""
AXES: Mapping[str, Iterable[str]] = {
    "lora.use_rslora": ("True", "False"),
    "lora.init": get_args(LoraPart.model_fields["init"].annotation),
    "peers.topology": TOPOLOGIES,
    "peers.mixing": MIXINGS,
    "method.schedule": SCHEDULES,
    "method.correction": CORRECTIONS,
    "method.mixer": MIXERS,
    "method.combine": COMBINES,
    "method.codec": CODECS,
    "train.optimizer": OPTIMIZERS,
    "data.partition": PARTITIONS,
    "task.name": (*TASKS, GSM8K),
}
ROWS = [(axis, value, row) for axis, rows in CITED.items() for value, row in rows.items()]
KEYS = {key for _, _, row in ROWS if not isinstance(row, str) for key in row} | set(ALWAYS)
KEYS |= {key for names in NAMED.values() for keys in names.values() for key in keys}


def of(*settings: str, **content: Any) -> set[str]:
    return set(cited(resolve(toy(**content), settings)))


def test_every_value_of_every_axis_has_a_row() -> None:
    assert CITED.keys() == AXES.keys()
    for axis, values in AXES.items():
        assert {value.split("(")[0] for value in CITED[axis]} == set(values), axis


def test_a_row_without_entries_says_why() -> None:
    assert [row for row in ROWS if not row[2]] == []
    assert [row for row in ROWS if isinstance(row[2], str) and len(row[2].split()) < 2] == []


def test_every_key_is_an_entry_and_every_entry_is_cited() -> None:
    assert references().keys() == KEYS


@pytest.mark.parametrize("key", sorted(KEYS))
def test_an_entry_has_a_title_a_year_and_authors_and_its_braces_match(key: str) -> None:
    entry = references()[key]
    fields = re.findall(r"(?:^  |}, )(\w+) = \{", entry, re.MULTILINE)
    assert {"title", "author", "year"} <= set(fields) and len(fields) == len(set(fields))
    assert entry.count("{") == entry.count("}") and entry.count("@") == 1 + entry.count("AI @ Meta")
    assert re.search(r"year = \{(19|20)\d\d\}", entry)
    assert not entry.startswith("@misc") or re.search(r"eprint = \{\d{4}\.\d{5}\}, archiveprefix = \{arXiv\}", entry)


def test_no_key_is_there_twice() -> None:
    text = (Path(__file__).parents[1] / "src" / "dfl_lora" / "references.bib").read_text(encoding="utf-8")
    assert len(re.findall(r"^@", text, re.MULTILINE)) == len(references())


def test_a_recipe_cites_what_it_uses_and_nothing_else() -> None:
    plain = {"hu2022lora", "xiao2005scheme", "lian2017dpsgd", "ghiasvand2025declora", "kingma2015adam"}
    base = ("data.partition=iid", "peers.topology=ring", "method={schedule: lora}")
    assert of(*base) == plain
    assert of(*base, "method.codec=choco") - plain == {"koloskova2019choco"}
    assert of(*base, "method.schedule=freeze_a") - plain == {"sun2024ffalora"}
    assert of(*base, "method.schedule=alternating") - plain == {"wang2025adflora", "wang2026tadlora"}
    assert of(*base, "method.schedule=alternating(mix=trained)") - plain == {"chen2025rolora"}
    assert plain - of(*base, "train.optimizer=sgd") == {"kingma2015adam"}


def test_what_has_no_effect_is_not_cited() -> None:
    """An exact mean has a graph and weights of its own; who is alone talks to nobody."""
    base = ("data.partition=iid", "peers.topology=exponential", "method={schedule: lora}")
    assert of(*base, "method.mixer=exact") == {"hu2022lora", "mcmahan2017fedavg", "kingma2015adam"}
    assert of(*base, "peers.topology=none", "method.codec=top_k") == {"hu2022lora", "kingma2015adam"}
    assert of(*base, "peers.num_peers=1", "data.partition=dirichlet(alpha=0.1)") == {"hu2022lora", "kingma2015adam"}
    w = "matrix(rows=[[0.6,0.2,0.2],[0.2,0.6,0.2],[0.2,0.2,0.6]])"
    assert "xiao2005scheme" not in of(*base, "peers.num_peers=3", f"peers.topology={w}")


def test_a_row_of_your_own_cites_nothing() -> None:
    assert row_of("mine", CITED["peers.mixing"]) == ()
    mine = resolve(toy(), ["method.correction=none"]).method.correction.model_copy(update={"kind": "mine"})
    assert row_of(mine, CITED["method.correction"]) == ()


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_the_recipes_of_the_project_can_be_cited(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("cite", path) == 0
    said = capsys.readouterr().out
    recipe = load_recipe(path)
    assert said == "\n".join(bibtex(recipe))
    assert re.findall(r"^@\w+\{([^,]+),$", said, re.MULTILINE) == list(cited(recipe))
    if recipe.task.name is not None:
        assert set(CITED["task.name"][recipe.task.name]) <= set(cited(recipe))


def test_settings_are_cited_and_mistakes_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("cite", RECIPES / "demo.yaml", "--set", "method.correction=k_gt") == 0
    assert "% method.correction k_gt(second_moments=0, decay=0.0)\n@article{liu2024kgt," in capsys.readouterr().out
    assert call("cite", RECIPES / "demo.yaml", "--set", "method.codec=topk") == 2
    assert "Did you mean 'top_k'?" in capsys.readouterr().err
