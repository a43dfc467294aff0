"""The start of A at gradients: against the dense gradients of all peers, and what a run makes of it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dfl_lora.build import Federation, build
from dfl_lora.gradient_start import LOOKS, spanning, start_at_gradients
from dfl_lora.models.toy import ToyModel
from dfl_lora.peer_data import TOY_INPUTS, TOY_LABELS
from dfl_lora.reading import resolve
from dfl_lora.recipe import Recipe
from dfl_lora.simulate import run_recipe
from tiny import toy

R = 2


def recipe_of(**parts: Any) -> Recipe:
    lora = {"r": R, "target_modules": ["first", "second"], "init": "gradient_svd"} | parts.pop("lora", {})
    return resolve(toy(lora=lora, **parts))


def dense(federation: Federation) -> dict[str, Tensor]:
    """The mean over peers of the gradients of the whole weights, over the first batches of each, by plain torch."""
    model, learner = ToyModel(TOY_INPUTS, TOY_LABELS, federation.recipe.train.seed).eval(), federation.learner
    for i in federation.peers.ids:
        for cursor in range(LOOKS):
            batch = learner.work.order.batch(learner.data.train[i], i, cursor)  # type: ignore[attr-defined]
            F.cross_entropy(model(**batch.padded()), batch.labels).backward()  # type: ignore[no-untyped-call]
    share = 1 / (LOOKS * len(federation.peers))
    weights = {name: getattr(model.encoder, name).weight for name in ("first", "second")}
    return {f"encoder.{name}": weight.grad.double() * share for name, weight in weights.items()}


@pytest.mark.parametrize("learner", ["stacked", "sequential"])
@pytest.mark.parametrize("schedule", ["freeze_a", "lora"])
def test_rows_span_what_the_gradients_of_all_peers_span_best(schedule: str, learner: str) -> None:
    """How much of them they hold, against the best that as many rows can; the drawn start holds far less."""
    federation = build(recipe_of(method={"schedule": schedule}, train={"local": {"steps": LOOKS}}), learner=learner)
    drawn = {name: value.clone() for name, value in federation.peers.adapter(0).items()}
    start_at_gradients(federation)
    for row in range(len(federation.peers)):
        adapter = federation.peers.adapter(row)
        for name, gradient in dense(federation).items():
            best = torch.linalg.svdvals(gradient)[:R].norm()
            a = adapter[f"{name}.A"].double()
            assert (gradient @ a.T).norm() > 0.95 * best
            assert (gradient @ drawn[f"{name}.A"].double().T).norm() < 0.9 * best
            assert torch.allclose(a @ a.T, torch.eye(R, dtype=torch.float64), atol=1e-6)
            assert not adapter[f"{name}.B"].any()
            assert torch.equal(adapter[f"{name}.A"], federation.peers.adapter(0)[f"{name}.A"])
        assert torch.equal(adapter["classifier.weight"], drawn["classifier.weight"])


@pytest.mark.parametrize("learner", ["stacked", "sequential"])
def test_of_a_core_both_factors_span_what_the_gradients_of_all_peers_span_best(learner: str) -> None:
    """B' G A' is nearly diagonal, the largest first, and has nearly all that r by r numbers can have of G."""
    federation = build(recipe_of(method={"schedule": "core"}, train={"local": {"steps": LOOKS}}), learner=learner)
    assert not federation.peers.x[:, federation.peers.layout.spans({"core"})[0]].any()
    start_at_gradients(federation)
    for row in range(len(federation.peers)):
        adapter = federation.peers.adapter(row)
        for name, gradient in dense(federation).items():
            a, b = adapter[f"{name}.A"].double(), adapter[f"{name}.B"].double()
            held = b.T @ gradient @ a.T
            assert held.norm() > 0.9 * torch.linalg.svdvals(gradient)[:R].norm()
            assert held.norm() > (1 - 1e-4) * (b.T @ gradient).norm()
            assert (held - held.diagonal().diag()).norm() < 1e-4 * held.norm()
            assert held[0, 0] > held[1, 1] > 0
            for gram in (a @ a.T, b.T @ b):
                assert torch.allclose(gram, torch.eye(R, dtype=torch.float64), atol=1e-6)
            assert not adapter[f"{name}.core"].any()


def test_nothing_but_the_start_is_changed() -> None:
    federation = build(recipe_of(train={"local": {"epochs": 1}}, method={"correction": "quasi_global"}))
    start_at_gradients(federation)
    peers = federation.peers
    assert not peers.counters.any() and not any(state.any() for state in peers.optimizer.values())
    assert all(torch.equal(peers.memory["start"], peers.x) for _ in peers) and peers.x.any()
    assert not peers.memory["gradient_shift"].any()
    assert federation.learner.work.epochs == 1  # type: ignore[attr-defined]


def test_passes_of_other_sizes_give_the_same_bits() -> None:
    alone, together = (
        build(recipe_of(method={"schedule": "freeze_a"}, compute={"group_tokens": tokens})) for tokens in (1, 4096)
    )
    start_at_gradients(alone)
    start_at_gradients(together)
    assert torch.equal(alone.peers.common.flat, together.peers.common.flat)


@pytest.mark.parametrize("schedule", ["freeze_a", "lora", "core"])
def test_a_run_begins_there_goes_on_there_and_counts_what_it_sent(schedule: str, tmp_path: Path) -> None:
    recipe = recipe_of(method={"schedule": schedule}, train={"rounds": 3}, output={"checkpoint_every": 1})
    whole = run_recipe(recipe, tmp_path / "whole", [], resume=False, overwrite=False)
    run_recipe(recipe, tmp_path / "again", [], resume=False, overwrite=False)
    lines = (tmp_path / "again" / "rounds.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "again" / "summary.json").unlink()
    resumed = run_recipe(recipe, tmp_path / "again", [], resume=True, overwrite=False)
    for key in ("accuracy", "consensus_error", "bytes_sent_per_peer", "recipe_digest"):
        assert whole[key] == resumed[key]
    federation = build(recipe)
    sent = start_at_gradients(federation)
    numbers = sum(value.numel() for name, value in federation.peers.adapter(0).items() if name[-2:] in (".A", ".B"))
    assert sent == 2 * 4 * numbers  # to two other peers, four bytes each
    assert whole["bytes_sent_per_peer"] == sent + sum(json.loads(line)["bytes_sent_per_peer"] for line in lines)


def test_fewer_outputs_than_the_rank_leave_columns_of_zeros() -> None:
    columns = spanning(torch.randn(2, 5, dtype=torch.float64), "B")
    assert columns.shape == (2, 5) and not columns[:, 2:].any()
    assert torch.allclose(columns @ columns.T, torch.eye(2, dtype=torch.float64))
    assert spanning(torch.zeros(3, 7, dtype=torch.float64), "A").shape == (3, 7)
