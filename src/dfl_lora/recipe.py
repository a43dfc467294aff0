"""The recipe: what all peers of a run agree on. Strict: an unknown key is an error with the nearest match.

In a serverless run the recipe is the contract: its digest is compared before anyone talks. What belongs to
one machine (`compute`, `output`, `data.path`, `data.per_peer`, a path in `data.validation`) is left out of
the digest, and the base model counts by the digests of its weights and tokenizer, not by its name.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from dfl_lora.choices import Choice, Positive, PositiveFloat, Share, Whole, choice
from dfl_lora.codecs import CODECS
from dfl_lora.corrections import CORRECTIONS
from dfl_lora.data.formats import FORMATS
from dfl_lora.data.glue import TASKS
from dfl_lora.data.partition import PARTITIONS
from dfl_lora.data.saved import read_saved
from dfl_lora.graphs import read_edges, read_numbers
from dfl_lora.metrics import METRICS
from dfl_lora.mixers import MIXERS
from dfl_lora.mixing import MIXINGS
from dfl_lora.schedules import SCHEDULES
from dfl_lora.strict_yaml import yaml_text
from dfl_lora.topologies import TOPOLOGIES


def expand(value: object) -> object:
    """Replaces ${NAME} and ${NAME:-default} in a path by the environment's value."""
    if not isinstance(value, str):
        return value

    def replace(match: re.Match[str]) -> str:
        name, default = match.group(1), match.group(2)
        found = os.environ.get(name, default)
        if found is None:
            raise ValueError(f"${{{name}}} is not set in the environment; set it, or write ${{{name}:-default}}")
        return found

    return re.sub(r"\$\{(\w+)(?::-([^}]*))?\}", replace, value)


PathText = Annotated[str, BeforeValidator(expand)]


def unquantised(value: object) -> object:
    """Raises where a quantised base is asked for."""
    if value is not None:
        raise ValueError("a quantised base needs a GPU to be run and compared, and is not offered; leave it null")
    return value


class Part(BaseModel):
    """A part of the recipe."""

    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), validate_default=True
    )


class Model(Part):
    """The frozen base."""

    name_or_path: PathText
    """A folder, a hub name, all-MiniLM-L6-v2 (embedded), or toy."""
    revision: str | None = None
    """The hub revision; null is the newest."""
    quantization: Annotated[None, BeforeValidator(unquantised)] = None
    """The base is kept in full: a quantised one was never run by us, so it is not offered."""


class LoraPart(Part):
    """Rank, scale and place of the adapters, as peft.LoraConfig means them."""

    r: Positive = 8
    """The rank."""
    ranks: list[Positive] | None = None
    """The rank of each peer where they differ; r is the largest, and B A is scaled by alpha / r for all."""
    lora_alpha: PositiveFloat = 16
    """The product B A is scaled by alpha / r."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1, strict=True)] = 0.0
    """Dropout on the input of A; masks come from a stream per peer."""
    target_modules: str | list[str]
    """Module names (suffixes), one regular expression, or all-linear."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) instead."""
    init: Literal["kaiming", "orthonormal", "gradient_svd"] = "kaiming"
    """How A starts: uniform as in PEFT, with orthonormal rows, or with those that span the first gradients of all peers
    best; B starts at zero."""
    layers_to_transform: Annotated[list[Whole], Field(min_length=1)] | None = None
    """The layers that carry adapters, counted from 0; null: all. What frozen layers below them make is made once."""

    @model_validator(mode="after")
    def check(self) -> Self:
        if self.ranks is not None and (not self.ranks or max(self.ranks) != self.r):
            raise ValueError(f"ranks must hold r, which is {self.r}, as the largest; a peer's rank is a part of it")
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ValueError("layers_to_transform needs target_modules to be a list of names, as in PEFT")
        return self


GSM8K = "gsm8k"


