"""Law 2: the stacked learner and plain PEFT, one peer at a time, end with the same peers."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from dfl_lora.build import build
from dfl_lora.data.generator import sentences
from dfl_lora.learners import Learner, Progress
from dfl_lora.learners.work import LocalWork, OptimizerName, Scheduler
from dfl_lora.metrics import Answers
from dfl_lora.models.base import STREAM_ATTENTION
from dfl_lora.models.placement import Lora
from dfl_lora.peers import STEPS, Peers
from dfl_lora.reading import resolve
from dfl_lora.schedules import SCHEDULES, Head
from encoders import Family, Setting, distances, load, start_apart, token_data, toy_base, toy_data, write_encoder

ROUNDS = 2
APART = 0.02
"""At B = 0 some gradients are as small as rounding, and Adam's first steps make 1e-5 of it (measured: 9 numbers)."""
UNEVEN = (33, 7, 18, 16)


@dataclass(frozen=True)
class Case:
    """One row of the table: what is trained, by which local work."""

    schedule: str = "lora"
    head: Head = "shared"
    optimizer: OptimizerName = "adam"
    dropout: bool = False
    max_grad_norm: float | None = None
    steps: int | None = None
    """None: one epoch, so that peers with few rows are finished first."""
    scheduler: Scheduler = "cosine"
    rslora: bool = False

    def work(self) -> LocalWork:
        return LocalWork(
            rounds=ROUNDS,
            batch_size=8,
            steps=self.steps,
            epochs=None if self.steps else 1,
            optimizer=self.optimizer,
            learning_rate=0.1 if self.optimizer == "sgd" else 5e-3,
            scheduler=self.scheduler,
            max_grad_norm=self.max_grad_norm,
            base_dropout=self.dropout,
        )

    def lora(self, targets: str | tuple[str, ...]) -> Lora:
        return Lora(targets, 4, 8, 0.2 if self.dropout else 0.0, self.rslora)


TOY_CASES = {
    "adam": Case(),
    "adamw, clipped": Case(optimizer="adamw", max_grad_norm=0.1),
    "sgd, clipped, private head": Case("lora", "private", "sgd", max_grad_norm=0.1, steps=3, scheduler="linear"),
    "frozen A": Case("freeze_a", scheduler="constant"),
    "B and A by turns": Case("alternating", scheduler="constant"),
    "shared A": Case("share_a"),
    "core": Case("core", scheduler="constant", max_grad_norm=0.1),
    "core, private head, dropout, sgd": Case("core", "private", "sgd", dropout=True),
    "frozen A and head, sgd": Case("freeze_a", "frozen", "sgd", rslora=True),
    "frozen head, dropout": Case("lora", "frozen", dropout=True),
    "frozen A, private head, dropout, adamw": Case("freeze_a", "private", "adamw", dropout=True, max_grad_norm=1.0),
}

SEED_TARGETS = ("q_lin", "v_lin", "pre_classifier", "classifier")
ENCODER_CASES: dict[str, tuple[Family, str | tuple[str, ...], Case]] = {
    "bert, adam": ("bert", ("query", "value"), Case()),
    "bert, dropout, clipped": ("bert", ("query", "value"), Case(dropout=True, max_grad_norm=0.5)),
    "bert, frozen A, private head, adamw": ("bert", ("query", "key", "dense"), Case("freeze_a", "private", "adamw")),
    "bert, all linear modules": ("bert", "all-linear", Case(optimizer="sgd", steps=2, max_grad_norm=0.5)),
    "bert, core": ("bert", ("query", "key", "dense"), Case("core")),
    "distilbert, the seed's targets, core, frozen head": ("distilbert", SEED_TARGETS, Case("core", "frozen")),
    "roberta, dropout, frozen head": ("roberta", ("query", "value"), Case("lora", "frozen", dropout=True)),
    "roberta, frozen A, sgd": ("roberta", ("query", "value"), Case("freeze_a", optimizer="sgd", rslora=True)),
    "roberta, LoRA on one module of the head": ("roberta", ("query", "out_proj"), Case(max_grad_norm=0.5)),
    "distilbert, adamw": ("distilbert", ("q_lin", "v_lin"), Case(optimizer="adamw", scheduler="linear")),
    "distilbert, the seed's targets": ("distilbert", SEED_TARGETS, Case(scheduler="constant")),
    "distilbert, the seed's targets, frozen A, dropout": ("distilbert", SEED_TARGETS, Case("freeze_a", dropout=True)),
}


@dataclass(frozen=True)
class End:
    """Where a learner left the peers, and what it said of them."""

    peers: Peers
    progress: list[Mapping[int, Progress]]
    answers: Mapping[int, Answers]


def end_of(learner: Learner, peers: Peers, setting: Setting) -> End:
    progress = [learner.train(peers, setting.schedule(t), t) for t in range(1, ROUNDS + 1)]
    return End(peers, progress, learner.evaluate(peers))


