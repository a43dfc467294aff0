"""The recipe: every key is read strictly, resolved once, and counted in the digest unless it is one machine's own."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from pydantic import BaseModel

from dfl_lora.compatibility import check_method
from dfl_lora.errors import UserError
from dfl_lora.preflight import talks_of
from dfl_lora.reading import load_recipe, resolve
from dfl_lora.recipe import DEFAULT_METHOD, WINNER, Recipe
from tiny import Content, written

EVERY_KEY = """
name: run
model:    {name_or_path: all-MiniLM-L6-v2, revision: null, quantization: null}
lora:     {r: 8, lora_alpha: 16, lora_dropout: 0.0, target_modules: [query, value], use_rslora: false, init: kaiming}
task:     {kind: classification, name: null, text: null, label: label, format: null, max_length: 512,
           truncation_side: right}
data:     {path: builtin/sentences, config: null, train: train, validation: validation, per_peer: null,
           partition: {kind: iid, alpha: 0.5, min_size: 1, seed: null}}
peers:    {num_peers: 7, topology: link3, mixing: metropolis, participation: 1.0}
method:   {schedule: lora, head: shared, correction: none, mixer: plain, combine: mean, codec: fp32, privacy: none}
train:    {rounds: 20, local: {steps: 10}, order: standard, shuffle: true, batch_size: 16, optimizer: adam,
           learning_rate: 1.0e-3, lr_scheduler_type: cosine, max_grad_norm: null, dropout: false, seed: 0}
