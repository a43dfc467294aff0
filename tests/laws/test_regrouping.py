"""Law 3: a peer's result does not depend on who shares its pass, to the bit."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dfl_lora.data.batches import VectorSource
from dfl_lora.learners.stacked import StackedLearner
from dfl_lora.learners.work import LocalWork
from dfl_lora.models.base import STREAM_ATTENTION, load_encoder, locate
from dfl_lora.models.layers import LoraLinear, OwnLinear, dense
from dfl_lora.models.packing import BUCKET, spans
from dfl_lora.models.placement import Lora
from dfl_lora.peers import Peers
from dfl_lora.schedules import SCHEDULES
from dfl_lora.streams import torch_stream
from encoders import Family, Setting, equal_bits, load, start_apart, token_data, toy_base, toy_data, write_encoder

UNEVEN = (22, 5, 17, 16, 33, 5, 22)
GROUPS = {"3 + 4": [[0, 2, 5], [1, 3, 4, 6]], "one by one": [[i] for i in range(7)]}
BF16 = torch.bfloat16
SEED_TARGETS = ("q_lin", "v_lin", "pre_classifier", "classifier")


@dataclass(frozen=True)
class Case:
    """One row of the table: a base in some precision, and the local work."""

    family: Family
    targets: str | tuple[str, ...]
    schedule: str = "lora"
    dtype: torch.dtype = torch.float32
    batch_size: int = 16
    lengths: tuple[int, int] = (3, 20)
    dropout: bool = False
    max_grad_norm: float | None = None
    eager: bool = False


CASES = {
    "bert, fp32": Case("bert", ("query", "value")),
    "bert, fp32, eager": Case("bert", ("query", "value"), eager=True),
    "bert, bf16": Case("bert", ("query", "value"), "lora", BF16, lengths=(9, 30)),
    "bert, fp32, frozen A, batches of 5": Case("bert", ("query", "value"), "freeze_a", batch_size=5),
    "bert, bf16, batches of 5": Case("bert", ("query", "value"), "lora", BF16, 5, (9, 20)),
    "bert, fp32, all linear modules, short rows": Case("bert", "all-linear", lengths=(3, 8), max_grad_norm=0.5),
    "bert, bf16, all linear modules, frozen A": Case("bert", "all-linear", "freeze_a", BF16, lengths=(9, 20)),
    "roberta, fp32, dropout": Case("roberta", ("query", "value"), dropout=True),
    "roberta, bf16, frozen A": Case("roberta", ("key", "out_proj"), "freeze_a", BF16, 16, (9, 20), max_grad_norm=0.5),
    "distilbert, fp32, the seed's targets": Case("distilbert", SEED_TARGETS, max_grad_norm=0.5),
    "distilbert, bf16, the seed's targets": Case("distilbert", SEED_TARGETS, "lora", BF16, lengths=(9, 20)),
}


def setting_of(case: Case, folder: Path, rounds: int = 1) -> Setting:
    attention = "eager" if case.eager or case.dtype == BF16 else "sdpa"
    base = load(write_encoder(case.family, folder), STREAM_ATTENTION if case.dropout else attention, case.dtype)
    work = LocalWork(rounds, case.batch_size, epochs=1, learning_rate=5e-3, max_grad_norm=case.max_grad_norm)
    lora = Lora(case.targets, 4, 8, 0.2 if case.dropout else 0.0)
    data = token_data(case.family, UNEVEN, case.lengths)
    work = replace(work, base_dropout=case.dropout)
    return Setting(base, lora, SCHEDULES[case.schedule]("shared"), data, work, attention=attention)


def toy_setting(
    rounds: int = 1, steps: int | None = None, batch_size: int = 16, rank: int = 4, schedule: str = "lora"
) -> Setting:
    work = LocalWork(rounds, batch_size, steps=steps, epochs=None if steps else 1, learning_rate=5e-3)
    data, lora = toy_data(UNEVEN, torch.float32), Lora(("first", "second"), rank, 8)
    return Setting(toy_base(torch.float32), lora, SCHEDULES[schedule]("shared"), data, work)


def train(setting: Setting, learner: StackedLearner, peers: Peers) -> Peers:
    for t in range(1, setting.work.rounds + 1):
        learner.train(peers, setting.schedule(t), t)
    return peers


def trained(setting: Setting, ids: Iterable[int] | None = None, group_tokens: int = 4096) -> Peers:
    """Returns the peers `ids` after their local steps, in one learner of their own."""
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


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_peer_ends_with_the_same_bits_in_any_group_and_at_any_budget(case: Case, tmp_path: Path) -> None:
    setting = setting_of(case, tmp_path)
    whole = trained(setting)
    for name, groups in GROUPS.items():
        assert not differing(whole, [trained(setting, ids) for ids in groups]), name
    for group_tokens in (1, 2 * case.batch_size * 16):
        assert not differing(whole, [trained(setting, group_tokens=group_tokens)]), group_tokens


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("r", "d_in", "d_out"), [(1, 32, 1), (4, 32, 4), (3, 48, 3), (4, 8, 32), (5, 48, 20)])
def test_products_of_several_peers_have_the_bits_of_each_peers_own(
    dtype: torch.dtype, r: int, d_in: int, d_out: int
) -> None:
    generator = torch_stream(0, "products")
    of_peers = spans([17, 40, 5, 16, 90, 27, 3])
    for _ in range(20):
        x, g = (torch.randn(of_peers[-1].stop, d, generator=generator).to(dtype) for d in (d_in, d_out))
        w, bias = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((d_out, d_in), (d_out,)))
        a, b, own = (torch.randn(7, *shape, generator=generator) for shape in ((r, d_in), (d_out, r), (d_out, d_in)))

        def lora(x: Tensor, a: Tensor, b: Tensor, s: list[slice]) -> Tensor:
            return LoraLinear.apply(x, None, a, b, w, bias, s, 2.0)  # noqa: B023 - called at once

        whole = answers(lora, x, g, a, b, of_peers)
        heads = answers(lambda x, own, b, s: OwnLinear.apply(x, own.to(dtype), None, s), x, g, own, b, of_peers)
        for i, s in enumerate(of_peers):
            here = [slice(0, s.stop - s.start)]
            assert same(answers(lora, x[s], g[s], a[i : i + 1], b[i : i + 1], here), whole, s, i)
            alone = answers(
                lambda x, own, b, s: OwnLinear.apply(x, own.to(dtype), None, s), x[s], g[s], own[i : i + 1],
                b[i : i + 1], here,
            )  # fmt: skip
            assert same(alone, heads, s, i)
            assert torch.equal(dense(x[s], w, bias), dense(x, w, bias)[s])


Product = Callable[[Tensor, Tensor, Tensor, list[slice]], Tensor]


def answers(product: Product, x: Tensor, g: Tensor, a: Tensor, b: Tensor, s: list[slice]) -> list[Tensor | None]:
    """Returns the output of a product and the gradients of x and of the factors that are its peers' own."""
    leaves = [t.clone().requires_grad_() for t in (x, a, b)]
    y = product(*leaves, s)
    return [y.detach(), *torch.autograd.grad(y, leaves, g, allow_unused=True)]


