"""From a recipe to the things it names. Checks that need no model come first, so that mistakes cost nothing."""

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import gettempdir
from typing import Literal

import numpy as np
import torch
from transformers import PreTrainedModel

from dfl_lora import codecs, combine, corrections, graphs, machine, mixers, schedules
from dfl_lora.data import partition, sources, tasks
from dfl_lora.data.batches import Rows, Shard, Source, VectorSource
from dfl_lora.data.labels import check_several, occurring
from dfl_lora.errors import UserError
from dfl_lora.learners import Learner
from dfl_lora.learners.activations import Activations
from dfl_lora.learners.optimizers import OPTIMIZERS
from dfl_lora.learners.sequential import SequentialLearner
from dfl_lora.learners.stacked import StackedLearner
from dfl_lora.learners.work import LocalWork, PeerData
from dfl_lora.models import base as bases
from dfl_lora.models.adapters import Export
from dfl_lora.models.below import digest_below, frozen_below
from dfl_lora.models.folder import check_room
from dfl_lora.models.placement import Lora, Placement, place, split
from dfl_lora.models.toy import ToyModel
from dfl_lora.participation import absence
from dfl_lora.peers import Peers
from dfl_lora.preflight import (
    TOY,
    TOY_HELD_OUT,
    check_attention,
    check_participation,
    check_partition,
    check_toy,
    graph_of,
    no_column,
    share_out,
    text_columns,
    toy_rows,
)
from dfl_lora.recipe import Compute, Recipe, is_path
from dfl_lora.rounds import Method
from dfl_lora.streams import numpy_stream, torch_stream

TOY_INPUTS, TOY_LABELS = 8, 3
GROUP_TOKENS = {"cpu": 4096, "cuda": 16384}
"""Of a pass. On a CPU the most of 512 to 4,096 tokens was the fastest; more, and a GPU, were not measured."""


@dataclass(frozen=True)
class Data:
    """The rows of every hosted peer and what is known of all."""

    peers: PeerData
    labels: tuple[str, ...]
    counts: list[list[int]]
    num_rows: int
    """Of the table that is shared out, or of all peers' own tables that are read here."""
    rows: list[Rows] | None
    """Row numbers of each peer; None where each has a table of its own."""


@dataclass(frozen=True)
class Federation:
    """A recipe made real: everything the loop needs, and what the reports tell."""

    recipe: Recipe
    digest: str
    method: Method
    graph: graphs.Graph
    peers: Peers
    learner: Learner
    data: Data
    export: Export | None


def build(
    recipe: Recipe, ids: Iterable[int] | None = None, learner: str = "stacked", folder: Path | None = None
) -> Federation:
    """Returns the federation of a recipe, hosting the peers `ids` (None: all).

    Peers that are stored on disk lie in `folder`, or the one above it that there is (None: temporary files).
    """
    recipe = recipe.model_copy(update={"compute": resolve_compute(recipe.compute, learner, recipe.train.dropout)})
    torch.set_num_threads(int(recipe.compute.threads))
    graph, method = build_method(recipe)
    hosted = range(recipe.peers.num_peers) if ids is None else sorted(ids)
    lora = Lora(**recipe.lora.model_dump())
    check_participation(recipe)
    check_toy(recipe)
    check_attention(recipe)
    toy = recipe.task.kind == "toy"
    files = None if toy else bases.locate(recipe.model.name_or_path, recipe.model.revision)
    digest = checked_digest(recipe, files)
    if files is None:
        data, base = (
            toy_data(recipe, hosted),
            bases.Base(ToyModel(TOY_INPUTS, TOY_LABELS, recipe.train.seed), "encoder"),
        )
    else:
        data = text_data(recipe, files, hosted)
        base = load_base(recipe, files, len(data.labels))
    placement = place(base.model, base.prefix, lora)
    start = placement.start(base.model, recipe.train.seed, torch.float32)
    device = torch.device(recipe.compute.device)
    start = start.with_flat(start.flat.to(device))
    own, common = split(start, schedules.ever_trained(method.schedule, recipe.train.rounds))
    vectors, memory = OPTIMIZERS[recipe.train.optimizer].state, method.correction.memory
    store = resolve_store(recipe.compute, own.flat.nbytes * len(hosted) * (1 + len(vectors) + len(memory)))
    recipe = recipe.model_copy(update={"compute": recipe.compute.model_copy(update={"store": store})})
    where = (folder or Path(gettempdir())) if store == "disk" else None
    peers = Peers(hosted, own, common, optimizer=vectors, memory=memory, place=where)
    export = Export.of(base, placement, data.labels) if files else None
    work = local_work(recipe)
    trainer: Learner
    if learner == "stacked":
        tokens, below = int(recipe.compute.group_tokens), num_below(recipe, base, placement)
        kept = kept_of(recipe, base, below) if below else None
        trainer = StackedLearner(
            base.model, data.peers, work, lora.scaling, tokens, recipe.compute.attention, device, below, kept
        )
    else:
        trainer = SequentialLearner(base.model, placement, data.peers, work, device)
    return Federation(recipe.model_copy(update={"digest": digest}), digest, method, graph, peers, trainer, data, export)


