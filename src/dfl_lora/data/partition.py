"""Partitions: which rows belong to which peer, by name.

Every row of PARTITIONS takes a table of n rows, the number of peers N, a seed and the fewest rows of a peer, and
gives each peer its row numbers: disjoint, complete, a function of the seed alone, at least `min_size` each, or one
sentence that says why that cannot be. Rows of one peer are shuffled.

    label skew   dirichlet      each label shared out by Dirichlet(alpha)        Hsu et al., arXiv 1909.06335
                 shards         sorted by label, cut, dealt out                  McMahan et al., arXiv 1602.05629
                 pathological   a fixed number of labels for every peer          Li et al., arXiv 2102.02079
    size skew    quantity       sizes drawn by Dirichlet(alpha)
                 linear, square, exponential   sizes 1 : 2 : ... : N, their squares, e : e^2 : ... : e^N
    text skew    length, topic  groups of like length or like words (groups.py), each shared out by Dirichlet(alpha)
    given        natural        whole groups of a column's value                 saved   the rows of an earlier run

No datasets or flwr_datasets is imported before rows are drawn, for those of LIGHT not even then: the recipe reads this
table, and what is wrong with a choice from it is said before anything heavy is loaded.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from dfl_lora.choices import Choice, Positive, PositiveFloat
from dfl_lora.data.groups import Grouped, by_length, by_topic, by_value
from dfl_lora.data.saved import Saved, read_saved
from dfl_lora.errors import UserError
from dfl_lora.streams import numpy_stream, stream

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner

Rows = NDArray[np.int64]
DRAWS, DRAWS_EACH, DRAWS_OF_SIZES, LOOKED_AT = 220, 11, 1000, 50


@dataclass(frozen=True)
class Table:
    """The rows to share out: their labels [rows] (all 0 where there are none), and any other column by its name,
    which has a value in each row.

    What else they hold is asked for where a partition needs it: lengths in tokens [rows] and texts (None: there are
    none). Groups that were made of them are kept in `made`, since topics take seconds.
    """

    labels: Rows
    column: Callable[[str], Sequence[object]]
    lengths: Callable[[], Rows] | None = None
    texts: Callable[[], Sequence[str]] | None = None
    labelled: bool = True
    """False: labels are groups or nothing, and say nothing against the counts of an earlier run."""
    made: dict[tuple[str, int, int], Grouped] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.labels)


def iid(table: Table, num_peers: int, seed: int, min_size: int) -> list[Rows]:
    """Equal parts of the shuffled rows."""
    from flwr_datasets.partitioner import IidPartitioner  # heavy

    enough(len(table), num_peers, min_size)
    return cut(
        numpy_stream(seed, "partition").permutation(len(table)), IidPartitioner(num_partitions=num_peers), num_peers
    )


def dirichlet(table: Table, num_peers: int, seed: int, min_size: int, *, alpha: PositiveFloat = 0.5) -> list[Rows]:
    """Each label shared out by Dirichlet(alpha), smaller is more skewed; drawn again until all have min_size rows."""
    from flwr_datasets.partitioner import DirichletPartitioner  # heavy

    enough(len(table), num_peers, min_size)
    for k in range(DRAWS // DRAWS_EACH):  # one partitioner gives up after 11 draws
        partitioner = DirichletPartitioner(
            num_partitions=num_peers,
            partition_by="label",
            alpha=float(alpha),
            min_partition_size=min_size,
            seed=stream(seed, "partition", k) % 2**32,
        )
        with suppress(ValueError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return cut(np.arange(len(table)), partitioner, num_peers, table.labels)
    raise unfair(f"Dirichlet({alpha:g})", min_size, DRAWS)


def quantity(table: Table, num_peers: int, seed: int, min_size: int, *, alpha: PositiveFloat = 0.5) -> list[Rows]:
    """Shuffled rows in parts whose sizes are drawn by Dirichlet(alpha) until all have min_size rows."""
    enough(len(table), num_peers, min_size)
    for k in range(DRAWS_OF_SIZES):
        drawn = numpy_stream(seed, "partition", k)
        shares = drawn.dirichlet(np.full(num_peers, alpha))
        cuts = np.round(np.cumsum(shares)[:-1] * len(table)).astype(int)
        if np.diff(cuts, prepend=0, append=len(table)).min() >= min_size:
            return list(np.split(drawn.permutation(len(table)), cuts))
    raise unfair(f"Dirichlet({alpha:g}) over sizes", min_size, DRAWS_OF_SIZES)


def shards(table: Table, num_peers: int, seed: int, min_size: int, *, per_peer: Positive = 2) -> list[Rows]:
    """Rows sorted by label, cut into shards of equal size (to a row), per_peer of them dealt to each peer."""
    enough(len(table), num_peers, min_size)
    drawn, num_shards = numpy_stream(seed, "partition", "shards"), per_peer * num_peers
    if num_shards > len(table):
        raise UserError(
            f"{len(table)} rows cannot be cut into {num_shards} shards, {per_peer} for each of {num_peers} peers; "
            "use a smaller per_peer, fewer peers, or more data."
        )
    order = drawn.permutation(len(table))
    pieces = np.array_split(order[np.argsort(table.labels[order], kind="stable")], num_shards)
    hands = drawn.permutation(num_shards).reshape(num_peers, per_peer)
    parts = [drawn.permutation(np.concatenate([pieces[i] for i in hand])) for hand in hands]
    return checked(parts, f"shards(per_peer={per_peer})", min_size)


def pathological(
    table: Table, num_peers: int, seed: int, min_size: int, *, labels_per_peer: Positive = 2
) -> list[Rows]:
    """Exactly labels_per_peer labels for every peer; a label's rows go in equal parts to the peers that hold it.

    A peer is given the labels that the fewest peers hold so far, ties drawn, so that none is left out.
    """
    enough(len(table), num_peers, min_size)
    found, ids, sizes = np.unique(table.labels, return_inverse=True, return_counts=True)
    what, num_labels = f"pathological(labels_per_peer={labels_per_peer})", len(found)
    if labels_per_peer > num_labels:
        raise UserError(f"{what} asks for more labels than the {num_labels} there are; use at most {num_labels}.")
    if labels_per_peer * num_peers < num_labels:
        raise UserError(
            f"{what} leaves {num_labels - labels_per_peer * num_peers} of {num_labels} labels without a peer; "
            f"use a labels_per_peer of at least {ceil(num_labels / num_peers)}, or more peers."
        )
    drawn, holders = numpy_stream(seed, "partition", "pathological"), [list[int]() for _ in range(num_labels)]
    for i in range(num_peers):
        order = np.lexsort((drawn.random(num_labels), np.array([len(held) for held in holders])))
        for label in order[:labels_per_peer]:
            holders[label].append(i)
    parts = [list[Rows]() for _ in range(num_peers)]
    for label, held in enumerate(holders):
        if sizes[label] < len(held):
            raise UserError(
                f"{what} gives label {found[label]} to {len(held)} peers, but only {sizes[label]} rows have it; "
                "use a smaller labels_per_peer, fewer peers, or more data."
            )
        rows = drawn.permutation(np.flatnonzero(ids == label))
        for i, part in zip(held, np.array_split(rows, len(held)), strict=True):
            parts[i].append(part)
    return checked([drawn.permutation(np.concatenate(part)) for part in parts], what, min_size)


def natural(table: Table, num_peers: int, seed: int, min_size: int, *, column: str) -> list[Rows]:
    """Whole groups of a column's value: largest first, each to the peer with the fewest rows, ties drawn."""
    enough(len(table), num_peers, min_size)
    found = by_value(table.column(column))
    groups = np.split(np.argsort(found.ids, kind="stable"), np.cumsum(np.bincount(found.ids))[:-1])
    if len(groups) < num_peers:
        raise UserError(
            f"Column '{column}' has {len(groups)} different values for {num_peers} peers; "
            f"use at most {len(groups)} peers, or a column with more values."
        )
    drawn, held = numpy_stream(seed, "partition", "natural"), [list[int]() for _ in range(num_peers)]
    for k in sorted(drawn.permutation(len(groups)), key=lambda k: -len(groups[k])):
        min(held, key=len).extend(groups[k])
    return checked([drawn.permutation(np.array(rows)) for rows in held], f"natural(column={column})", min_size)


