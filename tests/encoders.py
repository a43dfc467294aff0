"""Tiny encoders with random weights, random rows of uneven numbers and lengths, and peers over both."""

from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, cast

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)

from dfl_lora.data.batches import Shard, TokenSource, VectorSource
from dfl_lora.learners.optimizers import OPTIMIZERS
from dfl_lora.learners.sequential import SequentialLearner
from dfl_lora.learners.stacked import StackedLearner
from dfl_lora.learners.work import LocalWork, PeerData
from dfl_lora.models.base import Base, load_encoder, locate, quiet
from dfl_lora.models.placement import Lora, Placement, place, split
from dfl_lora.models.toy import ToyModel
from dfl_lora.peers import Peers
from dfl_lora.roles import Role
from dfl_lora.schedules import Schedule, ever_trained
from dfl_lora.streams import numpy_stream, torch_stream

torch.set_num_threads(1)
"""Products this small gain nothing from a second thread, and wait for it 60 times as long where others compute."""

Family = Literal["bert", "roberta", "distilbert"]
FAMILIES: tuple[Family, ...] = ("bert", "roberta", "distilbert")
HIDDEN, INNER, BLOCKS, HEADS, POSITIONS, NUM_LABELS = 32, 64, 2, 4, 48, 3
LETTERS = "abcdefghijklmnopqrstuvwxyz"
SPECIAL: dict[Family, dict[str, str]] = {
    "bert": {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"},
    "roberta": {"cls_token": "<s>", "pad_token": "<pad>", "sep_token": "</s>", "unk_token": "<unk>"},
    "distilbert": {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"},
}
NUM_TOKENS = 200


def vocabulary(family: Family) -> dict[str, int]:
    """Returns 200 pieces: the special tokens, single letters at the start of a word and inside, and pairs."""
    pairs = [f"##{a}{b}" for a in "aeiou" for b in LETTERS]
    pieces = [*SPECIAL[family].values(), *LETTERS, *(f"##{c}" for c in LETTERS), *",.;-'0123456789", *pairs]
    return {piece: i for i, piece in enumerate(pieces[:NUM_TOKENS])}


def tokenizer_of(family: Family) -> PreTrainedTokenizerFast:
    """Returns a small WordPiece tokenizer that reads any lower-cased English text."""
    words, special = vocabulary(family), SPECIAL[family]
    tokenizer = Tokenizer(models.WordPiece(words, unk_token=special["unk_token"]))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    cls, sep = special["cls_token"], special["sep_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B:1 {sep}:1",
        special_tokens=[(cls, words[cls]), (sep, words[sep])],
    )
    inputs = ["input_ids", "attention_mask"] + (["token_type_ids"] if family == "bert" else [])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=POSITIONS, model_input_names=inputs, **special
    )


def encoder_of(family: Family) -> PreTrainedModel:
    """Returns an encoder without a classifier, as base models are published; weights are large enough to matter."""
    if family == "distilbert":
        return DistilBertModel(
            DistilBertConfig(
                vocab_size=NUM_TOKENS, dim=HIDDEN, hidden_dim=INNER, n_layers=BLOCKS, n_heads=HEADS,
                max_position_embeddings=POSITIONS, initializer_range=0.1,
            )
        )  # fmt: skip
    config = (BertConfig if family == "bert" else RobertaConfig)(
        vocab_size=NUM_TOKENS, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS, max_position_embeddings=POSITIONS, initializer_range=0.1,
        pad_token_id=vocabulary(family)[SPECIAL[family]["pad_token"]],
    )  # fmt: skip
    if isinstance(config, RobertaConfig):
        return RobertaModel(config, add_pooling_layer=False)
    return BertModel(config)


def write_encoder(family: Family, folder: Path, seed: int = 0) -> Path:
    """Writes the tiny base model of a family with its tokenizer, as safetensors; returns its folder."""
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(seed)
        encoder_of(family).save_pretrained(folder)
    tokenizer_of(family).save_pretrained(folder)
    return folder


def load(folder: Path, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> Base:
    return load_encoder(locate(str(folder)), NUM_LABELS, attention, dtype, seed=0)


def token_rows(family: Family, lengths: Sequence[int], seed: int = 0) -> TokenSource:
    """Returns rows of random tokens of the given lengths; the label follows from the first token of a row."""
    generator = numpy_stream(seed, "rows", family)
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    tokens = generator.integers(len(SPECIAL[family]), NUM_TOKENS, offsets[-1]).astype(np.int32)
    columns = {"input_ids": tokens}
    pads = {"input_ids": vocabulary(family)[SPECIAL[family]["pad_token"]]}
    if family == "bert":
        columns["token_type_ids"] = generator.integers(0, 2, offsets[-1]).astype(np.int32)
        pads["token_type_ids"] = 0
    return TokenSource(columns, offsets, tokens[offsets[:-1]].astype(np.int64) % NUM_LABELS, pads, POSITIONS - 2)


def token_data(family: Family, sizes: Sequence[int], lengths: tuple[int, int] = (3, 20), seed: int = 0) -> PeerData:
    """Returns peers 0, 1, ... with the given numbers of rows, of a length in `lengths` each, and validation rows."""
    drawn = numpy_stream(seed, "lengths").integers(lengths[0], lengths[1] + 1, sum(sizes) + 8)
    return shared_out(token_rows(family, drawn.tolist(), seed), sizes)


def toy_data(sizes: Sequence[int], dtype: torch.dtype = torch.float64, seed: int = 0) -> PeerData:
    """Returns peers with the given numbers of random vectors."""
    inputs = torch.randn(sum(sizes) + 8, 8, generator=torch_stream(seed, "inputs"), dtype=dtype)
    return shared_out(VectorSource(inputs, (3 * inputs[:, 0].abs()).long() % NUM_LABELS), sizes)


def shared_out(source: TokenSource | VectorSource, sizes: Sequence[int]) -> PeerData:
    """Returns the rows cut into parts of the given sizes; the last 8 rows are everyone's validation rows."""
    parts = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    held_out = Shard(source, np.arange(sum(sizes), sum(sizes) + 8))
    return PeerData(
        {i: Shard(source, part) for i, part in enumerate(parts)}, dict.fromkeys([-1, *range(len(sizes))], held_out)
    )


@dataclass(frozen=True)
class Setting:
    """A base, where LoRA is placed on it, what rounds train, the rows and the local work."""

    base: Base
    lora: Lora
    schedule: Schedule
    data: PeerData
    work: LocalWork
    dtype: torch.dtype = torch.float32
    """Of adapters and optimiser state."""
    memory: tuple[str, ...] = ()
    attention: str = "sdpa"
    """The kernel of the stacked learner's attention."""
    objective: str = "classification"

    @cached_property
    def placement(self) -> Placement:
        lora = replace(self.lora, core="core" in self.schedule(1).trained)
        return place(self.base.model, self.base.prefix, lora, head=self.objective == "classification")

    def peers(self, ids: Iterable[int] | None = None) -> Peers:
        """Returns the peers at their common start; ids None: all that have rows."""
        start = self.placement.start(self.base.model, self.work.seed, self.dtype)
        own, common = split(start, ever_trained(self.schedule, self.work.rounds))
        hosted = self.data.train if ids is None else ids
        return Peers(hosted, own, common, optimizer=OPTIMIZERS[self.work.optimizer].state, memory=self.memory)

    def stacked(self, group_tokens: int = 4096) -> StackedLearner:
        """Returns the stacked learner over a copy of the base."""
        model, scaling = deepcopy(self.base.model), self.lora.scaling
        return StackedLearner(
            model, self.data, self.dropping, scaling, group_tokens, self.attention, objective=self.objective
        )

    def sequential(self) -> SequentialLearner:
        """Returns plain PEFT over a copy of the base."""
        return SequentialLearner(deepcopy(self.base.model), self.placement, self.data, self.dropping)

    @property
    def dropping(self) -> LocalWork:
        """The local work with the dropout of the adapters."""
        return replace(self.work, lora_dropout=self.lora.lora_dropout)


def toy_base(dtype: torch.dtype = torch.float64) -> Base:
    return Base(ToyModel(8, NUM_LABELS, seed=0).to(dtype), "encoder")


def start_apart(peers: Peers, size: float = 0.05) -> Peers:
    """Moves every peer, by its id, away from the common start, so that no gradient is zero; returns the peers."""
    for peer in peers:
        draws = torch.randn(peers.layout.size, generator=torch_stream(3, "apart", peer.id), dtype=torch.float64)
        peer.adapter.flat.add_(size * draws)
    return peers


def same_bits(one: Peers, other: Peers) -> bool:
    """Tells whether two sets of peers hold the same ids with the same bits: adapters, state, memory and counters."""
    a, b = one.arrays(), other.arrays()
    return one.ids == other.ids and a.keys() == b.keys() and all(equal_bits(a[name], b[name]) for name in a)


def equal_bits(one: Tensor, other: Tensor) -> bool:
    """Tells whether two tensors are equal to the bit, where not-a-number equals itself."""
    kinds = {torch.float32: torch.int32, torch.float64: torch.int64}
    return torch.equal(*(t.contiguous().view(kinds.get(t.dtype, t.dtype)) for t in (one, other)))


def relative_distance(one: Tensor, other: Tensor) -> float:
    """Returns ||one - other|| / ||other|| in float64; where both are zero, 0."""
    one, other = one.double(), other.double()
    distance, size = (one - other).norm().item(), other.norm().item()
    return distance / size if distance else 0.0


def distances(one: Peers, other: Peers) -> dict[str, float]:
    """Returns the relative distance of each matrix of two sets of peers, for each role apart."""
    other_arrays = other.arrays()
    return {
        f"{name}/{role}": max(
            relative_distance(mine, theirs)
            for mine, theirs in zip(by_role(matrix, one, role), by_role(other_arrays[name], other, role), strict=True)
        )
        for name, matrix in one.arrays().items()
        if name != "counters"
        for role in sorted({e.role for e in one.layout.entries})
    }


def by_role(matrix: Tensor, peers: Peers, role: str) -> list[Tensor]:
    """Returns, for each peer, the numbers of one role."""
    spans = peers.layout.spans([cast(Role, role)])
    return [torch.cat([row[s] for s in spans]) for row in matrix]
