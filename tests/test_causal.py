"""Causal language models in the engine: the model's own logits, plain PEFT's gradients, and nobody else's rows."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from decoders import TARGETS, causal_peers, causal_rows, load_tiny, write_decoder
from dfl_lora.build import example_rows
from dfl_lora.errors import UserError
from dfl_lora.learners.work import LocalWork
from dfl_lora.models import causal
from dfl_lora.models.base import STREAM_ATTENTION
from dfl_lora.models.causal import check_alike, labelled, own_logits, token_losses
from dfl_lora.models.packing import ROW_BLOCK, Packing
from dfl_lora.models.placement import Lora, place
from dfl_lora.peers import Peers
from dfl_lora.schedules import SCHEDULES, Phase
from encoders import Setting, distances, equal_bits, start_apart

UNEVEN = (13, 3, 8)
CAPPED = ("gemma2",)
"""Capped scores go by transformers' own eager attention, whose masks are not finite in float64."""
CPU = torch.device("cpu")


def setting_of(
    family: str, folder: Path, *, schedule: str = "lora", dtype: torch.dtype = torch.float32, attention: str = "sdpa",
    work: LocalWork | None = None, dropout: bool = False,
) -> Setting:  # fmt: skip
    plain = STREAM_ATTENTION if dropout else "eager" if family in CAPPED else attention
    base = load_tiny(write_decoder(family, folder), plain, dtype)
    work = work or LocalWork(2, 4, epochs=1, learning_rate=5e-3)
    lora = Lora(TARGETS[family], 4, 8, 0.2 if dropout else 0.0)
    return Setting(
        base, lora, SCHEDULES[schedule]("shared"), causal_peers(UNEVEN), replace(work, base_dropout=dropout),
        torch.float64 if dtype == torch.float64 else torch.float32, attention=attention, objective="causal_lm",
    )  # fmt: skip


def trained(
    setting: Setting, learner: str = "stacked", group_tokens: int = 4096, ids: list[int] | None = None
) -> Peers:
    peers = start_apart(setting.peers(ids), 0.05)
    taught = setting.stacked(group_tokens) if learner == "stacked" else setting.sequential()
    for t in (1, 2):
        taught.train(peers, setting.schedule(t), t)
    return peers


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", TARGETS)
def test_the_engine_reads_as_the_model_itself(family: str, attention: str, tmp_path: Path) -> None:
    setting = setting_of(family, tmp_path, attention=attention)
    rows = example_rows(setting.base.model)  # type: ignore[arg-type]
    learner = setting.stacked()
    check_alike(learner.model, rows, own_logits(setting.base.model, rows), learner.current)  # type: ignore[arg-type]


def test_a_model_that_the_engine_reads_otherwise_is_refused(tmp_path: Path) -> None:
    setting = setting_of("llama", tmp_path)
    rows = example_rows(setting.base.model)  # type: ignore[arg-type]
    own = own_logits(setting.base.model, rows)  # type: ignore[arg-type]
    learner = setting.stacked()
    with pytest.raises(UserError, match="cannot read models of the family llama"):
        check_alike(learner.model, rows, [own[0] * 1.01, own[1]], learner.current)  # type: ignore[arg-type]


def test_a_base_with_damaged_weights_is_told(tmp_path: Path) -> None:
    setting = setting_of("llama", tmp_path)
    rows = example_rows(setting.base.model)  # type: ignore[arg-type]
    learner = setting.stacked()
    with pytest.raises(UserError, match="weights are damaged"):
        check_alike(learner.model, rows, [torch.full((13, 2), torch.nan)] * 2, learner.current)  # type: ignore[arg-type]


