"""The rows of every peer: loaded, made into tokens, shared out, and those on which each is evaluated."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from datasets import Dataset

from dfl_lora.data import partition, sources, tasks
from dfl_lora.data.batches import Rows, Shard, Source, TokenSource, VectorSource
from dfl_lora.data.causal import CausalRows, CausalTokenization
from dfl_lora.data.labels import check_several, occurring
from dfl_lora.data.sources import Excerpt
from dfl_lora.errors import UserError
from dfl_lora.learners.work import PeerData
from dfl_lora.models import base as bases
from dfl_lora.models.folder import check_room
from dfl_lora.preflight import (
    TOY_HELD_OUT,
    check_partition,
    held_out_split,
    no_column,
    partition_seed,
    share_out,
    text_columns,
    toy_rows,
)
from dfl_lora.recipe import Recipe, is_path
from dfl_lora.streams import numpy_stream, torch_stream

TOY_INPUTS, TOY_LABELS = 8, 3


@dataclass(frozen=True)
class Data:
    """The rows of every hosted peer and what is known of all."""

    peers: PeerData
    labels: tuple[str, ...]
    """Of a classifier, or names of the groups that rows without labels were put into."""
    counts: list[list[int]]
    num_rows: int
    """Of the table that is shared out, or of all peers' own tables that are read here."""
    rows: list[Rows] | None
    """Row numbers of each peer; None where each has a table of its own."""
    notes: Mapping[str, int] = field(default_factory=dict)
    """What was done to rows, and to how many; the words follow the number."""


@dataclass(frozen=True)
class Tables:
    """The tables of training rows, by the peer they are of; one that is shared out is peer 0's."""

    owners: list[int]
    """Whose table each peer's rows are in, of all peers or (each with its own) of those hosted."""
    excerpts: Mapping[int, Excerpt]
    shared: bool
    everywhere: bool
    """Whether the rows of all peers are read here."""

    @property
    def rows(self) -> dict[int, Dataset]:
        return {i: excerpt.rows for i, excerpt in self.excerpts.items()}

    @property
    def paths(self) -> dict[int, str]:
        return {i: excerpt.path for i, excerpt in self.excerpts.items()}


def tables_of(recipe: Recipe, hosted: Iterable[int]) -> Tables:
    """Loads the tables of training rows."""
    data = recipe.data
    check_partition(recipe)
    shared, everyone = data.per_peer is None, range(recipe.peers.num_peers)
    owners = [0] * len(everyone) if shared else list(hosted)
    paths = {i: sources.peer_path(data.per_peer or str(data.path), i) for i in dict.fromkeys(owners)}
    excerpts = {i: sources.excerpt(path, data.config, data.train) for i, path in paths.items()}
    return Tables(owners, excerpts, shared, shared or len(owners) == len(everyone))


def text_data(recipe: Recipe, files: bases.Files, hosted: Iterable[int]) -> Data:
    """Loads, tokenises and shares out the rows of a classification task."""
    columns, tables = text_columns(recipe), tables_of(recipe, hosted)
    names, labels = labels_in(tables, columns)
    tokenizer, limit = bases.load_tokenizer(files), min(recipe.task.max_length, bases.max_tokens(files))
    special = tokenizer.num_special_tokens_to_add(pair=len(columns.text) == 2)
    check_room(limit, special)
    tokens = tasks.Tokenization(tokenizer, files.tokenizer, limit, recipe.task.truncation_side)
    read = {i: tokens.source(rows, columns, names, tables.paths[i]) for i, rows in tables.rows.items()}

    def texts() -> list[str]:
        own = (tasks.text_of(tables.rows[0], name, tables.paths[0]) for name in columns.text)
        return [" ".join(parts) for parts in zip(*own, strict=True)]

    if tables.shared:
        whole = partition.Table(labels[0], tables.excerpts[0].filled, lambda: read[0].lengths, texts)
        parts = share_out(recipe, whole)
    else:
        parts = [np.arange(len(labels[i])) for i in tables.owners]

    def held_out(excerpt: Excerpt) -> Source:
        return tokens.source(excerpt.rows, columns, names, excerpt.path)

    data = data_of(recipe, hosted, tables, read, parts, names, labels, held_out)
    check_words(data, bases.num_words(files), files)
    return data