def same(alone: Sequence[Tensor | None], whole: Sequence[Tensor | None], rows: slice, peer: int) -> bool:
    """Tells whether what one peer got alone is its part of what all got, to the bit."""
    parts = [*((t, rows) for t in whole[:2]), *((t, slice(peer, peer + 1)) for t in whole[2:])]
    return all(
        mine is None if theirs is None else mine is not None and torch.equal(mine, theirs[part])
        for mine, (theirs, part) in zip(alone, parts, strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("batch_size", [5, 17])
def test_a_peer_of_small_products_ends_with_the_same_bits_in_any_group(
    dtype: torch.dtype, schedule: str, rank: int, batch_size: int
) -> None:
    setting = replace(toy_setting(1, 4, batch_size, rank, schedule), base=toy_base(dtype))
    whole = trained(setting)
    for name, groups in GROUPS.items():
        assert not differing(whole, [trained(setting, ids) for ids in groups]), name


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["fp32", "bf16"])
def test_peers_of_two_blocks_of_the_embedded_encoder_end_with_the_same_bits_on_two_threads(dtype: torch.dtype) -> None:
    base = load_encoder(locate("all-MiniLM-L6-v2"), 3, "eager" if dtype == BF16 else "sdpa", dtype, seed=0)
    del base.model.get_submodule("bert.encoder.layer")[2:]  # type: ignore[attr-defined]
    data = token_data("bert", (16, 16), (9, 16))
    work = LocalWork(1, 16, steps=1)
    attention = "eager" if dtype == BF16 else "sdpa"
    setting = Setting(
        base, Lora(("query", "value"), 4, 8), SCHEDULES["lora"]("shared"), data, work, attention=attention
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert not differing(trained(setting), [trained(setting, [i]) for i in (0, 1)])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["bert, fp32", "bert, bf16", "distilbert, bf16, the seed's targets"])
def test_not_a_number_in_one_adapter_stays_with_its_peer(name: str, tmp_path: Path) -> None:
    setting = setting_of(CASES[name], tmp_path, rounds=2)
    sick = start_apart(setting.peers(), 0.02)
    sick.x[3, 5] = torch.nan
    start = sick.x[3].clone()
    learner = setting.stacked()
    skipped = [[p.skipped for p in learner.train(sick, setting.schedule(t), t).values()] for t in (1, 2)]
    assert not differing(trained(setting), [sick], but=[3])
    assert equal_bits(sick.x[3], start)
    assert skipped == [[0, 0, 0, 1, 0, 0, 0]] * 2  # its 16 rows are one batch


@pytest.mark.parametrize("steps", [None, 3], ids=["an epoch", "3 steps"])
def test_not_a_number_in_the_rows_of_one_peer_stays_with_it(steps: int | None) -> None:
    setting, sick = toy_setting(2, steps), toy_setting(2, steps)
    shard = sick.data.train[3]
    assert isinstance(shard.source, VectorSource)
    shard.source.inputs[torch.from_numpy(shard.rows)] = torch.nan
    peers = trained(sick)
    assert not differing(trained(setting), [peers], but=[3])
    assert equal_bits(peers.x[3], start_apart(setting.peers(), 0.02).x[3])
    assert peers.counters[3].tolist() == [0, 0, 0, 0, 2 * (steps or 1)]
    assert not any(moments[3].any() for moments in peers.optimizer.values())


def read_in(setting: Setting, ids: Iterable[int] | None = None) -> Counter[tuple[int, ...]]:
    """Counts, for every row that attention reads, its tokens and the length it is padded to."""
    seen = Counter[tuple[int, ...]]()
    learner = setting.stacked()

    def note(module: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        packing = learner.current.packing
        assert packing is not None
        lengths = np.concatenate(packing.lengths)
        for bucket in packing.buckets:
            width = len(bucket.tokens) // len(bucket.rows)
            seen.update((int(length), width) for length in lengths[bucket.numbers])

    with learner.model.register_forward_pre_hook(note, with_kwargs=True):
        train(setting, learner, setting.peers(ids))
    return seen


def test_how_far_a_row_is_padded_depends_on_that_row_alone(tmp_path: Path) -> None:
    setting = setting_of(CASES["bert, fp32, frozen A, batches of 5"], tmp_path)
    alone = sum((read_in(setting, [i]) for i in setting.data.train), Counter[tuple[int, ...]]())
    assert read_in(setting) == alone
    assert sum(alone.values()) == sum(UNEVEN)
    assert all(width % BUCKET == 0 and 0 <= width - length < BUCKET for length, width in alone)
