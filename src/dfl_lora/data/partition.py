"""Partitions: which rows belong to which peer. Every peer's rows are drawn from a named stream of the seed."""

import warnings
from collections.abc import Sequence
from contextlib import suppress
from math import ceil
from typing import cast

import numpy as np
from datasets import Dataset
from flwr_datasets.partitioner import DirichletPartitioner, IidPartitioner, Partitioner
from numpy.typing import NDArray

from dfl_lora.data.batches import Rows
from dfl_lora.errors import UserError
from dfl_lora.streams import numpy_stream, stream

DRAWS, DRAWS_EACH = 1000, 11
Labels = NDArray[np.int64]


def iid(labels: Labels, num_peers: int, seed: int, min_size: int) -> list[Rows]:
    """Returns equal parts of the shuffled rows (flwr-datasets alone would cut them in the order given)."""
    enough(len(labels), num_peers, min_size)
    order = numpy_stream(seed, "partition").permutation(len(labels))
    rows = Dataset.from_dict({"label": labels})
    return [order[part] for part in partitioned(rows, IidPartitioner(num_partitions=num_peers), num_peers)]


def dirichlet(labels: Labels, num_peers: int, seed: int, min_size: int, alpha: float) -> list[Rows]:
    """Returns rows by label, each label shared out by Dirichlet(alpha); drawn again until all have `min_size`.

    One partitioner gives up after 11 draws, so up to 91 of them, each with a derived seed, make 1,001 draws.
    """
    enough(len(labels), num_peers, min_size)
    rows = Dataset.from_dict({"label": labels})
    for k in range(ceil(DRAWS / DRAWS_EACH)):
        partitioner = DirichletPartitioner(
            num_partitions=num_peers,
            partition_by="label",
            alpha=float(alpha),
            min_partition_size=max(min_size, 1),
            seed=stream(seed, "partition", k) % 2**32,
        )
        with suppress(ValueError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return partitioned(rows, partitioner, num_peers)
    raise unfair(f"Dirichlet({alpha:g})", min_size)


def dirichlet_sizes(num_rows: int, num_peers: int, seed: int, min_size: int, alpha: float) -> list[Rows]:
    """Returns shuffled rows in parts whose sizes are drawn by Dirichlet(alpha): skew for data without labels."""
    enough(num_rows, num_peers, min_size)

    def draw(k: int) -> list[Rows]:
        generator = numpy_stream(seed, "partition", k)
        shares = generator.dirichlet(np.full(num_peers, alpha))
        cuts = np.round(np.cumsum(shares)[:-1] * num_rows).astype(int)
        return list(np.split(generator.permutation(num_rows), cuts))

    for parts in map(draw, range(DRAWS)):
        if min(map(len, parts)) >= max(min_size, 1):
            return parts
    raise unfair(f"Dirichlet({alpha:g}) over sizes", min_size)


def enough(num_rows: int, num_peers: int, min_size: int) -> None:
    if num_rows < num_peers * max(min_size, 1):
        raise UserError(
            f"{num_rows} rows cannot give {num_peers} peers at least {max(min_size, 1)} each; "
            "use fewer peers, a smaller min_size, or more data."
        )


def unfair(what: str, min_size: int) -> UserError:
    return UserError(
        f"{what} gave no split with at least {max(min_size, 1)} rows for every peer in {DRAWS} draws; "
        "use a larger alpha, a smaller min_size, or fewer peers."
    )


def partitioned(rows: Dataset, partitioner: Partitioner, num_peers: int) -> list[Rows]:
    """Returns the row numbers that a flwr-datasets partitioner gives each peer."""
    partitioner.dataset = rows.add_column("row", np.arange(len(rows)))
    parts = [partitioner.load_partition(i).with_format("numpy") for i in range(num_peers)]
    return [np.asarray(part["row"][:], dtype=np.int64) for part in parts]


def counts(parts: Sequence[Labels], num_labels: int) -> list[list[int]]:
    """Returns how many rows of each label each peer has [peers][labels]."""
    return [cast(list[int], np.bincount(part, minlength=num_labels).tolist()) for part in parts]
