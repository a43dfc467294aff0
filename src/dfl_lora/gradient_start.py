"""The start from gradients: rows of A that span the inputs on which all peers together would move a weight most.

For a target with weight W [d_out, d_in] let G = mean_i G_i be the gradient at the base over the first batches of each
peer. No G is ever formed: where B = 0 the gradient of B is s G A', and where A = 0 that of A is s B' G. Peers average

    Y = mean_i G_i A'  [d_out, r]      with A drawn;    B <- orthonormal columns that span Y
    Z = mean_i B' G_i  [r, d_in]  = U S V'              A <- V', and B <- 0

so that the rows of A come near the r largest right singular vectors of G, the largest first. With a core
(`models.core`), which is 1 while peers look, B <- B U: columns near the left ones. Measured on SST-2 (MiniLM, r = 4,
seven skewed peers): |G A'| is 0.075 for the A that was drawn, 0.6717 after this, and 0.6720 after four times as much.
Costs two gradients over LOOKS batches and a message of each factor from everybody to everybody. All peers must start at
the same factors to the bit, so one process is to host all of them.

Sources: the start of A at singular vectors of a gradient, Wang, Yu, Li, "LoRA-GA: Low-Rank Adaptation with Gradient
Approximation", NeurIPS 2024, arXiv 2407.05000 (without its start of B and its shift of W); the sketch, Halko,
Martinsson, Tropp, "Finding Structure with Randomness", 2011, arXiv 0909.4061. Checked are how much of dense gradients
the rows (and columns) hold, against the best that as many can, and the averages (tests/test_gradient_start.py).
"""

from collections.abc import Callable
from copy import copy
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from dfl_lora.build import Federation
from dfl_lora.learners.sequential import SequentialLearner
from dfl_lora.learners.stacked import StackedLearner
from dfl_lora.models.placement import split
from dfl_lora.peers import Peers
from dfl_lora.roles import Role
from dfl_lora.schedules import Phase
from dfl_lora.tensors import Entry, Layout, Tensors

LOOKS = 10
"""Batches of a peer whose gradients are averaged."""


def start_at_gradients(federation: Federation) -> float:
    """Puts all peers at the factors that all gradients give and a product of 0; returns the bytes that a peer sends."""
    peers, learner = federation.peers, looking(federation.learner)
    start = whole(peers)
    put(start, "core", lambda e: torch.eye(*e.shape))
    put(start, "B", zeros)
    y = average(peers.ids, start, learner, "B")
    put(start, "B", lambda e: spanning(y[e.name], "B"))
    put(start, "A", zeros)
    z = average(peers.ids, start, learner, "A")
    put(start, "A", lambda e: spanning(z[e.name], "A"))
    if "core" in start.layout.roles:
        put(start, "B", lambda e: start[e.name].double().cpu() @ left(z[f"{e.name[:-2]}.A"]))
        put(start, "core", zeros)
    else:
        put(start, "B", zeros)
    peers.begin_at(*split(start, peers.layout.roles))
    sizes = [start.select(frozenset({role})).flat.nbytes for role in ("A", "B")]
    return (federation.topology.num_peers - 1) * float(sum(sizes))


def whole(peers: Peers) -> Tensors:
    """Returns the common start of all peers, with what is frozen."""
    adapter = peers.adapter(0)
    layout = Layout.of({e.name: (e.role, e.shape) for e in (*peers.layout.entries, *peers.common.layout.entries)})
    start = Tensors(torch.empty(layout.size, dtype=peers.x.dtype, device=peers.x.device), layout)
    for name, value in adapter.items():
        start[name].copy_(value)
    return start


def looking(learner: object) -> StackedLearner | SequentialLearner:
    """Returns a learner over the same base whose steps move nothing."""
    assert isinstance(learner, StackedLearner | SequentialLearner)
    steps = min(LOOKS, learner.work.steps) if learner.work.steps else LOOKS
    look = copy(learner)
    look.work = replace(learner.work, steps=steps, epochs=None, optimizer="sgd", learning_rate=0.0, max_grad_norm=None)
    return look


def average(
    ids: tuple[int, ...], start: Tensors, learner: StackedLearner | SequentialLearner, role: Literal["A", "B"]
) -> Tensors:
    """Returns the mean over peers of the gradients of one factor at `start`, in float64."""
    own, common = split(start, frozenset({role}))
    peers = Peers(ids, own, common, memory=("gradient_mean",))
    learner.train(peers, Phase(1, frozenset({role}), frozenset()), 1)
    return own.with_flat(peers.memory["gradient_mean"].mean(0, dtype=torch.float64))


def put(start: Tensors, role: Role, value: Callable[[Entry], Tensor]) -> None:
    """Sets the tensors of a role, in place."""
    for entry in start.layout.entries:
        if entry.role == role:
            start[entry.name].copy_(value(entry))


def zeros(entry: Entry) -> Tensor:
    return torch.zeros(entry.shape)


def left(gradient: Tensor) -> Tensor:
    """Returns the left singular vectors [r, r] of a gradient of A [r, d_in]."""
    vectors: Tensor = torch.linalg.svd(gradient.cpu(), full_matrices=False).U
    return vectors


def spanning(gradient: Tensor, role: Literal["A", "B"]) -> Tensor:
    """Returns orthonormal rows (A) or columns (B) in the order of singular values; columns of zeros where d_out < r."""
    columns, _, rows = torch.linalg.svd(gradient.cpu(), full_matrices=False)
    found: Tensor = rows if role == "A" else F.pad(columns, (0, gradient.shape[1] - columns.shape[1]))
    return found
