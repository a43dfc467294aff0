"""The frozen base: one Hugging Face model in memory for all hosted peers. Safetensors only, never remote code."""

import hashlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.masking_utils import eager_mask
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from dfl_lora.errors import UserError
from dfl_lora.models import folder
from dfl_lora.streams import torch_stream

SEED_TOKENS = {"pad_token": "[PAD]", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
BY_LENGTH = ("longrope", "dynamic")
"""Rotary embeddings whose angles depend on how long the row is."""
UNLIMITED = 1 << 30
"""Tokens that a model without a longest sequence reads."""
EMBEDDED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


@dataclass(frozen=True)
class Files:
    """The folder of a base model, the name others know it by, and the digests of weights and tokenizer."""

    path: Path
    name: str
    revision: str | None
    weights: str
    tokenizer: str


@dataclass(frozen=True)
class Base:
    """A frozen model; everything outside the module `prefix` is its head."""

    model: nn.Module
    prefix: str
    files: Files | None = None
    drawn: frozenset[str] = frozenset()
    """Parameters that the file lacks and the run seed gave: they must travel with an adapter."""


def locate(name_or_path: str, revision: str | None = None) -> Files:
    """Finds a base model: a folder, the embedded all-MiniLM-L6-v2, or a hub name; raises without safetensors."""
    path, name = folder.find(name_or_path) or (download(name_or_path, revision), name_or_path)
    weights = folder.weights_in(path, name_or_path)
    digest = digest_of(weights)
    if folder.EMBEDDED_PACKAGE in str(path) and digest != EMBEDDED_SHA256:
        raise UserError(f"The embedded {folder.EMBEDDED} has digest {digest}, not {EMBEDDED_SHA256}; install it again.")
    return Files(path, name, revision, digest, digest_of(folder.tokenizer_in(path)))


def download(name: str, revision: str | None) -> Path:
    """Returns the local folder of a hub model, fetching it where the network is there."""
    try:
        patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub raises a dozen kinds, all of them mean: not to be had
        raise folder.no_model(name, type(error).__name__) from None


def digest_of(files: list[Path]) -> str:
    """Returns the sha256 of one file, or of the digests of several in the order of their names."""
    digests = []
    for file in files:
        with file.open("rb") as content:
            digests.append(hashlib.file_digest(content, "sha256").hexdigest())
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def load_tokenizer(files: Files, tokens: str | None = None) -> PreTrainedTokenizerBase:
    """Returns the tokenizer; with tokens `seed` what it lacks of SEED_TOKENS is added."""
    with readable(files):
        tokenizer = AutoTokenizer.from_pretrained(files.path, trust_remote_code=False)
    if tokens == "seed":
        tokenizer.add_special_tokens(lacking(tokenizer))
    return tokenizer


def lacking(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Returns which of SEED_TOKENS a tokenizer does not have."""
    return {name: token for name, token in SEED_TOKENS.items() if getattr(tokenizer, name) is None}


def max_tokens(files: Files, kind: str = "classification") -> int:
    """Returns the longest sequence the base can read; RoBERTa's positions start after its padding index.

    A decoder that reads long rows otherwise than short ones is read up to where it begins to: rows that share a pass
    are all read alike.
    """
    with readable(files):
        config = AutoConfig.from_pretrained(files.path, trust_remote_code=False)
    folder.check_family(config.to_dict(), files.name, kind)
    longest = getattr(config, "max_position_embeddings", None)  # none where positions have no table
    reserved = config.pad_token_id + 1 if "roberta" in config.model_type or "camembert" in config.model_type else 0
    here = UNLIMITED if longest is None else int(longest) - reserved
    return min(here, *alike_up_to(config.get_text_config()), UNLIMITED) if kind == "causal_lm" else here


def alike_up_to(config: PretrainedConfig) -> list[int]:
    """Returns lengths from which on a decoder turns positions by other angles, or attends in chunks."""
    given = getattr(config, "rope_parameters", None) or {}
    ropes = [given] if "rope_type" in given else [rope for rope in given.values() if isinstance(rope, dict)]
    name = "original_max_position_embeddings"
    known = [getattr(config, key, None) for key in (name, "max_position_embeddings")]
    lengths = [[rope.get(name), *known] for rope in ropes if rope["rope_type"] in BY_LENGTH]
    lengths.append([getattr(config, "attention_chunk_size", None)])
    return [int(next(filter(None, some))) for some in lengths if any(some)]


def num_words(files: Files) -> int:
    """Returns for how many words the base has embeddings."""
    with readable(files):
        return int(AutoConfig.from_pretrained(files.path, trust_remote_code=False).get_text_config().vocab_size)


def load_encoder(files: Files, num_labels: int, attention: str, dtype: torch.dtype, seed: int) -> Base:
    """Loads a sequence-classification encoder; what the file lacks (the head) is drawn once from the run seed."""
    with quiet(), readable(files):
        model, info = AutoModelForSequenceClassification.from_pretrained(
            files.path,
            num_labels=num_labels,
            attn_implementation=attention,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    missing = {*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])}
    for name in sorted(missing):
        parameter = model.get_parameter(name)
        draws = torch.randn(parameter.shape, generator=torch_stream(seed, "head", name))
        scale = getattr(model.config, "initializer_range", 0.02) if parameter.dim() > 1 else 0.0
        parameter.data.copy_(draws * scale)
    head = {n for n, p in model.named_parameters() if not n.startswith(f"{model.base_model_prefix}.")}
    for name, parameter in model.named_parameters():
        if name not in head or name.rpartition(".")[0] == "":
            parameter.data = parameter.data.to(dtype)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.to(dtype)
    return Base(model.eval().requires_grad_(False), model.base_model_prefix, files, frozenset(missing))


def load_decoder(files: Files, attention: str, dtype: torch.dtype, num_tokens: int = 0) -> Base:
    """Loads a causal language model, frozen with its output layer; for words it lacks of `num_tokens` rows are added.

    These are the mean of the rows there are, at all peers the same.
    """
    with quiet(), readable(files):
        model, info = AutoModelForCausalLM.from_pretrained(
            files.path,
            attn_implementation=attention,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    assert isinstance(model, PreTrainedModel)
    missing = sorted({*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])})
    if missing:
        raise UserError(f"{files.name} is no whole causal language model: it lacks {missing[0]}; give one that has it.")
    model = model.eval().requires_grad_(False)
    added = num_tokens > model.config.vocab_size
    if added:
        add_rows(model, num_tokens)
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)] if added else []
    drawn = {name for name in names if is_table(model, name.rpartition(".")[0])}
    return Base(model, model.base_model_prefix, files, frozenset(drawn))


def is_table(model: PreTrainedModel, path: str) -> bool:
    """Tells whether a module has a row for each word."""
    return model.get_submodule(path) in (model.get_input_embeddings(), model.get_output_embeddings())


@torch.no_grad()
def add_rows(model: PreTrainedModel, num_tokens: int) -> None:
    """Makes the vocabulary of a model as large as `num_tokens`; new words lie at the mean of the old ones."""
    old = int(model.config.vocab_size)
    with quiet():
        model.resize_token_embeddings(num_tokens, mean_resizing=False)
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert isinstance(table, nn.Embedding | nn.Linear)
        table.weight[old:] = table.weight[:old].float().mean(0).to(table.weight.dtype)
    model.requires_grad_(False)


@contextmanager
def readable(files: Files) -> Iterator[None]:
    """Turns what a library says of damaged files into one sentence that names the folder."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        if isinstance(error, UserError):
            raise
        raise folder.unreadable(files.path, " ".join(str(error).split())) from None


@contextmanager
def quiet() -> Iterator[None]:
    """Silences the loader's report of newly initialised heads: they are drawn from the run seed right after."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    bars = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        if bars:
            enable_progress_bar()


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain attention whose dropout is the module's own, so that masks come from the peers' streams."""
    times = query.shape[1] // key.shape[1]  # several heads may share keys and values
    key, value = (t if times == 1 else t.repeat_interleave(times, dim=1) for t in (key, value))
    scores = (query @ key.transpose(2, 3)) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = torch.softmax(scores, dim=-1)
    drop = getattr(module, "dropout", getattr(module, "attn_dropout", None))
    weights = drop(weights) if isinstance(drop, nn.Module) else weights
    return (weights @ value).transpose(1, 2).contiguous(), weights


STREAM_ATTENTION = "eager_stream_dropout"
AttentionInterface.register(STREAM_ATTENTION, attend)
AttentionMaskInterface.register(STREAM_ATTENTION, eager_mask)
