"""From a recipe to the things it names. Checks that need no model come first, so that mistakes cost nothing."""

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import gettempdir
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dfl_lora import machine, products, schedules
from dfl_lora.compatibility import check_method
from dfl_lora.corrections.local import Local
from dfl_lora.data import tasks
from dfl_lora.errors import UserError
from dfl_lora.learners import Learner
from dfl_lora.learners.activations import Activations
from dfl_lora.learners.optimizers import OPTIMIZERS
from dfl_lora.learners.sequential import SequentialLearner
from dfl_lora.learners.stacked import StackedLearner
from dfl_lora.learners.work import LocalWork
from dfl_lora.models import base as bases
from dfl_lora.models.adapters import Export
from dfl_lora.models.below import digest_below, frozen_below
from dfl_lora.models.causal import check_alike, own_logits, unreadable
from dfl_lora.models.placement import Lora, Placement, place, split
from dfl_lora.models.toy import ToyModel
from dfl_lora.participation import absence
from dfl_lora.peer_data import TOY_INPUTS, TOY_LABELS, Data, causal_data, text_data, toy_data
from dfl_lora.peers import Peers
from dfl_lora.preflight import TOY, check_attention, check_participation, check_toy, talks_of
from dfl_lora.recipe import Compute, Recipe
from dfl_lora.rounds import Method
from dfl_lora.streams import torch_stream
from dfl_lora.topologies import Topology

GROUP_TOKENS = {"cpu": 4096, "cuda": 16384}
"""Of a pass. On a CPU the most of 512 to 4,096 tokens was the fastest; more, and a GPU, were not measured."""


@dataclass(frozen=True)
class Federation:
    """A recipe made real: everything the loop needs, and what the reports tell."""

    recipe: Recipe
    digest: str
    method: Method
    topology: Topology
    peers: Peers
    learner: Learner
    data: Data
    export: Export | None
    short: str = ""
    """What to say where even the smallest passes are predicted to need more memory than there is."""


def build(
    recipe: Recipe, ids: Iterable[int] | None = None, learner: str = "stacked", folder: Path | None = None
) -> Federation:
    """Returns the federation of a recipe, hosting the peers `ids` (None: all).

    Peers that are stored on disk lie in `folder`, or the one above it that there is (None: temporary files).
    """
    recipe = recipe.model_copy(update={"compute": resolve_compute(recipe.compute, learner, recipe.train.dropout)})
    torch.set_num_threads(int(recipe.compute.threads))
    hosted = range(recipe.peers.num_peers) if ids is None else sorted(ids)
    check_participation(recipe)
    check_toy(recipe)
    check_attention(recipe)
    kind = recipe.task.kind
    files = None if kind == "toy" else bases.locate(recipe.model.name_or_path, recipe.model.revision)
    digest = checked_digest(recipe, files)
    if files is None:
        data = toy_data(recipe, hosted)
        base = bases.Base(ToyModel(TOY_INPUTS, TOY_LABELS, recipe.train.seed), "encoder")
    else:
        data = (causal_data if kind == "causal_lm" else text_data)(recipe, files, hosted)
        base = load_base(recipe, files, len(data.labels))
    work = local_work(recipe)
    topology, method = build_method(
        recipe, Local(lambda i: work.steps_of(data.peers.train[i]), work.rate_in, work.adaptive)
    )
    trained = schedules.ever_trained(method.schedule, recipe.train.rounds)
    lora = Lora(**recipe.lora.model_dump(exclude={"ranks"}), core="core" in trained)
    placement = place(base.model, base.prefix, lora, head=kind != "causal_lm")
    start = placement.start(base.model, recipe.train.seed, torch.float32)
    device = torch.device(recipe.compute.device)
    start = start.with_flat(start.flat.to(device))
    own, common = split(start, trained)
    vectors, memory = OPTIMIZERS[recipe.train.optimizer].state, method.memory
    store = resolve_store(recipe.compute, own.flat.nbytes * len(hosted) * (1 + len(vectors) + len(memory)))
    recipe = recipe.model_copy(update={"compute": recipe.compute.model_copy(update={"store": store})})
    where = (folder or Path(gettempdir())) if store == "disk" else None
    ranks = [recipe.lora.ranks[i] for i in hosted] if recipe.lora.ranks else ()
    agreement = None if recipe.method.combine == "mean" else products.agreed
    peers = Peers(hosted, own, common, optimizer=vectors, memory=memory, place=where, ranks=ranks, agreement=agreement)
    export = export_of(recipe, files, base, placement, data.labels) if files else None
    trainer: Learner
    if learner == "stacked":
        trainer = stacked(recipe, base, placement, data, device)
    else:
        trainer = SequentialLearner(base.model, placement, data.peers, work, device)
    recipe = recipe.model_copy(update={"digest": digest})
    return Federation(recipe, digest, method, topology, peers, trainer, data, export)


