"""The laws of corrections, over the table, on peers whose common optimum is known."""

from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from dfl_lora.codecs.frames import Frame
from dfl_lora.corrections import CORRECTIONS, Correction
from dfl_lora.graphs import GRAPHS, Graph
from dfl_lora.mixers import MIXERS
from dfl_lora.mixing import lazy, matrix, metropolis
from dfl_lora.networks import Arrived
from dfl_lora.networks.memory import MemoryNetwork
from dfl_lora.peers import Peers
from dfl_lora.rounds import Method, mix, rounds
from dfl_lora.schedules import SCHEDULES
from dfl_lora.tensors import Layout, Tensors
from quadratics import LAYOUT, Quadratics, method_on

RING, PLAIN = GRAPHS["ring"](7), MIXERS["plain"]
SEVEN = Quadratics.drawn(7)
SUMS: Mapping[str, str] = {"led": "step_shift", "k_gt": "gradient_shift", "d2": "step_shift"}
"""The corrections that sum to zero, and the vector that does."""


def corrected(name: str, graph: Graph = RING, mixer: str = "plain", of: Quadratics = SEVEN, **options: float) -> Method:
    correction: Correction = CORRECTIONS[name](of.local, **options)
    return method_on(graph, mixing=lazy, correction=correction, mixer=MIXERS[mixer](graph, lazy, 10))


def distance(method: Method, num_rounds: int, of: Quadratics = SEVEN) -> float:
    """Returns how far the furthest peer is from the optimum of all."""
    return float((of.run(method, num_rounds).x - of.optimum).norm(dim=1).max())


@pytest.mark.parametrize("graph", ["ring", "du14", "link4", "link6"])
@pytest.mark.parametrize("mixer", ["plain", "chebyshev", "finite_time"])
@pytest.mark.parametrize("name", SUMS)
def test_peers_with_different_data_end_at_the_optimum_of_all(name: str, mixer: str, graph: str) -> None:
    if (name, mixer) == ("d2", "chebyshev"):  # whose eigenvalues reach from -1 / T_k(1 / rho) to as much
        mixer = "finite_time"
    far = graph == "du14" and mixer == "plain"
    num_rounds = 1500 if far else 600 if mixer == "plain" else 300
    of = replace(SEVEN, rate=0.03) if far else SEVEN  # tracking through a long way needs short steps
    assert distance(corrected(name, GRAPHS[graph](7), mixer, of), num_rounds, of) < 1e-4


@pytest.mark.parametrize("mixer", ["plain", "chebyshev"])
@pytest.mark.parametrize("name", SUMS)
def test_the_optimum_of_all_stays_one_while_the_learning_rate_falls(name: str, mixer: str) -> None:
    of = replace(SEVEN, falls=0.7)
    method = corrected(name, mixer=mixer, of=of)
    peers = of.peers(method)
    peers.x.copy_(of.optimum.expand_as(peers.x))
    own = of.gradients(peers.x)
    peers.memory[SUMS[name]].copy_(own if SUMS[name] == "step_shift" else -own)
    for record in rounds(peers, method, of, MemoryNetwork()):
        if record.round == 15:
            break
    assert (peers.x - of.optimum).abs().max() < 1e-12


def test_plain_gossip_ends_elsewhere() -> None:
    assert distance(corrected("none"), 600) > 0.05


