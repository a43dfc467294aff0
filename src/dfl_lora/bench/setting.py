"""A setting: everything an arm needs of a federation, without its learner; every arm starts from the same numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dfl_lora.bench.flops import Shape, shape_of
from dfl_lora.build import Federation, build, local_work
from dfl_lora.learners.work import LocalWork, PeerData
from dfl_lora.models.base import Files
from dfl_lora.models.placement import Placement
from dfl_lora.peers import Peers
from dfl_lora.recipe import Compute, Recipe
from dfl_lora.schedules import Schedule
from dfl_lora.streams import torch_stream

MOVED = 0.02
"""At B = 0 some gradients are as small as rounding, and Adam's first steps make a sign of them."""


@dataclass(frozen=True)
class Setting:
    """A federation before its first round, in the words of any tool."""

    files: Files
    num_labels: int
    placement: Placement
    data: PeerData
    work: LocalWork
    weights: Sequence[Sequence[float]]
    """W, a row a peer."""
    schedule: Schedule
    starts: Sequence[Mapping[str, Tensor]]
    """Each peer's adapter by name."""
    shape: Shape
    compute: Compute
    """As this machine resolves it."""

    @property
    def num_peers(self) -> int:
        return len(self.starts)

    @property
    def trained(self) -> frozenset[str]:
        """The names that rounds train; every round of these methods trains the same."""
        return names_of(self.placement, self.schedule(1).trained)

    @property
    def shared(self) -> frozenset[str]:
        return names_of(self.placement, self.schedule(1).shared)


def names_of(placement: Placement, roles: frozenset[str]) -> frozenset[str]:
    return frozenset(e.name for e in placement.layout.entries if e.role in roles)


def move_start(peers: Peers, seed: int) -> None:
    """Moves the common start of all peers a little, so that no gradient is zero."""
    peers.x.add_(torch.randn(peers.layout.size, generator=torch_stream(seed, "bench start")), alpha=MOVED)


def matrix_of(federation: Federation) -> list[list[float]]:
    """Returns W of the federation's first round."""
    graph, count = federation.method.topology(1), len(federation.peers)
    rows = [federation.method.mixing(graph, i).weights for i in range(count)]
    others = [sum(w for j, w in row.items() if j != i) for i, row in enumerate(rows)]
    return [[1 - others[i] if i == j else row.get(j, 0.0) for j in range(count)] for i, row in enumerate(rows)]


def federation_of(recipe: Recipe, learner: str = "stacked") -> Federation:
    """Returns the federation of a cell's recipe with its start moved."""
    federation = build(recipe, learner=learner)
    move_start(federation.peers, recipe.train.seed)
    return federation


def setting_of(federation: Federation) -> Setting:
    """Returns what an arm needs of a federation whose peers are at their start."""
    if federation.export is None:
        raise ValueError("the toy has no base model that other tools could load")
    placement, files = federation.export.placement, federation.export.files
    starts = [
        {name: value.clone() for name, value in federation.peers.adapter(row).items()}
        for row in range(len(federation.peers))
    ]
    return Setting(
        files=files,
        num_labels=len(federation.data.labels),
        placement=placement,
        data=federation.data.peers,
        work=local_work(federation.recipe),
        weights=matrix_of(federation),
        schedule=federation.method.schedule,
        starts=starts,
        shape=shape_of(files, placement, len(federation.data.labels)),
        compute=federation.recipe.compute,
    )