@pytest.mark.parametrize("schedule", ["lora", "freeze_a", "core"])
@pytest.mark.parametrize("family", TARGETS)
def test_the_engine_and_plain_peft_end_with_the_same_peers(family: str, schedule: str, tmp_path: Path) -> None:
    dtype, near = (torch.float32, 1e-5) if family in CAPPED else (torch.float64, 1e-10)
    setting = setting_of(family, tmp_path, schedule=schedule, dtype=dtype)
    one, other = trained(setting), trained(setting, "sequential")
    far = {name: d for name, d in distances(one, other).items() if not d < near}
    assert not far
    assert torch.equal(one.counters, other.counters)
    answers = [learner.evaluate(one) for learner in (setting.stacked(), setting.sequential())]
    for i in one.ids:
        assert answers[0][i].loss == pytest.approx(answers[1][i].loss, rel=near)
        assert answers[0][i].truth.tolist() == answers[1][i].truth.tolist()
        assert answers[0][i].given.tolist() == answers[1][i].given.tolist()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_in_float32_they_end_within_1e_5(family: str, tmp_path: Path) -> None:
    setting = setting_of(family, tmp_path)
    assert max(distances(trained(setting), trained(setting, "sequential")).values()) < 1e-5


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_with_dropout_both_draw_the_same_masks(family: str, tmp_path: Path) -> None:
    setting = setting_of(family, tmp_path, dtype=torch.float64, dropout=True)
    dropped = trained(setting)
    assert max(distances(dropped, trained(setting, "sequential")).values()) < 1e-10
    plain = setting_of(family, tmp_path / "plain", dtype=torch.float64)
    assert max(distances(dropped, trained(plain)).values()) > 1e-3


@pytest.mark.parametrize("learner", ["stacked", "sequential"])
def test_a_step_of_several_parts_is_the_step_on_all_their_rows(learner: str, tmp_path: Path) -> None:
    whole = setting_of("llama", tmp_path, dtype=torch.float64, work=LocalWork(2, 6, steps=2, learning_rate=5e-3))
    parts = replace(whole, work=replace(whole.work, batch_size=2, accumulation=3))
    assert max(distances(trained(whole, learner), trained(parts, learner)).values()) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_a_peer_ends_with_the_same_bits_in_any_group_and_at_any_budget(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    attention = "eager" if dtype == torch.bfloat16 else "sdpa"
    work = LocalWork(2, 3, accumulation=2, epochs=1, learning_rate=5e-3)
    setting = setting_of(family, tmp_path, dtype=dtype, attention=attention, work=work)
    whole = trained(setting)
    for i in whole.ids:
        assert equal_bits(trained(setting, ids=[i]).x[0], whole.x[i]), i
    for group_tokens in (1, 150):
        assert equal_bits(trained(setting, group_tokens=group_tokens).x, whole.x)


def losses_of(setting: Setting, change: Callable[[Tensor], None] = lambda tokens: None) -> list[Tensor]:
    """Returns the losses of all peers' tokens in one pass, after a change to the tokens of peer 0's batch."""
    learner, peers = setting.stacked(), start_apart(setting.peers(), 0.2)
    batches = [setting.work.order.batch(shard, i, 0) for i, shard in setting.data.train.items()]
    change(batches[0].inputs["input_ids"])
    leaves = learner.leaves(peers, peers.x, peers.x, Phase(0, frozenset(), frozenset()))
    with torch.no_grad():
        return learner.forward(batches, leaves).losses


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", TARGETS)
def test_packed_rows_do_not_see_each_other_nor_what_follows(family: str, attention: str, tmp_path: Path) -> None:
    """The last token of the first row of peer 0 is changed: the loss of no token changes but that before it."""
    setting = setting_of(family, tmp_path, attention=attention)
    batch = setting.work.order.batch(setting.data.train[0], 0, 0)
    last = int(batch.lengths[0]) - 1

    def change(tokens: Tensor) -> None:
        tokens[last] = (tokens[last] + 1) % 256

    before, after = losses_of(setting), losses_of(setting, change)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))  # targets are kept: only inputs changed

    def earlier(tokens: Tensor) -> None:
        tokens[0] = (tokens[0] + 1) % 256

    moved = losses_of(setting, earlier)
    assert all(torch.equal(a, b) for a, b in zip(before[1:], moved[1:], strict=True))
    own = int((batch.labels[: batch.lengths[0]] >= 0).sum())
    assert not torch.equal(before[0][:own], moved[0][:own])
    assert torch.equal(before[0][own:], moved[0][own:])