evaluate: {every: 1, rows: null, before_mixing: false, metric: accuracy}
compute:  {dtype: auto, attention: auto, group_tokens: auto, device: auto, threads: auto, store: auto}
output:   {dir: null, checkpoint_every: 1, adapters: all, report_to: []}
"""
SHORTEST: Content = {
    "model": {"name_or_path": "toy"},
    "lora": {"target_modules": ["first"]},
    "data": {"path": "builtin/toy"},
}
BASE = {"weights": "w", "tokenizer": "t"}


def shortest() -> Content:
    return {key: dict(value) for key, value in SHORTEST.items()}


def with_settings(*settings: str) -> Recipe:
    return resolve(shortest(), settings)


def digest(*settings: str) -> str:
    return with_settings(*settings).digest_with(BASE)


def message(content: Content, *settings: str) -> str:
    """Returns the one sentence with which a recipe is refused."""
    with pytest.raises(UserError) as refusal:
        resolve(content, settings)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def test_a_recipe_that_says_no_method_has_the_winner_and_one_that_does_has_the_plain_rest() -> None:
    said = resolve(shortest() | {"method": WINNER})
    assert said.method == with_settings().method == DEFAULT_METHOD
    assert said.method.correction.kind == "k_gt" and said.method.mixer.kind == "chebyshev"
    changed = with_settings("method.codec=bf16").method
    assert changed == said.method.model_copy(update={"codec": changed.codec}) and changed.codec.kind == "bf16"
    for nothing in (None, {}):
        assert resolve(shortest() | {"method": nothing}).method == with_settings("method={}").method == DEFAULT_METHOD
    for wrong in (False, 0, "", []):
        with pytest.raises(UserError, match=r"method"):
            resolve(shortest() | {"method": wrong})
    plain = resolve(shortest() | {"method": {"codec": "int8"}}).method
    assert (plain.correction.kind, plain.mixer.kind, plain.codec.kind) == ("none", "plain", "int8")


def test_every_key_of_the_contract_is_read_and_the_first_values_are_the_defaults() -> None:
    full = resolve(yaml.safe_load(EVERY_KEY))
    short = resolve(
        {
            "model": {"name_or_path": "all-MiniLM-L6-v2"},
            "lora": {"target_modules": ["query", "value"]},
            "data": {"path": "builtin/sentences"},
        }
    )
    assert full.model_dump(exclude={"output", "method"}) == short.model_dump(exclude={"output", "method"})
    assert (short.output.dir, short.output.checkpoint_every, short.output.report_to) == (None, 1, [])


@pytest.mark.parametrize(
    "setting",
    [
        "lora.target_modules=all-linear", r"lora.target_modules='.*\.(first|second)'", "lora.use_rslora=true",
        "task.name=mnli", "task.name=qnli", "task.text=[premise, hypothesis]", "task.truncation_side=left",
        "data.partition=dirichlet", "data.partition=shards", "data.partition=linear", "peers.topology=du14",
        "peers.topology=star", "peers.topology=none", "peers.mixing=lazy", "peers.participation=0.5",
        "method.schedule=alternating", "method.schedule=share_a", "lora.init=orthonormal", "task.labels=[bad, good]",
        "evaluate.metric=f1", "evaluate.metric=matthews", "evaluate.metric=loss", "task.name=cola", "task.name=mrpc",
 "peers.topology=link7", "peers.topology=complete",
        "method.schedule=freeze_a", "method.head=private", "method.head=frozen", "train.local.epochs=2",
        "train.order=seed", "train.optimizer=adamw", "train.optimizer=sgd", "train.lr_scheduler_type=linear",
        "train.lr_scheduler_type=constant", "train.max_grad_norm=1.0", "train.dropout=true", "evaluate.rows=10",
        "evaluate.before_mixing=true", "compute.dtype=bfloat16", "compute.attention=eager", "compute.group_tokens=64",
        "compute.threads=1", "output.adapters=consensus", "output.checkpoint_every=5", "model.revision=main",
    ],
)  # fmt: skip
def test_a_value_of_the_contract_is_accepted_and_kept(setting: str) -> None:
    key, _, value = setting.partition("=")
    kept: Any = with_settings(setting).model_dump()
    for part in key.split("."):
        kept = kept[part]
    given = yaml.safe_load(value)
    assert (kept["kind"] if isinstance(kept, dict) else kept) == given


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("trian", "train"), ("model.name_or_pth", "name_or_path"), ("lora.target_module", "target_modules"),
        ("task.maxlength", "max_length"), ("data.valdation", "validation"), ("data.partition.min_sise", "min_size"),
        ("peers.num_peer", "num_peers"), ("method.schedul", "schedule"),
        ("train.learning_rat", "learning_rate"), ("train.local.step", "steps"), ("evaluate.row", "rows"),
        ("compute.thread", "threads"), ("output.checkpoint_evry", "checkpoint_every"),
    ],
)  # fmt: skip
def test_an_unknown_key_is_an_error_that_names_the_nearest(key: str, nearest: str) -> None:
    said = message(shortest(), f"{key}=1")
    assert f"unknown key '{key}'" in said and f"Did you mean '{nearest}'?" in said


def test_an_unknown_key_far_from_all_is_an_error_that_lists_the_allowed_ones() -> None:
    said = message(shortest(), "method.zzz=1")
    assert "'method.zzz'" in said and "schedule, head" in said and "Did you mean" not in said


@pytest.mark.parametrize("key", ["model", "lora", "data"])
def test_a_missing_section_is_named(key: str) -> None:
    content = shortest()
    del content[key]
    assert message(content) == f"the recipe: the key '{key}' is required and missing; add it."


@pytest.mark.parametrize("key", ["model.name_or_path", "lora.target_modules"])
def test_a_missing_required_key_is_named(key: str) -> None:
    section, name = key.split(".")
    content = shortest()
    del content[section][name]
    content[section]["r" if section == "lora" else "revision"] = 1 if section == "lora" else "main"
    assert f"the key '{key}' is required and missing" in message(content)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("train.optimizer=adamm", ("train.optimizer is 'adamm'", "adam, adamw, sgd", "Did you mean 'adam'?")),
        ("method.schedule=freeze-a", ("method.schedule is 'freeze-a'", "lora, freeze_a", "'freeze_a'?")),
        ("lora.r=0", ("lora.r", "greater than or equal to 1", "given: 0")),
        ("lora.r=2.5", ("lora.r", "integer", "2.5")),
        ("lora.lora_alpha=0", ("lora.lora_alpha", "greater than 0", "given: 0")),
        ("lora.lora_dropout=1", ("lora.lora_dropout", "less than 1", "given: 1")),
        ("train.rounds=many", ("train.rounds", "integer", "'many'")),
        ("train.local.steps=0", ("train.local.steps", "given: 0")),
        ("train.local=[1]", ("train.local", "[1]")),
        ("train.learning_rate=-1", ("train.learning_rate", "greater than 0", "-1")),
        ("peers.num_peers=0", ("peers.num_peers", "given: 0")),
        ("peers.participation=1.5", ("peers.participation", "1.5")),
        ("peers.participation=0", ("peers.participation", "greater than 0")),
        ("data.partition=dirichlet(alpha=0)", ("data.partition.alpha", "greater than 0")),
        ("data.partition=dirichlet(alpha)", ("'alpha'", "dirichlet(option=value)")),
        ("data.partition=dirichlet(beta=1)", ("unknown key 'data.partition.beta'", "alpha")),
        ("data.partition=a b", ("'a b' is not a name",)),
        ("peers.topology=ringg", ("peers.topology is 'ringg'", "du14", "Did you mean 'ring'?")),
        ("peers.topology=ring(k=2)", ("unknown key 'peers.topology.k'",)),
        ("peers.topology={kind: ring, edges: [[0, 1]]}", ("'peers.topology.edges'", "It is an option of edges")),
        ("peers.topology={edges: [[0, 1]]}", ("'peers.topology.edges'", "It is an option of edges")),
        ("data.partition=iid(alpha=0.1)", ("'data.partition.alpha'", "It is an option of dirichlet, quantity")),
        ("data.partition=shards(per_peer=0)", ("data.partition.per_peer", "greater than or equal to 1")),
        ("data.partition=saved(path=x, seed=3)", ("data.partition", "seed has no effect")),
        ("data.partition=natural", ("'data.partition.column'", "required")),
        ("method.schedule=alternating(mix=none)", ("method.schedule.mix is 'none'", "both, trained")),
        ("method.schedule=lora(period=2)", ("'method.schedule.period'", "It is an option of alternating")),
        ("peers.topology=erdos_renyi(p=1.5)", ("peers.topology.p", "given: 1.5")),
        ("peers.topology=7", ("peers.topology is '7'", "link3")),
        ("output.report_to=[wandb]", ("output.report_to", "wandb")),
        ("name=a/b", ("name", "a/b")),
        ("data.path=null", ("give path", "per_peer")),
        ("data.per_peer=clients/one", ("'clients/one'", "{i} or {}")),
        ("data.path=${DFL_LORA_NOWHERE}/glue", ("${DFL_LORA_NOWHERE} is not set", ":-default")),
    ],
)
def test_a_wrong_value_is_an_error_that_says_what_was_given_and_what_is_allowed(
    setting: str, said: tuple[str, ...]
) -> None:
    refusal = message(shortest(), setting)
    assert [word for word in said if word not in refusal] == [], refusal


@pytest.mark.parametrize("setting", ["compute.threads=many", "compute.group_tokens=0"])
def test_a_key_that_takes_auto_or_a_number_says_both(setting: str) -> None:
    refusal = message(shortest(), setting)
    assert setting.partition("=")[0] in refusal and "auto" in refusal, refusal
    assert "integer" in refusal or "number" in refusal or "greater than or equal to 1" in refusal, refusal


def test_a_wrong_list_is_named_by_its_key_alone() -> None:
    assert message(shortest(), "lora.target_modules=5").startswith("the recipe: lora.target_modules: ")


def test_a_key_that_is_no_word_is_an_error() -> None:
    assert "5" in message(cast(Content, {**shortest(), 5: 1}))


def test_several_mistakes_are_told_by_the_first_and_counted() -> None:
    assert "(1 more mistake follows.)" in message(shortest(), "lora.r=0", "train.rounds=0")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (
            "data.partition=dirichlet(alpha=0.1, min_size=5)",
            "data.partition={kind: dirichlet, alpha: 0.1, min_size: 5}",
        ),
        ("data.partition=iid", "data.partition={kind: iid}"),
        ("peers.topology=complete", "peers.topology={kind: complete}"),
        ("peers.topology= ring ", "peers.topology=ring()"),
    ],
)
def test_a_name_with_options_is_the_same_as_a_string_and_as_a_mapping(one: str, other: str) -> None:
    assert with_settings(one) == with_settings(other)


def test_settings_take_yaml_values_and_the_last_one_holds() -> None:
    recipe = with_settings(
        "train.learning_rate=1e-4", "train.shuffle=no", "lora.target_modules=[first, second]", "task.text=null",
        "train.rounds=3", "train.rounds = 4",
    )  # fmt: skip
    assert (recipe.train.learning_rate, recipe.train.shuffle, recipe.train.rounds) == (1e-4, False, 4)
    assert recipe.lora.target_modules == ["first", "second"]


def test_a_setting_reaches_into_a_name_with_options() -> None:
    recipe = with_settings("data.partition=dirichlet(min_size=5)", "data.partition.alpha=0.25")
    assert (recipe.data.partition.kind, recipe.data.partition.alpha, recipe.data.partition.min_size) == (
        "dirichlet", 0.25, 5,
    )  # fmt: skip


def test_settings_make_sections_that_the_file_does_not_have() -> None:
    recipe = resolve({}, ["model.name_or_path=toy", "lora.target_modules=all-linear", "data.path=builtin/toy"])
    assert recipe.model.name_or_path == "toy"


def test_setting_one_alternative_drops_the_other() -> None:
    assert with_settings("train.local.steps=3", "train.local.epochs=2").train.local.model_dump() == {
        "steps": None, "epochs": 2,
    }  # fmt: skip
    assert with_settings("train.local.epochs=3", "train.local.steps=2").train.local.model_dump() == {
        "steps": 2, "epochs": None,
    }  # fmt: skip
    per_peer = with_settings("data.validation=v/{i}", "data.per_peer=c/{}")
    assert (per_peer.data.path, per_peer.data.per_peer) == (None, "c/{}")
    path = resolve(json.loads(per_peer.model_dump_json()), ["data.path=builtin/toy"])
    assert (path.data.path, path.data.per_peer) == ("builtin/toy", None)


def test_both_alternatives_in_one_file_are_an_error() -> None:
    assert "exactly one of steps and epochs" in message({**shortest(), "train": {"local": {"steps": 1, "epochs": 1}}})


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("train.rounds", "write key=value"),
        ("train.rounds=[1", "is not a YAML value"),
        ("=5", "unknown key ''"),
        ("train..rounds=5", "unknown key 'train.'"),
        ("data.path.more=1", "data.path"),
        ("model.name_or_path.more=1", "model.name_or_path"),
    ],
)
def test_a_setting_that_cannot_be_applied_is_an_error(setting: str, said: str) -> None:
    assert said in message(shortest(), setting)


@pytest.mark.parametrize("local", [[1], 5])
def test_a_setting_replaces_a_section_that_is_no_mapping(local: object) -> None:
    recipe = resolve({**shortest(), "train": {"local": local}}, ["train.local.steps=3"])
    assert recipe.train.local.steps == 3


def test_paths_expand_the_environment_and_nothing_else_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DFL_LORA_HERE", "/data")
    monkeypatch.delenv("DFL_LORA_NOWHERE", raising=False)
    recipe = with_settings(
        "model.name_or_path=${DFL_LORA_HERE}/base",
        "data.path=${DFL_LORA_HERE:-data}/glue",
        "data.validation=${DFL_LORA_NOWHERE:-held/out}/{i}",
        "output.dir=${DFL_LORA_NOWHERE:-}/runs",
        "task.label=${DFL_LORA_HERE}",
    )
    assert (recipe.model.name_or_path, recipe.data.path) == ("/data/base", "/data/glue")
    assert (recipe.data.validation, recipe.output.dir) == ("held/out/{i}", "/runs")
    assert recipe.task.label == "${DFL_LORA_HERE}"
    per_peer = with_settings("data.validation=a/b", "data.per_peer=${DFL_LORA_HERE}/client_{i}")
    assert per_peer.data.per_peer == "/data/client_{i}"


@pytest.mark.parametrize(
    "setting",
    [
        "lora.r=4", "lora.lora_alpha=32", "lora.lora_dropout=0.1", "lora.target_modules=[second]",
        "lora.use_rslora=true", "task.name=sst2", "task.text=words", "task.label=target", "task.max_length=64",
        "task.truncation_side=left", "data.config=sst2", "data.train=other", "data.validation=test",
        "data.partition=dirichlet", "data.partition.min_size=2", "data.partition.seed=3", "peers.num_peers=5",
        "peers.topology=ring", "method.schedule=freeze_a", "method.head=private", "train.rounds=3",
        "train.local.steps=3", "train.local.epochs=1", "train.order=seed", "train.shuffle=false", "train.batch_size=8",
        "train.optimizer=sgd", "train.learning_rate=0.1", "train.lr_scheduler_type=linear", "train.max_grad_norm=1",
        "train.dropout=true", "train.seed=1", "model.revision=main",
    ],
)  # fmt: skip
def test_the_digest_changes_with_what_all_peers_must_agree_on(setting: str) -> None:
    assert digest(setting) != digest()


@pytest.mark.parametrize(
    "setting",
    [
        "compute.dtype=float32", "compute.threads=1", "compute.attention=eager", "compute.group_tokens=64",
        "output.dir=elsewhere", "output.adapters=consensus", "output.checkpoint_every=3", "data.path=elsewhere",
        "model.name_or_path=elsewhere",
    ],
)  # fmt: skip
def test_the_digest_does_not_change_with_what_is_one_machines_own(setting: str) -> None:
    assert digest(setting) == digest()


def test_the_digest_does_not_change_with_where_a_peer_keeps_its_rows() -> None:
    here = digest("data.validation=here/held_out", "data.per_peer=here/{i}")
    assert here == digest("data.validation=there/{i}.csv", "data.per_peer=there/client_{}")


def test_the_digest_changes_with_the_weights_and_with_the_tokenizer() -> None:
    recipe = with_settings()
    digests = {recipe.digest_with(base) for base in (BASE, {**BASE, "weights": "x"}, {**BASE, "tokenizer": "x"})}
    assert len(digests) == 3


def test_a_file_beside_the_process_does_not_change_the_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    away = digest()
    (tmp_path / "validation").mkdir()
    monkeypatch.chdir(tmp_path)
    assert digest() == away


def test_a_whole_number_written_out_gives_the_digest_of_the_default() -> None:
    assert digest("lora.lora_alpha=16", "peers.participation=1", "lora.lora_dropout=0") == digest()


def test_the_resolved_recipe_reads_back_equal_and_keeps_its_digest(tmp_path: Path) -> None:
    for number, settings in enumerate(
        (
            (),
            ("data.partition=dirichlet(alpha=0.1)", "train.local.epochs=2", "lora.lora_alpha=12.5"),
            ("peers.topology={kind: edges, edges: [[0, 1], [1, 2]]}", "peers.num_peers=3"),
            ("peers.topology={kind: matrix, rows: [[0.1, 0.9], [0.9, 0.1]]}", "peers.num_peers=2"),
            ("data.validation=naïve/{i}", "data.per_peer=p/{}", "train.learning_rate=3e-5"),
        )
    ):
        recipe = with_settings(*settings)
        path = written(tmp_path / f"{number}.yaml", recipe.to_yaml())
        assert load_recipe(path) == recipe
        assert load_recipe(path).digest_with(BASE) == recipe.digest_with(BASE)


def test_a_recorded_digest_is_kept_until_a_setting_changes_the_recipe() -> None:
    content = {**shortest(), "digest": "d"}
    assert resolve(content).digest == "d"
    assert resolve(content, ["train.rounds=3"]).digest is None


@pytest.mark.parametrize("name", ["edges.csv", "edges.txt", "edges.json"])
def test_an_edge_list_is_read_from_a_file_and_kept_in_the_recipe(name: str, tmp_path: Path) -> None:
    lines = {"csv": "0,1\n1,2\n", "txt": "# a path\n0 1\n\n1 2\n", "json": "[[0, 1], [1, 2]]"}
    path = written(tmp_path / name, lines[name.partition(".")[2]])
    as_string = with_settings(f"peers.topology=edges(path={path})")
    path.unlink()
    assert as_string.peers.topology.model_dump() == {
        "kind": "edges", "path": None, "edges": [[0, 1], [1, 2]],
    }  # fmt: skip
    assert resolve(yaml.safe_load(as_string.to_yaml())) == as_string


@pytest.mark.parametrize("name", ["w.csv", "w.txt", "w.json"])
def test_a_matrix_is_read_from_a_file_and_kept_in_the_recipe(name: str, tmp_path: Path) -> None:
    lines = {"csv": "0.75,0.25\n0.25,0.75\n", "txt": "0.75 0.25\n0.25 0.75\n", "json": "[[0.75, 0.25], [0.25, 0.75]]"}
    path = written(tmp_path / name, lines[name.partition(".")[2]])
    recipe = with_settings("peers.topology={kind: matrix, path: " + str(path) + "}", "peers.num_peers=2")
    path.unlink()
    assert recipe.peers.topology.rows == [[0.75, 0.25], [0.25, 0.75]]
    assert resolve(yaml.safe_load(recipe.to_yaml())) == recipe


def test_the_digest_counts_the_edges_and_not_the_file(tmp_path: Path) -> None:
    one, other = written(tmp_path / "a.csv", "0,1\n1,2\n"), written(tmp_path / "b.json", "[[0, 1], [1, 2]]")
    third = written(tmp_path / "c.csv", "0,1\n0,2\n")
    digests = [digest(f"peers.topology=edges(path={path})") for path in (one, other, third)]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("edges.csv", "0,1,2\n", "each row must be two peer numbers"),
        ("edges.csv", "0,x\n", "Cannot read rows of numbers"),
        ("edges.json", '{"0": 1}', "not a list of lists"),
        ("edges.json", "[[0, 1]", "Cannot read rows of numbers"),
    ],
)
def test_a_file_that_is_no_edge_list_is_an_error(name: str, content: str, said: str, tmp_path: Path) -> None:
    path = written(tmp_path / name, content)
    refusal = message(shortest(), f"peers.topology=edges(path={path})")
    assert said in refusal and str(path) in refusal and "peers.topology" in refusal


def test_a_missing_topology_file_is_an_error(tmp_path: Path) -> None:
    assert "No such file" in message(shortest(), f"peers.topology=matrix(path={tmp_path / 'w.csv'})")


def test_every_field_says_what_it_is() -> None:
    def undocumented(part: type[BaseModel], place: str) -> list[str]:
        found = [] if part.__doc__ else [place]
        for name, field in part.model_fields.items():
            inner = field.annotation
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                found += undocumented(inner, f"{place}.{name}")
            elif not field.description:
                found.append(f"{place}.{name}")
        return found

    assert undocumented(Recipe, "recipe") == []


STUDY = Path(__file__).parents[1] / "recipes" / "study" / "study.yaml"
RECIPES = sorted((Path(__file__).parents[1] / "recipes").rglob("*.yaml"))
RECIPES.remove(STUDY)  # a list of what is set in the others


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_the_recipes_of_the_project_are_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DFL_LORA_DATA", raising=False)
    recipe = load_recipe(path)
    assert recipe.name and resolve(yaml.safe_load(recipe.to_yaml())) == recipe


@pytest.mark.parametrize(
    ("settings", "metric"),
    [
        ((), "accuracy"), (("task.name=sst2",), "accuracy"), (("task.name=cola",), "matthews"),
        (("task.name=mrpc",), "f1"), (("task.name=qqp",), "f1"), (("task.name=qqp", "evaluate.metric=loss"), "loss"),
    ],
)  # fmt: skip
def test_the_metric_is_the_tasks_own_unless_another_is_asked_for(settings: tuple[str, ...], metric: str) -> None:
    assert with_settings(*settings).evaluate.metric == metric


@pytest.mark.parametrize(
    ("key", "other"),
    [("correction=k_gt(clip=2.0)", "led"), ("mixer=chebyshev(k=5)", "closing"), ("codec=top_k", "fp32")],
)
def test_the_rows_of_a_method_have_options_of_their_own(key: str, other: str) -> None:
    axis = key.split("=")[0]
    recipe = with_settings(f"method.{key}", f"method.{axis}.kind={other}")
    assert getattr(recipe.method, axis).model_dump() == other


def test_setting_another_row_of_a_table_drops_the_options_of_the_old_one() -> None:
    recipe = with_settings("data.partition=dirichlet(alpha=0.1, min_size=5)", "data.partition.kind=shards")
    assert recipe.model_dump()["data"]["partition"] == {"kind": "shards", "per_peer": 2, "min_size": 5, "seed": None}


def test_a_setting_of_an_option_before_its_row_is_kept() -> None:
    recipe = with_settings("method.schedule.period=4", "method.schedule.kind=alternating")
    assert recipe.method.schedule.options == {"period": 4, "mix": "both"}


def test_reading_recipes_loads_neither_torch_nor_datasets() -> None:
    code = (
        "import sys; from pathlib import Path; from dfl_lora.reading import load_recipe; "
        f"load_recipe(Path({str(Path(__file__).parents[1] / 'recipes' / 'demo.yaml')!r})); "
        "print([m for m in ('torch', 'transformers', 'peft', 'datasets', 'flwr_datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_path_of_saved_rows_is_expanded_as_every_path_is(toy_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNS", str(toy_run.parent))
    recipe = with_settings("data.partition=saved(path=${RUNS}/run)")
    assert recipe.data.partition.path == str(toy_run) and len(recipe.data.partition.sha256) == 64


def test_every_run_of_the_study_is_a_recipe_that_goes_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DFL_LORA_DATA", "/data")
    study = yaml.safe_load(STUDY.read_text(encoding="utf-8"))
    assert {arm for block in study["blocks"].values() for arm in block["arms"]} == set(study["arms"])
    for block in study["blocks"].values():
        for arm in block["arms"]:
            settings = [f"{key}={value}" for key, value in {**block.get("set", {}), **study["arms"][arm]}.items()]
            recipe = load_recipe(STUDY.parent / block["recipe"], settings)
            check_method(recipe, *talks_of(recipe))
