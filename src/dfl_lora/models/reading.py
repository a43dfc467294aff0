"""How a base reads a packed pass: its layers replaced once, its inputs given as one row of tokens."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dfl_lora.models import layers
from dfl_lora.models.attention import PACKED
from dfl_lora.models.below import install_below
from dfl_lora.models.firsts import install_firsts
from dfl_lora.models.layers import Pass


def install(
    model: nn.Module, current: Pass, scaling: float, lora_dropout: float, base_dropout: bool, num_below: int = 0,
    *, causal: bool = False,
) -> None:  # fmt: skip
    """Makes a model read packed passes, in place: linear layers and dropout of peers, attention in buckets.

    The first `num_below` layers, which no peer adapts, are put where they can be passed over.
    """
    layers.install(model, current, scaling, lora_dropout, base_dropout)
    if isinstance(model, PreTrainedModel):
        model.set_attn_implementation(PACKED)
    if isinstance(model, PreTrainedModel) and not causal:
        install_firsts(model, model.base_model_prefix, current)
        if num_below:
            install_below(model, model.base_model_prefix, num_below, current)


def read(model: nn.Module, inputs: Mapping[str, Tensor], current: Pass) -> Tensor:
    """Returns the logits [R, labels] of a packed pass, fills included."""
    if not isinstance(model, PreTrainedModel):
        logits: Tensor = model(**inputs)
        return logits
    assert current.packing is not None
    positions = torch.from_numpy(current.packing.positions + first_position(model)).to(current.packing.device)
    packed = {name: value.unsqueeze(0) for name, value in inputs.items()}
    return model(**packed, position_ids=positions.unsqueeze(0), current=current).logits  # type: ignore[no-any-return]


def first_position(model: PreTrainedModel) -> int:
    """Returns the position of a row's first token; RoBERTa's positions start after its padding index."""
    return int(model.config.pad_token_id) + 1 if model.base_model_prefix == "roberta" else 0