def test_peers_that_average_exactly_end_elsewhere_too() -> None:
    """Drift and not disagreement: several local steps of a server's average have another fixed point."""
    assert distance(corrected("none", GRAPHS["complete"](7)), 600) > 0.005
    assert distance(corrected("k_gt", GRAPHS["complete"](7)), 600) < 1e-9


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("mixer", ["plain", "chebyshev", "gossip_pga"])
@pytest.mark.parametrize("name", SUMS)
def test_corrections_sum_to_zero(name: str, mixer: str, schedule: str) -> None:
    method = replace(corrected(name, mixer=mixer), schedule=SCHEDULES[schedule]("shared"))
    shifts = SEVEN.run(method, 9).memory[SUMS[name]]
    assert torch.allclose(shifts.sum(0), torch.zeros(LAYOUT.size, dtype=torch.float64), rtol=0, atol=1e-13)
    assert shifts.abs().max() > 1e-3


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", CORRECTIONS)
def test_what_is_not_shared_is_not_corrected(name: str, schedule: str) -> None:
    method = replace(corrected(name), schedule=SCHEDULES[schedule]("private"))
    memory = SEVEN.run(method, 4).memory
    shared = method.schedule(1).shared | method.schedule(2).shared
    for e in LAYOUT.entries:
        if e.role not in shared:
            for shift in ("gradient_shift", "step_shift"):
                assert shift not in memory or not memory[shift][:, e.start : e.stop].any()


def test_led_of_one_step_is_exact_diffusion() -> None:
    """x_(t+1) = (I + W)/2 (2 x_t - x_(t-1) - eta g_t + eta g_(t-1))."""
    one = replace(SEVEN, tau=1)
    assert torch.allclose(one.run(corrected("led", of=one), 7).x, recursion(one, halved=True), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "share"), [("led", 0.5), ("d2", 1.0)])
def test_a_shift_is_kept_per_unit_of_the_learning_rate_of_its_round(name: str, share: float) -> None:
    """x^half = x - eta_t (g + c), x+ - x^half = share (W x^half - x^half), c <- c + (x^half - x+) / eta_t."""
    one, w = replace(SEVEN, tau=1, falls=0.7), torch.from_numpy(matrix(RING, lazy))
    x = c = torch.zeros(7, LAYOUT.size, dtype=torch.float64)
    for t in range(1, 8):
        half = x - one.local.rate(t) * (one.gradients(x) + c)
        x = half + share * (w @ half - half)
        c = c + (half - x) / one.local.rate(t)
    assert torch.allclose(one.run(corrected(name, of=one), 7).x, x, rtol=0, atol=1e-12)


def test_d2_of_one_step_is_that_of_the_paper() -> None:
    """x_(t+1) = W (2 x_t - x_(t-1) - eta g_t + eta g_(t-1))."""
    one = replace(SEVEN, tau=1)
    assert torch.allclose(one.run(corrected("d2", of=one), 7).x, recursion(one, halved=False), rtol=0, atol=1e-12)


def recursion(of: Quadratics, halved: bool) -> torch.Tensor:
    w = torch.from_numpy(matrix(RING, lazy))
    w = (torch.eye(7, dtype=torch.float64) + w) / 2 if halved else w
    before = torch.zeros(7, LAYOUT.size, dtype=torch.float64)
    now = w @ (before - of.rate * of.gradients(before))
    for _ in range(6):
        step = 2 * now - before - of.rate * (of.gradients(now) - of.gradients(before))
        before, now = now, w @ step
    return now


def test_d2_diverges_where_an_eigenvalue_is_below_minus_a_third() -> None:
    w = [[0.0, 0.5, 0.0, 0.5], [0.5, 0.0, 0.5, 0.0], [0.0, 0.5, 0.0, 0.5], [0.5, 0.0, 0.5, 0.0]]
    graph, four = GRAPHS["ring"](4), Quadratics.drawn(4)
    assert min(torch.linalg.eigvalsh(torch.tensor(w))) < -0.9

    def swapping(g: Graph, i: int):  # type: ignore[no-untyped-def]
        from dfl_lora.mixing import Row

        return Row(i, {j: w[i][j] for j in g.neighbours(i)})

    method = method_on(graph, mixing=swapping, correction=CORRECTIONS["d2"](four.local))
    assert not distance(method, 200, four) < 1e3
    assert distance(replace(method, correction=CORRECTIONS["led"](four.local)), 600, four) < 1e-6


