"""Evaluation reads each distinct adapter once, and passes hold what their budget allows."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dfl_lora.build import build
from dfl_lora.data.batches import Batch, Shard
from dfl_lora.errors import UserError
from dfl_lora.learners.stacked import StackedLearner, passes
from dfl_lora.learners.work import LocalWork, PeerData
from dfl_lora.models.packing import filled
from dfl_lora.models.placement import Lora
from dfl_lora.reading import resolve
from dfl_lora.schedules import SCHEDULES
from encoders import Setting, start_apart, toy_base, toy_data
from tiny import toy as toy_recipe


def toy() -> Setting:
    data, lora, work = toy_data((20, 20, 20, 20)), Lora(("first", "second"), 4, 8), LocalWork(1, 8, steps=1)
    return Setting(toy_base(), lora, SCHEDULES["lora"]("shared"), data, work, torch.float64)


def rows_read(learner: StackedLearner) -> list[int]:
    """Returns a list that gets, for each pass, the number of rows that the model reads."""
    read = list[int]()

    def note(*_: object) -> None:
        assert learner.current.packing is not None
        read.append(sum(map(len, learner.current.packing.lengths)))

    learner.model.register_forward_pre_hook(note)
    return read


def test_peers_with_one_adapter_are_evaluated_once_and_answer_alike() -> None:
    setting = toy()
    learner, peers = setting.stacked(), start_apart(setting.peers(), 0.3)
    apart, read = learner.evaluate(peers), rows_read(learner)
    peers.x[2] = peers.x[0]
    answers = learner.evaluate(peers)
    assert sum(read) == 3 * 8
    assert answers[2] is answers[0]
    for i in (0, 1, 3):
        assert answers[i].loss == apart[i].loss and (answers[i].given == apart[i].given).all()


def test_peers_with_one_adapter_and_rows_of_their_own_are_evaluated_each() -> None:
    setting = toy()
    shard = setting.data.validation[0]
    others = Shard(shard.source, np.arange(8))
    setting = Setting(
        setting.base, setting.lora, setting.schedule,
        PeerData(setting.data.train, {**setting.data.validation, 1: others}), setting.work, torch.float64,
    )  # fmt: skip
    learner, peers = setting.stacked(), setting.peers()
    read = rows_read(learner)
    answers = learner.evaluate(peers)
    assert sum(read) == 2 * 8
    assert answers[0] is answers[2] is answers[3] and answers[1] is not answers[0]


@given(st.lists(st.integers(1, 300), min_size=1, max_size=30), st.integers(1, 500))
def test_a_pass_holds_at_most_its_budget_or_one_peer_and_no_less_than_it_can(counts: list[int], budget: int) -> None:
    batches = {row: Batch({}, np.array([count]), torch.zeros(1), count, {}) for row, count in enumerate(counts)}
    found = list(passes(batches, budget))
    assert [row for rows in found for row in rows] == list(batches)
    used = [sum(filled(counts[row]) for row in rows) for rows in found]
    assert all(tokens <= budget or len(rows) == 1 for tokens, rows in zip(used, found, strict=True))
    for tokens, following in zip(used, found[1:], strict=False):
        assert tokens + filled(counts[following[0]]) > budget


def test_a_learner_tells_its_clock_of_its_parts() -> None:
    setting, parts = toy(), list[str]()
    learner, peers = setting.stacked(), setting.peers()

    def clock(part: str) -> nullcontext[None]:
        parts.append(part)
        return nullcontext()

    learner.clock = clock
    learner.train(peers, setting.schedule(1), 1)
    assert parts == ["data", "forward", "backward", "optimiser"]


def test_a_device_that_is_not_there_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match=r"compute\.device is cuda, but torch finds no GPU here; set it to cpu or auto"):
        build(resolve(toy_recipe(compute={"device": "cuda"})))
