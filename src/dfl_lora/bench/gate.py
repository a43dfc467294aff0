"""The gate: a time counts only if the arm did the work.

float32   A, B and head of every peer end within 1e-4 of the reference (plain PEFT in float32, one peer at a time,
          same batches, same mixing), in relative norm.
bfloat16  the gradient of the first step is within 5e-2 in each role, the loss curve within 2 %, the accuracy within
          a point. Adapters cannot gate it: Adam's first steps are signs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from dfl_lora.bench.arms import Adapter
from dfl_lora.models.placement import Placement

END, GRADIENT, LOSS, ACCURACY = 1e-4, 5e-2, 2e-2, 1e-2


@dataclass(frozen=True)
class Verdict:
    """Whether an arm did the work, by what was measured."""

    passed: bool
    measured: Mapping[str, float]
    allowed: Mapping[str, float]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def judged(measured: Mapping[str, float], allowed: Mapping[str, float]) -> Verdict:
    """Returns the verdict; what is not a number fails."""
    return Verdict(all(measured[name] <= limit for name, limit in allowed.items()), dict(measured), dict(allowed))


def by_role(adapters: Sequence[Adapter], placement: Placement) -> dict[str, list[Tensor]]:
    """Returns by role a vector of each peer, of the tensors there are."""
    names = {
        role: [e.name for e in placement.layout.entries if e.role == role and e.name in adapters[0]]
        for role in dict.fromkeys(e.role for e in placement.layout.entries)
    }
    return {role: [packed(own, some) for own in adapters] for role, some in names.items() if some}


def distances(mine: Sequence[Adapter], theirs: Sequence[Adapter], placement: Placement) -> dict[str, float]:
    """Returns by role the largest relative distance ||x - y|| / ||y|| over the peers."""
    x, y = by_role(mine, placement), by_role(theirs, placement)
    return {role: max(map(relative, x[role], vectors)) for role, vectors in y.items()}


def joint_distances(mine: Sequence[Adapter], theirs: Sequence[Adapter], placement: Placement) -> dict[str, float]:
    """Returns by role the relative distance of all peers' numbers as one vector.

    The rows of a small batch can cancel in one peer's gradient, and then its rounding alone is large beside it.
    """
    x, y = by_role(mine, placement), by_role(theirs, placement)
    return {role: relative(torch.cat(x[role]), torch.cat(vectors)) for role, vectors in y.items()}


def packed(adapter: Adapter, names: Sequence[str]) -> Tensor:
    return torch.cat([adapter[name].detach().double().flatten() for name in names])


def relative(x: Tensor, y: Tensor) -> float:
    distance, size = (x - y).norm().item(), y.norm().item()
    return distance / size if distance else 0.0


def same_end(mine: Sequence[Adapter], theirs: Sequence[Adapter], placement: Placement) -> Verdict:
    """Judges an arm in float32 by where its peers ended."""
    measured = distances(mine, theirs, placement)
    return judged(measured, dict.fromkeys(measured, END))


@dataclass(frozen=True)
class Course:
    """The first step's gradient (as Adam's first moments), the losses by round and peer, the accuracies at the end."""

    gradient: Sequence[Adapter]
    losses: Sequence[Sequence[float]]
    accuracies: Sequence[float]


def same_course(mine: Course, theirs: Course, placement: Placement) -> Verdict:
    """Judges an arm in bfloat16 by its way."""
    measured = {f"gradient of {r}": d for r, d in joint_distances(mine.gradient, theirs.gradient, placement).items()}
    allowed = dict.fromkeys(measured, GRADIENT)
    curves = zip(map(mean, mine.losses), map(mean, theirs.losses), strict=True)
    measured |= {
        "loss": max(abs(x - y) / y for x, y in curves),
        "accuracy": abs(mean(mine.accuracies) - mean(theirs.accuracies)),
    }
    return judged(measured, allowed | {"loss": LOSS, "accuracy": ACCURACY + 1e-9})


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