def length(
    table: Table, num_peers: int, seed: int, min_size: int, *, groups: Positive = 10, alpha: PositiveFloat = 0.5
) -> list[Rows]:
    """Rows in groups of like length, from short to long, each group shared out by Dirichlet(alpha)."""
    return by_group("length", table, num_peers, seed, min_size, groups, alpha)


def topic(
    table: Table, num_peers: int, seed: int, min_size: int, *, groups: Positive = 10, alpha: PositiveFloat = 0.5
) -> list[Rows]:
    """Rows in groups of like words (k-means of TF-IDF vectors), each group shared out by Dirichlet(alpha)."""
    return by_group("topic", table, num_peers, seed, min_size, groups, alpha)


def linear(table: Table, num_peers: int, seed: int, min_size: int) -> list[Rows]:
    """Shuffled rows in parts of sizes 1 : 2 : ... : N."""
    from flwr_datasets.partitioner import LinearPartitioner  # heavy

    return grown("linear", LinearPartitioner(num_peers), table, num_peers, seed, min_size)


def square(table: Table, num_peers: int, seed: int, min_size: int) -> list[Rows]:
    """Shuffled rows in parts of sizes 1 : 4 : ... : N^2."""
    from flwr_datasets.partitioner import SquarePartitioner  # heavy

    return grown("square", SquarePartitioner(num_peers), table, num_peers, seed, min_size)


