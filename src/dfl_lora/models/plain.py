"""Plain PEFT: a model of Hugging Face with an adapter folder on it, as everyone loads it, whatever trained it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from dfl_lora.errors import UserError
from dfl_lora.models.adapters import CAUSAL, check_base, fit_words, read_adapter
from dfl_lora.models.base import Files, load_tokenizer, quiet


def put_on(model: PreTrainedModel, files: Files, adapter: Path) -> PeftModel:
    """Returns a base model, loaded from `files`, with an adapter folder on it; raises where they do not fit."""
    config, tensors = read_adapter(adapter)
    check_base(config, files, adapter)
    with quiet():
        fit_words(model, tensors)
        try:
            worn = PeftModel.from_pretrained(model, str(adapter))
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise unfit(adapter, files, " ".join(str(error).split())) from None
        apart = sorted(set(get_peft_model_state_dict(worn, save_embedding_layers=False)) ^ set(tensors))
    if apart:
        raise unfit(adapter, files, f"its tensors differ in {apart[0]}")
    return worn.eval()


def plain_base(config: Mapping[str, Any], files: Files, labels: Sequence[str]) -> PreTrainedModel:
    """Returns the base that an adapter of this configuration goes on, in float32."""
    shared: dict[str, Any] = {"use_safetensors": True, "trust_remote_code": False, "dtype": torch.float32}
    if config.get("task_type") == CAUSAL:
        decoder: PreTrainedModel = AutoModelForCausalLM.from_pretrained(files.path, **shared)
        return decoder
    names = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    encoder: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(
        files.path, num_labels=len(labels), ignore_mismatched_sizes=True, **names, **shared
    )
    return encoder


def merge(adapter: Path, files: Files, labels: Sequence[str], to: Path) -> None:
    """Writes the base with an adapter folder merged in, as a model folder with its tokenizer."""
    with quiet():
        worn = put_on(plain_base(read_adapter(adapter)[0], files, labels), files, adapter)
        worn.merge_and_unload().save_pretrained(to, safe_serialization=True)
    own = replace(files, path=adapter) if (adapter / "tokenizer.json").is_file() else files
    load_tokenizer(own).save_pretrained(to)


def unfit(adapter: Path, files: Files, why: str) -> UserError:
    """Returns the sentence for an adapter whose base has the right weights, and still they do not fit."""
    return UserError(
        f"The adapter in {adapter} does not fit {files.name} ({why}); one of them is damaged: export the adapter "
        "again, or see whether the base's config.json is its own."
    )


def worn_in_turn(base: PreTrainedModel, files: Files, adapters: Mapping[str, Path | None]) -> Iterator[tuple[str, Any]]:
    """Yields the base with each adapter on it, one after the other; None stands for the base as it is."""
    for whose, adapter in adapters.items():
        if adapter is None:
            yield whose, base
        else:
            worn = put_on(base, files, adapter)
            yield whose, worn
            base = worn.unload()


def device_here() -> torch.device:
    """Returns where this machine computes the fastest."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
