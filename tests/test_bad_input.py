"""Bad input: one sentence that says what was given and what to do, exit code 2, nothing half-written."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from tiny import call, failing, files_of, text, toy, written

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@dataclass(frozen=True)
class Ground:
    """An empty working directory with recipes in it, and copies of finished runs on demand."""

    here: Path
    model: Path
    rows: Path
    toy_run: Path
    text_run: Path

    def toy(self, *settings: str) -> list[object]:
        """Returns the command that runs the toy with settings."""
        return self.run("toy.yaml", settings)

    def text(self, *settings: str) -> list[object]:
        """Returns the command that runs the text recipe with settings."""
        return self.run("text.yaml", settings)

    def run(self, recipe: str, settings: tuple[str, ...]) -> list[object]:
        return ["run", recipe, *(word for setting in settings for word in ("--set", setting))]

    def train(self, *more: object, **flags: object) -> list[object]:
        """Returns the seed's command for three clients, with other flags or without those that are None."""
        given: dict[str, object] = {
            "model_checkpoint": self.model,
            "dataset_path_template": self.rows / "client_{i}.csv",
            "val_dataset_path_template": self.rows / "validation.csv",
            "num_clients": 3,
            "lora_r": 2,
            "lora_alpha": 4,
            "target_modules": "q_lin,v_lin",
            "training_type": "LoRA",
            "dataset_type": "sst2",
            "name": "ring",
            "num_rounds": 1,
            "batch_size": 8,
        } | flags
        words = [w for name, value in given.items() if value is not None for w in (f"--{name}", value)]
        return ["train", *words, *more]

    def file(self, name: str, content: str) -> Path:
        return written(self.here / name, content)

    def table(self, name: str, columns: dict[str, list[object]]) -> Path:
        Dataset.from_dict(columns).save_to_disk(str(self.here / name))
        return self.here / name

    def done(self, run: Path) -> Path:
        """Returns a copy of a finished run, as folder `run` of the working directory."""
        return Path(shutil.copytree(run, self.here / "run"))

    def changed(self, run: Path, name: str, content: bytes | None) -> Path:
        """Returns a copy of a finished run with one file changed or (None) removed."""
        copy = self.done(run)
        if content is None:
            (copy / name).unlink()
        else:
            (copy / name).write_bytes(content)
        return copy


@pytest.fixture
def ground(
    tmp_path: Path, model: Path, rows: Path, toy_run: Path, text_run: Path, monkeypatch: pytest.MonkeyPatch
) -> Ground:
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "toy.yaml", toy())
    written(tmp_path / "text.yaml", text(model, rows / "train.csv", rows / "validation.csv"))
    return Ground(tmp_path, model, rows, toy_run, text_run)


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """Returns what was printed on stderr, which must be one line, and no traceback."""
    printed = capsys.readouterr().err
    assert printed.startswith("dfl-lora: ") and printed.count("\n") == 1 and printed.endswith("\n"), printed
    assert "Traceback" not in printed
    return printed


Words = Callable[[Ground], list[object]]


@dataclass(frozen=True)
class Case:
    """A command and the words that its refusal must hold."""

    words: Words
    said: tuple[str, ...]


def case(words: Words, *said: str) -> Case:
    return Case(words, said)


def resumed(change: Callable[[Path], object], *more: str) -> Words:
    """Returns the command that resumes a copy of the finished toy run after a change to it."""

    def words(g: Ground) -> list[object]:
        change(g.done(g.toy_run))
        return [*g.toy(*more), "--out", "run", "--resume"]

    return words


def exported(name: str, content: bytes | None, *more: str) -> Words:
    """Returns the command that merges the consensus of a copy of the text run, one of its files changed."""
    return lambda g: [
        "export", g.changed(g.text_run, f"adapters/consensus/{name}", content), "--consensus", "--to", "out", *more
    ]  # fmt: skip


def matrix(rows: list[list[float]], num_peers: int = 3) -> Words:
    return lambda g: g.toy(
        f"peers.topology=matrix(path={g.file('w.json', json.dumps(rows))})", f"peers.num_peers={num_peers}"
    )


def without_a_tensor(g: Ground) -> list[object]:
    """Merges an adapter whose file is whole but lacks a tensor."""
    path = g.done(g.text_run) / "adapters" / "consensus" / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors[next(name for name in sorted(tensors) if name.endswith("lora_B.weight"))]
    save_file(tensors, path, {"format": "pt"})
    return ["export", "run", "--consensus", "--merge", "--to", "out"]