class Task(Part):
    """What is learnt."""

    kind: Literal["classification", "causal_lm", "toy"] = "classification"
    """classification of text, causal_lm (what follows what), or the toy."""
    name: Literal[*TASKS, GSM8K] | None = None  # type: ignore[valid-type]
    """A known task of GLUE sets text, label names and metric; gsm8k sets kind and format."""
    text: str | list[str] | None = None
    """The text column, or two for pairs."""
    label: str = "label"
    """The label column: numbers from 0, ClassLabel or strings."""
    labels: Annotated[list[str], Field(min_length=2)] | None = None
    """The names of the labels in the order of their numbers; null: the column's own."""
    format: Literal[*FORMATS] | None = None  # type: ignore[valid-type]
    """What a row of a causal task is; null: the first that its columns fit."""
    bad_rows: Literal["refuse", "skip"] = "refuse"
    """Rows of a causal task of which nothing can be learnt: refuse the run, or skip them."""
    tokens: Literal["seed"] | None = None
    """seed: pad, eos, bos and unk tokens that a causal model lacks are added, and every adapter carries embeddings."""
    max_length: Positive = 512
    """Tokens kept of a row, at most what the base can read."""
    truncation_side: Literal["right", "left"] = "right"
    """The side on which longer rows are cut."""

    @model_validator(mode="after")
    def check(self) -> Self:
        if self.labels and len(set(self.labels)) < len(self.labels):
            raise ValueError("labels names one twice; give each name once")
        if self.name == GSM8K:
            if self.kind == "toy" or self.format not in (None, "question_answer"):
                raise ValueError(f"name {GSM8K} sets kind causal_lm and format question_answer; remove what differs")
            self.kind, self.format = "causal_lm", "question_answer"
        elif self.name is not None and self.kind == "causal_lm":
            raise ValueError(f"name {self.name} is a task of classification; remove name, or kind")
        of_others = ("text", "label", "labels") if self.kind == "causal_lm" else ("format", "bad_rows", "tokens")
        for key in of_others:
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} has no effect on kind {self.kind}; remove it")
        return self


class Partition(Choice):
    """Which rows belong to which peer."""

    min_size: Positive = 1
    """The fewest rows of any peer."""
    seed: Whole | None = None
    """null: train.seed."""

    @model_validator(mode="after")
    def check(self) -> Self:
        """Writes down which rows a saved partition means, whatever becomes of its file."""
        if self.kind == "saved" and self.seed is not None:
            raise ValueError("seed has no effect on saved rows; remove it")
        if self.kind == "saved":
            setattr(self, "path", expand(self.options["path"]))  # noqa: B010 - a table's option
        if self.kind == "saved" and self.options["sha256"] is None:
            setattr(self, "sha256", read_saved(Path(self.options["path"])).sha256)  # noqa: B010 - a table's option
        return self


class Data(Part):
    """Where the rows are."""

    path: PathText | None = None
    """A folder, a file, a save_to_disk folder, a hub name, builtin/sentences or builtin/toy."""
    config: str | None = None
    """The configuration of a data set with several, such as sst2 of glue."""
    train: str = "train"
    """The split that is partitioned, or a slice of it such as train[:1000]."""
    validation: PathText = "validation"
    """The split peers are evaluated on, or a path; {i} or {} in it stands for the peer, from 1."""
    per_peer: PathText | None = None
    """A path with {i} or {} for the peer's own training rows, from 1; then nothing is partitioned."""
    partition: choice(PARTITIONS, "iid", Partition) = "iid"  # type: ignore[valid-type]
    """How the rows are shared out."""

    @model_validator(mode="after")
    def check(self) -> Self:
        if self.path is None and self.per_peer is None:
            raise ValueError("give path (one data set to partition) or per_peer (a folder for each peer)")
        if self.per_peer is not None and "{i}" not in self.per_peer and "{}" not in self.per_peer:
            raise ValueError(f"per_peer '{self.per_peer}' needs {{i}} or {{}} where the peer's number stands")
        if self.path is None and not is_path(self.validation):
            raise ValueError("without path, validation must be a path (it may hold {i} or {})")
        return self


