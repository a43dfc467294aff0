"""What does not go together: one row for each pair of axis values, with the reason that a user is told.

The same table is in docs/recipe.md. Everything else composes: any schedule with any correction, mixer and codec.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dfl_lora.errors import UserError
from dfl_lora.graphs import DENSE
from dfl_lora.mixers import MOST_EXACT
from dfl_lora.mixing import Mixing, chebyshev_contraction, eigenvalues, matrix
from dfl_lora.recipe import Recipe
from dfl_lora.topologies import OWN_WEIGHTS, Topology

Meets = Callable[[Recipe, Topology, Mixing], bool]
LOWEST = -1 / 3
"""Above this all eigenvalues of what d2 mixes by must lie."""


@dataclass(frozen=True)
class Clash:
    """Two values that cannot be used together, when they meet, and why not."""

    one: str
    other: str
    meets: Meets
    reason: str


def too_low(recipe: Recipe, topology: Topology, mixing: Mixing) -> bool:
    """Tells whether the matrix of a round has an eigenvalue at or below -1/3; Chebyshev's reach to its contraction."""
    axes = recipe.method
    if axes.correction.kind != "d2" or topology.num_peers > DENSE:
        return False
    w = matrix(topology(1), mixing)
    if axes.mixer.kind == "chebyshev" and axes.mixer.options["k"] > 1:
        return chebyshev_contraction(w, axes.mixer.options["k"]) >= -LOWEST
    return bool(eigenvalues(w).min() <= LOWEST)


OF_ONE_GRAPH = ("chebyshev", "finite_time", "closing", "gossip_pga")
"""Mixers whose polynomials are made for the eigenvalues of one W."""
DRIFTING = ("led", "d2")
"""Corrections that keep what one W moved, which another W takes up wrongly: see corrections/led.py."""
CHANGING = "a topology that changes from round to round"


def changing_mixer(kind: str) -> Clash:
    return Clash(
        f"mixer {kind}", CHANGING,
        lambda r, t, w: r.method.mixer.kind == kind and t.changes,
        "its polynomial is made for one graph; use mixer plain",
    )  # fmt: skip


def changing_correction(kind: str) -> Clash:
    return Clash(
        f"correction {kind}", CHANGING,
        lambda r, t, w: r.method.correction.kind == kind and t.changes,
        "peers drift apart where W is another each time; use correction k_gt",
    )  # fmt: skip


def mixing_given_twice(kind: str) -> Clash:
    return Clash(
        "peers.mixing other than metropolis", f"topology {kind}",
        lambda r, t, w: r.peers.topology.kind == kind and r.peers.mixing != "metropolis",
        "it brings its own W, so that peers.mixing has no effect; remove it",
    )  # fmt: skip


CLASHES: Sequence[Clash] = (
    *map(mixing_given_twice, sorted(OWN_WEIGHTS)),
    *map(changing_mixer, OF_ONE_GRAPH),
    *map(changing_correction, DRIFTING),
    Clash(
        "mixer finite_time", "more than 10 peers",
        lambda r, t, w: r.method.mixer.kind == "finite_time" and t.num_peers > MOST_EXACT,
        "it amplifies rounding and noise by up to 100 there; use chebyshev(k=...)",
    ),
    Clash(
        "mixer finite_time", "participation below 1",
        lambda r, t, w: r.method.mixer.kind == "finite_time" and r.peers.participation < 1,
        "it is exact on one graph alone; use chebyshev(k=...)",
    ),
    Clash(
        "mixer exact", "participation below 1",
        lambda r, t, w: r.method.mixer.kind == "exact" and r.peers.participation < 1,
        "weights of 1/n are no average of those who are present; use topology complete",
    ),
    Clash(
        "correction k_gt(second_moments)", "optimizer sgd",
        lambda r, t, w: (
            r.method.correction.kind == "k_gt"
            and r.method.correction.options["second_moments"] > 0
            and r.train.optimizer == "sgd"
        ),
        "it has no second moments; remove the option",
    ),
    Clash(
        "correction d2", "eigenvalues of -1/3 or less",
        too_low,
        "it diverges; set peers.mixing to lazy or laplacian, with mixer plain, or use correction led",
    ),
)  # fmt: skip


def check_method(recipe: Recipe, topology: Topology, mixing: Mixing) -> None:
    """Raises where two values of a method cannot be used together."""
    for clash in CLASHES:
        if clash.meets(recipe, topology, mixing):
            raise UserError(f"{clash.one} does not go with {clash.other}: {clash.reason}.")
