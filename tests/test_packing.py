"""Packing: every token and row of a pass has one place, and rows do not see each other."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dfl_lora.data.batches import Batch
from dfl_lora.learners.work import LocalWork
from dfl_lora.models.attention import KERNELS
from dfl_lora.models.firsts import FirstsOnly
from dfl_lora.models.layers import Pass, PeerLinear, install
from dfl_lora.models.packing import BUCKET, PASS_BLOCK, ROW_BLOCK, Packing
from dfl_lora.models.placement import Lora, place
from dfl_lora.schedules import SCHEDULES, Phase
from dfl_lora.streams import torch_stream
from encoders import Family, Setting, load, start_apart, token_data, write_encoder

CPU = torch.device("cpu")
LENGTHS = st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=20), min_size=1, max_size=5)


def packed(lengths: list[list[int]], dtype: torch.dtype = torch.float32) -> Packing:
    return Packing([np.array(own) for own in lengths], [max(own) for own in lengths], CPU, dtype)


@given(LENGTHS)
@settings(max_examples=60, deadline=None)
def test_each_token_has_a_place_of_its_own_among_its_peers_blocks(lengths: list[list[int]]) -> None:
    packing = packed(lengths)
    columns = [torch.arange(sum(own)) + 1000 * (peer + 1) for peer, own in enumerate(lengths)]
    whole = packing.pack(columns, -1)
    assert len(whole) % ROW_BLOCK == 0 == packing.row_spans[-1].stop % ROW_BLOCK
    for span, own, counts in zip(packing.token_spans, columns, lengths, strict=True):
        assert torch.equal(whole[span][: len(own)], own)
        assert (whole[span][len(own) :] == -1).all() and span.stop - span.start - len(own) in range(ROW_BLOCK)
        within = torch.cat([torch.arange(count) for count in counts])
        assert torch.equal(torch.from_numpy(packing.positions[span])[: len(own)], within)
    firsts = whole[packing.firsts]
    for span, own, counts in zip(packing.row_spans, columns, lengths, strict=True):
        starts = np.cumsum(counts) - counts
        assert torch.equal(firsts[span][: len(counts)], own[torch.from_numpy(starts)])
        assert (firsts[span][len(counts) :] == own[0]).all()


@given(LENGTHS)
@settings(max_examples=60, deadline=None)
def test_buckets_hold_every_row_once_and_lay_back_what_they_gathered(lengths: list[list[int]]) -> None:
    packing, flat = packed(lengths), [count for own in lengths for count in own]
    whole = torch.randn(packing.num_tokens, 2, 3, generator=torch_stream(0, "whole"))
    back, places = torch.full_like(whole, torch.nan), set[int]()
    for bucket in packing.buckets:
        tokens, width = bucket.gather(whole, False), len(bucket.tokens) // len(bucket.rows)
        assert tokens.shape == (len(bucket.rows), 2, width, 3) and tokens.is_contiguous()
        assert all(0 <= width - flat[number] < BUCKET for number in bucket.numbers)
        hidden = bucket.gather(whole, False, hidden=7.0)
        if bucket.mask is not None:
            beyond = (bucket.mask == -torch.inf).expand(-1, 2, 1, -1).transpose(2, 3).expand(-1, -1, -1, 3)
            assert (hidden[beyond] == 7.0).all() and torch.equal(hidden[~beyond], tokens[~beyond])
        bucket.lay(tokens, back, False)
        places |= set(bucket.numbers.tolist())
    assert places == set(range(len(flat)))
    for span, own in zip(packing.token_spans, lengths, strict=True):
        assert torch.equal(back[span][: sum(own)], whole[span][: sum(own)])
        assert back[span][sum(own) :].isnan().all()


def test_passes_in_bfloat16_come_in_few_sizes() -> None:
    assert {packed([[n]], torch.bfloat16).num_tokens for n in (1, 100, 128)} == {PASS_BLOCK}
    assert packed([[129]], torch.bfloat16).num_tokens == 2 * PASS_BLOCK
    assert packed([[129]]).num_tokens == 144


def setting_of(family: Family, folder: Path, attention: str = "sdpa") -> Setting:
    targets = ("q_lin", "v_lin") if family == "distilbert" else ("query", "value")
    base, data = load(write_encoder(family, folder)), token_data(family, (6, 5, 7))
    work = LocalWork(1, 8, steps=1)
    return Setting(base, Lora(targets, 4, 8), SCHEDULES["lora"]("shared"), data, work, attention=attention)


def logits_of(setting: Setting, batches: list[Batch], *, whole: bool = False) -> list[Tensor]:
    """Returns each peer's logits of one pass; with `whole` the last layer is the base's own, for all tokens."""
    learner, peers = setting.stacked(), start_apart(setting.peers(), 0.2)
    if whole:
        for module in list(learner.model.modules()):
            if isinstance(module, nn.ModuleList) and isinstance(module[-1], FirstsOnly):
                module[-1] = Whole(module[-1].layer, learner.current)
    leaves = learner.leaves(peers, peers.x, peers.x, Phase(0, frozenset(), frozenset()))
    with torch.no_grad():
        return learner.forward(batches, leaves).logits or []


class Whole(nn.Module):
    """The last layer for all tokens, of which the first ones are then taken."""

    def __init__(self, layer: nn.Module, current: Pass) -> None:
        super().__init__()
        self.layer, self.current = layer, current

    def forward(self, hidden: Tensor, *_: object, **__: object) -> Tensor:
        assert self.current.packing is not None
        result: Tensor = self.layer(hidden, None, current=self.current)
        self.current.view = "rows"
        return result[:, self.current.packing.firsts].transpose(0, 1)


def batches_of(setting: Setting) -> list[Batch]:
    return [setting.work.order.batch(shard, i, 0) for i, shard in setting.data.train.items()]


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_the_last_layer_for_first_tokens_alone_is_the_last_layer(family: Family, tmp_path: Path) -> None:
    setting = setting_of(family, tmp_path)
    for narrow, whole in zip(
        logits_of(setting, batches_of(setting)), logits_of(setting, batches_of(setting), whole=True), strict=True
    ):
        assert torch.allclose(narrow, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
@pytest.mark.parametrize("attention", KERNELS)
def test_rows_of_a_pass_do_not_see_each_other(family: Family, attention: str, tmp_path: Path) -> None:
    setting = setting_of(family, tmp_path, attention)
    batches = batches_of(setting)
    before = logits_of(setting, batches)
    starts = np.cumsum(batches[1].lengths) - batches[1].lengths
    row = slice(int(starts[2]), int(starts[2] + batches[1].lengths[2]))
    batches[1].inputs["input_ids"][row] = batches[1].inputs["input_ids"][row].flip(0)
    after = logits_of(setting, batches)
    changed = [[not torch.equal(a, b) for a, b in zip(*pair, strict=True)] for pair in zip(before, after, strict=True)]
    assert [row for rows in changed for row in rows] == [number == 6 + 2 for number in range(6 + 5 + 7)]


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_padded_rows_give_the_logits_of_packed_ones(family: Family, tmp_path: Path) -> None:
    setting = setting_of(family, tmp_path)
    learner, peers, batches = setting.stacked(), start_apart(setting.peers(), 0.2), batches_of(setting)
    learner.packed = False
    with torch.no_grad():
        leaves = learner.leaves(peers, peers.x, peers.x, Phase(0, frozenset(), frozenset()))
        padded = learner.forward(batches, leaves).logits or []
    assert learner.current.packing is not None
    assert learner.current.packing.num_tokens > packed([b.lengths.tolist() for b in batches]).num_tokens
    for one, other in zip(padded, logits_of(setting, batches), strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)


def test_both_kernels_of_attention_give_the_same_logits(tmp_path: Path) -> None:
    ends = [
        logits_of(setting_of("bert", tmp_path / kernel, kernel), batches_of(setting_of("bert", tmp_path / kernel)))
        for kernel in KERNELS
    ]
    for one, other in zip(*ends, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)


class OfConv1D(nn.Module):
    """A model with GPT-2's kind of linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Conv1D(24, 16), nn.Linear(24, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        result: Tensor = self.second(torch.tanh(self.first(inputs)))
        return result