def check_words(data: Data, num_words: int, files: bases.Files) -> None:
    """Raises where rows have words for which the base has no embeddings: its tokenizer is not its own."""
    sources = {
        id(shard.source): shard.source for shard in (*data.peers.train.values(), *data.peers.validation.values())
    }
    for source in sources.values():
        assert isinstance(source, TokenSource)
        largest = int(source.columns["input_ids"].max())
        if largest >= num_words:
            raise UserError(
                f"The tokenizer of {files.name} writes token {largest}, and the base has embeddings for {num_words} "
                "words; give a base that was saved with this tokenizer."
            )


def labels_in(tables: Tables, columns: tasks.Columns) -> tuple[tuple[str, ...], dict[int, Rows]]:
    """Returns the names of the labels, which all peers must agree on, and those of each table's rows."""
    paths = tables.paths
    if not tables.everywhere and not all(tasks.fixed_names(rows, columns) for rows in tables.rows.values()):
        raise UserError(
            "Peers in several processes must agree on the labels, and their own rows do not say all of them; "
            "give task.name, or a ClassLabel column."
        )
    names = tasks.common_names(tasks.label_names(rows, columns, paths[i]) for i, rows in tables.rows.items())
    labels = {i: tasks.label_ids(rows, columns, names, paths[i]) for i, rows in tables.rows.items()}
    found = {name for ids in labels.values() for name in occurring(names, ids)} if tables.everywhere else set(names)
    check_several(found, paths[tables.owners[0]])
    return names, labels


def causal_data(recipe: Recipe, files: bases.Files, hosted: Iterable[int]) -> Data:
    """Loads, tokenises and shares out the rows of a causal task; groups play the part of labels where there are any."""
    tables, task = tables_of(recipe, hosted), recipe.task
    limit = min(task.max_length, bases.max_tokens(files, task.kind))
    tokenizer, digest = bases.load_tokenizer(files, task.tokens), f"{files.tokenizer} {task.tokens or ''}"
    if task.tokens and not bases.lacking(bases.load_tokenizer(files)):
        raise UserError("task.tokens seed has no effect on this base, whose tokenizer lacks none of them; remove it.")
    tokens = CausalTokenization(tokenizer, digest, limit, task.truncation_side, task.format, task.bad_rows)

    read = {i: tokens.rows(excerpt) for i, excerpt in tables.excerpts.items()}
    names: tuple[str, ...] = ("rows",)
    labels = {i: np.zeros(len(own.kept), dtype=np.int64) for i, own in read.items()}
    if tables.shared:
        names, labels[0], parts = shared_of(recipe, read[0], tables.excerpts[0])
    else:
        parts = [np.arange(len(labels[i])) for i in tables.owners]
    held_out = list[CausalRows]()

    def source_of(excerpt: Excerpt) -> Source:
        held_out.append(tokens.rows(excerpt))
        return held_out[-1].source

    sources_read = {i: own.source for i, own in read.items()}
    data = data_of(recipe, hosted, tables, sources_read, parts, names, labels, source_of)
    check_words(data, max(bases.num_words(files), len(tokenizer) if task.tokens else 0), files)
    # rows are told by their numbers in the table, so that they are the same rows where others are left out
    numbers = [read[0].kept[part] for part in parts] if tables.shared else None
    notes = notes_of("training", read.values(), limit) | notes_of("validation", held_out, limit)
    return replace(data, num_rows=sum(map(len, tables.rows.values())), rows=numbers, notes=notes)


def shared_of(recipe: Recipe, own: CausalRows, excerpt: Excerpt) -> tuple[tuple[str, ...], Rows, list[Rows]]:
    """Returns the names of the groups that kept rows were put into, the group of each, and each peer's kept rows."""
    how = recipe.data.partition
    nothing = np.zeros(len(own.kept), dtype=np.int64)
    if how.kind == "saved":  # numbers of the table
        whole = partition.Table(np.zeros(len(excerpt.rows), dtype=np.int64), lambda name: (), labelled=False)
        return ("rows",), nothing, [among(own.kept, part, excerpt) for part in share_out(recipe, whole)]
    table = partition.Table(
        nothing, excerpt.select(own.kept).filled, lambda: own.source.lengths, lambda: own.contents, False
    )
    groups = partition.grouped(how, table, partition_seed(recipe))
    if groups is None:
        return ("rows",), nothing, share_out(recipe, table)
    return groups.names, groups.ids, share_out(recipe, replace(table, labels=groups.ids))