class Topology(Choice):
    """Who talks to whom."""

    @model_validator(mode="after")
    def check(self) -> Self:
        """Reads the file of edges or of W once: the resolved recipe says it all."""
        for kind, option, read in (("edges", "edges", read_edges), ("matrix", "rows", read_numbers)):
            if self.kind == kind and self.options["path"] is not None and self.options[option] is None:
                setattr(self, option, read(Path(str(expand(self.options["path"])))))
                setattr(self, "path", None)  # noqa: B010 - a table's option
        return self


class PeersPart(Part):
    """How many, and who talks to whom with which weight."""

    num_peers: Annotated[Positive, Field(le=100_000)] = 7
    """1 trains alone: the centralised reference."""
    topology: choice(TOPOLOGIES, "link3", Topology) = "link3"  # type: ignore[valid-type]
    """The graph, or the graphs of all rounds."""
    mixing: Literal[*MIXINGS] = "metropolis"  # type: ignore[valid-type]
    """The matrix W on the graph of a round; the topologies matrix and base bring their own."""
    participation: Share = 1.0
    """The share of peers in a round, drawn anew in each; the others neither step nor exchange."""


class MethodPart(Part):
    """A point in the product of the axes."""

    schedule: choice(SCHEDULES, "lora") = "lora"  # type: ignore[valid-type]
    """What is trained and shared in a round; freeze_a is DFL-LoRA."""
    head: Literal["shared", "private", "frozen"] = "shared"
    """Whether the head is trained and mixed, trained and kept, or left at its start."""
    correction: choice(CORRECTIONS, "none") = "none"  # type: ignore[valid-type]
    """Against drift towards the own data."""
    mixer: choice(MIXERS, "plain") = "plain"  # type: ignore[valid-type]
    """How W is applied in a round."""
    combine: Literal["mean", "product", "fair", "rotated"] = "mean"
    """How a neighbourhood becomes one value."""
    codec: choice(CODECS, "fp32") = "fp32"  # type: ignore[valid-type]
    """What travels."""
    privacy: Literal["none"] = "none"
    """Noise on what is exchanged."""


WINNER = {"schedule": "lora", "correction": "k_gt", "mixer": "chebyshev(k=2)", "codec": "int8"}
"""The method of a recipe that says none: see docs/how-to-choose.md."""
DEFAULT_METHOD = MethodPart.model_validate(WINNER)


