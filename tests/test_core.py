"""The core of B C A: its gradient, what it sends, and where its factors start, against plain matrices."""

from dataclasses import replace

import pytest
import torch
from torch.func import functional_call
from torch.nn import functional as F

from dfl_lora.build import build
from dfl_lora.check import sent
from dfl_lora.codecs.frames import Frame
from dfl_lora.learners.work import LocalWork
from dfl_lora.measures import consensus, factors
from dfl_lora.models.core import folded
from dfl_lora.models.placement import Lora, place
from dfl_lora.reading import resolve
from dfl_lora.schedules import SCHEDULES
from encoders import Setting, start_apart, toy_base, toy_data
from tiny import toy

R = 3
MODULES = ("encoder.first", "encoder.second")


def setting() -> Setting:
    work = LocalWork(1, 8, steps=1, optimizer="sgd")
    lora = Lora(("first", "second"), R, 8, init="orthonormal")
    schedule = SCHEDULES["core"]("shared")
    return Setting(toy_base(), lora, schedule, toy_data((16, 9, 20)), work, torch.float64, ("gradient_mean",))


def test_the_gradient_of_a_core_is_that_of_the_dense_weight_in_float64() -> None:
    """dL/dC of W = W0 + s B C A, by plain autograd through the whole weight."""
    own = setting()
    peers = start_apart(own.peers(), 0.3)
    starts = [{name: value.clone() for name, value in peers.adapter(row).items()} for row in range(len(peers))]
    own.stacked().train(peers, own.schedule(1), 1)
    for peer, start in zip(peers, starts, strict=True):
        model, batch = own.base.model.eval(), own.work.order.batch(own.data.train[peer.id], peer.id, 0)
        cores = {path: start[f"{path}.core"].requires_grad_() for path in MODULES}
        weights = {
            f"{path}.weight": model.get_parameter(f"{path}.weight").detach()
            + own.lora.scaling * start[f"{path}.B"] @ core @ start[f"{path}.A"]
            for path, core in cores.items()
        }
        head = {name: start[name] for name in own.placement.head}
        loss = F.cross_entropy(functional_call(model, weights | head, kwargs=batch.padded()), batch.labels)
        gradients = torch.autograd.grad(loss, list(cores.values()))
        for path, gradient in zip(MODULES, gradients, strict=True):
            found = peer.memory["gradient_mean"][f"{path}.core"]
            assert gradient.norm() > 1e-4
            assert torch.allclose(found, gradient, rtol=1e-10, atol=1e-13)


def test_a_message_holds_the_cores_and_the_head_alone() -> None:
    """4 (r^2 a module + head) bytes and a frame's header, which check counts too."""
    federation = build(resolve(toy(lora={"r": R, "init": "orthonormal"}, method={"schedule": "core"})))
    peers, method = federation.peers, federation.method
    message = method.correction.outgoing(peers[0], method.schedule(1))
    assert {e.role for e in message.layout.entries} == {"core", "head"}
    head = sum(value.numel() for name, value in peers.adapter(0).items() if name.startswith("classifier"))
    numbers = len(MODULES) * R * R + head
    assert message.flat.nbytes == 4 * numbers
    frame = method.codec.encode(message, {}, (0, 1, 0))
    assert sent(federation).bytes_per_peer_and_round == 2 * frame.num_bytes  # to both neighbours of a ring of three
    assert Frame.from_bytes(frame.to_bytes()).num_bytes - 4 * numbers < 300


@pytest.mark.parametrize(("d_in", "d_out", "r"), [(8, 2, R), (8, 12, R), (6, 6, 6)])
def test_both_factors_start_orthonormal_from_the_seed(d_in: int, d_out: int, r: int) -> None:
    """Where there are fewer outputs than the rank the rows of B are, so that no core number is without effect."""
    model = torch.nn.Sequential(torch.nn.Linear(d_in, d_out))
    placement = place(model, "", Lora(("0",), r, init="orthonormal", core=True), head=True)
    start, again, other = (placement.start(model, seed, torch.float32) for seed in (0, 0, 1))
    a, b = start["0.A"].double(), start["0.B"].double()
    near = {"rtol": 0.0, "atol": 1e-6}
    assert torch.allclose(a @ a.T, torch.eye(r, dtype=torch.float64), **near)
    gram = b.T @ b if r <= d_out else b @ b.T
    assert torch.allclose(gram, torch.eye(min(r, d_out), dtype=torch.float64), **near)
    assert not start["0.core"].any()
    assert torch.equal(start.flat, again.flat)
    assert not torch.isclose(start["0.B"], other["0.B"]).any()


def test_the_measures_are_those_of_the_dense_products() -> None:
    own = setting()
    peers = start_apart(own.peers(), 0.3)
    tensors = folded({name: peers.stacked(name) for name in (*peers.common.layout.by_name, *peers.layout.by_name)})
    products = [tensors[f"{path}.B"] @ tensors[f"{path}.A"] for path in MODULES]
    apart = sum((p - p.mean(0)).flatten(1).norm(dim=1).mean().item() for p in products)
    size = sum(p.mean(0).norm().item() for p in products)
    found = consensus(factors(peers), len(peers))
    assert apart > 0.1
    assert found.consensus_error == pytest.approx(apart, rel=1e-9)
    assert found.product_disagreement == pytest.approx(apart, rel=1e-9)
    assert found.relative_disagreement == pytest.approx(apart / size, rel=1e-9)


def test_peers_begin_at_the_base_and_their_cores_move_at_once() -> None:
    """At C = 0 the product is zero, and its gradient is not: no factor has to wait for another."""
    own = setting()
    peers, learner = own.peers(), own.stacked()
    bare = replace(own, schedule=SCHEDULES["lora"]("shared"))
    assert all(
        answers.loss == pytest.approx(bare.stacked().evaluate(bare.peers())[i].loss)
        for i, answers in learner.evaluate(peers).items()
    )
    learner.train(peers, own.schedule(1), 1)
    assert all(peer.adapter[f"{path}.core"].abs().max() > 1e-6 for peer in peers for path in MODULES)