def among(kept: Rows, part: Rows, excerpt: Excerpt) -> Rows:
    """Returns where rows of a table are among those that are kept; raises where one of them is left out."""
    places = np.minimum(np.searchsorted(kept, part), len(kept) - 1)
    for number in part[kept[places] != part]:
        raise UserError(
            f"Row {excerpt.number(number)} of {excerpt.where} is a saved peer's, and is left out here; keep task as "
            "it was."
        )
    return places


def notes_of(what_for: str, tables: Collection[CausalRows], limit: int) -> dict[str, int]:
    """Returns how many rows of all in the tables were cut and left out, by words that follow the number."""
    notes = Counter[str]()
    for table in tables:
        notes[f"cut at {limit} tokens"] += table.num_cut
        notes.update({f"left out: {reason}": count for reason, count in table.bad.items()})
    num_rows = sum(len(table.kept) + sum(table.bad.values()) for table in tables)
    return {f"of {num_rows:,} {what_for} rows {note}": count for note, count in (+notes).items()}


def data_of(
    recipe: Recipe, hosted: Iterable[int], tables: Tables, read: Mapping[int, Source], parts: Sequence[Rows],
    names: tuple[str, ...], labels: Mapping[int, Rows], held_out: Callable[[Excerpt], Source],
) -> Data:  # fmt: skip
    """Returns the shards of the hosted peers; `parts` are each peer's rows, `held_out` makes tokens of a table."""
    owners = tables.owners
    peers = range(recipe.peers.num_peers) if tables.shared else owners
    shards = {i: Shard(read[owner], rows) for i, owner, rows in zip(peers, owners, parts, strict=True)}
    train = {i: shards[i] for i in hosted}
    counts = partition.counts([labels[owner][rows] for owner, rows in zip(owners, parts, strict=True)], len(names))
    own = PeerData(train, validation_shards(recipe, held_out, train))
    return Data(own, names, counts, sum(map(len, labels.values())), list(parts) if tables.shared else None)


def validation_shards(recipe: Recipe, held_out: Callable[[Excerpt], Source], ids: Iterable[int]) -> dict[int, Shard]:
    """Returns each peer's validation rows: one table for all, or a table of its own."""
    data, loaded, apart = recipe.data, dict[str, Source](), is_path(recipe.data.validation)
    shards = {}
    for i in ids:
        if apart:
            path, split_name, config = sources.peer_path(data.validation, i), held_out_split(recipe), None
        else:
            path, split_name, config = str(data.path), data.validation, data.config
        if path not in loaded:
            loaded[path] = held_out(sources.excerpt(path, config, split_name, alone=apart))
        source = loaded[path]
        shards[i] = evaluation_shard(recipe, source, np.arange(len(source.lengths)))
    return shards


def evaluation_shard(recipe: Recipe, source: Source, rows: Rows) -> Shard:
    """Returns the rows to evaluate on: all of `rows`, or `evaluate.rows` of them drawn once."""
    if recipe.evaluate.rows is not None and recipe.evaluate.rows < len(rows):
        rows = np.sort(numpy_stream(recipe.train.seed, "evaluate").permutation(rows)[: recipe.evaluate.rows])
    return Shard(source, rows)


def toy_data(recipe: Recipe, hosted: Iterable[int]) -> Data:
    """Vectors labelled by a random linear teacher."""
    generator = torch_stream(recipe.train.seed, "toy data")
    num_rows = toy_rows(recipe)
    inputs = torch.randn(num_rows, TOY_INPUTS, generator=generator)
    teacher = torch.randn(TOY_INPUTS, TOY_LABELS, generator=generator)
    source = VectorSource(inputs, (inputs @ teacher).argmax(1))
    held_out, rows = np.arange(TOY_HELD_OUT), np.arange(TOY_HELD_OUT, num_rows)
    labels = source.labels.numpy()
    shared = share_out(recipe, partition.Table(labels[rows], no_column))
    parts = [rows[part] for part in shared]
    shards = {i: evaluation_shard(recipe, source, held_out) for i in hosted}
    train = {i: Shard(source, parts[i]) for i in hosted}
    names = tuple(str(i) for i in range(TOY_LABELS))
    counts = partition.counts([labels[p] for p in parts], TOY_LABELS)
    return Data(PeerData(train, shards), names, counts, len(rows), shared)
