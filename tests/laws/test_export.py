"""Law 7: the exported adapter loaded with plain PEFT gives the same logits as the engine."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertModel

from dfl_lora.build import build
from dfl_lora.data.batches import Batch
from dfl_lora.data.generator import sentences
from dfl_lora.errors import UserError
from dfl_lora.learners.stacked import StackedLearner
from dfl_lora.learners.work import LocalWork
from dfl_lora.models.adapters import CONFIG, WEIGHTS, Export, read_adapter
from dfl_lora.models.base import Files, locate, quiet
from dfl_lora.models.placement import Lora
from dfl_lora.models.plain import merge
from dfl_lora.peers import Peers
from dfl_lora.reading import resolve
from dfl_lora.schedules import SCHEDULES, Head, Phase
from encoders import (
    NUM_LABELS,
    Family,
    Setting,
    load,
    relative_distance,
    start_apart,
    token_data,
    tokenizer_of,
    write_encoder,
)

LABELS = ("bad", "fair", "good")
SEED_TARGETS = ("q_lin", "v_lin", "pre_classifier", "classifier")


@dataclass(frozen=True)
class Case:
    """One row of the table: a base, where LoRA is placed on it, and what is trained."""

    family: Family
    targets: str | tuple[str, ...]
    schedule: str = "lora"
    head: Head = "shared"
    rslora: bool = False
    saved: tuple[str, ...] = ("classifier",)
    """The modules that an adapter holds in full."""


CASES = {
    "bert": Case("bert", ("query", "value")),
    "bert, all linear modules, rank-stabilised": Case("bert", "all-linear", "freeze_a", "private", rslora=True),
    "bert, frozen head": Case("bert", ("query", "value"), head="frozen"),
    "bert, LoRA on the head": Case("bert", ("query", "classifier"), "freeze_a"),
    "bert, core": Case("bert", ("query", "value"), "core"),
    "distilbert, the seed's targets, core": Case(
        "distilbert", SEED_TARGETS, "core", saved=("classifier", "pre_classifier")
    ),
    "roberta": Case("roberta", ("query", "value"), saved=("classifier.dense", "classifier.out_proj")),
    "roberta, LoRA on one module of the head": Case(
        "roberta", ("query", "out_proj"), rslora=True, saved=("classifier.dense", "classifier.out_proj")
    ),
    "distilbert": Case("distilbert", ("q_lin", "v_lin"), "freeze_a", saved=("classifier", "pre_classifier")),
    "distilbert, the seed's targets": Case("distilbert", SEED_TARGETS, saved=("classifier", "pre_classifier")),
    "distilbert, the seed's targets, rank-stabilised": Case(
        "distilbert", SEED_TARGETS, "freeze_a", rslora=True, saved=("classifier", "pre_classifier")
    ),
}


@dataclass(frozen=True)
class Exported:
    """Three peers and their consensus, what the engine says of a batch, and their adapter folders."""

    case: Case
    files: Files
    setting: Setting
    batch: Batch
    logits: dict[str, Tensor]
    adapters: dict[str, Path]


def logits_of(learner: StackedLearner, peers: Peers, phase: Phase, batch: Batch) -> Tensor:
    """Returns the engine's logits [peers, rows, labels] of one batch that every peer reads."""
    leaves = learner.leaves(peers, peers.x, torch.zeros_like(peers.x), phase)
    with torch.no_grad():
        return learner.forward([batch] * len(peers), leaves).logits or []


def exported(case: Case, base: Path, to: Path) -> Exported:
    """Writes the adapters of three peers that are far apart, and of their consensus."""
    files, loaded = locate(str(base)), load(base)
    lora = Lora(case.targets, 4, 8, use_rslora=case.rslora)
    data = token_data(case.family, (16, 16, 16))
    setting = Setting(loaded, lora, SCHEDULES[case.schedule](case.head), data, LocalWork(2, 16, steps=1))
    export = Export.of(loaded, setting.placement, LABELS)
    peers = start_apart(setting.peers(), 0.2)
    batch = setting.work.order.batch(data.train[0], 0, 0)
    learner, phase = setting.stacked(), setting.schedule(1)
    logits = {f"peer-{i:03d}": row for i, row in enumerate(logits_of(learner, peers, phase, batch))}
    logits["consensus"] = logits_of(learner, peers.consensus(), phase, batch)[0]
    for name, row in zip(logits, (0, 1, 2, None), strict=True):
        export.write(to / name, peers.adapter(row), f"Adapter {name}")
    return Exported(case, files, setting, batch, logits, {name: to / name for name in logits})


def plain_peft(adapter: Path, base: Path, batch: Batch, num_labels: int = NUM_LABELS) -> Tensor:
    """Returns the logits of the published base with an adapter folder, by transformers and PEFT alone."""
    with quiet(), torch.no_grad():
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=num_labels)
        return PeftModel.from_pretrained(model, str(adapter)).eval()(**batch.padded()).logits  # type: ignore[no-any-return]


