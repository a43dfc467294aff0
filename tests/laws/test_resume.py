"""Law 5: stop and resume at any round equals the whole run; the same seed gives the same record, another does not."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dfl_lora.build import Federation, build
from dfl_lora.checkpoint import load_checkpoint
from dfl_lora.codecs import CODECS
from dfl_lora.corrections import CORRECTIONS
from dfl_lora.errors import UserError
from dfl_lora.mixers import MIXERS
from dfl_lora.products import COMBINES
from dfl_lora.reading import resolve
from dfl_lora.recipe import Recipe
from dfl_lora.rounds import Record
from dfl_lora.run_directory import Line
from dfl_lora.running import Start
from dfl_lora.schedules import SCHEDULES
from dfl_lora.simulate import run_recipe

ROUNDS = 4
CLOCKED = {"seconds", "peak_rss_bytes", "tokens_per_second"}


class Killed(Exception):
    """What stops a run in these tests."""


@dataclass(frozen=True)
class KillAfter:
    """An observer that ends the process, so to say, after a round."""

    round: int

    def started(self, federation: Federation, lines: Sequence[Line], start: Start | None) -> None: ...

    def finished_round(self, record: Record, line: Line) -> None:
        if record.round == self.round:
            raise Killed

    def ended(self, summary: Mapping[str, Any], run: Path) -> None: ...


def recipe_of(**settings: object) -> Recipe:
    """Returns a recipe of three toy peers and four rounds with some keys set (a__b is a.b)."""
    content = {
        "model": {"name_or_path": "toy"},
        "lora": {"r": 2, "target_modules": ["first", "second"]},
        "task": {"kind": "toy"},
        "data": {"path": "builtin/toy", "partition": {"kind": "dirichlet", "alpha": 0.5}},
        "peers": {"num_peers": 3, "topology": "complete"},
        "method": {"schedule": "lora"},
        "train": {"rounds": ROUNDS, "local": {"steps": 2}},
        "evaluate": {"every": 2, "rows": 32},
        "compute": {"threads": 1},
    }
    return resolve(content, [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in settings.items()])


RECIPES = {
    "adam": recipe_of(),
    "frozen A, private head, epochs, dropout, adamw": recipe_of(
        method__schedule="freeze_a", method__head="private", train__local__epochs=1, train__batch_size=128,
        train__optimizer="adamw", train__dropout=True, lora__lora_dropout=0.1,
    ),
    "the seed's order, sgd, before and after mixing": recipe_of(
        train__order="seed", train__optimizer="sgd", train__shuffle=False, evaluate__before_mixing=True,
    ),
    "error feedback, some absent": recipe_of(
        method__codec="top_k(share=0.3)", peers__participation=0.7, method__correction="quasi_global",
    ),
    "replicas": recipe_of(method__codec="choco", train__order="seed"),
    "another graph in each round": recipe_of(
        peers__num_peers=5, peers__topology="random_matching(seed=3)", method__correction="k_gt", train__order="seed",
        train__shuffle=False,
    ),
    "core": recipe_of(
        method__schedule="core", lora__init="gradient_svd", method__correction="k_gt", method__codec="int8",
    ),
    "graphs in turn": recipe_of(peers__topology="base(k=1)"),
}  # fmt: skip
AXES = {"schedule": SCHEDULES, "correction": CORRECTIONS, "mixer": MIXERS, "combine": COMBINES, "codec": CODECS}
NEEDS: dict[str, dict[str, object]] = {
    "core": {"lora__init": "orthonormal"}, "d2": {"peers__mixing": "lazy"},
    "gossip_pga": {"method__mixer": "gossip_pga(every=2)"}, "relay_sum": {"peers__num_peers": 5},
    "k_gt": {"method__correction": "k_gt(second_moments=2, clip=5.0, decay=0.5)", "method__schedule": "alternating"},
}  # fmt: skip


def run(recipe: Recipe, folder: Path, *, resume: bool = False, kill_after: int = 0) -> Path:
    """Runs a recipe, perhaps killed after a round; returns the run directory."""
    try:
        run_recipe(recipe, folder, [KillAfter(kill_after)], resume=resume, overwrite=False)
    except Killed:
        assert kill_after
    return folder


def resumed(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Goes on with a run to its last round, without the pages made at the end; returns what it kept."""
    return kept(run(recipe, folder, resume=True, kill_after=ROUNDS))


def kept(folder: Path) -> dict[str, Any]:
    """Returns all that the rounds left in a run directory, but for the time they took."""
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    return {
        "rounds": [{k: v for k, v in line.items() if k not in CLOCKED} for line in lines],
        "partition": (folder / "partition.json").read_text(),
        "recipe": (folder / "recipe.yaml").read_text(),
        "checkpoint": {f.name: f.read_bytes() for f in (folder / "checkpoint").iterdir() if f.name[0] != "."},
    }


