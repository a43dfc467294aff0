"""Combining in product space: against dense products, and against what each is to minimise."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dfl_lora.build import build
from dfl_lora.combine import Inbox, mean
from dfl_lora.errors import UserError
from dfl_lora.graphs import GRAPHS
from dfl_lora.mixing import Row
from dfl_lora.networks.memory import MemoryNetwork
from dfl_lora.peers import Peers
from dfl_lora.products import COMBINES, agreed, lora_fair, product, rotated
from dfl_lora.reading import resolve
from dfl_lora.recipe import MethodPart
from dfl_lora.rounds import Method, mix, rounds
from dfl_lora.schedules import SCHEDULES
from dfl_lora.simulate import run_recipe
from dfl_lora.tensors import Layout, Tensors
from tiny import text, toy

R, D_IN, D_OUT = 2, 9, 7
LAYOUT = Layout.of({"q.A": ("A", (R, D_IN)), "q.B": ("B", (D_OUT, R)), "head": ("head", (3,))})
OTHERS = {name: combine for name, combine in COMBINES.items() if name != "mean"}
every_combine = pytest.mark.parametrize("combine", OTHERS.values(), ids=OTHERS)


def drawn(seed: int, layout: Layout = LAYOUT) -> Tensors:
    return Tensors(torch.randn(layout.size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), layout)


def inbox_of(values: list[Tensors], weight: float = 0.3) -> Inbox:
    row = Row(0, dict.fromkeys(range(1, len(values)), weight))
    return Inbox.receive(row, values[0], values[0], dict(enumerate(values[1:], 1)))


def of(value: Tensors) -> Tensor:
    return value["q.B"] @ value["q.A"]


def mean_product(inbox: Inbox) -> Tensor:
    own = 1 - sum(inbox.row.weights[j] for j in inbox.received)
    return own * of(inbox.own) + sum(inbox.row.weights[j] * of(v) for j, v in inbox.received.items())


def turn(value: Tensors, seed: int) -> Tensors:
    """The same product with factors of another gauge: a rotation of the space between them."""
    q, _ = torch.linalg.qr(torch.randn(R, R, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    turned = value.with_flat(value.flat.clone())
    turned["q.A"].copy_(q @ value["q.A"])
    turned["q.B"].copy_(value["q.B"] @ q.T)
    return turned


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 3))
def test_product_is_the_best_of_its_rank(seed: int, num_neighbours: int) -> None:
    inbox = inbox_of([drawn(seed + i) for i in range(num_neighbours + 1)], 0.25)
    p = mean_product(inbox)
    u, s, vt = torch.linalg.svd(p)
    assert torch.allclose(of(product(inbox)), u[:, :R] * s[:R] @ vt[:R], atol=1e-10)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 4), st.integers(1, 4))
def test_product_is_the_best_of_its_rank_in_any_shape(seed: int, r: int, d_in: int, d_out: int) -> None:
    """Also where r is above the inputs or outputs of a module, as on a head of two labels."""
    layout = Layout.of({"q.A": ("A", (r, d_in)), "q.B": ("B", (d_out, r))})
    values = [drawn(seed + i, layout) for i in range(3)]
    p = mean_product(inbox_of(values))
    u, s, vt = torch.linalg.svd(p, full_matrices=False)
    assert torch.allclose(of(product(inbox_of(values))), u[:, :r] * s[:r] @ vt[:r], atol=1e-9)
    assert of(lora_fair(inbox_of(values))).isfinite().all() and of(rotated(inbox_of(values))).isfinite().all()


def test_product_keeps_the_own_gauge() -> None:
    """Factors that agree in their products come back as they were, and not as an SVD would have them."""
    a, _ = torch.linalg.qr(torch.randn(D_IN, R, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    own = drawn(0)
    own["q.A"].copy_(1.7 * a.T)
    found = product(inbox_of([own, turn(own, 3), turn(own, 4)]))
    assert torch.allclose(found["q.A"], own["q.A"], atol=1e-10) and torch.allclose(found["q.B"], own["q.B"], atol=1e-10)


def test_lora_fair_is_nearest_to_the_mean_product_with_the_mean_of_a() -> None:
    inbox = inbox_of([drawn(i) for i in range(3)])
    found, p = lora_fair(inbox), mean_product(inbox)
    a = mean(inbox)["q.A"]
    assert torch.allclose(found["q.A"], a, atol=1e-12)
    best = torch.linalg.lstsq(a.T, p.T).solution.T
    assert torch.allclose(found["q.B"], best, atol=1e-10)
    assert (of(found) - p).norm() < (of(mean(inbox)) - p).norm()


def test_rotated_sees_through_the_gauge_of_neighbours() -> None:
    own = drawn(0)
    found = rotated(inbox_of([own, turn(own, 3), turn(own, 4)]))
    assert torch.allclose(found.flat, own.flat, atol=1e-10)
    assert not torch.allclose(mean(inbox_of([own, turn(own, 3)]))["q.A"], own["q.A"], atol=0.1)


@every_combine
def test_equal_peers_stay_where_they_are_and_heads_are_averaged(combine: Callable[[Inbox], Tensors]) -> None:
    own = drawn(0)
    assert torch.allclose(of(combine(inbox_of([own, own, own]))), of(own), atol=1e-12)
    apart = inbox_of([drawn(i) for i in range(3)])
    assert torch.equal(combine(apart)["head"], mean(apart)["head"])


@every_combine
def test_with_a_common_a_it_is_the_mean(combine: Callable[[Inbox], Tensors]) -> None:
    """Where A is the same everywhere, averaging B averages products."""
    values = [drawn(i) for i in range(3)]
    for value in values[1:]:
        value["q.A"].copy_(values[0]["q.A"])
    inbox = inbox_of(values)
    if combine is not rotated:
        assert torch.allclose(of(combine(inbox)), mean_product(inbox), atol=1e-10)


@every_combine
def test_a_lost_message_is_as_none(combine: Callable[[Inbox], Tensors]) -> None:
    values = [drawn(i) for i in range(3)]
    row = Row(0, {1: 0.3, 2: 0.3})
    lost = combine(Inbox.receive(row, values[0], values[0], {1: values[1]}))
    alone = combine(Inbox.receive(Row(0, {1: 0.3}), values[0], values[0], {1: values[1]}))
    assert torch.equal(lost.flat, alone.flat)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", COMBINES)
def test_what_is_not_finite_at_one_peer_stays_there(name: str, bad: float) -> None:
    """Its neighbours refuse it and go on, as if nothing had come; what all agreed on is not finite, and no error."""
    ring = GRAPHS["ring"](5)
    method = Method(SCHEDULES["lora"]("shared"), lambda t: ring, combine=COMBINES[name])
    peers = peers_of([drawn(i) for i in range(5)], name)
    peers[2].adapter["q.A"][0, 3] = bad
    traffic = mix(peers, method.schedule(1), ring, 1, method, MemoryNetwork())
    assert traffic.refused == {"non-finite": 2}
    assert [bool(peers[i].adapter.is_finite()) for i in range(5)] == [True, True, False, True, True]
    assert not peers.agreed().is_finite()


@every_combine
def test_fresh_adapters_stay_fresh(combine: Callable[[Inbox], Tensors]) -> None:
    """B = 0 everywhere: there is no product to agree on."""
    values = [drawn(i) for i in range(3)]
    for value in values:
        value["q.B"].zero_()
    found = combine(inbox_of(values))
    assert not found["q.B"].abs().max() > 1e-12 and torch.isfinite(found.flat).all() and found["q.A"].norm() > 0.1


@every_combine
def test_what_is_sent_without_its_other_factor_is_averaged(combine: Callable[[Inbox], Tensors]) -> None:
    layout = Layout.of({"q.B": ("B", (D_OUT, R))})
    values = [Tensors(torch.randn(layout.size, dtype=torch.float64), layout) for _ in range(3)]
    assert torch.equal(combine(inbox_of(values)).flat, mean(inbox_of(values)).flat)


def test_a_recipe_names_every_row() -> None:
    assert set(get_args(MethodPart.model_fields["combine"].annotation)) == set(COMBINES)


def peers_of(values: list[Tensors], combine: str = "product") -> Peers:
    nothing = Tensors(torch.zeros(0, dtype=torch.float64), Layout.of({}))
    agreement = None if combine == "mean" else agreed
    peers = Peers(range(len(values)), values[0], nothing, agreement=agreement)
    for row, value in enumerate(values):
        peers.x[row] = value.flat
    return peers


@pytest.mark.parametrize("rank", range(1, R + 1))
def test_a_peer_of_a_lower_rank_keeps_it_and_has_the_best_product_of_it(rank: int) -> None:
    own = drawn(0)
    own["q.A"][rank:], own["q.B"][:, rank:] = 0, 0
    inbox = inbox_of([own, drawn(1), drawn(2)])
    found, (u, s, vt) = product(inbox), torch.linalg.svd(mean_product(inbox))
    assert torch.allclose(of(found), u[:, :rank] * s[:rank] @ vt[:rank], atol=1e-10)
    assert not found["q.A"][rank:].any() and not found["q.B"][:, rank:].any() and found["q.A"][:rank].all()


def test_what_peers_agreed_on_is_the_best_of_the_mean_of_their_products() -> None:
    """However each of them is turned, and if the first has a lower rank; what is no factor is averaged."""
    values = [turn(drawn(seed), seed) for seed in range(4)]
    values[0]["q.A"][1:], values[0]["q.B"][:, 1:] = 0, 0
    found = Tensors(peers_of(values).consensus().x[0], LAYOUT)
    u, s, vt = torch.linalg.svd(torch.stack([of(value) for value in values]).mean(0))
    assert torch.allclose(of(found), u[:, :R] * s[:R] @ vt[:R], atol=1e-10)
    assert torch.allclose(found["head"], torch.stack([value["head"] for value in values]).mean(0), atol=1e-12)
    assert torch.equal(peers_of(values, "mean").agreed().flat, peers_of(values, "mean").mean().flat)


def test_peers_of_different_ranks_train_agree_and_keep_them(tmp_path: Path) -> None:
    ranks = [1, 3, 2]
    lora = {"r": 3, "ranks": ranks, "target_modules": ["first", "second"]}
    recipe = resolve(toy(lora=lora, method={"combine": "product"}, train={"rounds": 4}))
    federation = build(recipe)
    going = rounds(federation.peers, federation.method, federation.learner, MemoryNetwork())
    assert next(record for record in going if record.round == 4).traffic.messages == 6
    for row, rank in enumerate(ranks):
        adapter = federation.peers.adapter(row)
        for name in ("encoder.first", "encoder.second"):
            a, b = adapter[f"{name}.A"], adapter[f"{name}.B"]
            assert torch.linalg.matrix_rank(b @ a) == rank
            assert not a[rank:].any() and not b[:, rank:].any()
    summary = run_recipe(recipe, tmp_path / "run", [], resume=False, overwrite=False)
    assert summary["relative_disagreement"] < 1 and summary["accuracy"]["consensus"] > 0
    assert torch.equal(build(recipe, [2]).peers.x[0], build(recipe).peers.x[2])


@pytest.mark.parametrize(
    ("ranks", "told"),
    [
        ([1, 3], "lora.ranks has 2 ranks for 3 peers; give one for each peer"),
        ([1, 2, 2], "ranks must hold r, which is 3, as the largest"),
        ([4, 3, 3], "ranks must hold r, which is 3, as the largest"),
        ([0, 3, 3], "lora.ranks"),
        ([], "ranks must hold r"),
    ],
)
def test_ranks_that_are_none_of_these_peers_are_refused(ranks: list[int], told: str) -> None:
    with pytest.raises(UserError, match=told):
        resolve(toy(lora={"r": 3, "ranks": ranks, "target_modules": ["first"]}, method={"combine": "product"}))


def test_the_consensus_adapter_says_how_it_was_made(model: Path, rows: Path, tmp_path: Path) -> None:
    for combine, made in (("mean", ""), ("product", ": the best factors of the mean of their products")):
        recipe = text(model, rows / "train.csv", rows / "validation.csv", method={"combine": combine})
        run_recipe(resolve(recipe), tmp_path / combine, [], resume=False, overwrite=False)
        assert f"# Consensus of all peers{made}\n" in (tmp_path / combine / "adapters/consensus/README.md").read_text()
