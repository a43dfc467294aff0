"""Law 3: a peer's result does not depend on who shares its pass, to the bit."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from encoders import Family, Setting, equal_bits, load, same_bits, start_apart, toy_base, toy_data, token_data, write_encoder
from torch import nn

from dfl_lora.data.batches import PAD_TO, TokenSource
from dfl_lora.learners.stacked import StackedLearner
from dfl_lora.learners.work import LocalWork
from dfl_lora.models.base import STREAM_ATTENTION
from dfl_lora.models.placement import Lora
from dfl_lora.peers import Peers
from dfl_lora.schedules import SCHEDULES

ROUNDS = 2
UNEVEN = (33, 7, 18, 16, 40, 5, 21)
GROUPS = {"3 + 4": [[0, 1, 2], [3, 4, 5, 6]], "not neighbours": [[0, 2, 5], [1, 6], [3, 4]], "one by one": [[i] for i in range(7)]}
SEED_TARGETS = ("q_lin", "v_lin", "pre_classifier", "classifier")


@dataclass(frozen=True)
class Case:
    """One row of the table: a base in some precision, and the local work."""

    family: Family
    targets: str | tuple[str, ...]
    schedule: str = "lora"
    dtype: torch.dtype = torch.float32
    batch_size: int = 16
    longest: int = 20
    dropout: bool = False
    max_grad_norm: float | None = None


CASES = {
    "bert, fp32": Case("bert", ("query", "value")),
    "bert, bf16": Case("bert", ("query", "value"), dtype=torch.bfloat16),
    "bert, fp32, frozen A, batches of 5": Case("bert", ("query", "value"), "freeze_a", batch_size=5),
    "bert, bf16, batches of 5": Case("bert", ("query", "value"), dtype=torch.bfloat16, batch_size=5),
    "bert, fp32, all linear modules, short rows": Case("bert", "all-linear", longest=8, max_grad_norm=0.5),
    "bert, bf16, all linear modules, frozen A": Case("bert", "all-linear", "freeze_a", torch.bfloat16),
    "roberta, fp32, dropout": Case("roberta", ("query", "value"), dropout=True),
    "roberta, bf16, frozen A, clipped": Case("roberta", ("query", "value"), "freeze_a", torch.bfloat16, max_grad_norm=0.5),
    "distilbert, fp32, the seed's targets": Case("distilbert", SEED_TARGETS, max_grad_norm=0.5),
    "distilbert, bf16, the seed's targets, frozen A": Case("distilbert", SEED_TARGETS, "freeze_a", torch.bfloat16),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def setting_of(case: Case, folder: Path) -> Setting:
    attention = "eager" if case.dtype == torch.bfloat16 else "sdpa"
    base = load(write_encoder(case.family, folder), STREAM_ATTENTION if case.dropout else attention, case.dtype)
    work = LocalWork(
        ROUNDS, case.batch_size, epochs=1, learning_rate=5e-3, max_grad_norm=case.max_grad_norm, base_dropout=case.dropout
    )
    lora = Lora(case.targets, 4, 8, 0.2 if case.dropout else 0.0)
    return Setting(base, lora, SCHEDULES[case.schedule]("shared"), token_data(case.family, UNEVEN, case.longest), work)


def toy_setting(steps: int | None = None) -> Setting:
    work = LocalWork(ROUNDS, 16, steps=steps, epochs=None if steps else 1, learning_rate=5e-3)
    data = toy_data(UNEVEN, torch.float32)
    return Setting(toy_base(torch.float32), Lora(("first", "second"), 4, 8), SCHEDULES["lora"]("shared"), data, work)


def train(setting: Setting, learner: StackedLearner, peers: Peers) -> Peers:
    for t in range(1, ROUNDS + 1):
        learner.train(peers, setting.schedule(t), t)
    return peers


def trained(setting: Setting, ids: Iterable[int] | None = None, group_tokens: int = 4096) -> Peers:
    """Returns the peers `ids` after two rounds of local steps, in one learner of their own."""
    return train(setting, setting.stacked(group_tokens), start_apart(setting.peers(ids), 0.02))


def differing(whole: Peers, parts: Iterable[Peers], but: Sequence[int] = ()) -> set[tuple[str, int]]:
    """Returns the name and peer of every row that is not the same to the bit in the whole and in its part."""
    rows = {i: (part.arrays(), row) for part in parts for row, i in enumerate(part.ids)}
    return {
        (name, i)
        for name, matrix in whole.arrays().items()
        for row, i in enumerate(whole.ids)
        if i not in but and not equal_bits(matrix[row], rows[i][0][name][rows[i][1]])
    }


@every_case
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_peers_hosted_in_several_learners_end_with_the_bits_of_one(
    case: Case, groups: list[list[int]], tmp_path: Path
) -> None:
    setting = setting_of(case, tmp_path)
    assert differing(trained(setting), [trained(setting, ids) for ids in groups]) == set()


@every_case
def test_the_budget_of_tokens_changes_no_bit(case: Case, tmp_path: Path) -> None:
    setting = setting_of(case, tmp_path)
    whole = trained(setting)
    for group_tokens in (1, 2 * case.batch_size * 16):
        assert differing(whole, [trained(setting, group_tokens=group_tokens)]) == set()


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_toy_peers_end_with_the_same_bits_in_any_grouping(groups: list[list[int]]) -> None:
    setting = toy_setting()
    assert differing(trained(setting), [trained(setting, ids) for ids in groups]) == set()
    assert same_bits(trained(setting), trained(setting, group_tokens=1))


def test_a_second_thread_changes_no_bit_of_the_grouping(tmp_path: Path) -> None:
    setting = setting_of(CASES["bert, fp32"], tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert differing(trained(setting), [trained(setting, ids) for ids in GROUPS["3 + 4"]]) == set()
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["bert, fp32", "bert, bf16", "distilbert, bf16, the seed's targets, frozen A"])
def test_not_a_number_in_one_adapter_stays_with_its_peer(name: str, tmp_path: Path) -> None:
    setting = setting_of(CASES[name], tmp_path)
    sick = start_apart(setting.peers(), 0.02)
    sick.x[3, 5] = torch.nan
    start = sick.x[3].clone()
    learner = setting.stacked()
    skipped = [[p.skipped for p in learner.train(sick, setting.schedule(t), t).values()] for t in (1, 2)]
    assert differing(trained(setting), [sick], but=[3]) == set()
    assert equal_bits(sick.x[3], start)
    assert skipped == [[0, 0, 0, 1, 0, 0, 0]] * 2  # 16 rows are one batch


@pytest.mark.parametrize("steps", [None, 3], ids=["an epoch", "3 steps"])
def test_not_a_number_in_the_rows_of_one_peer_stays_with_it(steps: int | None) -> None:
    setting, sick = toy_setting(steps), toy_setting(steps)
    shard = sick.data.train[3]
    shard.source.inputs[shard.rows] = torch.nan  # type: ignore[attr-defined]
    peers = trained(sick)
    assert differing(trained(setting), [peers], but=[3]) == set()
    assert peers.x[3].isfinite().all()
    assert peers.counters[3].tolist() == [0, 0, 0, ROUNDS * (steps or 1)]
    assert not any(moments[3].any() for moments in peers.optimizer.values())


def shapes_of_passes(setting: Setting, ids: Iterable[int] | None = None) -> Counter[tuple[int, ...]]:
    """Counts, for each peer's batch, the shape in which the model read it."""
    read = Counter[tuple[int, ...]]()
    learner = setting.stacked()

    def note(module: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        rows, width = inputs["input_ids"].shape
        read[(rows // learner.current.num_peers, width)] += learner.current.num_peers

    with learner.model.register_forward_pre_hook(note, with_kwargs=True):
        train(setting, learner, setting.peers(ids))
    return read


def test_the_padded_length_of_a_batch_depends_on_that_batch_alone(tmp_path: Path) -> None:
    setting = setting_of(CASES["bert, fp32, frozen A, batches of 5"], tmp_path)
    alone = sum((shapes_of_passes(setting, [i]) for i in setting.data.train), Counter[tuple[int, ...]]())
    assert shapes_of_passes(setting) == alone
    assert {width for _, width in alone} == {8, 16, 24}


def test_a_batch_is_padded_to_the_next_multiple_of_eight_of_its_longest_row(tmp_path: Path) -> None:
    setting = setting_of(CASES["bert, fp32"], tmp_path)
    order = setting.work.order
    for i, shard in setting.data.train.items():
        assert isinstance(shard.source, TokenSource)
        for cursor in range(2 * shard.num_batches(16)):
            batch = order.batch(shard, i, cursor)
            longest = int(batch.inputs["attention_mask"].sum(1).max())
            assert batch.shape[1] - longest in range(PAD_TO) and batch.shape[1] % PAD_TO == 0