def num_below(recipe: Recipe, base: bases.Base, placement: Placement) -> int:
    """Returns how many layers no peer adapts lie below the first adapted one, where what they make is never another.

    Only where layers are chosen: else there are none. With the dropout of the base it is another each time.
    """
    asked = recipe.lora.layers_to_transform is not None and not recipe.train.dropout
    return frozen_below(base.model, base.prefix, placement.modules) if asked else 0


def kept_of(recipe: Recipe, base: bases.Base, below: int) -> Activations:
    """Returns where what the lowest layers make of each row is kept, by a name that says all it depends on."""
    assert isinstance(base.model, PreTrainedModel)
    versions = [str(torch.__version__), version("transformers"), version("dfl-lora")]
    computed = [recipe.compute.device, torch.backends.cpu.get_cpu_capability(), str(recipe.compute.attention)]
    name = [digest_below(base.model, base.prefix, below), base.model.config.to_json_string(), *versions, *computed]
    weight = next(base.model.parameters())  # of the embeddings: [tokens of the vocabulary, d]
    return Activations(tasks.cache_place("activations"), name, weight.shape[1], weight.dtype)


def checked_digest(recipe: Recipe, files: bases.Files | None) -> str:
    """Returns the digest of the recipe on this base; raises where the recipe says another."""
    digest = recipe.digest_with({"weights": files.weights, "tokenizer": files.tokenizer} if files else {"weights": TOY})
    if recipe.digest not in (None, digest):
        raise UserError(f"The recipe says digest {recipe.digest}, but it is {digest}; remove the line to accept it.")
    return digest


def resolve_compute(compute: Compute, learner: str, dropout: bool) -> Compute:
    """Returns how this machine computes, by a fixed rule of processor and precision, never by a timing."""
    if learner == "sequential" and compute.dtype == "bfloat16":
        raise UserError("The sequential learner is the reference in float32; set compute.dtype to float32 or auto.")
    device = device_of(compute)
    native = multiplies_bf16(device) and learner == "stacked"
    dtype = ("bfloat16" if native else "float32") if compute.dtype == "auto" else compute.dtype
    eager = (dtype == "bfloat16" and device == "cpu") or dropout
    attention = ("eager" if eager else "sdpa") if compute.attention == "auto" else compute.attention
    return Compute(
        dtype=dtype,
        attention=attention,
        group_tokens=GROUP_TOKENS[device] if compute.group_tokens == "auto" else compute.group_tokens,
        device=device,
        threads=torch.get_num_threads() if compute.threads == "auto" else compute.threads,
        store=compute.store,
    )


def multiplies_bf16(device: str) -> bool:
    """Tells whether a device multiplies bfloat16 natively."""
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def device_of(compute: Compute) -> Literal["cpu", "cuda"]:
    """Returns where a run computes; raises where a GPU is asked for and there is none."""
    there = torch.cuda.is_available()
    if compute.device == "cuda" and not there:
        raise UserError("compute.device is cuda, but torch finds no GPU here; set it to cpu or auto.")
    return "cuda" if there and compute.device != "cpu" else "cpu"


def resolve_store(compute: Compute, num_bytes: int) -> str:
    """Returns where so many bytes of peers lie: by what this machine may use at most, never by what is free now."""
    if compute.store == "disk" and compute.device == "cuda":
        raise UserError("compute.store is disk, which holds peers of a CPU alone; with device cuda set it to memory.")
    if compute.store != "auto" or compute.device == "cuda":
        return "memory" if compute.store == "auto" else compute.store
    return "disk" if 2 * num_bytes > machine.total_memory() else "memory"


def build_method(recipe: Recipe) -> tuple[graphs.Graph, Method]:
    """Returns the graph and the point in the product of the axes."""
    peers, axes = recipe.peers, recipe.method
    graph, weights = graph_of(recipe)
    return graph, Method(
        axes.schedule.of(axes.head),
        lambda t: graph,
        absence(peers.num_peers, peers.participation, recipe.train.seed),
        weights,
        corrections.CORRECTIONS[axes.correction],
        mixers.MIXERS[axes.mixer],
        combine.COMBINES[axes.combine],
        codecs.CODECS[axes.codec],
    )


