"""Consensus measures against the products themselves."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from dfl_lora import measures
from dfl_lora.measures import (
    Consensus,
    consensus,
    factors,
    inner_products,
    many_distances,
    module_distances,
)
from dfl_lora.memory import Alive
from dfl_lora.peers import Peers
from dfl_lora.tensors import Layout, Tensors

Modules = list[tuple[Tensor, Tensor]]


def random_modules(seed: int, n: int, shapes: list[tuple[int, int, int]], spread: float = 1.0) -> Modules:
    """Factors (A [n, r, d_in], B [n, d_out, r]) for each (d_out, r, d_in), `spread` apart from common ones."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    return [(draw(1, r, d) + spread * draw(n, r, d), draw(1, o, r) + spread * draw(n, o, r)) for o, r, d in shapes]


def naive(modules: Modules, n: int) -> Consensus:
    """The definitions, on d_out x d_in matrices."""
    error = disagreement = size = 0.0
    for a, b in modules:
        products = b @ a
        error += (products - b.mean(0) @ a.mean(0)).norm(dim=(1, 2)).mean().item()
        disagreement += (products - products.mean(0)).norm(dim=(1, 2)).mean().item()
        size += products.mean(0).norm().item()
    return Consensus(error, disagreement, disagreement / size)


def exact(modules: Modules, n: int) -> Consensus:
    """The definitions in rational arithmetic: no digit is lost before the square roots."""

    def rational(t: Tensor) -> NDArray[np.object_]:
        return np.array([Fraction(v) for v in t.flatten().tolist()], dtype=object).reshape(t.shape)

    def norm(m: NDArray[np.object_]) -> float:
        return math.sqrt((m * m).sum())

    error = disagreement = size = 0.0
    for a, b in modules:
        a_exact, b_exact = rational(a), rational(b)
        products = b_exact @ a_exact
        at_mean, mean = b_exact.sum(0) @ a_exact.sum(0) / (n * n), products.sum(0) / n
        error += sum(norm(p - at_mean) for p in products) / n
        disagreement += sum(norm(p - mean) for p in products) / n
        size += norm(mean)
    return Consensus(error, disagreement, disagreement / size)


def assert_close(found: Consensus, expected: Consensus, rel: float) -> None:
    for name in ("consensus_error", "product_disagreement", "relative_disagreement"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=rel), name


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 2**31),
    st.integers(2, 7),
    st.lists(st.tuples(st.integers(1, 8), st.integers(1, 3), st.integers(1, 8)), min_size=1, max_size=3),
)
def test_the_measures_are_those_of_the_products(seed: int, n: int, shapes: list[tuple[int, int, int]]) -> None:
    modules = random_modules(seed, n, shapes)
    assert_close(consensus(modules, n), naive(modules, n), rel=1e-6)


@pytest.mark.parametrize("spread", [1.0, 1e-3, 1e-6, 1e-9])
@pytest.mark.parametrize("seed", range(3))
def test_no_digits_are_lost_where_peers_nearly_agree(seed: int, spread: float) -> None:
    modules = random_modules(seed, 4, [(5, 2, 6), (3, 1, 4)], spread)
    expected = exact(modules, 4)
    assert 0 < expected.consensus_error < 100 * spread
    assert_close(consensus(modules, 4), expected, rel=1e-6)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**31),
    st.integers(1, 40),
    st.tuples(st.integers(1, 8), st.integers(1, 3), st.integers(1, 8)),
    st.sampled_from([1.0, 1e-3, 1e-6]),
    st.integers(1, 600),
    st.booleans(),
)
def test_many_peers_are_measured_as_few_are(
    seed: int, n: int, shape: tuple[int, int, int], spread: float, block: int, frozen: bool
) -> None:
    """Whatever the size of a block: to 1e-10, or to what the rounding of the means leaves."""
    ((a, b),) = random_modules(seed, n, [shape], spread)
    a = a[:1].expand_as(a) if frozen else a
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measures, "BLOCK", block)
        found, expected = many_distances(a, b), module_distances(a, b)
    scale = expected[0].max().item()
    off = 1e-10 * scale + 1e-14 * (a.norm() * b.norm()).item()  # a mean is known to 1e-16 of the factors, not better
    assert found[0].tolist() == pytest.approx(expected[0].tolist(), rel=1e-10, abs=off)
    squares = [[v**2 for v in row.tolist()] for row in (found[1], expected[1])]  # a peer at the mean is a root of 0
    assert squares[0] == pytest.approx(squares[1], rel=1e-10, abs=2 * scale * off)
    assert found[2].item() == pytest.approx(expected[2].item(), rel=1e-10, abs=off)


@pytest.mark.parametrize("spread", [1.0, 1e-3, 1e-6, 1e-9])
@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
def test_many_peers_are_measured_as_their_products_say(spread: float, precision: torch.dtype) -> None:
    modules = [(a.to(precision), b.to(precision)) for a, b in random_modules(1, 12, [(5, 2, 6), (3, 1, 4)], spread)]
    assert not any(measures.by_pairs(12, *a.shape[1:], b.shape[1]) for a, b in modules)
    assert_close(consensus(modules, 12), exact(modules, 12), rel=1e-9)


def test_thousands_of_peers_need_a_few_megabytes_and_no_pairs_of_them() -> None:
    """All pairs would be 4 GB."""
    a, b = random_modules(0, 4000, [(32, 2, 16)])[0]
    with Alive(2**40) as alive:
        found = consensus([(a, b)], 4000)
    assert alive.peaks[0] < 8 * 6 * measures.BLOCK
    assert_close(found, naive([(a, b)], 4000), rel=1e-9)


