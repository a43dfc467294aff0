"""Recipes as people mistype them: YAML's pitfalls, wrong types, numbers that are none, settings that cannot be."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from dfl_lora.strict_yaml import read_yaml
from tiny import call, files_of, toy, written

GOOD = yaml.safe_dump(toy())
TEXTS: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "nothing": (b"", ("holds nothing", "model and data")),
    "a comment alone": (b"# later\n", ("holds nothing",)),
    "a word": (b"hello", ("a text", "mapping")),
    "a list": (b"- a\n- b\n", ("a list", "mapping")),
    "tabs": (b"model:\n\tname_or_path: toy\n", ("line 2", "not with tabs")),
    "a key given twice": (f"{GOOD}\nname: other\n".encode(), ("'name' is given twice",)),
    "a key given twice inside": (b"train: {rounds: 3, rounds: 4}\n", ("'rounds' is given twice", "line 1")),
    "two documents": (b"a: 1\n---\nb: 2\n", ("another document", "line 2")),
    "an open bracket": (b"model: [1\nlora: }", ("not readable YAML", "line")),
    "two colons": (b"model: a: b\n", ("line 1", "mapping values")),
    "an unknown alias": (b"model: *base\n", ("'base'", "line 1")),
    "a tag of Python": (b"model: !!python/object/apply:os.system [ls]\n", ("constructor", "line 1")),
    "endless brackets": (b"[" * 5000, ("nested too deeply",)),
    "a number of 5,000 digits": (b"train: {rounds: " + b"9" * 5000 + b"}\n", ("4300 digits",)),
    "a list for a key": (b"[a]: 2\n", ("unhashable key",)),
    "a zero byte": (b"name: \x00\n", ("not allowed",)),
    "Latin-1": ("name: café\n".encode("latin-1"), ("UTF-8",)),
    "UTF-16": (GOOD.encode("utf-16"), ("UTF-8",)),
    "bytes": (bytes(range(256)), ("UTF-8",)),
    "a value nested in itself": (b"model: &a\n  x: *a\n", ("model.name_or_path", "required")),
    "a billion laughs": (
        b"a: &a [x,x,x,x,x,x,x,x,x]\n"
        + b"".join(b"%c: &%c [%s]\n" % (k, k, b",".join([b"*%c" % (k - 1)] * 9)) for k in b"bcdefghi"),
        ("'model' is required",),
    ),
    "only a model": (b"model: {name_or_path: toy}\n", ("'lora' is required", "1 more mistake follows")),
    "a number for a part": (
        b"model: {name_or_path: toy}\nlora: 3\ndata: {path: builtin/toy}\n",
        ("lora is 3", "target_modules"),
    ),
    "numbers for keys": (b"1: 2\n", ("required",)),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_file_that_is_no_recipe_is_refused_in_one_sentence(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    content, words = TEXTS[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_bytes(content)
    assert_refused(["run", "recipe.yaml"], ("recipe.yaml", *words), capsys)
    assert list(files_of(tmp_path)) == ["recipe.yaml"]


def assert_refused(words: list[str], said: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*words) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("dfl-lora: ") and printed.count("\n") == 1 and len(printed) < 700, printed
    assert [word for word in said if word not in printed] == [], printed


WHOLE, NUMBER, TEXT = "a valid integer", "a valid number", "a valid string"
SETTINGS: dict[str, tuple[str, ...]] = {
    **{
        f"train.rounds={value}": ("train.rounds", WHOLE)
        for value in (
            "'3'",
            "yes",
            "true",
            "3.0",
            "3.5",
            "",
            "null",
            "[1]",
            ".nan",
            "1e400",
            "many",
            "{x: 1}",
            "2020-01-01",
        )
    },
    "train.rounds=-1": ("train.rounds", "greater than or equal to 1", "given: -1"),
    "train.rounds.more=1": ("train.rounds",),
    "train.rounds": ("key=value",),
    "train.rounds={": ("'{' is not a YAML value",),
    "train.rounds=\t3": ("not a YAML value", "tabs"),
    "train.local=3": ("train.local is 3", "steps, epochs"),
    "train.local={}": ("exactly one of steps and epochs",),
    "train.local.steps=null": ("exactly one of steps and epochs",),
    "train.local.minutes=3": ("train.local.minutes", "steps, epochs"),
    **{
        f"train.learning_rate={value}": ("train.learning_rate", NUMBER) for value in ("abc", "yes", "'1e-3'", "", "[1]")
    },
    **{f"train.learning_rate={value}": ("train.learning_rate", "greater than 0") for value in ("0", "-1e-3")},
    **{
        f"{key}={value}": (key, "finite")
        for key in ("train.learning_rate", "lora.lora_alpha", "train.max_grad_norm")
        for value in (".nan", ".inf")
    },
    "train.seed=1.5": ("train.seed", WHOLE),
    "train.dropout=3": ("train.dropout", "a valid boolean"),
    "train.shuffle=maybe": ("train.shuffle", "a valid boolean"),
    "train.optimizer=adan": ("'adan'", "Did you mean 'adam'?"),
    "train=3": ("train is 3", "rounds"),
    "train..rounds=3": ("train.", "unknown key"),
    "=3": ("unknown key",),
    "a.b.c=1": ("unknown key 'a'", "allowed here are name, model"),
    "lora.lora_dropout=1": ("lora.lora_dropout", "less than 1"),
    "lora.lora_dropout=-0.1": ("lora.lora_dropout", "greater than or equal to 0"),
    "lora.target_modules=3": ("lora.target_modules", "a valid string or a valid list"),
    "lora.target_modules=[1, 2]": ("lora.target_modules", TEXT),
    "lora.r=0": ("lora.r", "1"),
    "lora.r=100000000": ("lora.r is 100000000", "16 inputs"),
    **{f"name={value}": ("name", "letters, digits") for value in ("a/b", "..", "'a b'", "-a", "''")},
    **{f"name={value}": ("name", TEXT) for value in ("3", "[a]", "no", "2020-01-01", "")},
    f"name={'x' * 300}": ("name", "at most 100 characters"),
    "model=toy": ("model is 'toy'", "name_or_path, revision"),
    "model.name_or_path=": ("model.name_or_path", TEXT),
    "model.name_or_path=${DFL_LORA_NOT_SET}": ("DFL_LORA_NOT_SET", "is not set"),
    "task.labels=[a]": ("task.labels", "at least 2 items"),
    "task.kind=causal": ("'causal'", "classification, causal_lm, toy"),
    "model.quantization=int4": ("model.quantization", "leave it null"),
    "data.path=": ("path", "per_peer"),
    "peers.num_peers=0": ("peers.num_peers", "1"),
    "peers.num_peers=1000000000": ("peers.num_peers", "100000"),
    "peers.participation=0": ("peers.participation", "greater than 0"),
    "peers.participation=.nan": ("peers.participation",),
    "peers.topology=3": ("'3'", "ring"),
    "peers.topology=": ("peers.topology", "ring"),
    "peers.topology=[ring]": ("ring", "star"),
    "peers.topology=erdos_renyi(p=2)": ("peers.topology.p", "less than or equal to 1"),
    "peers.topology=erdos_renyi(p=0.0001)": ("disconnected", "100 draws"),
    "data.partition=dirichlet(alhpa=1)": ("data.partition.alhpa", "Did you mean 'alpha'?"),
    "data.partition=dirichlet(alpha=yes)": ("data.partition.alpha", NUMBER),
    "data.partition=saved(path=gone)": ("no partition at gone",),
    "data.partition=natural": ("data.partition.column", "required"),
    "method.schedule=alternating(period=0)": ("method.schedule.period", "1"),
    "compute.threads=two": ("compute.threads", "auto or a number"),
    "compute.threads=true": ("compute.threads", "auto or a number"),
    "output.report_to=wandb": ("output.report_to", "a valid list"),
    "digest=3": ("digest", TEXT),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_that_cannot_be_is_refused_in_one_sentence(
    setting: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "toy.yaml", toy())
    assert_refused(["run", "toy.yaml", "--set", setting], SETTINGS[setting], capsys)
    assert list(files_of(tmp_path)) == ["toy.yaml"]


PLACES: dict[str, tuple[Callable[[Path], list[str]], tuple[str, ...]]] = {
    "a recipe for a folder": (lambda here: ["--out", "toy.yaml"], ("toy.yaml is a file", "--out")),
    "a folder below a recipe": (lambda here: ["--out", "toy.yaml/run"], ("toy.yaml is a file",)),
    "a device": (lambda here: ["--out", "/dev/null"], ("/dev/null",)),
    "a name that is too long": (lambda here: ["--out", "x" * 300], ("too long",)),
    "where one is": (lambda here: ["--out", "."], ("no run", "--out")),
    "nothing": (lambda here: ["--out", ""], ("no run", "--out")),
}


@pytest.mark.parametrize("name", PLACES)
def test_a_place_that_is_no_run_directory_is_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "toy.yaml", toy())
    words, said = PLACES[name]
    assert call("run", "toy.yaml", *words(tmp_path)) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and [word for word in said if word not in printed] == [], printed
    assert list(files_of(tmp_path)) == ["toy.yaml"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3), ("1E5", 1e5), ("-2e3", -2e3), ("1.5e-3", 1.5e-3), ("1e", "1e"), ("e1", "e1"), ("12", 12),
        ("0.5", 0.5), (".inf", float("inf")), ("'1e-3'", "1e-3"), ("a1e3", "a1e3"), ("[1e2, x]", [1e2, "x"]),
    ],
)  # fmt: skip
def test_numbers_are_read_as_people_write_them(text: str, value: object) -> None:
    assert read_yaml(text) == value


def test_yaml_is_read_as_before_where_it_was_right() -> None:
    text = "base: &b {x: 1, y: [on, 'no', ~]}\nmore: {<<: *b, x: 2}\nnames: 'über'\n"
    assert read_yaml(text) == yaml.safe_load(text)
    assert read_yaml(GOOD) == toy() and read_yaml(json.dumps(toy())) == toy()
