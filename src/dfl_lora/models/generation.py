"""Generation: what a causal language model says after prompts, many of them at a time.

Prompts of about the same length share a pass. They are padded on the left, under a mask, so that all of them end
where what is said begins. Said is the likeliest token, or a drawn one:

    argmax_v  l_v / T - log e_v        e_v ~ Exp(1) (the Gumbel-max trick; arXiv 1411.0030)

over the k tokens of the largest logits l, and of these over the fewest that hold the share p of the probability. The
draws of a prompt are a stream of its own, so that who shares its pass changes nothing but rounding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dfl_lora.errors import UserError
from dfl_lora.models.base import Files, load_decoder
from dfl_lora.models.plain import device_here, put_on
from dfl_lora.streams import torch_stream

Tokens = list[int]


@dataclass(frozen=True)
class Sampling:
    """How what is said is chosen, and how long it may be."""

    temperature: float = 0.0
    """0: always the likeliest token, whatever top_k and top_p are."""
    top_k: int = 0
    """0: no limit."""
    top_p: float = 1.0
    seed: int = 0
    max_new_tokens: int = 256


DRAWN = Sampling(temperature=0.1, top_k=40, top_p=0.95)
"""How the seed script draws."""


def sampling_of(drawn: bool, max_new_tokens: int | None) -> Sampling:
    """Returns the likeliest tokens or the seed script's draws, so long at most (None: 256 tokens)."""
    how = DRAWN if drawn else Sampling()
    return how if max_new_tokens is None else replace(how, max_new_tokens=max_new_tokens)


@dataclass(frozen=True)
class Said:
    """What was said after a prompt."""

    text: str
    num_tokens: int
    ended: bool
    """Whether it came to its end, before it was as long as it may be."""
    cut: bool
    """Whether the prompt was too long and its beginning was left out."""


@dataclass(frozen=True)
class Draws:
    """Makes the likeliest token of the scores [prompts, vocabulary] a drawn one."""

    streams: Sequence[torch.Generator]

    def __call__(self, tokens: Tensor, scores: Tensor) -> Tensor:
        waits = [torch.empty(scores.shape[1]).exponential_(generator=stream) for stream in self.streams]
        return scores - torch.stack(waits).log().to(scores)


def load_causal(files: Files, adapter: Path | None = None, dtype: torch.dtype | None = None) -> Any:
    """Returns a causal language model, with an adapter folder on it where one is given.

    `dtype` None is float32 on a CPU and bfloat16 on a GPU. Of how its folder says to generate, only the tokens that
    end a text are kept.
    """
    device = device_here()
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    try:
        model: Any = load_decoder(files, "sdpa", dtype).model.to(device)
    except UserError:  # sdpa caps no scores, as Gemma 2 does; what else is wrong is said again
        model = load_decoder(files, "eager", dtype).model.to(device)
    model.generation_config = GenerationConfig(eos_token_id=model.generation_config.eos_token_id)
    return model if adapter is None else put_on(model, files, adapter)


def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Tokens],
    sampling: Sampling = Sampling(),
    batch_size: int = 16,
    heard: Callable[[int, Said], None] = lambda *_: None,
    ends: Sequence[int] = (),
) -> list[Said]:
    """Returns what a model says after each prompt, in the order of the prompts; `ends` are more tokens that end it.

    The longest are read first; `heard` is told each as it comes, with the number of its prompt.
    """
    room, stops = room_for(model, sampling), [*stops_of(model, tokenizer), *ends]
    if not all(prompts):
        raise UserError("A prompt is empty, and there is nothing to go on from; give some text.")
    kept = [prompt if room is None else prompt[-room:] for prompt in prompts]
    order, said = sorted(range(len(kept)), key=lambda i: -len(kept[i])), dict[int, Said]()
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        rows = [kept[i] for i in batch]
        streams = [torch_stream(sampling.seed, "said", i) for i in batch]
        pad = stops[0] if stops else 0
        pad = pad if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        for i, new in zip(batch, continued(model, rows, sampling, streams, stops, pad), strict=True):
            length = next((k for k, token in enumerate(new) if token in stops), len(new))
            text = tokenizer.decode(new[:length], skip_special_tokens=True)
            said[i] = Said(text, length, length < len(new), len(kept[i]) < len(prompts[i]))
            heard(i, said[i])
    return [said[i] for i in range(len(kept))]


def room_for(model: Any, sampling: Sampling) -> int | None:
    """Returns how many tokens of a prompt can be read; None where there is no limit."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is None:
        return None
    if positions <= sampling.max_new_tokens:
        raise UserError(
            f"--max-new-tokens {sampling.max_new_tokens} leaves no room for a prompt, since the model reads "
            f"{positions} tokens in all; use fewer."
        )
    return int(positions) - sampling.max_new_tokens


def stops_of(model: Any, tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """Returns the tokens that end a text: the tokenizer's, and those that the model's folder names."""
    own = model.generation_config.eos_token_id
    named = own if isinstance(own, list) else [own]
    return [token for token in dict.fromkeys([tokenizer.eos_token_id, *named]) if token is not None]


def continued(
    model: Any,
    prompts: Sequence[Tokens],
    sampling: Sampling,
    streams: Sequence[torch.Generator],
    stops: Tokens,
    pad: int,
) -> list[Tokens]:
    """Returns the tokens that a model says after each prompt of one pass; what follows a stop is padding."""
    width = max(map(len, prompts))
    tokens = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    how = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens, do_sample=False, eos_token_id=stops or None, pad_token_id=pad
    )
    with torch.inference_mode():
        whole: Tensor = model.generate(
            input_ids=tokens.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=how,
            logits_processor=processors(sampling, streams),
        )
    new: list[Tokens] = whole[:, width:].tolist()
    return new


def processors(sampling: Sampling, streams: Sequence[torch.Generator]) -> LogitsProcessorList:
    """Returns what is done to the scores before the likeliest token is taken."""
    if sampling.temperature == 0:
        return LogitsProcessorList()
    limits = [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    limits += [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    return LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature), *limits, Draws(streams)])