def exponential(table: Table, num_peers: int, seed: int, min_size: int) -> list[Rows]:
    """Shuffled rows in parts of sizes e : e^2 : ... : e^N."""
    from flwr_datasets.partitioner import ExponentialPartitioner  # heavy

    return grown("exponential", ExponentialPartitioner(num_peers), table, num_peers, seed, min_size)


def saved(
    table: Table, num_peers: int, seed: int, min_size: int, *, path: str, sha256: str | None = None
) -> list[Rows]:
    """The rows of an earlier run, from its directory or its partition.json; sha256 says which rows they must be."""
    given = saved_for(len(table), num_peers, path, sha256)
    if table.labelled and not agree(given.counts, [table.labels[rows] for rows in given.rows]):
        raise UserError(f"{path} counts other labels in these rows than they have; give the same data and labels.")
    return checked(list(given.rows), f"saved(path={path})", min_size)


def saved_for(num_rows: int, num_peers: int, path: str, sha256: str | None) -> Saved:
    """Returns the saved rows of a path; raises where they are not those of the recipe, its peers and its table."""
    given = read_saved(Path(path))
    if sha256 is not None and given.sha256 != sha256:
        raise UserError(
            f"The rows of {path} have the sha256 {given.sha256[:12]}, not {sha256[:12]} as the recipe says; "
            "give the file the recipe was written with, or drop sha256."
        )
    if len(given.rows) != num_peers:
        raise UserError(f"{path} shares rows out to {len(given.rows)} peers, not {num_peers}; set peers.num_peers.")
    if given.num_rows != num_rows:
        raise UserError(f"{path} shares out a table of {given.num_rows} rows, not {num_rows}; give the same data.")
    return given


PARTITIONS: Mapping[str, Callable[..., list[Rows]]] = {
    "iid": iid,
    "dirichlet": dirichlet,
    "quantity": quantity,
    "shards": shards,
    "pathological": pathological,
    "length": length,
    "topic": topic,
    "natural": natural,
    "linear": linear,
    "square": square,
    "exponential": exponential,
    "saved": saved,
}
LIGHT = frozenset({"quantity", "shards", "pathological", "natural", "saved"})
"""Those that are drawn with numpy alone."""
GROWTH: Mapping[str, Callable[[Rows], NDArray[np.float64]]] = {
    "linear": lambda peers: peers.astype(float),
    "square": lambda peers: np.square(peers.astype(float)),
    "exponential": lambda peers: np.exp(np.minimum(peers - 1, 500)),  # e^710 is infinite
}
"""What the sizes grow with, by the peer's number from 1; the first is the smallest."""
BY_LABEL = frozenset({"dirichlet", "shards", "pathological"})
"""Those that say nothing where rows have no labels."""


def lengths_of(table: Table, groups: int, seed: int) -> Grouped:
    """Returns the rows by length; the seed says nothing."""
    if table.lengths is None:
        raise no_text("lengths")
    return by_length(table.lengths(), groups)


def topics_of(table: Table, groups: int, seed: int) -> Grouped:
    if table.texts is None:
        raise no_text("words")
    return by_topic(table.texts(), groups, seed)


GROUPS: Mapping[str, Callable[[Table, int, int], Grouped]] = {"length": lengths_of, "topic": topics_of}
"""Those that make groups of what rows hold, and how."""