@pytest.mark.parametrize("spread", [1.0, 1e-9])
def test_a_common_frozen_a_is_given_once(spread: float) -> None:
    modules = [(a[:1], b) for a, b in random_modules(3, 4, [(5, 2, 6), (3, 1, 4)], spread)]
    found = consensus(modules, 4)
    assert_close(found, exact([(a.expand(4, -1, -1), b) for a, b in modules], 4), rel=1e-6)
    assert found.consensus_error == pytest.approx(found.product_disagreement, rel=1e-9)


def test_zeros_are_in_full_agreement() -> None:
    """B is zero at the start of every run."""
    (a, b), *_ = random_modules(0, 4, [(5, 2, 6)])
    for modules in ([(a, 0 * b)], [(0 * a, 0 * b)], [(a[:1], 0 * b)]):
        assert consensus(modules, 4) == Consensus(0.0, 0.0, 0.0)


def test_equal_peers_are_in_full_agreement() -> None:
    ((a, b),) = random_modules(0, 1, [(5, 2, 6)])
    found = consensus([(a.expand(4, -1, -1), b.expand(4, -1, -1))], 4)
    assert found.consensus_error == pytest.approx(0, abs=1e-14)
    assert found.product_disagreement == pytest.approx(0, abs=1e-14)
    assert found.relative_disagreement == pytest.approx(0, abs=1e-14)


def test_one_peer_agrees_with_itself() -> None:
    assert consensus(random_modules(0, 1, [(5, 2, 6)]), 1) == Consensus(0.0, 0.0, 0.0)


def test_rotated_factors_of_one_product_differ_only_in_the_factors() -> None:
    ((a, b),) = random_modules(0, 1, [(5, 2, 6)])
    turn = torch.tensor([[[0.6, -0.8], [0.8, 0.6]]], dtype=torch.float64)
    found = consensus([(torch.cat([a, turn.mT @ a]), torch.cat([b, b @ turn]))], 2)
    assert found.consensus_error > 0.1
    assert found.relative_disagreement < 1e-7


def test_opposite_products_are_not_reported_as_agreement() -> None:
    ((a, b),) = random_modules(0, 1, [(5, 2, 6)])
    found = consensus([(a, torch.cat([b, -b]))], 2)
    assert found.product_disagreement > 0.1
    assert found.relative_disagreement > 1


def test_a_peer_that_is_not_finite_is_not_reported_as_agreement() -> None:
    ((a, b),) = random_modules(0, 4, [(5, 2, 6)])
    b[1, 0, 0] = math.nan
    found = consensus([(a, b)], 4)
    assert math.isnan(found.consensus_error)
    assert math.isnan(found.product_disagreement)
    assert math.isnan(found.relative_disagreement)


def test_the_measures_scale_with_the_products() -> None:
    modules = random_modules(1, 4, [(5, 2, 6), (3, 1, 4)])
    once, thrice = consensus(modules, 4), consensus([(a, 3 * b) for a, b in modules], 4)
    assert thrice.consensus_error == pytest.approx(3 * once.consensus_error)
    assert thrice.product_disagreement == pytest.approx(3 * once.product_disagreement)
    assert thrice.relative_disagreement == pytest.approx(once.relative_disagreement)


def test_layers_add_up() -> None:
    first, second = random_modules(1, 4, [(5, 2, 6), (3, 1, 4)])
    parts, both = [consensus([m], 4) for m in (first, second)], consensus([first, second], 4)
    assert both.consensus_error == pytest.approx(sum(p.consensus_error for p in parts))
    assert both.product_disagreement == pytest.approx(sum(p.product_disagreement for p in parts))


def test_no_matrix_of_the_size_of_a_layer_is_formed() -> None:
    """As d_out x d_in numbers this layer would be 80 GB."""
    a, b = torch.ones(2, 1, 100_000), torch.ones(2, 100_000, 1)
    b[0] *= 3
    assert consensus([(a, b)], 2) == Consensus(1e5, 1e5, 0.5)


def test_inner_products_are_those_of_the_matrices() -> None:
    ((right, left),) = random_modules(2, 5, [(4, 3, 6)])
    products = (left @ right).flatten(1)
    assert torch.allclose(inner_products(left, right), products @ products.T)


@pytest.mark.parametrize("frozen", [True, False], ids=["freeze_a", "lora"])
def test_the_factors_of_peers_are_paired_by_module_and_the_head_is_no_factor(frozen: bool) -> None:
    a = Layout.of({"v.A": ("A", (2, 6)), "q.A": ("A", (1, 4))})
    b = Layout.of({"q.B": ("B", (3, 1)), "v.B": ("B", (5, 2)), "head": ("head", (2, 2))})
    both = Layout.of({e.name: (e.role, e.shape) for e in (*a.entries, *b.entries)})
    layout, common = (b, a) if frozen else (both, Layout.of({}))
    g = torch.Generator().manual_seed(0)
    peers = Peers(
        range(4), Tensors(torch.zeros(layout.size), layout), Tensors(torch.randn(common.size, generator=g), common)
    )
    peers.x.copy_(torch.randn(peers.x.shape, generator=g))
    modules = list(factors(peers))
    rows = 1 if frozen else 4
    assert [(tuple(x.shape), tuple(y.shape)) for x, y in modules] == [
        ((rows, 2, 6), (4, 5, 2)),
        ((rows, 1, 4), (4, 3, 1)),
    ]
    expected = naive([(peers.stacked(f"{m}.A").double(), peers.stacked(f"{m}.B").double()) for m in "qv"], 4)
    assert_close(consensus(modules, 4), expected, rel=1e-9)