class Local(Part):
    """The local work of a round: exactly one of steps and epochs."""

    steps: Positive | None = None
    """Optimiser steps."""
    epochs: Positive | None = None
    """Passes over the peer's own rows."""

    @model_validator(mode="after")
    def check(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of steps and epochs")
        return self


class Train(Part):
    """The rounds and the local optimiser."""

    rounds: Positive = 20
    """Exchanges with the neighbours."""
    local: Local = Local(steps=10)
    """The local work of a round."""
    order: Literal["standard", "seed"] = "standard"
    """seed: evaluate and gossip once before round 1, as the seed script did."""
    shuffle: bool = True
    """Draw a new order of rows each epoch."""
    batch_size: Positive = 16
    """Rows of a local step, or of each of its parts."""
    gradient_accumulation_steps: Positive = 1
    """Parts of a local step, read one after the other: a step is on batch_size times as many rows."""
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    """Its state stays with the peer across rounds."""
    learning_rate: PositiveFloat = 1.0e-3
    """At the start."""
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    """Decays end at 2 % of learning_rate."""
    max_grad_norm: PositiveFloat | None = None
    """Clips each peer's gradient."""
    dropout: bool = False
    """Turns the base model's own dropout on."""
    seed: Whole = 0
    """Names every draw of the run."""


class Evaluate(Part):
    """When and on what peers are evaluated."""

    every: Positive = 1
    """Rounds between evaluations; the last round always is."""
    rows: Positive | None = None
    """Validation rows, drawn once by the seed; null: all."""
    before_mixing: bool = False
    """Also evaluate between the local steps and the exchange."""
    metric: Literal[*METRICS] | None = None  # type: ignore[valid-type]
    """Reported beside the accuracy; null: the task's own (matthews for cola, f1 for mrpc and qqp)."""


class Compute(Part):
    """How this machine computes; not part of the digest. auto is resolved by a fixed rule and written down."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the base; adapters and optimiser are float32. auto: bfloat16 where the processor multiplies it."""
    attention: Literal["auto", "eager", "sdpa"] = "auto"
    """auto: eager for bfloat16 on a CPU (2.6x faster at short lengths), else sdpa."""
    group_tokens: Literal["auto"] | Positive = "auto"
    """Tokens of a training pass over several peers. auto: 4096 on a CPU, 16384 on a GPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where torch finds a GPU, else cpu."""
    threads: Literal["auto"] | Annotated[Positive, Field(le=1024)] = "auto"
    """auto: as many as torch takes."""
    store: Literal["auto", "memory", "disk"] = "auto"
    """Where the peers' vectors lie. auto: disk (a mapped file) where they are more than half of the memory there is."""


class Output(Part):
    """What a run leaves behind; not part of the digest."""

    dir: PathText | None = None
    """The run directory; null: runs/NAME."""
    checkpoint_every: Positive = 1
    """Rounds between resume points."""
    adapters: Literal["all", "consensus"] | None = None
    """null: all up to 64 peers, above that the consensus alone."""
    report_to: Annotated[list[str], Field(max_length=0)] = []
    """Trackers by name."""


class Recipe(Part):
    """A whole run."""

    name: Annotated[str, Field(pattern=r"^[\w][\w.-]*$", max_length=100)] = "run"
    """Names the run directory: letters, digits, '.', '_' and '-'."""
    model: Model
    lora: LoraPart
    task: Task = Task()
    data: Data
    peers: PeersPart = PeersPart()
    method: MethodPart = DEFAULT_METHOD
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    compute: Compute = Compute()
    output: Output = Output()
    digest: str | None = None
    """Written by a run. Where it is given, it must be the recipe's own."""

    @model_validator(mode="after")
    def check_ranks(self) -> Self:
        """Raises where not every peer has a rank."""
        if self.lora.ranks is not None and len(self.lora.ranks) != self.peers.num_peers:
            given = len(self.lora.ranks)
            raise ValueError(f"lora.ranks has {given} ranks for {self.peers.num_peers} peers; give one for each peer")
        return self

    @model_validator(mode="after")
    def check_causal(self) -> Self:
        """Raises where something has no effect on a causal model, whose output layer is frozen."""
        if self.task.kind == "causal_lm" and self.method.head != "shared":
            raise ValueError(f"method.head {self.method.head} has no effect on task.kind causal_lm; remove it")
        if self.task.kind == "causal_lm" and self.evaluate.metric not in (None, "loss", "accuracy"):
            raise ValueError(f"evaluate.metric {self.evaluate.metric} is of labels; causal_lm has loss and accuracy")
        return self

    @model_validator(mode="after")
    def resolve_metric(self) -> Self:
        """Writes down the task's own metric where none is asked for."""
        if self.evaluate.metric is None:
            known = TASKS[self.task.name].metric if self.task.name in TASKS else "accuracy"
            own = "loss" if self.task.kind == "causal_lm" else known
            self.evaluate = self.evaluate.model_copy(update={"metric": own})
        return self

    def digest_with(self, base: Mapping[str, str]) -> str:
        """Returns the sha256 of the canonical JSON, with the base model given by its digests."""
        content = self.model_dump(mode="json", exclude={"compute", "output", "digest"})
        content["model"]["name_or_path"] = dict(base)
        for key in ("path", "per_peer", *(["validation"] if is_path(self.data.validation) else [])):
            del content["data"][key]
        if self.data.partition.kind == "saved":
            del content["data"]["partition"]["path"]
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def to_yaml(self) -> str:
        return yaml_text(self.model_dump(mode="json", exclude_none=False))


def is_path(validation: str) -> bool:
    """Tells a path or template from the name of a split."""
    return any(mark in validation for mark in ("/", "\\", "{", "."))