def summary_of(folder: Path) -> dict[str, Any]:
    """Returns the summary of a finished run, but for the time and the memory it took."""
    summary = json.loads((folder / "summary.json").read_text())
    return {k: v for k, v in summary.items() if k not in CLOCKED}


def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "run"))


@pytest.fixture(scope="module", params=RECIPES)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    """A recipe, and the directory of its uninterrupted run."""
    recipe = RECIPES[request.param]
    return recipe, run(recipe, tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run killed after round 3; copy it before you change it."""
    return run(RECIPES["adam"], tmp_path_factory.mktemp("stopped") / "run", kill_after=3)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the uninterrupted run kept."""
    return kept(run(RECIPES["adam"], tmp_path_factory.mktemp("expected") / "run", kill_after=ROUNDS))


@pytest.mark.parametrize("stop", range(1, ROUNDS))
def test_stopping_after_any_round_and_resuming_equals_the_whole_run(
    stop: int, whole: tuple[Recipe, Path], tmp_path: Path
) -> None:
    recipe, folder = whole
    run(recipe, tmp_path / "run", kill_after=stop)
    assert len(kept(tmp_path / "run")["rounds"]) == stop
    assert resumed(recipe, tmp_path / "run") == kept(folder)


def test_stopping_after_every_round_equals_the_whole_run(whole: tuple[Recipe, Path], tmp_path: Path) -> None:
    recipe, folder = whole
    for stop in range(1, ROUNDS + 1):
        run(recipe, tmp_path / "run", resume=True, kill_after=stop)
    assert not (tmp_path / "run" / "summary.json").exists()
    run(recipe, tmp_path / "run", resume=True)
    assert kept(tmp_path / "run") == kept(folder)
    assert summary_of(tmp_path / "run") == summary_of(folder)


@pytest.mark.parametrize(("axis", "name"), [(axis, name) for axis, table in AXES.items() for name in table])
def test_every_row_of_every_axis_goes_on_from_where_it_stopped(axis: str, name: str, tmp_path: Path) -> None:
    recipe = recipe_of(**{f"method__{axis}": name, "peers__topology": "line"} | NEEDS.get(name, {}))
    whole = kept(run(recipe, tmp_path / "whole", kill_after=ROUNDS))
    run(recipe, tmp_path / "run", kill_after=3)
    assert resumed(recipe, tmp_path / "run") == whole


def test_a_finished_run_is_resumed_to_the_same_record(tmp_path: Path) -> None:
    first = run(RECIPES["adam"], tmp_path / "run")
    record, summary = kept(first), summary_of(first)
    run(RECIPES["adam"], first, resume=True)
    assert kept(first) == record
    assert summary_of(first) == summary


@pytest.mark.parametrize("stop", range(1, ROUNDS))
def test_rounds_after_the_last_resume_point_are_done_again(stop: int, expected: dict[str, Any], tmp_path: Path) -> None:
    rare = recipe_of(output__checkpoint_every=2)
    run(rare, tmp_path / "run", kill_after=stop)
    assert resumed(rare, tmp_path / "run")["rounds"] == expected["rounds"]
    assert kept(tmp_path / "run")["checkpoint"] == expected["checkpoint"]


def test_the_same_seed_gives_the_same_record_and_another_does_not(expected: dict[str, Any], tmp_path: Path) -> None:
    again = kept(run(recipe_of(train__seed=0), tmp_path / "again", kill_after=ROUNDS))
    other = kept(run(recipe_of(train__seed=1), tmp_path / "other", kill_after=ROUNDS))
    assert again == expected
    assert other["partition"] != expected["partition"]
    for mine, theirs in zip(expected["rounds"], other["rounds"], strict=True):
        assert mine["loss"] != theirs["loss"]
        assert mine["consensus_error"] != theirs["consensus_error"]


@pytest.mark.parametrize("torn", ['{"round": 4, "loss": {"me', "{", '{"round": 4}', "\x00\x00\x00", "\n\n"])
def test_a_torn_last_line_is_healed(torn: str, stopped: Path, expected: dict[str, Any], tmp_path: Path) -> None:
    folder = copied(stopped, tmp_path)
    with (folder / "rounds.jsonl").open("a") as file:
        file.write(torn)
    assert resumed(RECIPES["adam"], folder) == expected


def test_lines_that_are_missing_are_one_sentence(stopped: Path, tmp_path: Path) -> None:
    folder = copied(stopped, tmp_path)
    lines = (folder / "rounds.jsonl").read_text().splitlines()
    (folder / "rounds.jsonl").write_text("\n".join(lines[:2]))
    with pytest.raises(UserError, match=r"has 2 rounds, the checkpoint 3"):
        run(RECIPES["adam"], folder, resume=True)


def test_what_a_killed_process_left_half_written_does_no_harm(
    stopped: Path, expected: dict[str, Any], tmp_path: Path
) -> None:
    folder = copied(stopped, tmp_path)
    state = (folder / "checkpoint" / "state-000003.safetensors").read_bytes()
    for name, content in {
        "state-000004.safetensors": state,  # whole, but never put in force
        "state-000002.safetensors": state[:100],  # replaced, but not yet removed
        ".state-000004.safetensors.x1y2z3": state[:100],
        ".latest.json.x1y2z3": b"{",
    }.items():
        (folder / "checkpoint" / name).write_bytes(content)
    assert resumed(RECIPES["adam"], folder) == expected


State = Callable[[bytes], bytes]
DAMAGES: dict[str, tuple[str, State]] = {
    "a flipped bit in the state": ("state-000003.safetensors", lambda b: b[:-9] + bytes([b[-9] ^ 1]) + b[-8:]),
    "a flipped bit in its header": ("state-000003.safetensors", lambda b: b[:20] + bytes([b[20] ^ 1]) + b[21:]),
    "a truncated state": ("state-000003.safetensors", lambda b: b[: len(b) // 2]),
    "an empty state": ("state-000003.safetensors", lambda b: b""),
    "a truncated latest.json": ("latest.json", lambda b: b[: len(b) // 2]),
    "an empty latest.json": ("latest.json", lambda b: b""),
    "a latest.json that is no JSON": ("latest.json", lambda b: b"\x00\xff garbage"),
    "a latest.json that is a list": ("latest.json", lambda b: b"[]"),
    "a latest.json that is null": ("latest.json", lambda b: b"null"),
    "a latest.json without a key": ("latest.json", lambda b: b.replace(b'"sha256"', b'"sha255"')),
    "a latest.json of another round": ("latest.json", lambda b: b.replace(b'"round": 3', b'"round": 2')),
    "a latest.json with a round that is no number": ("latest.json", lambda b: b.replace(b'"round": 3', b'"round": []')),
    "a latest.json that names another file": ("latest.json", lambda b: b.replace(b"state-000003", b"state-000009")),
    "a latest.json that kept nothing": ("latest.json", lambda b: b.replace(b'"start"', b'"stare"')),
    "a latest.json that kept something else": ("latest.json", lambda b: b.replace(b'"start": null', b'"start": [1]')),
}


@pytest.mark.parametrize(("file", "damage"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_one_sentence_and_changes_nothing(
    file: str, damage: State, stopped: Path, tmp_path: Path
) -> None:
    folder = copied(stopped, tmp_path)
    damaged = damage((folder / "checkpoint" / file).read_bytes())
    assert damaged != (folder / "checkpoint" / file).read_bytes()
    (folder / "checkpoint" / file).write_bytes(damaged)
    before = files_of(folder)
    with pytest.raises(UserError, match=r"is damaged .*--overwrite") as raised:
        run(RECIPES["adam"], folder, resume=True)
    assert "\n" not in str(raised.value)
    assert files_of(folder) == before


def test_a_missing_state_is_one_sentence(stopped: Path, tmp_path: Path) -> None:
    folder = copied(stopped, tmp_path)
    (folder / "checkpoint" / "state-000003.safetensors").unlink()
    with pytest.raises(UserError, match=r"damaged"):
        run(RECIPES["adam"], folder, resume=True)


@pytest.mark.parametrize(
    "other",
    [
        recipe_of(train__seed=1),
        recipe_of(train__rounds=5),
        recipe_of(lora__r=4),
        recipe_of(train__optimizer="sgd"),
        recipe_of(peers__num_peers=4),
        recipe_of(method__schedule="freeze_a"),
    ],
    ids=["seed", "rounds", "rank", "optimizer", "peers", "schedule"],
)
def test_the_checkpoint_of_another_recipe_is_refused(other: Recipe, stopped: Path, tmp_path: Path) -> None:
    folder = copied(stopped, tmp_path)
    before = files_of(folder)
    with pytest.raises(UserError, match=r"another recipe"):
        run(other, folder, resume=True)
    assert files_of(folder) == before


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_a_checkpoint_is_loaded_into_the_peers_it_was_taken_of_and_no_others(stopped: Path, tmp_path: Path) -> None:
    federation, folder = build(RECIPES["adam"]), stopped / "checkpoint"
    start = federation.peers.x.clone()
    with pytest.raises(UserError, match=r"belongs to another recipe"):
        load_checkpoint(folder, federation.peers, "0" * 64)
    with pytest.raises(UserError, match=r"belongs to another recipe"):
        load_checkpoint(folder, build(RECIPES["adam"], ids=[0, 1]).peers, federation.digest)
    assert load_checkpoint(tmp_path, federation.peers, federation.digest) is None
    assert (federation.peers.x == start).all()
    checkpoint = load_checkpoint(folder, federation.peers, federation.digest)
    assert checkpoint is not None
    assert checkpoint.round == 3
    assert (federation.peers.x != start).any(1).all()
    assert federation.peers.counters.tolist() == [[6, 6, 0, 6, 6]] * 3