def test_lora_on_conv1d_is_lora_on_the_transposed_weight() -> None:
    torch.manual_seed(0)
    model, x = OfConv1D().double(), torch.randn(32, 16, dtype=torch.float64)
    plain, first = model(x), model.first
    placement = place(model, "encoder", Lora(("first",), 4, 8))
    assert dict(placement.modules) == {"first": (16, 24)}
    current = Pass(packing=packed([[1] * 16, [1] * 16], torch.float64))
    install(model, current, 2.0, 0.0, False)
    a, b = torch.randn(2, 4, 16, dtype=torch.float64), torch.randn(2, 24, 4, dtype=torch.float64, requires_grad=True)
    assert torch.allclose(model(x), plain, rtol=1e-12)
    current.tensors = {"first.A": a, "first.B": b}
    assert isinstance(model.first, PeerLinear)
    for i, s in enumerate((slice(0, 16), slice(16, 32))):
        merged = torch.tanh(x[s] @ (first.weight + 2.0 * (b[i] @ a[i]).T) + first.bias)
        expected = merged @ model.second.base.weight.T + model.second.base.bias  # type: ignore[union-attr, operator]
        assert torch.allclose(model(x)[s], expected, rtol=1e-10)
    (gradient,) = torch.autograd.grad(model(x).square().sum(), b)
    assert torch.isfinite(gradient).all() and gradient.abs().min() > 0


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_all_tensors_of_a_pass_are_on_the_device_of_the_learner(family: Family, tmp_path: Path) -> None:
    """The device `meta` has shapes and no numbers, and refuses to meet tensors of another device."""
    setting, meta = setting_of(family, tmp_path), torch.device("meta")
    learner, peers = setting.stacked(), setting.peers()
    learner.model.to(meta)
    learner.device = meta
    x, gradients = (torch.empty(peers.x.shape, device=meta) for _ in range(2))
    peers.common = peers.common.with_flat(peers.common.flat.to(meta))
    losses = learner.forward(batches_of(setting), learner.leaves(peers, x, gradients, setting.schedule(1))).means
    losses.sum().backward()  # type: ignore[no-untyped-call]
    assert losses.device == meta and losses.shape == (3,)
