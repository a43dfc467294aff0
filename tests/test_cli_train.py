"""The seed's flow, word for word in its flags: split, view-split, train with its log, export; and its scripts."""

import json
import os
import re
import shlex
import shutil
import subprocess
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value, load_from_disk
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from tiny import call, failing, files_of, labelled

SCRIPTS = Path(__file__).parents[1] / "scripts"
NUMBER = r"\d+(?:\.\d+)?(?:e-?\d+)?"
HEADS = ("pre_classifier", "classifier")


@dataclass(frozen=True)
class Seed:
    """What the seed's user has: a base model, client folders, validation rows."""

    model: Path
    split: Path
    validation: Path

    def words(self, **flags: object) -> list[object]:
        """Returns the seed's command for two rounds of DFL-LoRA on seven clients, with other flags."""
        given = {
            "model_checkpoint": self.model,
            "dataset_path_template": f"{self.split}/client_{{i}}",
            "val_dataset_path_template": self.validation,
            "num_clients": 7,
            "lora_r": 4,
            "lora_alpha": 32,
            "target_modules": "q_lin,v_lin,pre_classifier,classifier",
            "training_type": "DFL-LoRA",
            "dataset_type": "sst2",
            "name": "link3",
            "num_rounds": 2,
            "batch_size": 8,
        } | flags
        here = ("--set", "compute.threads=1", "--set", "compute.dtype=float32", "--json")
        return ["train", *(word for name, value in given.items() for word in (f"--{name}", value)), *here]


@dataclass(frozen=True)
class Trained:
    """A finished training: its folder and its log."""

    run: Path
    log: Path

    @property
    def messages(self) -> list[str]:
        return [line.split(" - ", 2)[2] for line in self.log.read_text().splitlines()]

    @property
    def rounds(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.run / "rounds.jsonl").read_text().splitlines()]

    def adapter(self, name: str) -> dict[str, Tensor]:
        return dict(load_file(self.run / "adapters" / name / "adapter_model.safetensors"))


def train(seed: Seed, folder: Path, *words: object, **flags: object) -> Trained:
    """Trains into a folder and returns what came of it."""
    done = Trained(folder / "run", folder / "train.log")
    assert call(*seed.words(**flags), "--out", done.run, "--log_path", done.log, *words) == 0
    return done


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """84 rows as GLUE has them, in a parquet file."""
    features = Features(
        {"sentence": Value("string"), "label": ClassLabel(names=["negative", "positive"]), "idx": Value("int32")}
    )
    rows = [{**row, "idx": i} for i, row in enumerate(labelled(84))]
    path = tmp_path_factory.mktemp("glue") / "train.parquet"
    Dataset.from_list(rows, features=features).to_parquet(path)
    return path