def test_quasi_global_of_one_peer_and_one_step_is_momentum() -> None:
    """d = beta m + g, x+ = x - eta d, m <- mu m + (1 - mu) d."""
    one = Quadratics(SEVEN.curvature[:1], SEVEN.centres[:1], tau=1)
    method = method_on(GRAPHS["ring"](1), correction=CORRECTIONS["quasi_global"](one.local, beta=0.8, mu=0.7))
    x = m = torch.zeros(1, LAYOUT.size, dtype=torch.float64)
    for _ in range(6):
        d = one.gradients(x) + 0.8 * m
        x, m = x - one.rate * d, 0.7 * m + 0.3 * d
    assert torch.allclose(one.run(method, 6).x, x, rtol=0, atol=1e-12)


def test_quasi_global_of_an_adaptive_optimiser_has_the_length_of_what_it_was_given() -> None:
    local = replace(SEVEN.local, adaptive=True)
    method = method_on(RING, correction=CORRECTIONS["quasi_global"](local, beta=0.5, mu=0.0))
    peers = SEVEN.run(method, 1)
    assert torch.allclose(
        peers.memory["gradient_shift"].norm(dim=1), 0.5 * peers.memory["gradient_mean"].norm(dim=1), rtol=1e-12
    )


def test_a_correction_that_is_clipped_is_no_longer_than_so_many_mean_gradients() -> None:
    peers = SEVEN.run(corrected("k_gt", clip=0.25), 12)
    c, z = peers.memory["gradient_shift"].norm(dim=1), peers.memory["gradient_mean"].norm(dim=1)
    assert (c <= 0.25 * z * (1 + 1e-12)).all() and (c > 0.24 * z).any()


class Losing:
    """A network on which one edge fails, at both ends, in some rounds."""

    def __init__(self, rounds: set[int]) -> None:
        self.rounds = rounds

    def exchange(self, round: int, k: int, graph: Graph, outgoing: Mapping[int, Frame]) -> Arrived:
        frames = MemoryNetwork().exchange(round, k, graph, outgoing).frames
        cut = {(0, 1), (1, 0)} if round in self.rounds else set()
        return Arrived({i: {j: f for j, f in box.items() if (i, j) not in cut} for i, box in frames.items()})


@pytest.mark.parametrize("name", SUMS)
def test_an_edge_that_fails_now_and_then_moves_neither_the_sum_nor_the_optimum(name: str) -> None:
    peers = SEVEN.run(corrected(name), 600, Losing({2, 3, 7, 20, 21, 22, 100}))
    assert torch.allclose(peers.memory[SUMS[name]].sum(0), torch.zeros(LAYOUT.size, dtype=torch.float64), atol=1e-12)
    assert (peers.x - SEVEN.optimum).norm(dim=1).max() < 1e-6


def test_decay_forgets_a_share_of_the_correction_of_those_who_lost_a_message_and_of_no_others() -> None:
    forgetful, plain = (SEVEN.run(corrected("k_gt", decay=d), 5, Losing({5})).memory for d in (1.0, 0.0))
    differ = (forgetful["gradient_shift"] != plain["gradient_shift"]).any(1)
    assert differ.tolist() == [True, True, *[False] * 5]


def test_second_moments_are_mixed_every_so_many_rounds_and_never_below_zero() -> None:
    """Chebyshev's matrix on du14 has negative entries."""
    graph = GRAPHS["du14"](7)
    method = method_on(
        graph,
        correction=CORRECTIONS["k_gt"](SEVEN.local, second_moments=2),
        mixer=MIXERS["chebyshev"](graph, metropolis, 9, k=3),
    )
    start = Tensors(torch.zeros(LAYOUT.size, dtype=torch.float64), LAYOUT)
    nothing = Tensors(torch.zeros(0, dtype=torch.float64), Layout.of({}))
    peers = Peers(range(7), start, nothing, memory=method.memory, optimizer=["exp_avg_sq"])
    spike = torch.zeros(7, LAYOUT.size, dtype=torch.float64)
    spike[0] = 1.0
    peers.optimizer["exp_avg_sq"].copy_(spike)
    mix(peers, method.schedule(1), graph, 1, method, MemoryNetwork())
    assert torch.equal(peers.optimizer["exp_avg_sq"], spike)
    mix(peers, method.schedule(2), graph, 2, method, MemoryNetwork())
    mixed = peers.optimizer["exp_avg_sq"]
    assert (mixed >= 0).all() and (mixed == 0).any() and 0 < mixed[0, 0] < 1


