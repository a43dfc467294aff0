"""Peers: what belongs to a party between two rounds, in one owner of memory.

`Peers` holds the hosted peers' vectors as matrices [N, P], a row each; a `Peer` is views of its row.
Local steps, mixing and checkpoints act on these matrices in place, so nothing is copied between them.
The tensors that no round trains (the frozen A of DFL-LoRA, a frozen head) are one common copy.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import torch
from torch import Tensor

from dfl_lora.roles import ROLES
from dfl_lora.store import zeros
from dfl_lora.tensors import Layout, Tensors

STEPS = len(ROLES)
"""counters[:STEPS] are the optimiser's steps on each role; counters[STEPS] is the number of batches read."""

BEGIN_AT_X = frozenset({"start", "replica"})
"""Vectors of the memory that begin at the start of all peers; the others begin at zero."""

MEAN_COLUMNS = 1024
"""Columns of x that are in float64 at a time."""


@dataclass(frozen=True)
class Peer:
    """One party; every tensor is a view of its row.

    `optimizer` holds the optimiser's own vectors (exp_avg, exp_avg_sq). `memory` holds what a correction, a mixer and
    a codec keep: `gradient_shift` is added to every gradient after clipping, the learning rate times `step_shift` to x
    after every step, `gradient_mean` receives the mean of what the optimiser was given (skipped steps apart), `start`
    begins at x; each is absent unless one of them names it.
    """

    id: int
    adapter: Tensors
    optimizer: Mapping[str, Tensors]
    memory: Mapping[str, Tensors]
    counters: Tensor


class Peers(Sequence[Peer]):
    """The hosted peers, in the order of their ids."""

    def __init__(
        self,
        ids: Iterable[int],
        start: Tensors,
        common: Tensors,
        *,
        optimizer: Iterable[str] = (),
        memory: Iterable[str] = (),
        place: Path | None = None,
        ranks: Sequence[int] = (),
        agreement: "Callable[[Peers], Tensors] | None" = None,
    ) -> None:
        """All start at the same adapter `start` [P]; `common` holds the frozen tensors of all.

        The matrices lie in memory, or in files of the folder `place`. With `ranks` each peer's A begins with so many
        rows, and zeros, which no gradient moves. `agreement` is what all agreed on, the mean if it is not given.
        """
        self.ids = tuple(ids)
        self.layout: Layout = start.layout
        self.common = common
        self.ranks = ranks
        self.agreement = agreement or Peers.mean
        kind = (len(self.ids), start.layout.size, start.flat.dtype, start.flat.device)
        self.x = zeros(place, *kind)  # [N, P]
        self.optimizer = {name: zeros(place, *kind) for name in optimizer}
        self.memory = {name: zeros(place, *kind) for name in memory}
        self.counters = torch.zeros(len(self.ids), STEPS + 1, dtype=torch.int64)
        self.begin_at(start, common)

    def begin_at(self, start: Tensors, common: Tensors) -> None:
        """Puts all peers at an adapter `start` [P], and what is common and frozen at `common`."""
        self.x.copy_(start.flat)
        for row, rank in enumerate(self.ranks):
            for e in self.layout.entries:
                if e.role == "A":
                    self.x[row, e.start : e.stop].view(e.shape)[rank:] = 0
        for name in BEGIN_AT_X & self.memory.keys():
            self.memory[name].copy_(start.flat)
        self.common.flat.copy_(common.flat)

    @overload
    def __getitem__(self, index: int) -> Peer: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Peer]: ...
    def __getitem__(self, index: int | slice) -> Peer | Sequence[Peer]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = range(len(self))[index]
        return Peer(
            self.ids[row],
            Tensors(self.x[row], self.layout),
            {name: Tensors(m[row], self.layout) for name, m in self.optimizer.items()},
            {name: Tensors(m[row], self.layout) for name, m in self.memory.items()},
            self.counters[row],
        )

    def __len__(self) -> int:
        return len(self.ids)

    def stacked(self, name: str) -> Tensor:
        """Returns one tensor of all peers [N, *shape], a view; [1, *shape] where it is common and frozen."""
        if name in self.common.layout.by_name:
            return self.common[name].unsqueeze(0)
        e = self.layout.by_name[name]
        return self.x[:, e.start : e.stop].view(len(self), *e.shape)

    def adapter(self, row: int | None) -> dict[str, Tensor]:
        """Returns every adapter tensor by name, of one row or (None) of the consensus."""
        flat = self.agreed() if row is None else Tensors(self.x[row], self.layout)
        return {**dict(self.common.items()), **dict(flat.items())}

    def agreed(self) -> Tensors:
        """Returns the consensus: the mean over peers, where nothing else was said."""
        return self.agreement(self)

    def mean(self) -> Tensors:
        """Returns the mean over peers, summed in float64 with no such copy of all of x."""
        columns = [self.x[:, start : start + MEAN_COLUMNS] for start in range(0, self.layout.size, MEAN_COLUMNS)]
        parts = [part.mean(0, dtype=torch.float64).to(self.x.dtype) for part in columns]
        return Tensors(torch.cat([*parts, self.x[0, :0]]), self.layout)

    def arrays(self) -> dict[str, Tensor]:
        """Returns every matrix by name, as a checkpoint saves them."""
        named = {f"optimizer.{k}": v for k, v in self.optimizer.items()}
        named |= {f"memory.{k}": v for k, v in self.memory.items()}
        return {"x": self.x, "counters": self.counters, **named}

    def consensus(self, ids: Iterable[int] = (-1,)) -> "Peers":
        """Returns a peer (or several, with these ids) at what the federation agreed on."""
        return Peers(ids, self.agreed(), self.common)