@pytest.fixture(scope="module")
def seed(table: Path, model: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Seed:
    split = tmp_path_factory.mktemp("split")
    words = ("--split_type", "dirichlet", "--alpha", 0.5, "--min_size", 4, "--num_clients", 7, "--overwrite")
    assert call("split", "glue", "--dataset_path", table, "--output_path", split, *words) == 0
    return Seed(model, split, rows / "validation.csv")


@pytest.fixture(scope="module")
def trained(seed: Seed, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train(seed, tmp_path_factory.mktemp("trained"))


def test_split_shares_every_row_out_once_to_folders_that_datasets_reads(seed: Seed, table: Path) -> None:
    clients = [load_from_disk(str(seed.split / f"client_{i}")) for i in range(1, 8)]
    assert sorted(index for client in clients for index in client["idx"]) == list(range(84))
    assert min(map(len, clients)) >= 4
    whole = Dataset.from_parquet(str(table))
    assert all(client.features == whole.features for client in clients)
    assert clients[3]["sentence"][0] == whole["sentence"][clients[3]["idx"][0]]


def test_split_says_how_many_rows_each_client_has(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--dataset-path", table, "--output-path", tmp_path, "--num-clients", 4, "--split-type", "iid")
    assert call("split", "glue", *words) == 0
    assert capsys.readouterr() == (f"4 clients in {tmp_path}: 21, 21, 21, 21 rows\n", "")


@pytest.mark.parametrize(("dataset", "split_type"), [("glue", "iid"), ("gsm8k", "iid"), ("gsm8k", "dirichlet")])
def test_a_split_is_a_function_of_the_seed(dataset: str, split_type: str, table: Path, tmp_path: Path) -> None:
    def indices(folder: str, number: int) -> list[list[int]]:
        words = ("--dataset_path", table, "--output_path", tmp_path / folder, "--split_type", split_type)
        assert call("split", dataset, *words, "--num_clients", 3, "--seed", number, "--min-size", 2) == 0
        return [load_from_disk(str(tmp_path / folder / f"client_{i}"))["idx"][:] for i in (1, 2, 3)]

    one, again, other = indices("one", 0), indices("again", 0), indices("other", 1)
    assert one == again != other
    assert sorted(i for client in one for i in client) == list(range(84)) and one[0] != sorted(one[0])


def test_an_overwritten_split_leaves_no_client_of_the_earlier_one(table: Path, tmp_path: Path) -> None:
    words = ("split", "glue", "--dataset_path", table, "--output_path", tmp_path / "out")
    assert call(*words, "--num_clients", 5) == 0
    assert call(*words, "--num_clients", 2, "--overwrite") == 0
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["client_1", "client_2"]


def test_view_split_shows_a_table_and_draws_a_chart(seed: Seed, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("view-split", "--base_path", seed.split, "--num_clients", 7, "--dataset_type", "glue") == 0
    printed = capsys.readouterr()
    assert printed.err == "" and "negative" in printed.out and "positive" in printed.out and "share" in printed.out
    clients = re.findall(r"client_(\d).*?(\d+)\D+(\d+)\D+(\d+)\D+([\d.]+)%", printed.out)
    assert [int(client[0]) for client in clients] == list(range(1, 8))
    assert all(int(a) + int(b) == int(rows) for _, a, b, rows, _ in clients)
    assert sum(int(client[3]) for client in clients) == 84
    chart = seed.split / "split.png"
    assert f"chart: {chart}" in printed.out.replace("\n", "") or "split.png" in printed.out
    assert chart.read_bytes().startswith(b"\x89PNG")


def test_view_split_prints_the_counts_as_json(seed: Seed, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("view-split", "--base-path", seed.split, "--num-clients", 7, "--json") == 0
    view = json.loads(capsys.readouterr().out)
    assert view["labels"] == ["negative", "positive"]
    for i, counts in enumerate(view["counts"], 1):
        labels = load_from_disk(str(seed.split / f"client_{i}"))["label"][:]
        assert counts == [labels.count(0), labels.count(1)]


def test_view_split_counts_the_rows_of_data_without_labels(seed: Seed, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--base_path", seed.split, "--num_clients", 7, "--dataset_type", "gsm8k", "--json")
    assert call("view-split", *words) == 0
    view = json.loads(capsys.readouterr().out)
    assert view["labels"] == ["rows"] and sum(map(sum, view["counts"])) == 84


def test_view_split_shows_labels_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = ["[/b]", "[red]", "$x_1$", "_hidden"]
    Dataset.from_dict({"label": labels}).save_to_disk(str(tmp_path / "client_1"))
    assert call("view-split", "--base_path", tmp_path, "--num_clients", 1) == 0
    printed = capsys.readouterr().out
    assert [label for label in labels if label not in printed] == []


def test_view_split_counts_labels_that_no_single_client_has_all_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Dataset.from_dict({"label": ["bad", "fair"]}).save_to_disk(str(tmp_path / "client_1"))
    Dataset.from_dict({"label": ["fair", "good"]}).save_to_disk(str(tmp_path / "client_2"))
    assert call("view-split", "--base_path", tmp_path, "--num_clients", 2, "--json") == 0
    view = json.loads(capsys.readouterr().out)
    assert (view["labels"], view["counts"]) == (["bad", "fair", "good"], [[1, 1, 0], [0, 1, 1]])


def log_pattern(num_clients: int, rounds: int, before_mixing: bool = False) -> list[str]:
    """Returns a pattern for each line of a log, in order."""
    clients = range(1, num_clients + 1)
    scored = f", Accuracy: {NUMBER}" if before_mixing else ""
    lines = [f"Initial accuracy of client {i}: {NUMBER}" for i in clients]
    for t in range(1, rounds + 1):
        history = rf"\[{NUMBER}(?:, {NUMBER}){{{t}}}\]"
        lines += [f"Round {t}/{rounds}"]
        lines += [f"Client {i} - Loss: {NUMBER}{scored}" for i in clients]
        lines += [f"Round {t} - Parameter Difference: {NUMBER}"]
        lines += [f"Accuracy of client {i} after round {t}: {NUMBER}" for i in clients]
        lines += [f"Parameter Difference record: {history}"]
        lines += [rf"Accuracies after round {t}: \[{history}(?:, {history}){{{num_clients - 1}}}\]"]
    return lines


def assert_log(done: Trained, pattern: list[str]) -> None:
    lines = done.log.read_text().splitlines()
    stamp = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} - INFO - "
    wrong = [pair for pair in zip(lines, pattern, strict=True) if not re.fullmatch(stamp + pair[1], pair[0])]
    assert wrong == []


def test_the_log_has_the_seeds_lines_in_the_seeds_order(trained: Trained) -> None:
    assert_log(trained, log_pattern(7, 2))


def test_the_log_has_each_clients_accuracy_before_mixing_when_asked(seed: Seed, tmp_path: Path) -> None:
    done = train(seed, tmp_path, "--set", "evaluate.before_mixing=true", num_rounds=1)
    assert_log(done, log_pattern(7, 1, before_mixing=True))
    logged = [m.rpartition(" ")[2] for m in done.messages if re.match(r"Client \d - Loss", m)]
    assert list(map(float, logged)) == done.rounds[0]["accuracy_before_mixing"]["per_peer"]


def test_the_log_says_what_the_rounds_say(trained: Trained) -> None:
    messages, rounds = trained.messages, trained.rounds
    initial = [float(m.rpartition(" ")[2]) for m in messages if m.startswith("Initial accuracy")]
    record = json.loads(messages[-2].partition(": ")[2])
    histories = json.loads(messages[-1].partition(": ")[2])
    assert len(record) == 3 and record[1:] == [line["consensus_error"] for line in rounds]
    assert histories == [[initial[i], *(line["accuracy"]["per_peer"][i] for line in rounds)] for i in range(7)]
    losses = [float(m.rpartition(" ")[2]) for m in messages if m.startswith("Client ")][:7]
    assert sum(losses) / 7 == pytest.approx(rounds[0]["loss"]["mean"])


def test_dfl_lora_starts_in_agreement_and_its_frozen_a_stays_equal_at_all(trained: Trained) -> None:
    assert json.loads(trained.messages[-2].partition(": ")[2])[0] == 0.0
    one, other = trained.adapter("peer-000"), trained.adapter("peer-004")
    assert all(torch.equal(one[name], other[name]) for name in one if "lora_A" in name)
    assert any(not torch.equal(one[name], other[name]) for name in one if "lora_B" in name)


def test_conlora_in_kebab_case_is_dfl_lora(trained: Trained, seed: Seed, tmp_path: Path) -> None:
    words = [
        str(word).replace("_", "-") if str(word).startswith("--") else word
        for word in seed.words(training_type="ConLoRA", num_rounds=1)
    ]
    assert call(*words, "--out", tmp_path / "run", "--log-path", tmp_path / "train.log") == 0
    done = Trained(tmp_path / "run", tmp_path / "train.log")
    for key in ("loss", "accuracy", "consensus_error"):
        assert done.rounds[0][key] == trained.rounds[0][key]


def test_lora_trains_a_as_well(seed: Seed, tmp_path: Path) -> None:
    done = train(seed, tmp_path, training_type="LoRA", num_rounds=1)
    assert_log(done, log_pattern(7, 1))
    one, other = done.adapter("peer-000"), done.adapter("peer-004")
    assert any(not torch.equal(one[name], other[name]) for name in one if "lora_A" in name)


def test_the_run_is_named_by_its_flags_and_the_log_by_its_own(
    seed: Seed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(*seed.words(num_clients=2, name="complete", num_rounds=1, training_type="LoRA")) == 0
    assert [f.name for f in (tmp_path / "runs").iterdir()] == ["sst2-LoRA-complete"]
    assert (tmp_path / "federated_training.log").exists()


def test_one_client_trains_alone(seed: Seed, tmp_path: Path) -> None:
    done = train(seed, tmp_path, num_clients=1)
    assert_log(done, log_pattern(1, 2))
    assert [line["messages"] for line in done.rounds] == [0, 0]
    assert json.loads(done.messages[-2].partition(": ")[2]) == [0.0, 0.0, 0.0]


def test_a_heads_own_weights_are_private_and_differ_between_peers(seed: Seed, tmp_path: Path) -> None:
    done = train(seed, tmp_path, target_modules="q_lin,v_lin", name="complete", num_clients=3, num_rounds=1)
    one, other = done.adapter("peer-000"), done.adapter("peer-001")
    for name in one:
        head = any(name.startswith(f"base_model.model.{head}.") for head in HEADS)
        assert torch.allclose(one[name], other[name], rtol=0, atol=1e-7) != head, name


def test_a_head_that_carries_lora_is_mixed_and_keeps_its_bias(trained: Trained) -> None:
    one, other = trained.adapter("peer-000"), trained.adapter("peer-004")
    for head in HEADS:
        assert torch.equal(one[f"base_model.model.{head}.bias"], other[f"base_model.model.{head}.bias"])
        assert not torch.equal(one[f"base_model.model.{head}.weight"], other[f"base_model.model.{head}.weight"])
    assert not [name for name in one if "classifier.lora" in name]


@pytest.mark.parametrize("mark", ["{i}", "{}"])
def test_a_validation_template_gives_each_client_its_own_rows(
    mark: str, seed: Seed, rows: Path, tmp_path: Path
) -> None:
    held = labelled(12, "validation")
    for i in (1, 2):
        turned = [{**row, "label": row["label"] if i == 1 else 1 - row["label"]} for row in held]
        Dataset.from_list(turned).to_parquet(tmp_path / f"held_{i}.parquet")
    done = train(
        seed, tmp_path, num_clients=2, name="ring", num_rounds=1, dataset_path_template=rows / f"client_{mark}.csv",
        val_dataset_path_template=tmp_path / f"held_{mark}.parquet",
    )  # fmt: skip
    initial = [float(m.rpartition(" ")[2]) for m in done.messages if m.startswith("Initial accuracy")]
    assert sum(initial) == pytest.approx(1)


def test_settings_go_over_the_flags(seed: Seed, tmp_path: Path) -> None:
    done = train(
        seed, tmp_path, "--set", "train.local.steps=1", "--set", "train.order=standard", "--seed", 3,
        num_clients=2, name="ring",
    )  # fmt: skip
    assert "Initial accuracy of client 1" not in done.log.read_text()
    assert len(json.loads(done.messages[-2].partition(": ")[2])) == 2
    recipe = (done.run / "recipe.yaml").read_text()
    assert "steps: 1" in recipe and "epochs: null" in recipe and "seed: 3" in recipe


def test_a_new_training_starts_its_log_anew_and_json_prints_the_summary_and_nothing_else(
    seed: Seed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train.log").write_text("of an earlier run\n")
    done = train(seed, tmp_path, num_clients=2, name="ring", num_rounds=1)
    assert_log(done, log_pattern(2, 1))
    printed = capsys.readouterr()
    assert json.loads(printed.out) == json.loads((done.run / "summary.json").read_text()) and printed.err == ""


def test_a_resumed_training_appends_to_its_log_what_the_whole_one_has(
    trained: Trained, seed: Seed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (*seed.words(), "--out", tmp_path / "run", "--log_path", tmp_path / "train.log")
    with monkeypatch.context() as stopped:
        stopped.setattr(os, "fsync", failing(KeyboardInterrupt(), after=16))
        assert call(*words) == 130
    done = Trained(tmp_path / "run", tmp_path / "train.log")
    before = done.log.read_text()
    assert call(*words, "--resume") == 0
    assert done.log.read_text().startswith(before) and len(before.splitlines()) == 7 + 1 + 7 + 1 + 7 + 2
    assert done.messages == trained.messages
    assert done.adapter("consensus").keys() == trained.adapter("consensus").keys()
    for name, value in done.adapter("consensus").items():
        assert torch.equal(value, trained.adapter("consensus")[name])


def logits(model: PreTrainedModel | PeftModel, folder: Path, sentences: list[str]) -> Tensor:
    """Returns what plain transformers computes, rows cut on the left as the seed did."""
    tokenizer = AutoTokenizer.from_pretrained(folder, truncation_side="left")
    inputs = tokenizer(sentences, padding=True, truncation=True, max_length=48, return_tensors="pt")
    with torch.no_grad():
        return Tensor(model.eval()(**inputs).logits)


def plain(folder: Path, adapter: Path | None = None) -> PreTrainedModel | PeftModel:
    """Loads a model folder, and an adapter folder over it, with nothing of ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries, about their own names
        base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
        return base if adapter is None else PeftModel.from_pretrained(base, str(adapter))


@pytest.mark.parametrize(("flags", "name"), [(("--peer", 2), "peer-002"), (("--consensus",), "consensus")])
def test_an_exported_adapter_and_an_exported_model_answer_alike_and_as_the_run_counted(
    flags: tuple[object, ...], name: str, trained: Trained, model: Path, tmp_path: Path
) -> None:
    assert call("export", trained.run, *flags, "--to", tmp_path / "adapter") == 0
    assert call("export", trained.run, *flags, "--merge", "--to", tmp_path / "new" / "model") == 0
    assert files_of(tmp_path / "adapter") == files_of(trained.run / "adapters" / name)
    held = labelled(12, "validation")
    sentences = [str(row["sentence"]) for row in held]
    adapted = logits(plain(model, tmp_path / "adapter"), model, sentences)
    merged = logits(plain(tmp_path / "new" / "model"), tmp_path / "new" / "model", sentences)
    torch.testing.assert_close(adapted, merged)
    right = (adapted.argmax(1) == torch.tensor([row["label"] for row in held])).double().mean().item()
    accuracy: Mapping[str, Any] = json.loads((trained.run / "summary.json").read_text())["accuracy"]
    assert right == pytest.approx(accuracy["per_peer"][2] if name == "peer-002" else accuracy["consensus"])


def test_export_says_what_it_wrote_and_nothing_else(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("export", trained.run, "--consensus", "--to", tmp_path / "a") == 0
    assert capsys.readouterr() == (f"wrote {tmp_path / 'a'}\n", "")
    assert call("export", trained.run, "--consensus", "--merge", "--to", tmp_path / "b") == 0
    assert capsys.readouterr() == (f"wrote {tmp_path / 'b'}\n", "")


def test_an_exported_model_knows_its_labels_and_no_path_of_this_machine(
    trained: Trained, model: Path, tmp_path: Path
) -> None:
    assert call("export", trained.run, "--peer", 0, "--merge", "--to", tmp_path / "model") == 0
    text = (tmp_path / "model" / "config.json").read_text()
    assert json.loads(text)["id2label"] == {"0": "negative", "1": "positive"}
    assert str(model.parent) not in text


def test_export_over_an_earlier_export_replaces_all_of_it(trained: Trained, tmp_path: Path) -> None:
    to = tmp_path / "out"
    assert call("export", trained.run, "--peer", 0, "--to", to) == 0
    (to / "more").mkdir()
    (to / "more" / "file").write_text("old")
    assert call("export", trained.run, "--peer", 1, "--to", to, "--overwrite") == 0
    assert files_of(to) == files_of(trained.run / "adapters" / "peer-001")
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


def test_a_model_with_a_head_of_other_labels_is_trained_and_merged(model: Path, seed: Seed, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        AutoModelForSequenceClassification.from_pretrained(model, num_labels=5).save_pretrained(tmp_path / "five")
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "five")
    done = train(
        seed, tmp_path, model_checkpoint=tmp_path / "five", num_clients=2, name="ring", num_rounds=1,
        target_modules="q_lin",
    )  # fmt: skip
    assert call("export", done.run, "--consensus", "--merge", "--to", tmp_path / "model") == 0
    assert plain(tmp_path / "model").config.num_labels == 2


def test_labels_that_no_single_client_has_all_of_are_trained(model: Path, tmp_path: Path) -> None:
    words = ["the soup was bland", "the soup was fine", "the soup was superb"]
    for i, kept in ((1, [0, 1]), (2, [1, 2])):
        names = ["bad", "fair", "good"]
        columns = {"sentence": [words[k] for k in kept], "label": [names[k] for k in kept]}
        Dataset.from_dict(columns).to_parquet(tmp_path / f"client_{i}.parquet")
    seed = Seed(model, tmp_path, tmp_path / "client_1.parquet")
    done = train(
        seed, tmp_path, "--set", "task.name=null", num_clients=2, name="ring", num_rounds=1,
        dataset_path_template=f"{tmp_path}/client_{{i}}.parquet",
    )  # fmt: skip
    facts = json.loads((done.run / "partition.json").read_text())
    assert (facts["labels"], facts["counts"]) == (["bad", "fair", "good"], [[1, 1, 0], [0, 1, 1]])


def script(path: Path, *words: str, variables: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Runs a script with no variable set but those given."""
    env = {"PATH": os.environ["PATH"], **variables}
    return subprocess.run(["bash", str(path), *words], capture_output=True, text=True, env=env, check=False, timeout=20)


@pytest.mark.parametrize(
    ("name", "variable", "flag", "others"),
    [
        ("glue_split.sh", "DATASET_PATH", "--dataset_path", {}),
        ("glue_split.sh", "OUTPUT_PATH", "--output_path", {"DATASET_PATH": "a"}),
        ("gsm8k_split.sh", "DATASET_PATH", "--dataset_path", {"OUTPUT_PATH": "a"}),
        ("gsm8k_split.sh", "OUTPUT_PATH", "--output_path", {"DATASET_PATH": "a"}),
        ("view_split.sh", "OUTPUT_PATH", "--base_path", {}),
        ("train.sh", "MODEL_CHECKPOINT", "--model_checkpoint", {}),
        ("train.sh", "DATASET_PATH_TEMPLATE", "--dataset_path_template", {"MODEL_CHECKPOINT": "a"}),
        (
            "train.sh", "VAL_DATASET_PATH_TEMPLATE", "--val_dataset_path_template",
            {"MODEL_CHECKPOINT": "a", "DATASET_PATH_TEMPLATE": "a"},
        ),
    ],
)  # fmt: skip
def test_a_script_without_a_path_says_which_in_one_sentence(
    name: str, variable: str, flag: str, others: dict[str, str]
) -> None:
    done = script(SCRIPTS / name, variables=others)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1
    assert name in done.stderr and variable in done.stderr and flag in done.stderr


@pytest.fixture(scope="module")
def echoing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts beside a command that prints its words, one a line."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copytree(SCRIPTS, folder / "scripts")
    command = folder / ".venv" / "bin" / "dfl-lora"
    command.parent.mkdir(parents=True)
    command.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    command.chmod(0o755)
    return folder / "scripts"


@pytest.mark.parametrize(
    ("name", "variables", "words"),
    [
        (
            "glue_split.sh", {"DATASET_PATH": "my glue", "OUTPUT_PATH": "o"},
            "split glue --dataset_path 'my glue' --output_path o --num_clients 4 --split_type dirichlet "
            "--min_size 1500",
        ),
        (
            "gsm8k_split.sh", {"DATASET_PATH": "d", "OUTPUT_PATH": "o"},
            "split gsm8k --dataset_path d --output_path o --num_clients 7 --split_type dirichlet",
        ),
        ("view_split.sh", {"OUTPUT_PATH": "o"}, "view-split --base_path o --num_clients 4 --dataset_type glue"),
        (
            "train.sh",
            {"MODEL_CHECKPOINT": "m", "DATASET_PATH_TEMPLATE": "c_{i}", "VAL_DATASET_PATH_TEMPLATE": "v"},
            "train --model_checkpoint m --dataset_path_template c_{i} --val_dataset_path_template v --num_clients 7 "
            "--lora_r 4 --lora_alpha 32 --target_modules q_lin,v_lin,pre_classifier,classifier "
            "--training_type DFL-LoRA --dataset_type sst2 --name link3 --num_rounds 5 --batch_size 128",
        ),
    ],
)  # fmt: skip
def test_a_script_gives_the_seeds_numbers_and_then_its_own_words(
    name: str, variables: dict[str, str], words: str, echoing: Path
) -> None:
    done = script(echoing / name, "--num_clients", "3", variables=variables)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [*shlex.split(words), "--num_clients", "3"]


@pytest.mark.parametrize(
    "flags", [("--dataset_path=d", "--output-path", "o"), ("--dataset-path", "d", "--output_path=o")]
)
def test_a_script_takes_its_paths_as_flags(flags: tuple[str, ...], echoing: Path) -> None:
    done = script(echoing / "glue_split.sh", *flags, variables={})
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-len(flags) :] == list(flags)


def test_the_last_of_a_repeated_flag_holds(seed: Seed, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--base_path", seed.split, "--num_clients", 4, "--num_clients", 2, "--num-clients", 3, "--json")
    assert call("view-split", *words) == 0
    assert len(json.loads(capsys.readouterr().out)["counts"]) == 3