def test_second_moments_are_mixed_as_steps_divide_by_them() -> None:
    """Peers that did different numbers of steps agree on v / (1 - beta_2^steps)."""
    graph = GRAPHS["complete"](3)
    method = method_on(graph, correction=CORRECTIONS["k_gt"](SEVEN.local, second_moments=1))
    start = Tensors(torch.zeros(LAYOUT.size, dtype=torch.float64), LAYOUT)
    peers = Peers(range(3), start, start.select(frozenset()), memory=method.memory, optimizer=["exp_avg_sq"])
    steps = torch.tensor([0, 10, 300])
    peers.counters[:] = steps[:, None]
    grown = 1 - 0.999 ** steps.clamp(min=1).double()[:, None]
    peers.optimizer["exp_avg_sq"].copy_(grown * torch.tensor([[0.0], [2.0], [4.0]]))
    mix(peers, method.schedule(1), graph, 1, method, MemoryNetwork())
    assert torch.allclose(peers.optimizer["exp_avg_sq"] / grown, torch.full((3, LAYOUT.size), 2.0).double())


def test_a_factor_that_rests_is_mixed_and_no_more() -> None:
    """Tracking neither sends nor bounds the shift of what a round does not train."""
    method = replace(corrected("k_gt", clip=0.1), schedule=SCHEDULES["alternating"]("shared", period=3))
    peers = SEVEN.run(method, 3)
    outgoing = method.correction.outgoing(peers[0], method.schedule(4))
    names = {e.name for e in outgoing.layout.entries}
    assert names == {"x/q.A", "x/q.B", "x/head", "z/q.A", "z/head"}
    (of_b,) = LAYOUT.spans({"B"})
    now, later = (SEVEN.run(method, t).memory["gradient_shift"][:, of_b] for t in (3, 6))
    assert torch.equal(now, later) and now.abs().max() > 1e-3


OTHERS = list(range(1, 7))


def leaving(after: int) -> SimpleNamespace:
    """Returns a network from which peer 0 is gone after a round."""

    def gone(round: int, k: int, graph: Graph, outgoing: Mapping[int, Frame]) -> Arrived:
        frames = MemoryNetwork().exchange(round, k, graph, outgoing).frames
        return Arrived(
            {i: {j: f for j, f in box.items() if round <= after or 0 not in (i, j)} for i, box in frames.items()}
        )

    return SimpleNamespace(exchange=gone)


def optimum_of_others() -> torch.Tensor:
    left = SEVEN.curvature[OTHERS]
    return (left * SEVEN.centres[OTHERS]).sum(0) / left.sum(0)


@pytest.mark.parametrize("name", SUMS)
def test_those_who_go_on_without_a_peer_stay_at_the_optimum_of_all(name: str) -> None:
    """What they were corrected by holds the data of the one that left; the mean of plain gossip leaves it."""
    mean = SEVEN.run(corrected("none"), 1200, leaving(after=600)).x[OTHERS].mean(0)
    assert (mean - optimum_of_others()).norm() < (mean - SEVEN.optimum).norm()
    peers = SEVEN.run(corrected(name), 1200, leaving(after=600))
    assert (peers.x[OTHERS] - SEVEN.optimum).norm(dim=1).max() < 1e-4


def test_to_forget_where_a_peer_is_missed_is_worse_than_no_correction() -> None:
    """The figures of docs/architecture.md: why no correction is reset when a peer leaves."""

    def apart(method: Method) -> float:
        x, without = SEVEN.run(method, 250, leaving(after=30)).x[OTHERS], optimum_of_others()
        return round(float((x - without).norm(dim=1).max() / without.norm()), 2)

    assert (apart(corrected("k_gt", decay=1.0)), apart(corrected("none"))) == (2.32, 1.62)
