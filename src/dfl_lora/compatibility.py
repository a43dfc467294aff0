"""What does not go together: one row for each pair of axis values, with the reason that a user is told.

The same table is in docs/recipe.md. Everything else composes: any schedule with any correction, mixer and codec.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dfl_lora.errors import UserError
from dfl_lora.graphs import DENSE
from dfl_lora.mixers import MOST_EXACT
from dfl_lora.mixing import ROUNDING, Mixing, chebyshev_contraction, eigenvalues, matrix
from dfl_lora.recipe import DEFAULT_METHOD, WINNER, MethodPart, Recipe
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
    """Tells whether a round mixes by an eigenvalue at or below -1/3; Chebyshev's reach to its contraction.

    Those of a mixer that brings all to the mean are 0.
    """
    axes = recipe.method
    if axes.correction.kind != "d2" or axes.mixer.kind in ("exact", "finite_time") or topology.num_peers > DENSE:
        return False
    w = matrix(topology(1), mixing)
    if axes.mixer.kind == "chebyshev" and axes.mixer.options["k"] > 1:
        return chebyshev_contraction(w, axes.mixer.options["k"]) >= -LOWEST
    return bool(eigenvalues(w).min() <= LOWEST + ROUNDING)


OF_ONE_GRAPH = ("chebyshev", "finite_time", "closing", "gossip_pga")
"""Mixers whose polynomials are made for the eigenvalues of one W."""
DRIFTING = ("led", "d2")
"""Corrections that keep what one W moved, which another W takes up wrongly: see corrections/led.py."""
TRACKING = ("correction", "mixer", "codec")
"""The axes in which the default is not plain gossip."""
CHANGING = "a topology that changes from round to round"
MISSING = "a sum that does not come is missing ever after"


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


def agreeing_with_absence(kind: str) -> Clash:
    return Clash(
        f"mixer {kind}", "participation below 1",
        lambda r, t, w: r.method.mixer.kind == kind and r.peers.participation < 1,
        "peers that are absent when all are to agree would stay apart; use mixer plain or chebyshev",
    )  # fmt: skip


def weights_of_its_own(kind: str) -> Clash:
    return Clash(
        f"mixer {kind}", "peers.mixing other than metropolis",
        lambda r, t, w: r.method.mixer.kind == kind and r.peers.mixing != "metropolis",
        "its weights are its own, so that peers.mixing has no effect; remove it",
    )  # fmt: skip


def relaying(other: str, meets: Meets, reason: str) -> Clash:
    return Clash(
        "mixer relay_sum", other, lambda r, t, w: r.method.mixer.kind == "relay_sum" and meets(r, t, w), reason
    )


def trained_alone(recipe: Recipe, topology: Topology, mixing: Mixing) -> bool:
    """Tells whether what is shared alternates from round to round."""
    schedule = recipe.method.schedule
    return bool(schedule.kind == "alternating" and schedule.options["mix"] == "trained")


def is_tree(topology: Topology) -> bool:
    return not topology.changes and len(topology(1).edges) == topology.num_peers - 1


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
    *map(agreeing_with_absence, ("closing", "gossip_pga")),
    Clash(
        "mixer gossip_pga", "fewer rounds than every",
        lambda r, t, w: r.method.mixer.kind == "gossip_pga" and r.method.mixer.options["every"] > r.train.rounds,
        "its agreement would never come; use a smaller every, or mixer plain",
    ),
    Clash(
        "mixer exact", "participation below 1",
        lambda r, t, w: r.method.mixer.kind == "exact" and r.peers.participation < 1,
        "weights of 1/n are no average of those who are present; use topology complete",
    ),
    *map(weights_of_its_own, ("exact", "relay_sum")),
    relaying(
        "a graph that is no tree", lambda r, t, w: not is_tree(t),
        "sums would go in circles; use topology line or star, or edges of a tree",
    ),
    relaying(
        "topology matrix", lambda r, t, w: r.peers.topology.kind == "matrix",
        "its weights are its own, so that those of the rows have no effect; use topology edges",
    ),
    relaying("participation below 1", lambda r, t, w: r.peers.participation < 1, f"{MISSING}; use mixer plain"),
    relaying(
        "a correction", lambda r, t, w: r.method.correction.kind != "none",
        "the mean of peers is not kept, so that no correction sums to zero; use correction none",
    ),
    relaying(
        "codecs with errors", lambda r, t, w: r.method.codec.kind != "fp32",
        "what a sum is off by is never made up for; use codec fp32",
    ),
    relaying(
        "schedule alternating(mix=trained)", trained_alone,
        "its sums are of what is shared in every round; use mix=both",
    ),
    relaying(
        "train.order seed", lambda r, t, w: r.train.order == "seed",
        "it counts from round 1 who is in a sum, and the seed mixes before; use order standard",
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
    Clash(
        "lora.ranks", "combine other than product",
        lambda r, t, w: r.lora.ranks is not None and r.method.combine != "product",
        "others average factors row by row, which gives a peer rows that it has no room for; use combine product",
    ),
    Clash(
        "combine product, fair or rotated", "a correction",
        lambda r, t, w: r.method.combine != "mean" and r.method.correction.kind != "none",
        "what they make of a neighbourhood is no flow that a correction could sum up; use combine mean",
    ),
    Clash(
        "combine product, fair or rotated", "mixers other than plain and exact",
        lambda r, t, w: r.method.combine != "mean" and r.method.mixer.kind not in ("plain", "exact"),
        "sums and polynomials of what is not linear mean nothing; use mixer plain or exact",
    ),
    Clash(
        "combine product, fair or rotated", "schedules that share one factor",
        lambda r, t, w: r.method.combine != "mean" and not both_shared(r),
        "products need A and B in one message, and with a common A the mean is exact; use combine mean",
    ),
    Clash(
        "schedule core", "lora.init kaiming",
        lambda r, t, w: r.method.schedule.kind == "core" and r.lora.init == "kaiming",
        "both factors stay as they start, so both start orthonormal; use init orthonormal or gradient_svd",
    ),
    Clash(
        "codec top_k or choco", "mixers of several exchanges",
        lambda r, t, w: is_sparse(r) and r.method.mixer.kind not in ("plain", "exact"),
        "what one exchange leaves out the next would add to another vector; use codec bf16 or int8",
    ),
    Clash(
        "codec top_k or choco", "correction k_gt",
        lambda r, t, w: is_sparse(r) and r.method.correction.kind == "k_gt",
        "the largest numbers of a message of several vectors may all be of one; use codec bf16 or int8",
    ),
    Clash(
        "codec top_k or choco", "correction led or d2",
        lambda r, t, w: is_sparse(r) and r.method.correction.kind in ("led", "d2"),
        "what their shifts gather of a mix that comes late makes peers diverge; use codec bf16 or int8",
    ),
    Clash(
        "codec top_k or choco", "combine product, fair or rotated",
        lambda r, t, w: is_sparse(r) and r.method.combine != "mean",
        "what is left out of factors is no part of their products; use codec bf16 or int8",
    ),
    Clash(
        "codec choco", "participation below 1",
        lambda r, t, w: r.method.codec.kind == "choco" and r.peers.participation < 1,
        "it needs every message; use codec top_k",
    ),
    Clash(
        "codec choco", CHANGING,
        lambda r, t, w: r.method.codec.kind == "choco" and t.changes,
        "what it keeps of its neighbours is summed by one W; use codec top_k",
    ),
    Clash(
        "codec choco", "schedule alternating(mix=trained)",
        lambda r, t, w: r.method.codec.kind == "choco" and trained_alone(r, t, w),
        "its replicas are of what is shared in every round; use mix=both",
    ),
)  # fmt: skip
OF_REAL_PEERS: Sequence[Clash] = (
    relaying("real peers", lambda r, t, w: True, f"{MISSING}, and messages between them can be lost; use mixer plain"),
    Clash(
        "codec choco", "real peers",
        lambda r, t, w: r.method.codec.kind == "choco",
        "messages between them can be lost, and it needs every one; use codec top_k",
    ),
    Clash(
        "lora.init gradient_svd", "real peers",
        lambda r, t, w: r.lora.init == "gradient_svd",
        "the gradients of all are averaged where all peers are; use init orthonormal",
    ),
)  # fmt: skip
"""Of a recipe whose peers are hosted by several processes."""


def is_sparse(recipe: Recipe) -> bool:
    """Tells whether messages hold the largest numbers alone, the rest being kept for later ones."""
    return recipe.method.codec.kind in ("top_k", "choco")


def both_shared(recipe: Recipe) -> bool:
    """Tells whether both factors are in the messages of every round."""
    schedule = recipe.method.schedule.of(recipe.method.head)
    return all({"A", "B"} <= schedule(t).shared for t in range(1, recipe.train.rounds + 1))


def plain(recipe: Recipe) -> Recipe:
    """Returns the recipe without the default's correction, mixer and codec, where it has two of them: it said none."""
    axes = [a for a in TRACKING if getattr(recipe.method, a) == getattr(DEFAULT_METHOD, a)]
    plainly = {axis: getattr(MethodPart(), axis) for axis in axes if len(axes) > 1}
    return recipe.model_copy(update={"method": recipe.method.model_copy(update=plainly)})


def check_method(recipe: Recipe, topology: Topology, mixing: Mixing, *, real: bool = False) -> None:
    """Raises where two values of a method cannot be used together; `real`: between real peers."""
    for clash in (*CLASHES, *(OF_REAL_PEERS if real else ())):
        if clash.meets(recipe, topology, mixing):
            own = not clash.meets(plain(recipe), topology, mixing)
            default = ", ".join(WINNER[axis] for axis in TRACKING)
            hint = f" (A recipe that says no method has {default}.)" if own else ""
            raise UserError(f"{clash.one} does not go with {clash.other}: {clash.reason}.{hint}")