@pytest.fixture(scope="module", params=CASES)
def done(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The adapters of one row of the table."""
    case, folder = CASES[request.param], tmp_path_factory.mktemp("exported")
    return exported(case, write_encoder(case.family, folder / "base"), folder / "adapters")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The adapters of the first row; copy them before you change them."""
    folder = tmp_path_factory.mktemp("bert")
    return exported(CASES["bert"], write_encoder("bert", folder / "base"), folder / "adapters")


def test_every_exported_adapter_gives_the_logits_of_the_engine_in_plain_peft(done: Exported) -> None:
    for name, logits in done.logits.items():
        assert relative_distance(plain_peft(done.adapters[name], done.files.path, done.batch), logits) < 1e-5, name
    others = [logits for name, logits in done.logits.items() if name != "peer-000"]
    assert all(relative_distance(done.logits["peer-000"], logits) > 0.01 for logits in others)


def test_the_base_with_an_adapter_merged_in_gives_the_same_logits(done: Exported, tmp_path: Path) -> None:
    merge(done.adapters["peer-001"], done.files, LABELS, tmp_path / "merged")
    with quiet(), torch.no_grad():
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
        logits = model(**done.batch.padded()).logits
    assert relative_distance(logits, done.logits["peer-001"]) < 1e-5
    text = "a small, plain text"
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")(text) == tokenizer_of(done.case.family)(text)


def test_an_adapter_has_the_names_of_peft_and_says_nothing_of_the_machine(done: Exported) -> None:
    folder = done.adapters["consensus"]
    inside = [path for path in done.setting.placement.modules if path.startswith(f"{done.setting.base.prefix}.")]
    wanted = {f"base_model.model.{path}.lora_{factor}.weight" for path in inside for factor in "AB"}
    wanted |= {f"base_model.model.{path}.{part}" for path in done.case.saved for part in ("weight", "bias")}
    tensors = load_file(folder / WEIGHTS)
    assert tensors.keys() == wanted
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    with safe_open(folder / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    config = json.loads((folder / CONFIG).read_text())
    assert config["target_modules"] == sorted(inside)
    assert config["modules_to_save"] == list(done.case.saved)
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 8, done.case.rslora)
    assert config["base_model_name_or_path"] == "base"
    assert config["auto_mapping"]["base_weights_sha256"] == done.files.weights
    assert sorted(f.name for f in folder.iterdir()) == ["README.md", CONFIG, WEIGHTS]
    assert not any(str(done.files.path.parent).encode() in f.read_bytes() for f in folder.iterdir())


def test_parts_of_the_encoder_that_the_base_lacks_travel_with_the_adapter(tmp_path: Path) -> None:
    base = write_encoder("bert", tmp_path / "base")
    with quiet():
        BertModel.from_pretrained(base, add_pooling_layer=False).save_pretrained(base)
    Dataset.from_list(sentences("train", 32)).save_to_disk(tmp_path / "rows")
    content = {
        "model": {"name_or_path": str(base)},
        "lora": {"target_modules": ["query", "value"]},
        "data": {"path": str(tmp_path / "rows"), "validation": str(tmp_path / "rows")},
        "peers": {"num_peers": 2, "topology": "complete"},
        "compute": {"dtype": "float32", "threads": 1},
    }
    f = build(resolve(content))
    assert f.export is not None
    assert isinstance(f.learner, StackedLearner)
    f.export.write(tmp_path / "adapter", start_apart(f.peers, 0.2).adapter(1), "Peer 1")
    shard = f.data.peers.train[0]
    batch = shard.source.collate(shard.rows[:8])
    logits = logits_of(f.learner, f.peers, f.method.schedule(1), batch)[1]
    assert relative_distance(plain_peft(tmp_path / "adapter", base, batch, 2), logits) < 1e-5


def test_an_adapter_is_written_over_an_older_one(tmp_path: Path) -> None:
    base = write_encoder("bert", tmp_path / "base")
    exported(CASES["bert, frozen head"], base, tmp_path / "adapters")
    done = exported(CASES["bert, LoRA on the head"], base, tmp_path / "adapters")
    assert relative_distance(plain_peft(done.adapters["peer-002"], base, done.batch), done.logits["peer-002"]) < 1e-5
    assert sorted(f.name for f in (tmp_path / "adapters").iterdir()) == sorted(done.adapters)


def test_an_adapter_of_another_base_is_refused(bert: Exported, tmp_path: Path) -> None:
    other = locate(str(write_encoder("bert", tmp_path / "other", seed=1)))
    with pytest.raises(UserError, match=r"was trained on base .* but other has .* give the base"):
        merge(bert.adapters["peer-000"], other, LABELS, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


Damage = Callable[[bytes], bytes | None]
DAMAGES: dict[str, tuple[str, Damage]] = {
    "no weights": (WEIGHTS, lambda b: None),
    "truncated weights": (WEIGHTS, lambda b: b[: len(b) // 2]),
    "empty weights": (WEIGHTS, lambda b: b""),
    "weights that are no safetensors": (WEIGHTS, lambda b: b"PK\x03\x04" + b[4:]),
    "no configuration": (CONFIG, lambda b: None),
    "a truncated configuration": (CONFIG, lambda b: b[: len(b) // 2]),
    "a configuration that is no text": (CONFIG, lambda b: b"\xff\xfe\x00"),
    "a configuration that is a list": (CONFIG, lambda b: b"[]"),
    "a configuration that is null": (CONFIG, lambda b: b"null"),
    "a configuration without a base": (CONFIG, lambda b: b"{}"),
    "a mapping that is a word": (CONFIG, lambda b: b'{"auto_mapping": "bert"}'),
}


@pytest.mark.parametrize(("file", "damage"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_adapter_is_one_sentence(file: str, damage: Damage, bert: Exported, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(bert.adapters["peer-000"], tmp_path / "adapter"))
    content = damage((adapter / file).read_bytes())
    if content is None:
        (adapter / file).unlink()
    else:
        (adapter / file).write_bytes(content)
    with pytest.raises(UserError) as raised:
        merge(adapter, bert.files, LABELS, tmp_path / "merged")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "merged").exists()


def test_reading_an_adapter_returns_what_was_written(bert: Exported, tmp_path: Path) -> None:
    config, tensors = read_adapter(bert.adapters["peer-000"])
    assert config["peft_type"] == "LORA"
    assert config["inference_mode"] is True
    assert len(tensors) == 10
    with pytest.raises(UserError, match=r"is not an adapter folder"):
        read_adapter(tmp_path)
