"""Mixers as the polynomials they are, and the facts that are known of them."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from dfl_lora.errors import UserError
from dfl_lora.graphs import GRAPHS, Graph
from dfl_lora.mixers import AGREED, MIXERS, Values, leja
from dfl_lora.mixing import Mixing, chebyshev_contraction, exact_in, laplacian, lazy, matrix, metropolis
from dfl_lora.tensors import Layout, Tensors

FACTS = {
    "link3": ("link3", 7, 0.181, 0.003, 3),
    "link4": ("link4", 7, 0.217, 0.005, 6),
    "link5": ("link5", 7, 0.013, 0.0, 3),
    "link6": ("link6", 7, 0.045, 0.0, 4),
    "du14": ("du14", 7, 0.587, 0.099, 6),
    "link7": ("link7", 7, 0.0, 0.0, 1),
    "ring(16)": ("ring", 16, 0.660, 0.147, 8),
    "ring(32)": ("ring", 32, 0.894, 0.513, 16),
}
"""Graph, peers, contraction of three and of eight Chebyshev exchanges, exchanges of the exact mean."""


def applied(
    mixer: str, graph: Graph, mixing: Mixing = metropolis, t: int = 1, rounds: int = 8, **options: int
) -> Tensor:
    """Returns the matrix that a mixer makes of W [n, n], and counts on it that exchanges are numbered from 0."""
    n, w = graph.num_peers, torch.from_numpy(matrix(graph, mixing))
    layout, numbers = Layout.of({"x": ("A", (n,))}), list[int]()

    def exchange(values: Values, k: int) -> Values:
        numbers.append(k)
        mixed = w @ torch.stack([values[i].flat for i in range(n)])
        return {i: Tensors(mixed[i], layout) for i in range(n)}

    eye = torch.eye(n, dtype=torch.float64)
    found = MIXERS[mixer](graph, mixing, rounds, **options)(
        {i: Tensors(eye[i], layout) for i in range(n)}, exchange, t, {}
    )
    assert numbers == list(range(len(numbers)))
    made = torch.stack([found[i].flat for i in range(n)])
    assert torch.allclose(made.sum(0), torch.ones(n, dtype=torch.float64), rtol=0, atol=1e-11), "the mean stays"
    return made


def contraction(m: Tensor) -> float:
    return float(torch.linalg.matrix_norm(m - 1.0 / len(m), 2))


@pytest.mark.parametrize("fact", FACTS)
def test_chebyshev_contracts_as_is_known(fact: str) -> None:
    name, n, three, eight, _ = FACTS[fact]
    graph = GRAPHS[name](n)
    for k, wanted in ((3, three), (8, eight)):
        found = contraction(applied("chebyshev", graph, k=k))
        assert found == pytest.approx(wanted, abs=6e-4)
        assert found == pytest.approx(chebyshev_contraction(matrix(graph, metropolis), k), abs=1e-9)


@pytest.mark.parametrize("fact", [name for name, row in FACTS.items() if row[1] == 7])
@pytest.mark.parametrize("mixing", [metropolis, laplacian, lazy])
def test_finite_time_gives_the_mean(fact: str, mixing: Mixing) -> None:
    graph = GRAPHS[FACTS[fact][0]](7)
    assert contraction(applied("finite_time", graph, mixing)) < 1e-6


@pytest.mark.parametrize("fact", [name for name, row in FACTS.items() if row[1] == 7])
def test_finite_time_takes_the_exchanges_that_are_known_under_laplacian_mixing(fact: str) -> None:
    graph, exchanges = GRAPHS[FACTS[fact][0]](7), 0
    w = torch.from_numpy(matrix(graph, laplacian))

    def exchange(values: Values, k: int) -> Values:
        nonlocal exchanges
        exchanges += 1
        return {i: values[i].with_flat(sum(w[i, j] * values[j].flat for j in range(7))) for i in range(7)}  # type: ignore[misc]

    one = {i: Tensors(torch.ones(1, dtype=torch.float64), Layout.of({"x": ("A", (1,))})) for i in range(7)}
    MIXERS["finite_time"](graph, laplacian, 8)(one, exchange, 1, {})
    assert exchanges == FACTS[fact][4] == exact_in(graph)


@pytest.mark.parametrize("fact", FACTS)
def test_closing_and_gossip_pga_are_plain_but_for_some_rounds(fact: str) -> None:
    graph = GRAPHS[FACTS[fact][0]](FACTS[fact][1])
    w = torch.from_numpy(matrix(graph, metropolis))
    for mixer, options, agreed in (("closing", {}, {8}), ("gossip_pga", {"every": 3}, {3, 6})):
        for t in range(9):
            made = applied(mixer, graph, t=t, **options)
            if t in agreed or (mixer == "gossip_pga" and t == 0):
                assert contraction(made) <= AGREED * (1 + 1e-6)
            else:
                assert torch.equal(made, applied("plain", graph)) and torch.allclose(made, w, atol=1e-15)


@pytest.mark.parametrize("mixer", ["chebyshev", "closing", "gossip_pga"])
def test_a_rho_that_was_not_found_is_refused(mixer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dfl_lora.mixers.rho_on", lambda graph, mixing: math.nan)
    with pytest.raises(UserError, match=r"rho of W on this graph of 7 peers was not found, .*; use .* mixer plain\.$"):
        MIXERS[mixer](GRAPHS["ring"](7), metropolis, 8)


def test_peers_that_never_agree_are_mixed_plainly() -> None:
    graph = GRAPHS["none"](5)
    for mixer in ("closing", "chebyshev", "gossip_pga"):
        assert torch.equal(applied(mixer, graph, t=8), torch.eye(5, dtype=torch.float64))


@pytest.mark.parametrize(("name", "n"), [("ring", 10), ("du14", 7), ("line", 10)])
def test_the_order_of_roots_amplifies_less_on_the_way_than_from_one_end_to_the_other(name: str, n: int) -> None:
    """By what one sees in between: the largest product of the first or of the last factors at any eigenvalue."""
    values = np.linalg.eigvalsh(matrix(GRAPHS[name](n), metropolis))[:-1]
    roots = leja(values.tolist())

    def most(order: list[float]) -> float:
        factors = np.array([(values - root) / (1 - root) for root in order])
        parts = [factors[:k] for k in range(1, n)] + [factors[k:] for k in range(n - 1)]
        return max(float(np.abs(part.prod(0)).max()) for part in parts)

    assert most(roots) < 0.6 * most(sorted(roots)) and most(roots) < 0.6 * most(sorted(roots, reverse=True))
