"""Tiny decoders with random weights, random rows of tokens of which a part is learnt, and recipes on little texts."""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from dfl_lora.data.batches import TokenSource
from dfl_lora.learners.work import PeerData
from dfl_lora.models.base import Base, load_decoder, locate, quiet
from dfl_lora.streams import numpy_stream
from encoders import shared_out

WORDS, WINDOW, POSITIONS = 290, 8, 96
SHAPE = {
    "vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": POSITIONS, "initializer_range": 0.2,
    "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": None,
}  # fmt: skip
TARGETS: dict[str, tuple[str, ...]] = {
    "llama": ("q_proj", "v_proj"), "qwen2": ("q_proj", "k_proj", "down_proj"), "qwen3": ("q_proj", "v_proj"),
    "mistral": ("q_proj", "v_proj", "o_proj"), "gemma": ("q_proj", "v_proj"), "gemma2": ("q_proj", "v_proj"),
    "gemma3": ("q_proj", "gate_proj"), "phi3": ("qkv_proj", "down_proj"), "gpt2": ("c_attn", "c_fc"),
}  # fmt: skip
"""Families of decoders, and modules that carry LoRA in the tests."""
STORIES = ("the cat sat on the mat.", "a dog ran after the ball all day long.", "we went home.", "it rained.")


def decoder_of(family: str) -> PreTrainedModel:
    """Returns a decoder; windows are shorter than most rows."""
    sliding = {"sliding_window": WINDOW}
    match family:
        case "llama":
            return LlamaForCausalLM(LlamaConfig(**SHAPE))
        case "qwen2":
            return Qwen2ForCausalLM(Qwen2Config(**SHAPE))
        case "qwen3":
            return Qwen3ForCausalLM(Qwen3Config(**SHAPE))
        case "mistral":
            return MistralForCausalLM(MistralConfig(**SHAPE, **sliding))
        case "gemma":
            return GemmaForCausalLM(GemmaConfig(**SHAPE))
        case "gemma2":
            return Gemma2ForCausalLM(Gemma2Config(**SHAPE, **sliding, query_pre_attn_scalar=8))
        case "gemma3":
            return Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE, **sliding, query_pre_attn_scalar=8))
        case "phi3":
            return Phi3ForCausalLM(Phi3Config(**SHAPE))
        case "gpt2":
            return GPT2LMHeadModel(
                GPT2Config(
                    vocab_size=WORDS, n_embd=32, n_layer=2, n_head=4, n_positions=POSITIONS, initializer_range=0.2,
                    bos_token_id=256, eos_token_id=257,
                )
            )  # fmt: skip
    raise ValueError(family)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer with a token for each byte, <s> and </s>; it has no padding token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {letter: i for i, letter in enumerate(letters)} | {"<s>": 256, "</s>": 257}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def write_decoder(family: str, folder: Path, seed: int = 0) -> Path:
    """Writes the tiny decoder of a family with its tokenizer, as safetensors; returns its folder."""
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(seed)
        decoder_of(family).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def load_tiny(folder: Path, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> Base:
    return load_decoder(locate(str(folder)), attention, dtype)


def causal_rows(lengths: Sequence[int], seed: int = 0) -> TokenSource:
    """Returns rows of random tokens, the latter half of each learnt."""
    generator = numpy_stream(seed, "causal rows")
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    tokens = generator.integers(0, WORDS, offsets[-1]).astype(np.int32)
    targets = np.full(len(tokens), -100, dtype=np.int32)
    for start, end in pairwise(offsets):
        learnt = slice(start + (end - start) // 2, end - 1)
        targets[learnt] = tokens[learnt.start + 1 : end]
    labels = np.zeros(len(lengths), dtype=np.int64)
    return TokenSource({"input_ids": tokens}, offsets, labels, {"input_ids": 257}, POSITIONS, targets=targets)


def causal_peers(sizes: Sequence[int], lengths: tuple[int, int] = (4, 30), seed: int = 0) -> PeerData:
    """Returns peers 0, 1, ... with the given numbers of rows, of a length in `lengths` each, and validation rows."""
    drawn = numpy_stream(seed, "lengths").integers(lengths[0], lengths[1] + 1, sum(sizes) + 8)
    return shared_out(causal_rows(drawn.tolist(), seed), sizes)


def texts(number: int) -> list[dict[str, str]]:
    return [{"text": f"{i} {STORIES[i % 4]} {STORIES[(i * 7 + 1) % 4]}"} for i in range(number)]


def recipe(folder: Path, family: str = "llama", **changes: Any) -> dict[str, Any]:
    """Returns a recipe of three peers on a tiny decoder and 40 texts."""
    for name, number in (("train", 40), ("validation", 8)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts(number)))
    content: dict[str, Any] = {
        "name": "tiny", "model": {"name_or_path": str(write_decoder(family, folder / "model"))},
        "lora": {"r": 4, "lora_alpha": 8, "target_modules": ["c_attn"] if family == "gpt2" else ["q_proj", "v_proj"]},
        "task": {"kind": "causal_lm", "max_length": 64},
        "data": {"path": str(folder / "train.jsonl"), "validation": str(folder / "validation.jsonl"),
                 "partition": {"kind": "length", "groups": 3, "alpha": 0.5, "min_size": 5}},
        "peers": {"num_peers": 3, "topology": "ring"},
        "train": {"rounds": 2, "local": {"steps": 2}, "batch_size": 4, "learning_rate": 1e-2},
        "compute": {"dtype": "float32", "threads": 1},
    }  # fmt: skip
    for part, keys in changes.items():
        content[part] = content.get(part, {}) | keys
    return content