def local_work(recipe: Recipe) -> LocalWork:
    train = recipe.train
    return LocalWork(
        rounds=train.rounds,
        batch_size=train.batch_size,
        steps=train.local.steps,
        epochs=train.local.epochs,
        optimizer=train.optimizer,
        learning_rate=train.learning_rate,
        scheduler=train.lr_scheduler_type,
        max_grad_norm=train.max_grad_norm,
        shuffle=train.shuffle,
        lora_dropout=recipe.lora.lora_dropout,
        base_dropout=train.dropout,
        seed=train.seed,
    )


def load_base(recipe: Recipe, files: bases.Files, num_labels: int) -> bases.Base:
    """Loads the encoder in the precision and with the attention that the recipe resolved to."""
    attention = bases.STREAM_ATTENTION if recipe.train.dropout else recipe.compute.attention
    dtype = torch.bfloat16 if recipe.compute.dtype == "bfloat16" else torch.float32
    return bases.load_encoder(files, num_labels, attention, dtype, recipe.train.seed)


def text_data(recipe: Recipe, files: bases.Files, hosted: Iterable[int]) -> Data:
    """Loads, tokenises and shares out the rows of a text task."""
    data, columns = recipe.data, text_columns(recipe)
    check_partition(recipe)
    shared, everyone = data.per_peer is None, range(recipe.peers.num_peers)
    owners = [0] * len(everyone) if shared else list(hosted)
    paths = {i: sources.peer_path(data.per_peer or str(data.path), i) for i in dict.fromkeys(owners)}
    tables = {i: sources.load_rows(path, data.config, data.train) for i, path in paths.items()}
    everywhere = shared or len(owners) == len(everyone)
    if not everywhere and not all(tasks.fixed_names(rows, columns) for rows in tables.values()):
        raise UserError(
            "Peers in several processes must agree on the labels, and their own rows do not say all of them; "
            "give task.name, or a ClassLabel column."
        )
    names = tasks.common_names(tasks.label_names(rows, columns, paths[i]) for i, rows in tables.items())
    labels = {i: tasks.label_ids(rows, columns, names, paths[i]) for i, rows in tables.items()}
    found = {name for ids in labels.values() for name in occurring(names, ids)} if everywhere else set(names)
    check_several(found, paths[owners[0]])
    if shared:
        parts = share_out(recipe, labels[0], lambda name: sources.column(tables[0], name, paths[0]))
    else:
        parts = [np.arange(len(labels[i])) for i in owners]
    tokenizer, limit = bases.load_tokenizer(files), min(recipe.task.max_length, bases.max_tokens(files))
    special = tokenizer.num_special_tokens_to_add(pair=len(columns.text) == 2)
    check_room(limit, special)
    tokens = tasks.Tokenization(tokenizer, files.tokenizer, limit, recipe.task.truncation_side)
    read = {i: tokens.source(rows, columns, names, paths[i]) for i, rows in tables.items()}
    shards = {
        i: Shard(read[owner], rows)
        for i, owner, rows in zip(everyone if shared else owners, owners, parts, strict=True)
    }
    train = {i: shards[i] for i in hosted}
    counts = partition.counts([labels[owner][rows] for owner, rows in zip(owners, parts, strict=True)], len(names))
    peers = PeerData(train, validation_shards(recipe, tokens, columns, names, train))
    return Data(peers, names, counts, sum(map(len, labels.values())), parts if shared else None)


def validation_shards(
    recipe: Recipe, tokens: tasks.Tokenization, columns: tasks.Columns, names: tuple[str, ...], ids: Iterable[int]
) -> dict[int, Shard]:
    """Returns each peer's validation rows: one table for all, or a table of its own."""
    data, loaded, apart = recipe.data, dict[str, Source](), is_path(recipe.data.validation)
    shards = {}
    for i in ids:
        if apart:
            path, split_name, config = sources.peer_path(data.validation, i), "validation", None
        else:
            path, split_name, config = str(data.path), data.validation, data.config
        if path not in loaded:
            loaded[path] = tokens.source(sources.load_rows(path, config, split_name, alone=apart), columns, names, path)
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
    shared = share_out(recipe, labels[rows], no_column)
    parts = [rows[part] for part in shared]
    shards = {i: evaluation_shard(recipe, source, held_out) for i in hosted}
    train = {i: Shard(source, parts[i]) for i in hosted}
    names = tuple(str(i) for i in range(TOY_LABELS))
    counts = partition.counts([labels[p] for p in parts], TOY_LABELS)
    return Data(PeerData(train, shards), names, counts, len(rows), shared)
