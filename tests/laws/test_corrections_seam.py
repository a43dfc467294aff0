"""What a correction may ask of the local steps, shown by a toy correction that asks for all of it."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from dfl_lora.graphs import GRAPHS
from dfl_lora.learners import Learner
from dfl_lora.learners.work import LocalWork
from dfl_lora.mixing import lazy
from dfl_lora.models.placement import Lora
from dfl_lora.networks.memory import MemoryNetwork
from dfl_lora.peers import Peer, Peers
from dfl_lora.rounds import Method, rounds
from dfl_lora.schedules import SCHEDULES, Phase
from dfl_lora.tensors import Tensors
from encoders import Setting, distances, load, start_apart, token_data, toy_base, toy_data, write_encoder

UNEVEN = (33, 7, 18)
ROUNDS = 3
RING = GRAPHS["complete"](3)


@dataclass(frozen=True)
class Pull:
    """Sends x and the round's mean gradient z in one message; shifts by how far the neighbours' means are.

    gradient_shift += M z - z, step_shift = 20 (M x - x), x <- M x.
    """

    memory: tuple[str, ...] = ("gradient_shift", "gradient_mean", "step_shift")

    def outgoing(self, peer: Peer, phase: Phase) -> Tensors:
        return peer.adapter.select(phase.shared).join(z=peer.memory["gradient_mean"].select(phase.shared))

    def incoming(self, peer: Peer, phase: Phase, mixed: Tensors) -> None:
        own, sent = peer.adapter.select(phase.shared), peer.memory["gradient_mean"].select(phase.shared)
        x, z = mixed.part("x", own.layout), mixed.part("z", own.layout)
        shift = peer.memory["gradient_shift"].select(phase.shared)
        peer.memory["gradient_shift"].assign(phase.shared, shift.with_flat(shift.flat + z.flat - sent.flat))
        peer.memory["step_shift"].assign(phase.shared, x.with_flat(20 * (x.flat - own.flat)))
        peer.adapter.assign(phase.shared, x)


def run(setting: Setting, learner: Learner) -> Peers:
    """Returns the peers after three rounds of the loop with the toy correction."""
    method = Method(setting.schedule, lambda t: RING, mixing=lazy, correction=Pull())  # so that no mixing is the last
    peers = start_apart(setting.peers(), 0.02)
    for record in rounds(peers, method, learner, MemoryNetwork()):
        assert not record.traffic.refused
        if record.round == ROUNDS:
            break
    return peers


def check_learners_agree(setting: Setting, tolerance: float) -> None:
    """Checks each role of adapter, optimiser state and memory, and that the correction did something."""
    corrected, reference = run(setting, setting.stacked()), run(setting, setting.sequential())
    far = {name: d for name, d in distances(corrected, reference).items() if not d < tolerance}
    assert not far
    assert torch.equal(corrected.counters, reference.counters)
    assert all(matrix.any(1).all() for matrix in corrected.memory.values())


TOY_CASES = {
    "adam": ("lora", "shared", LocalWork(ROUNDS, 8, epochs=1, learning_rate=5e-3)),
    "sgd, clipped": ("lora", "shared", LocalWork(ROUNDS, 8, steps=3, optimizer="sgd", max_grad_norm=0.1)),
    "adamw, frozen A": ("freeze_a", "shared", LocalWork(ROUNDS, 8, epochs=1, optimizer="adamw", max_grad_norm=0.5)),
    "adam, private head": ("lora", "private", LocalWork(ROUNDS, 8, steps=3)),
}


def toy(schedule: str, head: str, work: LocalWork, dtype: torch.dtype = torch.float64) -> Setting:
    lora, trained = Lora(("first", "second"), 4, 8), SCHEDULES[schedule](head)  # type: ignore[arg-type]
    return Setting(toy_base(dtype), lora, trained, toy_data(UNEVEN, dtype), work, dtype, Pull().memory)


@pytest.mark.parametrize(("schedule", "head", "work"), TOY_CASES.values(), ids=TOY_CASES)
def test_on_the_toy_a_correction_sees_the_same_local_steps_of_both_learners(
    schedule: str, head: str, work: LocalWork
) -> None:
    check_learners_agree(toy(schedule, head, work), 1e-10)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_on_an_encoder_a_correction_sees_the_same_local_steps_of_both_learners(schedule: str, tmp_path: Path) -> None:
    base, lora = load(write_encoder("bert", tmp_path)), Lora(("query", "value"), 4, 8)
    work = LocalWork(ROUNDS, 8, epochs=1, learning_rate=5e-3, max_grad_norm=0.5)
    data, trained = token_data("bert", UNEVEN), SCHEDULES[schedule]("shared")
    check_learners_agree(Setting(base, lora, trained, data, work, memory=Pull().memory), 1e-5)


def both(setting: Setting) -> list[Learner]:
    return [setting.stacked(), setting.sequential()]


def test_the_mean_gradient_is_the_mean_over_the_steps_of_what_the_optimiser_was_given() -> None:
    work = LocalWork(1, 8, epochs=1, optimizer="sgd", learning_rate=0.1, scheduler="constant", max_grad_norm=0.05)
    setting = toy("lora", "shared", work)
    for learner in both(setting):
        peers = start_apart(setting.peers(), 0.3)
        peers.memory["gradient_shift"].normal_(std=0.1, generator=torch.Generator().manual_seed(0))
        start = peers.x.clone()
        progress = learner.train(peers, setting.schedule(1), 1)
        steps = torch.tensor([[p.steps] for p in progress.values()]).double()
        assert steps.flatten().tolist() == [5, 1, 3]
        given = (start - peers.x) / (0.1 * steps)  # sgd: x - lr * tau * mean
        assert torch.allclose(peers.memory["gradient_mean"], given, rtol=0, atol=1e-12)


def test_the_shift_is_added_after_clipping() -> None:
    setting = toy("lora", "shared", LocalWork(1, 8, steps=1, optimizer="sgd", max_grad_norm=1e-3))
    for learner in both(setting):
        peers = start_apart(setting.peers(), 0.3)
        peers.memory["gradient_shift"].fill_(2.0)
        learner.train(peers, setting.schedule(1), 1)
        norms = (peers.memory["gradient_mean"] - 2.0).norm(dim=1)
        assert norms.tolist() == pytest.approx([1e-3] * 3, rel=1e-2)


def test_the_mean_gradient_is_of_the_last_round_alone() -> None:
    setting = toy("lora", "shared", LocalWork(2, 8, steps=2, optimizer="sgd", learning_rate=0.1))
    for learner in both(setting):
        peers, fresh = start_apart(setting.peers(), 0.3), start_apart(setting.peers(), 0.3)
        learner.train(peers, setting.schedule(1), 1)
        fresh.x.copy_(peers.x)
        fresh.counters.copy_(peers.counters)
        for each in (peers, fresh):
            learner.train(each, setting.schedule(2), 2)
        assert torch.equal(peers.memory["gradient_mean"], fresh.memory["gradient_mean"])


def test_the_step_shift_times_the_rate_is_added_after_every_step_to_what_is_trained() -> None:
    work = LocalWork(1, 8, epochs=1, optimizer="sgd", learning_rate=0.1, scheduler="constant")
    setting = toy("lora", "frozen", work)
    for learner in both(setting):
        peers = start_apart(setting.peers(), 0.3)
        peers.memory["step_shift"].normal_(std=0.01, generator=torch.Generator().manual_seed(0))
        start = peers.x.clone()
        progress = learner.train(peers, setting.schedule(1), 1)
        steps = torch.tensor([[p.steps] for p in progress.values()]).double()
        moved = 0.1 * steps * (peers.memory["step_shift"] - peers.memory["gradient_mean"])
        assert torch.allclose(peers.x, start + moved, rtol=0, atol=1e-12)


def test_roles_that_a_phase_does_not_train_are_left_alone_by_both_shifts() -> None:
    setting = toy("lora", "shared", LocalWork(1, 8, steps=2))
    phase = Phase(1, frozenset({"B"}), frozenset({"B"}))
    for learner in both(setting):
        peers = start_apart(setting.peers(), 0.3)
        peers.memory["step_shift"].fill_(0.01)
        peers.memory["gradient_shift"].fill_(0.01)
        start = peers.x.clone()
        learner.train(peers, phase, 1)
        for e in peers.layout.entries:
            span = slice(e.start, e.stop)
            assert torch.equal(peers.x[:, span], start[:, span]) == (e.role != "B")
            assert bool(peers.memory["gradient_mean"][:, span].any()) == (e.role == "B")
            assert bool(peers.optimizer["exp_avg"][:, span].any()) == (e.role == "B")
        assert peers.counters.tolist() == [[0, 2, 0, 0, 2]] * 3


def test_memory_is_absent_unless_declared() -> None:
    setting = replace(toy("lora", "shared", LocalWork(1, 8, steps=2)), memory=())
    for learner in both(setting):
        peers = setting.peers()
        learner.train(peers, setting.schedule(1), 1)
        assert peers.memory == {}
        assert all(peer.memory == {} for peer in peers)
        assert set(peers.arrays()) == {"x", "counters", "optimizer.exp_avg", "optimizer.exp_avg_sq"}


def test_zero_memory_changes_nothing() -> None:
    setting = toy("lora", "shared", LocalWork(1, 8, epochs=1))
    for of in (Setting.stacked, Setting.sequential):
        plain, asked = replace(setting, memory=()).peers(), setting.peers()
        of(setting).train(plain, setting.schedule(1), 1)
        of(setting).train(asked, setting.schedule(1), 1)
        assert torch.equal(plain.x, asked.x)


def test_the_parts_of_a_message_travel_in_one_frame() -> None:
    setting = toy("lora", "shared", LocalWork(1, 8, steps=1))
    method = Method(setting.schedule, lambda t: RING, correction=Pull())
    peers = setting.peers()
    traffic = next(rounds(peers, method, setting.stacked(), MemoryNetwork())).traffic
    assert traffic.messages == 6
    assert traffic.bytes // 6 == pytest.approx(2 * peers.layout.size * 8, abs=200)
