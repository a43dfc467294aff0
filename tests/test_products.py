"""Combining in product space: against dense products, and against what each is to minimise."""

from collections.abc import Callable
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dfl_lora.combine import Inbox, mean
from dfl_lora.mixing import Row
from dfl_lora.products import COMBINES, lora_fair, product, rotated
from dfl_lora.recipe import MethodPart
from dfl_lora.tensors import Layout, Tensors

R, D_IN, D_OUT = 2, 9, 7
LAYOUT = Layout.of({"q.A": ("A", (R, D_IN)), "q.B": ("B", (D_OUT, R)), "head": ("head", (3,))})
OTHERS = {name: combine for name, combine in COMBINES.items() if name != "mean"}
every_combine = pytest.mark.parametrize("combine", OTHERS.values(), ids=OTHERS)


def drawn(seed: int) -> Tensors:
    return Tensors(torch.randn(LAYOUT.size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), LAYOUT)


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