def grouped(how: Choice, table: Table, seed: int) -> Grouped | None:
    """Returns the groups that a partition shares out, made once for a table; None where it makes none.

    Values of a column are groups where they are so few that one can look at them.
    """
    if how.kind == "natural":
        column = str(how.options["column"])
        found = by_value(table.column(column))
        return found if len(found.names) <= LOOKED_AT else None
    return groups_of(how.kind, table, how.options["groups"], seed) if how.kind in GROUPS else None


def groups_of(kind: str, table: Table, groups: int, seed: int) -> Grouped:
    if (kind, groups, seed) not in table.made:
        table.made[kind, groups, seed] = GROUPS[kind](table, groups, seed)
    return table.made[kind, groups, seed]


def by_group(
    kind: str, table: Table, num_peers: int, seed: int, min_size: int, groups: int, alpha: float
) -> list[Rows]:
    """Returns what `dirichlet` gives each peer where groups are the labels."""
    enough(len(table), num_peers, min_size)
    labelled = replace(table, labels=groups_of(kind, table, groups, seed).ids)
    return dirichlet(labelled, num_peers, seed, min_size, alpha=alpha)


def no_text(what: str) -> UserError:
    return UserError(f"These rows are no texts, so that they have no {what} to group by; use a partition by size.")


def cut(order: Rows, partitioner: "Partitioner", num_peers: int, labels: Rows | None = None) -> list[Rows]:
    """Returns the row numbers that a flwr-datasets partitioner gives each peer of the rows in that order."""
    from datasets import Dataset  # heavy

    columns = {"row": order} if labels is None else {"row": order, "label": labels}
    partitioner.dataset = Dataset.from_dict(columns)
    parts = [partitioner.load_partition(i).with_format("numpy") for i in range(num_peers)]
    return [np.asarray(part["row"][:], dtype=np.int64) for part in parts]


def grown(name: str, partitioner: "Partitioner", table: Table, num_peers: int, seed: int, min_size: int) -> list[Rows]:
    """Returns shuffled rows in parts whose sizes grow with the peer's number; the last takes what rounding leaves."""
    check_growth(name, len(table), num_peers, min_size)
    order = numpy_stream(seed, "partition", name).permutation(len(table))
    try:
        with np.errstate(over="ignore", invalid="ignore"):  # e^710 is infinite
            parts = cut(order, partitioner, num_peers)
    except ValueError:  # an empty part
        parts = [order[:0]]
    return checked(parts, name, min_size)


def check_growth(name: str, num_rows: int, num_peers: int, min_size: int) -> None:
    """Raises where the first peer, whose part is the smallest, is left with too few rows."""
    enough(num_rows, num_peers, min_size)
    sizes = GROWTH[name](np.arange(1, num_peers + 1))
    check_smallest(int(num_rows * sizes[0] / sizes.sum() + 1e-6), name, min_size)


def enough(num_rows: int, num_peers: int, min_size: int) -> None:
    if num_rows < num_peers * min_size:
        raise UserError(
            f"{num_rows} rows cannot give {num_peers} peers at least {min_size} each; "
            "use fewer peers, a smaller min_size, or more data."
        )


def checked(parts: list[Rows], what: str, min_size: int) -> list[Rows]:
    check_smallest(min(map(len, parts)), what, min_size)
    return parts


def check_smallest(smallest: int, what: str, min_size: int) -> None:
    if smallest < min_size:
        raise UserError(
            f"{what} leaves a peer with {smallest} rows, fewer than min_size {min_size}; "
            "use fewer peers, a smaller min_size, or more data."
        )


def unfair(what: str, min_size: int, draws: int) -> UserError:
    return UserError(
        f"{what} gave no split with at least {min_size} rows for every peer in {draws} draws; "
        "use a larger alpha, a smaller min_size, or fewer peers."
    )


def agree(given: Sequence[Sequence[int]], labels: Sequence[Rows]) -> bool:
    """Tells whether the counts of a file are those of the labels; counts of no labels say nothing."""
    width = max(map(len, given))
    return width == 0 or (max(int(part.max()) for part in labels) < width and counts(labels, width) == given)


def counts(parts: Sequence[Rows], num_labels: int) -> list[list[int]]:
    """Returns how many rows of each label each peer has [peers][labels]."""
    return [cast(list[int], np.bincount(part, minlength=num_labels).tolist()) for part in parts]