def of_another_rank(g: Ground) -> list[object]:
    """Merges an adapter whose tensors are not of the shape that its configuration says."""
    path = g.done(g.text_run) / "adapters" / "consensus" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 3}))
    return ["export", "run", "--consensus", "--merge", "--to", "out"]


def on_another_base(g: Ground) -> list[object]:
    """Merges into a base of the same shape with other weights."""
    other = shutil.copytree(g.model, g.here / "other")
    path = other / "model.safetensors"
    save_file({name: value + 1 for name, value in load_file(path).items()}, path, {"format": "pt"})
    run = g.done(g.text_run)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["model"]["name_or_path"] = str(other)
    written(run / "recipe.yaml", recipe)
    return ["export", run, "--consensus", "--merge", "--to", "out"]


def only_pickled_weights(g: Ground) -> list[object]:
    folder = g.here / "pickled"
    folder.mkdir()
    shutil.copy(g.model / "config.json", folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    return g.text(f"model.name_or_path={folder}")


def two_clients_of_three(g: Ground) -> list[object]:
    for i in (1, 2):
        shutil.copy(g.rows / f"client_{i}.csv", g.here)
    return g.text("data.per_peer=client_{i}.csv")


LLAMA = '{"model_type": "llama", "max_position_embeddings": 64}'


def base_with(g: Ground, name: str, content: str | None) -> Path:
    """Returns a copy of the base model in which one file is other, or missing along with the tokenizer's others."""
    base = Path(shutil.copytree(g.model, g.here / "base"))
    (base / "tokenizer_config.json").unlink(missing_ok=True)
    (base / name).unlink()
    if content is not None:
        (base / name).write_text(content)
    return base


def a_client_without_rows(g: Ground) -> list[object]:
    shutil.copy(g.rows / "client_1.csv", g.here)
    g.file("client_2.csv", "sentence,label")
    return g.text("data.per_peer=client_{i}.csv", "peers.num_peers=2")


def never_checkpointed(run: Path) -> None:
    """Leaves what a process leaves that was killed in round 1."""
    shutil.rmtree(run / "checkpoint")
    shutil.rmtree(run / "adapters", ignore_errors=True)
    (run / "rounds.jsonl").write_bytes(b"")


SENTENCE = "the soup was bland"
USAGE = {
    "an unknown command": case(lambda g: ["runn", "toy.yaml"], "runn", "run"),
    "an unknown flag": case(lambda g: [*g.toy(), "--overwritee"], "--overwritee", "--overwrite"),
    "a missing recipe argument": case(lambda g: ["run"], "recipe"),
    "a missing flag": case(lambda g: g.train(target_modules=None), "target_modules"),
    "an unknown training type": case(lambda g: g.train(training_type="lora"), "lora", "DFL-LoRA"),
    "an unknown dataset type": case(lambda g: g.train(dataset_type="sst3"), "sst3", "qnli"),
    "no clients": case(lambda g: g.train(num_clients=0), "num_clients", "1"),
    "rank 0 as a flag": case(lambda g: g.train(lora_r=0), "lora_r", "1"),
    "a flag that wants a number": case(lambda g: g.train(num_rounds="many"), "num_rounds", "integer"),
}
RECIPES = {
    "a missing recipe": case(lambda g: ["run", "nowhere.yaml"], "nowhere.yaml", "YAML file"),
    "a recipe that is no YAML": case(
        lambda g: ["run", g.file("broken.yaml", "model: [1\nlora: }")], "broken.yaml", "not readable YAML"
    ),
    "a recipe that is no text": case(lambda g: ["run", g.model / "model.safetensors"], "not readable YAML"),
    "a recipe that is a folder": case(lambda g: ["run", g.here], "not readable YAML"),
    "a recipe that is a list": case(lambda g: ["run", g.file("list.yaml", "- a\n")], "list", "mapping", "model"),
    "an empty recipe": case(lambda g: ["run", g.file("empty.yaml", "")], "empty.yaml", "mapping"),
    "an unknown key": case(lambda g: g.toy("train.learnig_rate=1"), "train.learnig_rate", "'learning_rate'?"),
    "an unknown value": case(lambda g: g.toy("train.optimizer=adan"), "'adan'", "adamw", "'adam'?"),
    "a setting without a value": case(lambda g: g.toy("train.rounds"), "train.rounds", "key=value"),
    "a setting below a path": case(lambda g: g.toy("data.path.x=1"), "data.path"),
    "rank 0": case(lambda g: g.toy("lora.r=0"), "lora.r", "1", "given: 0"),
    "a digest that is not the recipe's": case(lambda g: g.toy("digest='0123'"), "0123", "remove the line"),
    "two settings of the same work": case(
        lambda g: g.toy("train.local={steps: 1, epochs: 1}"), "train.local", "exactly one"
    ),
    "the toy's task with a real model": case(lambda g: g.text("task.kind=toy"), "toy", "builtin/toy"),
    "the toy's model with a real task": case(lambda g: g.text("model.name_or_path=toy"), "toy", "builtin/toy"),
    "the toy's rows with a real task": case(lambda g: g.text("data.path=builtin/toy"), "toy", "builtin/toy"),
    "a text column beside a known task": case(
        lambda g: g.text("task.name=sst2", "task.text=sentence"), "task.text", "sst2", "remove"
    ),
    "three text columns": case(lambda g: g.text("task.text=[a, b, c]"), "3 columns", "pairs"),
}
TOPOLOGIES = {
    "an unknown topology": case(lambda g: g.toy("peers.topology=rign"), "'rign'", "du14", "'ring'?"),
    "five peers on seven nodes": case(
        lambda g: g.toy("peers.topology=link4", "peers.num_peers=5"), "7 peers", "5 were asked for", "ring"
    ),
    "five clients on seven nodes": case(lambda g: g.train(name="link3", num_clients=5), "7 peers", "5", "ring"),
    "a missing file of edges": case(lambda g: g.toy("peers.topology=edges(path=gone.csv)"), "gone.csv", "No such"),
    "a file that is no list of edges": case(
        lambda g: g.toy(f"peers.topology=edges(path={g.file('e.csv', '0,1,2')})"), "e.csv", "two peer numbers"
    ),
    "disconnected edges": case(
        lambda g: g.toy(f"peers.topology=edges(path={g.file('e.csv', '0,1')})"), "disconnected", "2 parts", "add edges"
    ),
    "an edge to nobody": case(lambda g: g.toy("peers.topology={kind: edges, edges: [[0, 3]]}"), "[0, 3]", "0 and 2"),
    "an edge to oneself": case(lambda g: g.toy("peers.topology={kind: edges, edges: [[1, 1]]}"), "[1, 1]", "different"),
    "a matrix that is not square": case(matrix([[1, 0], [0, 1], [0, 0]]), "3 rows", "square"),
    "a matrix that is not symmetric": case(
        matrix([[0.5, 0.5, 0], [0.25, 0.5, 0.25], [0.25, 0, 0.75]]), "not symmetric", "W[0,1] = 0.5", "W[1,0] = 0.25"
    ),
    "a matrix that is not stochastic": case(
        matrix([[0.5, 0.25, 0], [0.25, 0.5, 0.25], [0, 0.25, 0.75]]), "not stochastic", "row 0 sums to 0.75"
    ),
    "a matrix with negative weights": case(matrix([[1.5, -0.5], [-0.5, 1.5]], 2), "negative", "between 0 and 1"),
    "a matrix in two parts": case(matrix([[1, 0, 0], [0, 0.5, 0.5], [0, 0.5, 0.5]]), "disconnected"),
    "a matrix that never mixes": case(matrix([[0, 1], [1, 0]], 2), "never agree", "(I + W) / 2"),
    "a matrix of another size": case(matrix([[0.5, 0.5], [0.5, 0.5]]), "2 peers", "num_peers is 3"),
}
MODELS = {
    "a model that is nowhere": case(
        lambda g: g.text("model.name_or_path=no/such-model"), "no/such-model", "neither a folder", "safetensors"
    ),
    "a model folder without safetensors": case(only_pickled_weights, "pickled", "safetensors", "save_pretrained"),
    "a target that matches nothing": case(
        lambda g: g.text("lora.target_modules=[query]"), "'query'", "candidates are", "q_lin", "all-linear"
    ),
    "a misspelt target": case(
        lambda g: g.train(target_modules="q_lin,classifer"),
        "'classifer'",
        "pre_classifier",
        "Did you mean 'classifier'?",
    ),
    "a misspelt target of the toy": case(lambda g: g.toy("lora.target_modules=[frist]"), "'frist'", "'first'?"),
    "a regular expression that matches nothing": case(lambda g: g.text("lora.target_modules=.*query"), "'.*query'"),
    "a target that is no regular expression": case(lambda g: g.text("lora.target_modules='('"), "'('"),
    "no targets": case(lambda g: g.text("lora.target_modules=[]"), "target_modules", "q_lin"),
    "no targets as a flag": case(lambda g: g.train(target_modules=","), "--target_modules", "q_lin"),
    "a target that is no linear layer": case(
        lambda g: g.text("lora.target_modules=[word_embeddings]"), "word_embeddings", "Embedding", "nn.Linear"
    ),
}
DATA = {
    "a missing file of rows": case(lambda g: g.text("data.path=gone.csv"), "gone.csv", "Give a folder"),
    "a file of an unknown kind": case(lambda g: g.text(f"data.path={g.file('a.xml', '<a/>')}"), "a.xml", ".parquet"),
    "a file that is no table": case(lambda g: g.text(f"data.path={g.file('a.parquet', 'no')}"), "a.parquet"),
    "a wrong text column": case(
        lambda g: g.text("task.text=sentense"), "'sentense'", "sentence, label", "Did you mean 'sentence'?"
    ),
    "a wrong label column": case(lambda g: g.text("task.label=labels"), "'labels'", "Did you mean 'label'?"),
    "columns of another task": case(lambda g: g.train(dataset_type="mnli"), "'premise'", "sentence, label"),
    "a label out of range": case(
        lambda g: g.text(
            f"data.path={g.table('rows', {'sentence': [SENTENCE] * 4, 'label': [0, 1, 2, 1]})}", "task.name=sst2"
        ),
        "Row 2", "label 2", "0 to 1", "negative, positive",
    ),
    "a label below 0": case(
        lambda g: g.text(f"data.path={g.table('rows', {'sentence': [SENTENCE] * 4, 'label': [0, -1, 1, 1]})}"),
        "Row 1", "label -1", "0 to 1",
    ),
    "a label out of range among the validation rows": case(
        lambda g: g.text(f"data.validation={g.table('held', {'sentence': [SENTENCE] * 2, 'label': [0, 7]})}"),
        "Row 1", "label 7", "held",
    ),
    "a missing label": case(
        lambda g: g.text(f"data.path={g.table('rows', {'sentence': [SENTENCE] * 4, 'label': [0, None, 1, 1]})}"),
        "Row 1", "None",
    ),
    "labels that are fractions": case(
        lambda g: g.text(f"data.path={g.table('rows', {'sentence': [SENTENCE] * 4, 'label': [0.5, 1.0, 0.0, 1.0]})}"),
        "0.5", "'label'",
    ),
    "a file without rows": case(
        lambda g: g.text(f"data.path={g.file('empty.csv', 'sentence,label')}"), "empty.csv", "no rows"
    ),
    "a client without rows": case(a_client_without_rows, "client_2.csv"),
    "validation without rows": case(
        lambda g: g.text(f"data.validation={g.file('held.csv', 'sentence,label')}"), "held.csv"
    ),
    "an unknown split of the built-in sentences": case(
        lambda g: g.text("data.path=builtin/sentences", "data.train=trian"), "'trian'", "train, validation"
    ),
    "an unknown split to evaluate on": case(
        lambda g: g.text("data.path=builtin/sentences", "data.validation=test"), "'test'", "train, validation"
    ),
    "an unknown split of a folder": case(
        lambda g: g.text(f"data.path={shutil.copytree(g.rows, g.here / 'd', ignore=shutil.ignore_patterns('client*'))}",
                         "data.train=trian"),
        "'trian'", "Did you mean 'train'?",
    ),
    "more peers than rows": case(lambda g: g.text("peers.num_peers=50"), "40 rows", "50 peers", "fewer peers"),
    "more rows a peer than the toy has": case(
        lambda g: g.toy("peers.num_peers=600", "data.partition=iid(min_size=2)"), "1000 rows", "at least 2"
    ),
    "a min_size above an equal share": case(
        lambda g: g.text("data.partition=iid(min_size=20)"), "40 rows", "at least 20", "smaller min_size"
    ),
    "a min_size that no draw reaches": case(
        lambda g: g.text("data.partition=dirichlet(alpha=0.01, min_size=13)"), "Dirichlet(0.01)", "13", "larger alpha"
    ),
    "a template without a number": case(
        lambda g: g.train(dataset_path_template="client_1"), "'client_1'", "--dataset_path_template", "{i} or {}"
    ),
    "a per_peer without a number": case(lambda g: g.text("data.per_peer=client_1"), "'client_1'", "{i} or {}"),
    "a missing client": case(two_clients_of_three, "client_3.csv"),
    "a missing client's validation": case(
        lambda g: g.train(val_dataset_path_template=g.here / "held_{}"), "held_1"
    ),
}  # fmt: skip
RUNS = {
    "an existing run": case(
        lambda g: [*g.toy(), "--out", g.done(g.toy_run)], "a run in", "--resume", "--overwrite", "--out"
    ),
    "an existing run of the seed's command": case(
        lambda g: g.train("--out", g.done(g.toy_run)), "a run in", "--resume", "--overwrite"
    ),
    "a folder of other files": case(lambda g: [*g.toy(), "--out", g.file("my/a.txt", "a").parent], "no run", "--out"),
    "a folder of other files with --overwrite": case(
        lambda g: [*g.toy(), "--out", g.file("my/a.txt", "a").parent, "--overwrite"], "no run", "--out"
    ),
    "a file for a folder": case(lambda g: [*g.toy(), "--out", g.file("a.txt", "a")], "a.txt is a file", "--out"),
    "a folder below a file": case(lambda g: [*g.toy(), "--out", g.file("a.txt", "a") / "run"], "a.txt"),
    "--resume with --overwrite": case(
        lambda g: [*g.toy(), "--out", g.done(g.toy_run), "--resume", "--overwrite"], "--resume", "--overwrite", "one of"
    ),
    "--resume with another recipe": case(
        resumed(lambda run: None, "train.learning_rate=0.5"), "another recipe", "digest", "--overwrite"
    ),
    "--resume with another recipe before the first checkpoint": case(
        resumed(never_checkpointed, "train.learning_rate=0.5"), "another recipe", "--overwrite"
    ),
    "a checkpoint that is no JSON": case(
        resumed(lambda run: (run / "checkpoint/latest.json").write_text("{")), "checkpoint", "damaged", "--overwrite"
    ),
    "a checkpoint without a round": case(
        resumed(lambda run: (run / "checkpoint/latest.json").write_text("{}")), "damaged", "--overwrite"
    ),
    "a checkpoint cut short": case(
        resumed(lambda run: os.truncate(run / "checkpoint/state-000002.safetensors", 100)), "damaged", "sha256"
    ),
    "a checkpoint without its state": case(
        resumed(lambda run: (run / "checkpoint/state-000002.safetensors").unlink()), "damaged", "--overwrite"
    ),
    "fewer lines than the checkpoint has rounds": case(
        resumed(lambda run: (run / "rounds.jsonl").write_text('{"round": 1}\n{')),
        "rounds.jsonl", "1 rounds", "2", "--overwrite",
    ),
    "lines of rounds that are none": case(
        resumed(lambda run: (run / "rounds.jsonl").write_bytes(b"[1]\n\xff\xfe\n3")),
        "rounds.jsonl", "0 rounds", "--overwrite",
    ),
    "edges inline that are not connected": case(
        lambda g: g.toy("peers.num_peers=4", "peers.topology=edges(edges=[[0,1],[2,3]])"), "disconnected"
    ),
    "a name with an option that is none": case(
        lambda g: g.toy("peers.topology=ring(3)", "peers.topology.kind=ring"), "'3'", "ring(option=value)"
    ),
    "a learning rate without end": case(lambda g: g.toy("train.learning_rate=.inf"), "learning_rate", "finite"),
    "rows too short for any word": case(lambda g: g.text("task.max_length=2"), "max_length", "special tokens"),
    "a base without a tokenizer": case(
        lambda g: g.text(f"model.name_or_path={base_with(g, 'tokenizer.json', None)}"), "no tokenizer"
    ),
    "a base with damaged weights": case(
        lambda g: g.text(f"model.name_or_path={base_with(g, 'model.safetensors', 'xxxx')}"), "cannot be read"
    ),
    "a base with a damaged tokenizer": case(
        lambda g: g.text(f"model.name_or_path={base_with(g, 'tokenizer.json', '{')}"), "cannot be read"
    ),
    "a base of another family": case(
        lambda g: g.text(f"model.name_or_path={base_with(g, 'config.json', LLAMA)}"), "llama", "distilbert"
    ),
    "an export over a folder that is none": case(
        lambda g: ["export", g.text_run, "--consensus", "--overwrite", "--to", g.file("mine/notes.txt", "a").parent],
        "not overwritten", "--to",
    ),
    "a run whose recipe is damaged": case(
        resumed(lambda run: (run / "recipe.yaml").write_text("{")), "recipe.yaml", "not readable YAML"
    ),
    "a log below a file": case(
        lambda g: g.train("--log_path", g.file("a.txt", "a") / "x.log"), "a.txt"
    ),
    "a log that is a folder": case(lambda g: g.train("--log_path", g.here), "directory"),
}  # fmt: skip
EXPORTS = {
    "no adapter named": case(lambda g: ["export", g.done(g.text_run), "--to", "out"], "--peer K", "--consensus"),
    "two adapters named": case(
        lambda g: ["export", g.done(g.text_run), "--to", "out", "--peer", 0, "--consensus"], "exactly one"
    ),
    "a peer that is not there": case(
        lambda g: ["export", g.done(g.text_run), "--to", "out", "--peer", 3], "peer-003", "consensus, peer-000"
    ),
    "a run that left no adapters": case(
        lambda g: ["export", g.done(g.toy_run), "--to", "out", "--consensus"], "no adapter consensus", "none"
    ),
    "a folder that is no run": case(lambda g: ["export", g.rows, "--to", "out", "--consensus"], "not a run directory"),
    "an existing folder to write": case(
        lambda g: ["export", g.done(g.text_run), "--to", g.file("out/a", "a").parent, "--peer", 0], "exists", "--to"
    ),
    "an adapter cut short": case(exported("adapter_model.safetensors", b"\0" * 20, "--merge"), "consensus", "damaged"),
    "an adapter cut short, not merged": case(exported("adapter_model.safetensors", b"\0" * 20), "damaged"),
    "an adapter without its tensors": case(exported("adapter_model.safetensors", None), "needs", "adapter_model"),
    "an adapter without a configuration": case(exported("adapter_config.json", None, "--merge"), "adapter_config.json"),
    "an adapter whose configuration is no JSON": case(exported("adapter_config.json", b"{", "--merge"), "damaged"),
    "an adapter whose configuration is a list": case(exported("adapter_config.json", b"[]", "--merge"), "damaged"),
    "an adapter that lacks a tensor": case(without_a_tensor, "consensus", "lora_B"),
    "an adapter whose tensors have another rank": case(of_another_rank, "consensus", "damaged"),
    "an adapter of another base": case(on_another_base, "tiny-distilbert", "other", "give the base"),
    "a run without its partition": case(
        lambda g: ["export", g.changed(g.text_run, "partition.json", None), "--consensus", "--merge", "--to", "out"],
        "partition.json", "missing or damaged",
    ),
}  # fmt: skip
SPLITS = {
    "rows that are nowhere": case(
        lambda g: ["split", "glue", "--dataset_path", "gone", "--output_path", "out"], "'gone'", "Give a folder"
    ),
    "rows without labels": case(
        lambda g: ["split", "glue", "--dataset_path", g.table("rows", {"text": ["a"] * 9}), "--output_path", "out"],
        "'label'", "text",
    ),
    "more clients than rows": case(
        lambda g: ["split", "glue", "--dataset_path", g.rows / "train.csv", "--output_path", "out",
                   "--num_clients", 41], "40 rows", "41",
    ),
    "a concentration of 0": case(
        lambda g: ["split", "gsm8k", "--dataset_path", g.rows / "train.csv", "--output_path", "out", "--alpha", 0],
        "--alpha is 0", "above 0",
    ),
    "sizes that no draw reaches": case(
        lambda g: ["split", "gsm8k", "--dataset_path", g.rows / "train.csv", "--output_path", "out",
                   "--num_clients", 4, "--min_size", 10, "--split_type", "dirichlet"], "Dirichlet(0.25)", "10",
    ),
    "a split that is there already": case(
        lambda g: ["split", "glue", "--dataset_path", g.rows / "train.csv", "--output_path",
                   g.table("out/client_1", {"label": [1]}).parent], "holds a split", "--overwrite",
    ),
    "a file for the split's folder": case(
        lambda g: ["split", "glue", "--dataset_path", g.rows / "train.csv", "--output_path", g.file("a.txt", "a")],
        "a.txt",
    ),
    "a client that was not split": case(
        lambda g: ["view-split", "--base_path", g.table("out/client_1", {"label": [0, 1]}).parent, "--num_clients", 2],
        "client_2", "--num_clients",
    ),
    "a client's folder that is no split": case(
        lambda g: ["view-split", "--base_path", g.file("out/client_1/a.txt", "a").parents[1], "--num_clients", 1],
        "client_1",
    ),
}  # fmt: skip
CASES = {**USAGE, **RECIPES, **TOPOLOGIES, **MODELS, **DATA, **RUNS, **EXPORTS, **SPLITS}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_refused_with_one_sentence_and_nothing_is_written(
    name: str, ground: Ground, capsys: pytest.CaptureFixture[str]
) -> None:
    words = CASES[name].words(ground)
    before = files_of(ground.here)
    assert call(*words) == 2
    printed = one_line(capsys)
    assert [word for word in CASES[name].said if word not in printed] == [], printed
    assert files_of(ground.here) == before


def test_a_folder_with_several_configurations_names_them(ground: Ground, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(ground.rows / "train.csv", ground.here)
    for name in ("one", "two"):
        shutil.copytree(ground.rows, ground.here / "data" / name, ignore=shutil.ignore_patterns("client*"))
    configs = [{"config_name": n, "data_files": [{"split": "train", "path": f"{n}/train.csv"}]} for n in ("one", "two")]
    ground.file("data/README.md", f"---\n{yaml.safe_dump({'configs': configs})}---\n")
    assert call(*ground.text("data.path=data")) == 2
    printed = one_line(capsys)
    assert "one" in printed and "two" in printed and "config" in printed, printed


@pytest.mark.parametrize("after", [0, 4, 7])
def test_a_full_disk_is_told_in_one_sentence_and_the_run_goes_on_when_there_is_room(
    after: int, ground: Ground, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as full:
        full.setattr(os, "fsync", failing(FULL, after))
        assert call(*ground.toy(), "--out", "run") == 2
    assert "disk is full" in one_line(capsys)
    assert [name for name in files_of(ground.here) if Path(name).name.startswith(".")] == []
    assert call(*ground.toy(), "--out", "run", "--resume", "--json") == 0
    assert outcome(ground.here / "run") == outcome(ground.toy_run)


def test_too_many_open_files_end_a_run_with_what_to_do(
    ground: Ground, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as full:
        full.setattr(os, "fsync", failing(OSError(errno.EMFILE, os.strerror(errno.EMFILE)), 4))
        assert call(*ground.toy(), "--out", "run") == 3
    assert "raise the limit with ulimit -n" in one_line(capsys)
    assert call(*ground.toy(), "--out", "run", "--resume", "--json") == 0


def outcome(run: Path) -> list[dict[str, object]]:
    """Returns the lines of a run without what a clock measured."""
    lines = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def test_a_disk_that_is_full_before_the_first_round_leaves_a_place_that_can_be_used(
    ground: Ground, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as full:
        full.setattr(os, "fsync", failing(FULL, 1))
        assert call(*ground.toy(), "--out", "run") == 2
    assert call(*ground.toy(), "--out", "run", "--overwrite", "--json") == 0


def test_a_disk_that_is_full_when_adapters_are_written_leaves_no_half_of_one(
    ground: Ground, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "write_bytes", failing(FULL, after=1))
    assert call(*ground.text(), "--out", "run") == 2
    assert "disk is full" in one_line(capsys)
    adapters = [f.name for f in (ground.here / "run" / "adapters").iterdir()]
    assert adapters == ["consensus"]


def test_a_disk_that_is_full_when_a_model_is_merged_leaves_nothing(
    ground: Ground, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    error = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", failing(error))
    before = files_of(ground.here)
    assert call("export", ground.text_run, "--consensus", "--merge", "--to", "out") == 2
    assert "disk is full" in one_line(capsys)
    assert files_of(ground.here) == before


def test_a_disk_that_is_full_when_tokens_are_cached_leaves_nothing(
    ground: Ground, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a full disk np.save to a path raises an OSError without a number, whose words do not say so."""
    save = np.save

    def save_to_a_full_disk(file: object, array: np.ndarray[Any, Any]) -> None:
        if isinstance(file, str | Path):
            Path(file).touch()
            raise OSError("79999 requested and 15328 written")
        save(cast(BytesIO, file), array)

    monkeypatch.setenv("DFL_LORA_CACHE", str(ground.here / "cache"))
    monkeypatch.setattr(np, "save", save_to_a_full_disk)
    monkeypatch.setattr(Path, "write_bytes", failing(FULL))
    assert call(*ground.text()) == 2
    assert "disk is full" in one_line(capsys)
    assert list((ground.here / "cache" / "tokens").iterdir()) == []
    assert not (ground.here / "runs").exists()


def test_a_disk_that_is_full_when_rows_are_split_leaves_the_earlier_split(
    ground: Ground, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    split = ["split", "glue", "--dataset_path", ground.rows / "train.csv", "--output_path", "out", "--num_clients", 3]
    assert call(*split) == 0
    before = files_of(ground.here)
    monkeypatch.setattr(datasets.Dataset, "save_to_disk", failing(FULL))
    assert call(*split, "--seed", 1, "--overwrite") == 2
    assert "disk is full" in one_line(capsys)
    assert files_of(ground.here) == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_log_on_a_full_disk_is_told_in_one_sentence(ground: Ground, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*ground.train("--log_path", "/dev/full", "--json")) == 2
    assert "disk is full" in one_line(capsys)


@pytest.mark.parametrize("kind", [errno.EACCES, errno.EROFS])
def test_a_directory_that_cannot_be_written_is_named(
    kind: int, ground: Ground, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = str(ground.here / "locked" / "run")
    monkeypatch.setattr(os, "mkdir", failing(OSError(kind, os.strerror(kind), place)))
    assert call(*ground.toy(), "--out", place) == 2
    printed = one_line(capsys)
    assert place in printed and os.strerror(kind) in printed and "another place" in printed
    assert not (ground.here / "locked").exists()


def test_an_export_to_a_place_that_cannot_be_written_speaks_of_its_own_flag(
    ground: Ground, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("export", ground.text_run, "--consensus", "--to", ground.file("a.txt", "a") / "out") == 2
    printed = one_line(capsys)
    assert "a.txt" in printed and "--out" not in printed, printed


def test_a_refused_overwrite_leaves_the_earlier_run_as_it_was(
    ground: Ground, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ground.done(ground.toy_run)
    before = files_of(run)
    assert call(*ground.toy("lora.target_modules=[frist]"), "--out", run, "--overwrite") == 2
    assert one_line(capsys) and files_of(run) == before


def test_a_failure_of_the_program_is_one_line_and_exit_code_3(
    ground: Ground, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(torch, "set_num_threads", failing(RuntimeError("a kernel\n  failed")))
        assert call(*ground.toy()) == 3
    printed = one_line(capsys)
    assert "RuntimeError" in printed and "a kernel" in printed and "--debug" in printed


@pytest.mark.parametrize(("error", "code"), [(RuntimeError("a kernel failed"), 3), (FULL, 2)])
def test_debug_shows_the_traceback_of_a_failure_and_keeps_the_exit_code(
    error: Exception, code: int, ground: Ground, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(torch, "set_num_threads", failing(error))
        assert call("--debug", *ground.toy()) == code
    printed = capsys.readouterr().err
    assert "Traceback" in printed and str(error) in printed


def test_debug_shows_the_traceback_of_a_mistake_and_keeps_the_exit_code(
    ground: Ground, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*ground.toy("lora.target_modules=[frist]"), "--debug") == 2
    printed = capsys.readouterr().err
    assert "Traceback" in printed and "'frist'" in printed


def test_an_interrupted_run_says_how_to_go_on(
    ground: Ground, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as stopped:
        stopped.setattr(os, "fsync", failing(KeyboardInterrupt(), after=14))
        assert call(*ground.toy()) == 130
    assert "--resume" in one_line(capsys)