def check(stacked: End, sequential: End, tolerance: float) -> None:
    """Checks each role of each vector apart, the counters to the bit, and what the learners told."""
    far = {name: d for name, d in distances(stacked.peers, sequential.peers).items() if not d < tolerance}
    assert not far
    assert torch.equal(stacked.peers.counters, sequential.peers.counters)
    for mine, theirs in zip(stacked.progress, sequential.progress, strict=True):
        assert {i: (p.steps, p.tokens, p.skipped) for i, p in mine.items()} == {
            i: (p.steps, p.tokens, p.skipped) for i, p in theirs.items()
        }
        assert [p.loss for p in mine.values()] == pytest.approx([p.loss for p in theirs.values()], rel=10 * tolerance)
    losses, reference = ({i: a.loss for i, a in end.answers.items()} for end in (stacked, sequential))
    assert losses == pytest.approx(reference, rel=10 * tolerance)
    told, plain = (
        {i: (a.truth.tolist(), a.given.tolist(), a.num_labels) for i, a in end.answers.items()}
        for end in (stacked, sequential)
    )
    assert told == plain


@pytest.mark.parametrize("case", TOY_CASES.values(), ids=TOY_CASES)
@pytest.mark.parametrize("apart", [0.0, 0.3], ids=["from one start", "from apart"])
def test_on_the_toy_both_learners_end_with_the_same_peers_in_float64(case: Case, apart: float) -> None:
    setting = Setting(
        toy_base(), case.lora(("first", "second")), SCHEDULES[case.schedule](case.head), toy_data(UNEVEN), case.work(),
        torch.float64,
    )  # fmt: skip
    stacked = end_of(setting.stacked(), start_apart(setting.peers(), apart), setting)
    sequential = end_of(setting.sequential(), start_apart(setting.peers(), apart), setting)
    assert (stacked.peers.x != start_apart(setting.peers(), apart).x).any(1).all()
    check(stacked, sequential, 1e-10)


@pytest.mark.parametrize(("family", "targets", "case"), ENCODER_CASES.values(), ids=ENCODER_CASES)
def test_on_an_encoder_both_learners_end_with_the_same_peers(
    family: Family, targets: str | tuple[str, ...], case: Case, tmp_path: Path
) -> None:
    base = load(write_encoder(family, tmp_path), STREAM_ATTENTION if case.dropout else "sdpa")
    schedule = SCHEDULES[case.schedule](case.head)
    setting = Setting(base, case.lora(targets), schedule, token_data(family, UNEVEN), case.work())
    stacked = end_of(setting.stacked(), start_apart(setting.peers(), APART), setting)
    sequential = end_of(setting.sequential(), start_apart(setting.peers(), APART), setting)
    assert (stacked.peers.x != start_apart(setting.peers(), APART).x).any(1).all()
    check(stacked, sequential, 1e-5)


def test_dropout_is_really_on(tmp_path: Path) -> None:
    ends = []
    for case in (Case(), Case(dropout=True)):
        base = load(write_encoder("bert", tmp_path / str(case.dropout)), STREAM_ATTENTION)
        lora = Lora(("query", "value"), 4, 8)
        setting = Setting(base, lora, SCHEDULES["lora"]("shared"), token_data("bert", UNEVEN), case.work())
        ends.append(end_of(setting.stacked(), setting.peers(), setting).peers)
    assert max(distances(*ends).values()) > 0.01


def test_finished_peers_take_no_further_step(tmp_path: Path) -> None:
    base = load(write_encoder("bert", tmp_path))
    lora = Lora(("query", "value"), 4, 8)
    setting = Setting(base, lora, SCHEDULES["lora"]("shared"), token_data("bert", UNEVEN), Case().work())
    together = end_of(setting.stacked(), setting.peers(), setting)
    assert together.peers.counters[:, STEPS].tolist() == [ROUNDS * steps for steps in (5, 1, 3, 2)]
    assert [p.steps for p in together.progress[0].values()] == [5, 1, 3, 2]


def test_on_the_embedded_encoder_both_learners_end_with_the_same_peers(tmp_path: Path) -> None:
    Dataset.from_list(sentences("train", 64)).save_to_disk(tmp_path / "rows")
    recipe = resolve(
        {
            "model": {"name_or_path": "all-MiniLM-L6-v2"},
            "lora": {"r": 4, "lora_alpha": 32, "target_modules": ["query", "value"]},
            "data": {"path": str(tmp_path / "rows"), "train": "train[:48]", "validation": "train[48:]"},
            "peers": {"num_peers": 2, "topology": "complete"},
            "train": {"rounds": 1, "local": {"steps": 2}, "batch_size": 8, "learning_rate": 2e-3},
            "evaluate": {"rows": 16},
            "compute": {"dtype": "float32", "threads": 1},
        }
    )
    ends = []
    for name in ("stacked", "sequential"):
        federation = build(recipe, learner=name)
        start_apart(federation.peers, APART)
        progress = federation.learner.train(federation.peers, federation.method.schedule(1), 1)
        ends.append(End(federation.peers, [progress], federation.learner.evaluate(federation.peers)))
    check(*ends, 1e-5)
