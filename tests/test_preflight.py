"""Wrong recipes are refused before torch, transformers, peft or datasets is imported, and right ones pass.

All the wrong ones go through one fresh process, which tells after each what it had to import.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict

from dfl_lora.errors import UserError
from dfl_lora.models import folder
from dfl_lora.models.placement import Lora, place
from dfl_lora.preflight import preflight
from dfl_lora.reading import resolve
from encoders import FAMILIES, Family, load, write_encoder
from tiny import labelled, text, toy, written

HEAVY = {"torch", "transformers", "peft", "datasets", "flwr_datasets", "pandas", "sklearn", "matplotlib"}
TELLING = f"""
import contextlib, io, json, sys
from dfl_lora.cli import main
for line in sys.stdin:
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = main(json.loads(line))
    print(json.dumps([code, said.getvalue(), sorted({HEAVY!r} & set(sys.modules))]), flush=True)
"""
ROWS = labelled(12)


@dataclass(frozen=True)
class Place:
    """A folder with recipes, a base model and rows in every form."""

    here: Path
    model: Path

    def toy(self, *settings: str) -> list[str]:
        return self.run("toy.yaml", *settings)

    def text(self, *settings: str) -> list[str]:
        return self.run("text.yaml", *settings)

    def run(self, recipe: str, *settings: str) -> list[str]:
        words = [word for setting in settings for word in ("--set", setting)]
        return ["run", str(self.here / recipe), "--out", str(self.here / "run"), *words]

    def file(self, name: str, content: str | bytes) -> str:
        path = self.here / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    def parquet(self, name: str, columns: dict[str, list[Any]]) -> str:
        path = self.here / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), path)
        return str(path)

    def saved(self, name: str, columns: dict[str, list[Any]]) -> str:
        Dataset.from_dict(columns).save_to_disk(str(self.here / name))
        return str(self.here / name)

    def base(self, name: str, **files: bytes | None) -> str:
        """Returns a copy of the base model with some files other, or (None) gone; `_` stands for the point."""
        copy = Path(shutil.copytree(self.model, self.here / name))
        for file, content in files.items():
            path = copy / file.replace("_json", ".json").replace("_safetensors", ".safetensors")
            if content is None:
                path.unlink()
            else:
                path.write_bytes(content)
        return str(copy)

    def data(self, name: str, content: str | bytes, *settings: str) -> list[str]:
        """Returns the command on rows in a file of that content."""
        return self.text(f"data.path={self.file(name, content)}", *settings)

    def based(self, name: str, **files: bytes | None) -> list[str]:
        """Returns the command on a copy of the base model with some files other."""
        return self.text(f"model.name_or_path={self.base(name, **files)}")

    def resumed(self, name: str, **files: str) -> list[str]:
        """Returns the command that resumes a run of which these files are left."""
        for file, content in files.items():
            self.file(f"{name}/{file.replace('__', '/').replace('_', '.')}", content)
        return ["run", str(self.here / "toy.yaml"), "--resume", "--out", str(self.here / name)]

    def configured(self, name: str, configs: object) -> str:
        for split in ("train", "validation"):
            self.parquet(f"{name}/{split}.parquet", {k: [row[k] for row in ROWS] for k in ROWS[0]})
        return str(Path(self.file(f"{name}/README.md", f"---\nconfigs: {json.dumps(configs)}\n---\n")).parent)


SENTENCES = ["a good film"] * 12
Words = Callable[[Place], list[str]]
Case = tuple[Words, tuple[str, ...]]


def rows(name: str, columns: dict[str, list[Any]], *settings: str) -> Words:
    return lambda p: p.text(f"data.path={p.parquet(f'{name}.parquet', columns)}", *settings)


def part(name: str) -> list[dict[str, str]]:
    return [{"split": "train", "path": f"{name}.parquet"}]


def a_client_without_rows(p: Place) -> list[str]:
    for i, content in ((1, "sentence,label\na,1\n"), (2, "sentence,label\n")):
        p.file(f"k_{i}.csv", content)
    return p.text(f"data.per_peer={p.here}/k_{{i}}.csv", "peers.num_peers=2")


def an_empty_folder(p: Place) -> list[str]:
    (p.here / "empty").mkdir()
    return p.text(f"data.path={p.here}/empty")


def shared(how: str, *settings: str) -> Words:
    return lambda p: p.text(f"data.partition={how}", *settings)


def a_saved_partition(num_rows: int, peers: list[list[int]], option: str = "") -> Words:
    """Returns the command on rows saved by a run whose rows had no known labels, or all the label 0."""

    def words(p: Place) -> list[str]:
        content = {"num_rows": num_rows, "rows": peers, "counts": [[len(rows), 0] for rows in peers]}
        path = p.file(f"saved_{num_rows}_{len(peers)}{len(option)}.json", json.dumps(content))
        return p.text(f"data.partition=saved(path={path}{option})")

    return words


CSV = "sentence,label\na,0\nb,1\nc,0\n"
THREE = [[0, 1], [2, 3], [4, 5]]
W = "0.5 0.4\n0.4 0.5"
HEADER_TOO_LONG = (1 << 62).to_bytes(8, "little") + b"{}"
BEYOND = b'{"a.weight":{"dtype":"F32","shape":[4,4],"data_offsets":[0,64]}}'
GRAPHS: dict[str, Case] = {
    "a misspelt key": (lambda p: p.toy("train.learnig_rate=1"), ("train.learnig_rate", "'learning_rate'?")),
    "a key given twice": (
        lambda p: ["run", p.file("twice.yaml", "train: {rounds: 3}\ntrain: {rounds: 4}\n")],
        ("'train' is given twice", "line 2"),
    ),
    "yes for a number": (lambda p: p.toy("train.rounds=yes"), ("train.rounds", "given: True")),
    "a misspelt topology": (lambda p: p.toy("peers.topology=rign"), ("'rign'", "'ring'?")),
    "a topology of another size": (lambda p: p.toy("peers.topology=link4"), ("7 peers", "3 were asked for")),
    "a shape that no torus has": (lambda p: p.toy("peers.topology=torus", "peers.num_peers=7"), ("torus", "7")),
    "an option of another topology": (
        lambda p: p.toy("peers.topology=ring(p=0.5)"),
        ("peers.topology.p", "erdos_renyi"),
    ),
    "edges in two parts": (
        lambda p: p.toy("peers.topology=edges(edges=[[0,1],[2,3]])", "peers.num_peers=4"),
        ("disconnected", "2 parts"),
    ),
    "a W that is not stochastic": (
        lambda p: p.toy(f"peers.topology=matrix(path={p.file('w.csv', W)})", "peers.num_peers=2"),
        ("not stochastic", "0.9"),
    ),
    "a W that is not symmetric": (
        lambda p: p.toy("peers.topology=matrix(rows=[[0.5,0.5],[0.4,0.6]])", "peers.num_peers=2"),
        ("not symmetric",),
    ),
    "a mixing of weights that are given": (
        lambda p: p.toy("peers.topology=base", "peers.mixing=lazy"),
        ("peers.mixing", "topology base", "no effect"),
    ),
    "a number of peers that is no power of two": (
        lambda p: p.toy("peers.topology=one_peer_exponential"),
        ("3 peers", "power of two", "topology base"),
    ),
    "more partners than peers": (lambda p: p.toy("peers.topology=base(k=3)"), ("base(k=3)", "more than 3 peers")),
    **{
        f"{axis} {name} where the graph changes": (
            lambda p, axis=axis, name=name: p.toy("peers.topology=random_matching", f"method.{axis}={name}"),
            (f"{axis} {name}", "changes from round to round", instead),
        )
        for axis, names, instead in (
            ("mixer", ("chebyshev", "finite_time", "closing", "gossip_pga"), "plain"),
            ("correction", ("led", "d2"), "k_gt"),
        )
        for name in names
    },
    "a W and a mixing": (
        lambda p: p.toy("peers.topology=matrix(rows=[[0.5,0.5],[0.5,0.5]])", "peers.num_peers=2", "peers.mixing=lazy"),
        ("no effect", "matrix"),
    ),
}
RECIPES: dict[str, Case] = {
    "the toy's task with a real model": (lambda p: p.text("task.kind=toy"), ("toy", "builtin/toy")),
    "what has no effect on the toy": (lambda p: p.toy("task.max_length=64"), ("task.max_length has no effect",)),
    "more rows a peer than the toy has": (
        lambda p: p.toy("peers.num_peers=600", "data.partition=iid(min_size=2)"),
        ("1000 rows", "at least 2"),
    ),
    "text beside a known task": (
        lambda p: p.text("task.name=sst2", "task.text=sentence"),
        ("task.text has no effect",),
    ),
    "three text columns": (lambda p: p.text("task.text=[a,b,c]"), ("3 columns", "pairs")),
    "a label named twice": (lambda p: p.text("task.labels=[a,b,a]"), ("twice",)),
    "a partition of what is not shared out": (
        lambda p: p.text("data.per_peer=client_{i}.csv", "data.partition=dirichlet"),
        ("data.partition has no effect",),
    ),
    "a seed of what is not shared out": (
        lambda p: p.text("data.per_peer=client_{i}.csv", "data.partition=iid(seed=5)"),
        ("data.partition has no effect",),
    ),
    "a share of one peer": (
        lambda p: p.toy("peers.num_peers=1", "peers.topology=none", "peers.participation=0.5"),
        ("participation 0.5 has no effect", "1 peers"),
    ),
    "a share of the peers that is all of them": (
        lambda p: p.toy("peers.participation=0.9"),
        ("participation 0.9 has no effect", "3 peers"),
    ),
    "more threads than any machine has": (lambda p: p.toy("compute.threads=100000"), ("compute.threads", "1024")),
    "dropout with fused attention": (
        lambda p: p.text("train.dropout=true", "compute.attention=sdpa"),
        ("sdpa", "eager or auto"),
    ),
}
MODELS: dict[str, Case] = {
    "a model folder that is not there": (lambda p: p.text("model.name_or_path=./gone"), ("'./gone'", "no such folder")),
    "a model of a hub that is not there": (
        lambda p: p.text("model.name_or_path=no/such"),
        ("'no/such'", "cannot be reached"),
    ),
    "a folder that is no model": (lambda p: p.text(f"model.name_or_path={p.here}"), ("no config.json", "safetensors")),
    "a base without a tokenizer": (
        lambda p: p.based("b1", tokenizer_json=None, tokenizer_config_json=None),
        ("no tokenizer",),
    ),
    "a base of another family": (
        lambda p: p.text(f"model.name_or_path={p.base('b2', config_json=b'{}')}"),
        ("family None", "distilbert"),
    ),
    "a damaged config.json": (
        lambda p: p.based("b3", config_json=b"{"),
        ("config.json", "cannot be read"),
    ),
    "a damaged tokenizer": (
        lambda p: p.based("b4", tokenizer_json=b"["),
        ("tokenizer.json", "cannot be read"),
    ),
    "weights whose header is longer than the file": (
        lambda p: p.based("b5", model_safetensors=HEADER_TOO_LONG),
        ("model.safetensors", "longer than the file"),
    ),
    "weights cut short": (
        lambda p: p.based("b6", model_safetensors=len(BEYOND).to_bytes(8, "little") + BEYOND + b"\0" * 8),
        ("model.safetensors", "cut short"),
    ),
    "empty weights": (
        lambda p: p.based("b7", model_safetensors=b""),
        ("model.safetensors", "cannot be read"),
    ),
    "a revision of what is here": (lambda p: p.text("model.revision=main"), ("model.revision has no effect",)),
    "a misspelt target": (
        lambda p: p.text("lora.target_modules=[q_lin,classifer]"),
        ("'classifer'", "pre_classifier", "'classifier'?"),
    ),
    "a target of another family": (lambda p: p.text("lora.target_modules=[query]"), ("'query'", "q_lin", "all-linear")),
    "a regular expression that matches nothing": (lambda p: p.text("lora.target_modules=.*query"), ("'.*query'",)),
    "a target that is no regular expression": (lambda p: p.text("lora.target_modules='('"), ("'('", "q_lin")),
    "an embedding for a target": (
        lambda p: p.text("lora.target_modules=[word_embeddings]"),
        ("word_embeddings", "Embedding"),
    ),
    "no targets": (lambda p: p.text("lora.target_modules=[]"), ("'[]'", "q_lin")),
    "a misspelt target of the toy": (lambda p: p.toy("lora.target_modules=[frist]"), ("'frist'", "'first'?")),
    "a rank above all inputs": (lambda p: p.text("lora.r=65"), ("lora.r is 65", "32 inputs")),
    "orthonormal rows that there is no room for": (
        lambda p: p.text("lora.r=33", "lora.init=orthonormal", "lora.target_modules=[q_lin,lin2]"),
        ("orthonormal", "32 inputs"),
    ),
    "rows of one word": (lambda p: p.text("task.max_length=3"), ("room for 1 tokens", "use 4 or more")),
    "rows too short for any word": (lambda p: p.text("task.max_length=2"), ("max_length 2", "special tokens")),
}
DATA: dict[str, Case] = {
    "a path that is nowhere": (lambda p: p.text("data.path=./gone"), ("'./gone'", "no such file")),
    "rows of a hub that is not there": (
        lambda p: p.text("data.path=no/such-rows"),
        ("'no/such-rows'", "cannot be reached"),
    ),
    "a file that is nowhere": (lambda p: p.text("data.path=gone.csv"), ("gone.csv", "Give a folder")),
    "an unknown ending": (lambda p: p.data("a.xml", "<a/>"), ("a.xml", ".parquet")),
    "an empty folder": (an_empty_folder, ("the folder is empty",)),
    "a configuration of a file": (lambda p: p.text("data.config=sst2"), ("'sst2' has no effect",)),
    "several configurations": (
        lambda p: p.text(
            f"data.path={p.configured('c1', [{'config_name': n, 'data_files': part('train')} for n in ('one', 'two')])}"
        ),
        ("one, two", "data.config"),
    ),
    "an unknown configuration": (
        lambda p: p.text(
            f"data.path={p.configured('c2', [{'config_name': 'one', 'data_files': part('train')}])}", "data.config=tow"
        ),
        ("'tow'", "one"),
    ),
    "an unknown split of a configuration": (
        lambda p: p.text(
            f"data.path={p.configured('c3', [{'config_name': 'default', 'data_files': part('train')}])}",
            "data.train=trian",
        ),
        ("'trian'", "Did you mean 'train'?"),
    ),
    "an unknown split of a folder": (
        lambda p: p.text(
            f"data.path={Path(p.parquet('f/train.parquet', {'sentence': SENTENCES})).parent}", "data.train=dev"
        ),
        ("'dev'", "it has train"),
    ),
    "an unknown split of the built-in sentences": (
        lambda p: p.text("data.path=builtin/sentences", "data.validation=test"),
        ("'test'", "train, validation"),
    ),
    "a split that is none": (lambda p: p.text("data.train=train[5"), ("'train[5'", "train[:1000]")),
    "a slice without rows": (lambda p: p.text("data.train=train[100:]"), ("no rows", "train[100:]")),
    "a damaged .parquet": (lambda p: p.data("d.parquet", "no"), ("d.parquet", "correct it")),
    "an empty .csv": (lambda p: p.data("n.csv", "sentence,label\n"), ("n.csv", "no rows")),
    "a .csv in Latin-1": (
        lambda p: p.data("l.csv", "sentence,label\ncafé,1\n".encode("latin-1")),
        ("not in UTF-8",),
    ),
    "a broken line of .jsonl": (
        lambda p: p.data("b.jsonl", '{"sentence": "a", "label": 1}\n{"sente'),
        ("line 2",),
    ),
    "a row of .csv longer than its header": (
        lambda p: p.data("long.csv", "sentence,label\na,0\nb,1,c\n"),
        ("long.csv", "more values than its header has names"),
    ),
    "a row of .csv with empty values beyond its header": (
        lambda p: p.data("longer.csv", "sentence,label\na,0\nb,1,,\n"),
        ("longer.csv", "more values than its header has names"),
    ),
    "fractions for labels in a .csv": (lambda p: p.data("f.csv", "sentence,label\na,0.0\nb,1.0\n"), ("Row 0", "0.0")),
    "scores for labels in a .csv": (lambda p: p.data("s.csv", "sentence,label\na,1\nb,2.50\n"), ("Row 1", "2.50")),
    "a misspelt text column": (lambda p: p.text("task.text=sentense"), ("'sentense'", "Did you mean 'sentence'?")),
    "a misspelt label column": (lambda p: p.text("task.label=labels"), ("'labels'", "Did you mean 'label'?")),
    "the columns of another task": (lambda p: p.text("task.name=mnli"), ("'premise'", "sentence, label")),
    "a label out of range": (
        rows("r1", {"sentence": SENTENCES, "label": [0, 1, 2] * 4}, "task.name=sst2"),
        ("Row 2", "label 2", "negative, positive"),
    ),
    "a missing label": (rows("r2", {"sentence": SENTENCES, "label": [0, None, 1] * 4}), ("Row 1", "None")),
    "labels that are fractions": (rows("r3", {"sentence": SENTENCES, "label": [0.5, 1.0, 0.0] * 4}), ("0.5",)),
    "the labels of a test split": (rows("r4", {"sentence": SENTENCES, "label": [-1] * 12}), ("-1", "no labels")),
    "one label only": (rows("r5", {"sentence": SENTENCES, "label": [0] * 12}), ("All labels", "two labels")),
    "a missing text": (rows("r6", {"sentence": [*SENTENCES[:11], None], "label": [0, 1] * 6}), ("Row 11", "no text")),
    "an unknown name of a label": (
        lambda p: p.text(
            f"data.path={p.saved('s1', {'sentence': SENTENCES, 'label': ['good', 'bad', 'ugly'] * 4})}",
            "task.labels=[bad, good]",
        ),
        ("Row 2", "'ugly'", "bad, good"),
    ),
    "another label among the validation rows": (
        lambda p: p.text(f"data.validation={p.parquet('v.parquet', {'sentence': SENTENCES, 'label': [0, 7] * 6})}"),
        ("Row 1", "label 7", "v.parquet"),
    ),
    "a table for its own validation": (lambda p: p.text("data.validation=validation"), ("train.csv", "train[90%:]")),
    "more peers than rows": (lambda p: p.text("peers.num_peers=41"), ("40 rows", "41 peers")),
    "more peers than rows of a slice": (lambda p: p.text("data.train=train[:2]"), ("2 rows", "3 peers")),
    "a min_size above an equal share": (
        lambda p: p.text("data.partition=dirichlet(min_size=14)"),
        ("40 rows", "at least 14", "smaller min_size"),
    ),
    "more labels for each peer than there are": (shared("pathological(labels_per_peer=9)"), ("9", "the 2 there are")),
    "more built-in labels for each peer than there are": (
        lambda p: p.text(
            "data.path=builtin/sentences",
            "data.validation=validation",
            "data.partition=pathological(labels_per_peer=9)",
        ),
        ("9", "the 2 there are"),
    ),
    "more shards than rows": (shared("shards(per_peer=1000)"), ("40 rows", "3000 shards")),
    "sizes that grow too fast": (
        shared("exponential", "peers.num_peers=7"),
        ("exponential leaves a peer with 0 rows",),
    ),
    "sizes that grow linearly": (shared("linear(min_size=7)"), ("linear leaves a peer with 6 rows",)),
    "sizes that grow with the square": (shared("square", "peers.num_peers=10"), ("square leaves a peer with 0 rows",)),
    "groups of a column that is not there": (shared("natural(column=nope)"), ("'nope'", "sentence, label")),
    "more peers than groups": (shared("natural(column=label)"), ("2 different values for 3 peers",)),
    "other saved rows": (a_saved_partition(40, THREE, ", sha256=abc"), ("sha256", "not abc")),
    "saved rows of other peers": (a_saved_partition(40, THREE[:2]), ("2 peers, not 3",)),
    "saved rows of another table": (a_saved_partition(39, THREE), ("39 rows, not 40",)),
    "saved rows with other labels": (a_saved_partition(40, [list(range(38)), [38], [39]]), ("counts other labels",)),
    "validation on the split of training": (
        lambda p: p.text("data.path=builtin/sentences", "data.validation=train"),
        ("data.validation 'train'", "trained on"),
    ),
    "validation on the table of training": (
        lambda p: p.text(f"data.path={(path := p.file('own.csv', CSV))}", f"data.validation={path}"),
        ("own.csv", "trained on", "train[90%:]"),
    ),
    "a slice of a path": (lambda p: p.text("data.validation=val.jsonl[:5]"), ("val.jsonl[:5]", "name of a split")),
    "names and numbers for labels": (
        lambda p: p.data("mixed.jsonl", '{"sentence": "a", "label": 0}\n{"sentence": "b", "label": "zero"}\n'),
        ("mixed.jsonl", "mixes names", "'zero'"),
    ),
    "the label 1 only": (rows("r7", {"sentence": SENTENCES, "label": [1] * 12}), ("All labels", "two labels")),
    "one label of a known task": (
        rows("r8", {"sentence": SENTENCES, "label": [1] * 12}, "task.name=sst2"),
        ("All labels", "positive"),
    ),
    "a missing client": (lambda p: p.text(f"data.per_peer={p.here}/client_{{i}}.csv"), ("client_1.csv", "peer 0")),
    "a client without rows": (a_client_without_rows, ("k_2.csv", "no rows")),
}
RUNS: dict[str, Case] = {
    "a file for the run directory": (
        lambda p: [*p.toy()[:2], "--out", p.file("f.txt", "a") + "/run"],
        ("f.txt is a file", "--out"),
    ),
    "a folder of other files": (lambda p: [*p.toy()[:2], "--out", str(p.here)], ("no run",)),
    "a damaged recipe of the run": (lambda p: p.resumed("q1", recipe_yaml="{"), ("recipe.yaml", "not readable")),
    "a damaged checkpoint": (
        lambda p: p.resumed("q2", recipe_yaml=json.dumps(toy()), checkpoint__latest_json="{"),
        ("checkpoint", "damaged", "--overwrite"),
    ),
}
CASES = {**GRAPHS, **RECIPES, **MODELS, **DATA, **RUNS}


@pytest.fixture(scope="module")
def ground(model: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    here = tmp_path_factory.mktemp("preflight")
    written(here / "toy.yaml", toy())
    written(here / "text.yaml", text(model, rows / "train.csv", rows / "validation.csv"))
    return Place(here, model)


@pytest.fixture(scope="module")
def refusals(ground: Place) -> dict[str, tuple[int, str, list[str]]]:
    """How the command line answered each wrong recipe, one after the other, and the heavy imports until then."""
    lines = "".join(json.dumps(words(ground)) + "\n" for words, _ in CASES.values())
    process = [sys.executable, "-c", TELLING]
    done = subprocess.run(process, input=lines, capture_output=True, text=True, check=True, cwd=ground.here)
    return dict(zip(CASES, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_recipe_is_refused_in_one_sentence_before_anything_heavy_is_imported(
    name: str, refusals: dict[str, tuple[int, str, list[str]]]
) -> None:
    code, said, imported = refusals[name]
    assert code == 2 and said.startswith("dfl-lora: ") and said.count("\n") == 1, said
    assert [word for word in CASES[name][1] if word not in said] == [], said
    assert imported == []


def test_nothing_is_written_for_a_wrong_recipe(refusals: object, ground: Place) -> None:
    assert not (ground.here / "run").exists() and not (ground.here / "runs").exists()


def table(num_rows: int = 12) -> Dataset:
    rows = Dataset.from_list(labelled(num_rows))
    return rows.cast_column("label", ClassLabel(names=["bad", "good"]))


def splits() -> DatasetDict:
    return DatasetDict({"train": table(), "validation": table(6)})


def written_folder(here: Path) -> str:
    splits()["train"].to_parquet(here / "train.parquet")
    splits()["validation"].to_parquet(here / "validation.parquet")
    return str(here)


def clients(here: Path) -> str:
    for i in (1, 2, 3):
        table(4).save_to_disk(here / f"client_{i}")
    return str(here / "client_{i}")


def separators(file: Path) -> str:
    """Writes texts with every character but a new line at which str.splitlines cuts."""
    texts = [f"a good{sign}film" for sign in "\u2028\u2029\x85\v\f\x1c\x1d\x1e"]
    rows = [json.dumps({"sentence": text, "label": i % 2}, ensure_ascii=False) for i, text in enumerate(texts)]
    file.write_text("\n".join(rows))
    return str(file)


def words_for_nothing(file: Path) -> str:
    file.write_text("sentence,label\nNone,0\nNA,1\nnull,0\nnan,1\n#N/A,0\n")
    return str(file)


RIGHT: dict[str, Callable[[Path], dict[str, Any]]] = {
    "parquet": lambda here: {"path": str(here / "a.parquet")} if table().to_parquet(here / "a.parquet") else {},
    "jsonl": lambda here: {"path": str(here / "a.jsonl")} if table().to_json(here / "a.jsonl") else {},
    "csv": lambda here: {"path": str(here / "a.csv")} if table().to_csv(here / "a.csv") else {},
    "jsonl with separators of lines": lambda here: {"path": separators(here / "u.jsonl")},
    "csv with words for nothing": lambda here: {"path": words_for_nothing(here / "n.csv")},
    "a slice": lambda here: (
        {"path": str(here / "a.csv"), "train": "train[:50%]"} if table().to_csv(here / "a.csv") else {}
    ),
    "a folder": lambda here: {"path": written_folder(here), "validation": "validation"},
    "save_to_disk": lambda here: {"path": str(here / "d")} if table().save_to_disk(here / "d") is None else {},
    "save_to_disk of splits": lambda here: (
        {"path": str(here / "s"), "validation": "validation"} if splits().save_to_disk(here / "s") is None else {}
    ),
    "a folder for each peer": lambda here: {"path": None, "per_peer": clients(here)},
    "what is built in": lambda here: {"path": "builtin/sentences", "validation": "validation"},
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_rows_pass_in_every_form(name: str, model: Path, rows: Path, tmp_path: Path) -> None:
    content = text(model, rows / "train.csv", rows / "validation.csv")
    content["data"] |= RIGHT[name](tmp_path)
    preflight(resolve(content))


TARGETS: list[str | list[str]] = [
    ["query"], ["q_lin", "v_lin"], ["q_lin", "nothing"], ["dense"], ["classifier"], ["pre_classifier"], ["out_proj"],
    ["classifier.dense"], ["pooler.dense"], ["0.attention"], ["LayerNorm"], ["word_embeddings"], ["dropout"], [],
    "all-linear", "query", ".*query", ".*(query|value)", ".*layer.1.*(query|q_lin)", "(", "roberta.*key",
    ["bert.encoder.layer.0.attention.self.query"], ["encoder.layer.0.attention.self.query"], ["uery"],
]  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[Family, Path]:
    return {family: write_encoder(family, tmp_path_factory.mktemp("bases") / family) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_target_that_the_headers_refuse_is_refused_by_the_model_with_the_same_sentence(
    family: Family, bases: dict[Family, Path]
) -> None:
    modules, base = folder.modules_in(sorted(bases[family].glob("*.safetensors")), family), load(bases[family])
    glanced = {str(targets): said for targets in TARGETS if (said := refusal(lambda t=targets: modules.check(t)))}
    found = {str(t): refusal(lambda t=t: place(base.model, base.prefix, Lora(t))) for t in TARGETS if str(t) in glanced}
    assert len(glanced) > len(TARGETS) // 3
    assert {
        targets: said and said.replace("'['", "'").replace("']'", "'") for targets, said in found.items()
    } == glanced


def refusal(check: Callable[[], object]) -> str | None:
    """Returns what a check says where it refuses."""
    try:
        check()
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize("family", FAMILIES)
def test_the_modules_of_the_headers_are_those_of_the_model(family: Family, bases: dict[Family, Path]) -> None:
    modules, base = folder.modules_in(sorted(bases[family].glob("*.safetensors")), family), load(bases[family])
    everything = place(base.model, base.prefix, Lora(".*" if False else sorted(modules.linear)))
    assert set(everything.modules) == set(modules.linear)
    assert all(d_in is None or everything.modules[name][0] == d_in for name, d_in in modules.linear.items())