def export_of(
    recipe: Recipe, files: bases.Files, base: bases.Base, placement: Placement, labels: tuple[str, ...]
) -> Export:
    """Returns what adapter folders say of the base."""
    if recipe.task.kind == "classification":
        return Export.of(base, placement, labels)
    tokenizer = bases.load_tokenizer(files, recipe.task.tokens) if recipe.task.tokens else None
    return Export.of(base, placement, (), tokenizer)


def stacked(recipe: Recipe, base: bases.Base, placement: Placement, data: Data, device: torch.device) -> StackedLearner:
    """Returns the engine on a base; a causal one is first seen to be read as the model itself reads."""
    model, tokens, below = base.model, int(recipe.compute.group_tokens), num_below(recipe, base, placement)
    kept = kept_of(recipe, base, below) if below else None
    causal = recipe.task.kind == "causal_lm" and isinstance(model, PreTrainedModel)
    rows = example_rows(model) if causal else []
    own = own_logits(model, rows)
    try:
        learner = StackedLearner(
            model, data.peers, local_work(recipe), placement.lora.scaling, tokens, recipe.compute.attention, device,
            below, kept, "causal_lm" if causal else "classification",
        )  # fmt: skip
    except ValueError as error:  # of transformers, where a family takes no attention but its own
        if isinstance(error, UserError) or not causal:
            raise
        raise unreadable(model, " ".join(str(error).split())[:200]) from None
    if causal:
        check_alike(model, [row.to(device) for row in rows], own, learner.current)
    return learner


def example_rows(model: PreTrainedModel) -> list[Tensor]:
    """Returns two rows of tokens, drawn once, of different lengths."""
    numbers = torch.randint(model.config.vocab_size, (20,), generator=torch_stream(0, "example rows"))
    return [numbers[:13], numbers[13:]]


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


def build_method(recipe: Recipe, local: Local) -> tuple[Topology, Method]:
    """Returns the graphs of all rounds and the point in the product of the axes."""
    peers, axes = recipe.peers, recipe.method
    topology, weights = talks_of(recipe)
    check_method(recipe, topology, weights)
    return topology, Method(
        axes.schedule.of(axes.head),
        topology,
        absence(peers.num_peers, peers.participation, recipe.train.seed),
        weights,
        axes.correction.of(local),
        axes.mixer.of(topology(1), weights, recipe.train.rounds),
        products.COMBINES[axes.combine],
        axes.codec.of(recipe.train.seed),
    )


def local_work(recipe: Recipe) -> LocalWork:
    train = recipe.train
    return LocalWork(
        rounds=train.rounds,
        batch_size=train.batch_size,
        accumulation=train.gradient_accumulation_steps,
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
    """Loads the base in the precision and with the attention that the recipe resolved to."""
    attention = bases.STREAM_ATTENTION if recipe.train.dropout else recipe.compute.attention
    dtype = torch.bfloat16 if recipe.compute.dtype == "bfloat16" else torch.float32
    if recipe.task.kind == "causal_lm":  # eager: every decoder has it, and the engine brings its own
        attention = bases.STREAM_ATTENTION if recipe.train.dropout else "eager"
        words = len(bases.load_tokenizer(files, recipe.task.tokens)) if recipe.task.tokens else 0
        return bases.load_decoder(files, attention, dtype, words)
    return bases.load_encoder(files, num_labels, attention, dtype, recipe.train.seed)