@pytest.mark.parametrize("chunk", [16, 48, 1000])
def test_losses_in_chunks_are_the_losses_of_all_logits(chunk: int) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(96, 12, generator=generator, dtype=torch.float64, requires_grad=True)
    weight, targets = torch.randn(40, 12, generator=generator, dtype=torch.float64), torch.arange(96) % 40
    weights = torch.rand(96, generator=generator, dtype=torch.float64)
    losses, answers = token_losses(hidden, targets, lambda x: 5 * torch.tanh(x @ weight.T), chunk)
    logits = 5 * torch.tanh(hidden @ weight.T)
    expected = F.cross_entropy(logits, targets, reduction="none")
    assert torch.allclose(losses, expected, rtol=1e-12)
    assert torch.equal(answers, logits.argmax(1))
    mine, theirs = (torch.autograd.grad((own * weights).sum(), hidden)[0] for own in (losses, expected))
    assert torch.allclose(mine, theirs, rtol=1e-10, atol=1e-14)


def test_no_logits_are_made_of_tokens_that_are_not_learnt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting, seen = setting_of("llama", tmp_path), list[int]()
    plain = causal.head_of

    def counted(model: object) -> Callable[[Tensor], Tensor]:
        head = plain(model)  # type: ignore[arg-type]
        return lambda hidden: (seen.append(len(hidden)), head(hidden))[1]  # type: ignore[func-returns-value]

    monkeypatch.setattr(causal, "head_of", counted)
    monkeypatch.setattr(causal, "CHUNK_NUMBERS", 32 * 290)
    losses = losses_of(setting)
    learnt = sum(len(own) for own in losses)
    assert sum(seen) <= learnt + len(losses) * (ROW_BLOCK - 1) and max(seen) <= 32


def test_learnt_tokens_lie_in_blocks_of_their_peer() -> None:
    lengths = [np.array([5, 9]), np.array([30])]
    packing = Packing(lengths, [9, 30], CPU, torch.float32, causal=True)
    labels = [np.full(14, -100), np.arange(30)]
    labels[0][[3, 12]] = 7, 8
    found = labelled(packing, labels)
    assert found.counts == [2, 30]
    assert len(found.places) == 16 + 32
    assert found.places[found.real].tolist() == [3, 12, *range(16, 46)]
    assert found.targets[found.real].tolist() == [7, 8, *range(30)]
    assert found.places[2:16].tolist() == [0] * 14 and found.places[46:].tolist() == [16] * 2


def test_the_output_layer_carries_no_lora(tmp_path: Path) -> None:
    base = load_tiny(write_decoder("llama", tmp_path))
    with pytest.raises(UserError, match="'lm_head' belongs to the output"):
        place(base.model, base.prefix, Lora(("q_proj", "lm_head"), 4, 8), head=False)
    everything = place(base.model, base.prefix, Lora("all-linear", 4, 8), head=False)
    assert "lm_head" not in everything.modules and not everything.head and len(everything.modules) == 14


def test_batches_of_tokens_are_cut_into_parts_by_rows() -> None:
    source = causal_rows([5, 8, 6, 7, 9])
    batch = source.collate(np.arange(5))
    parts = batch.parts(2)
    assert [part.lengths.tolist() for part in parts] == [[5, 8], [6, 7], [9]]
    assert torch.cat([part.labels for part in parts]).tolist() == batch.labels.tolist()
    assert sum(part.num_learnt for part in parts) == batch.num_learnt
    assert batch.parts(5) == [batch]
