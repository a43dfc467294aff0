"""PEFT adapter folders out and in, and merging: what was trained is used with the tools everyone has.

A head module that carries LoRA is written as the full weight W0 + s B A among modules_to_save, since its
base weight is not part of the published base model. So are the heads that peers trained in full, and what
the base's file lacks of the encoder (a pooler) and the run seed gave.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dfl_lora.errors import UserError
from dfl_lora.files import new_folder
from dfl_lora.models.base import Base, Files
from dfl_lora.models.core import folded
from dfl_lora.models.placement import Placement

CAUSAL = "CAUSAL_LM"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BASE_DIGEST = "base_weights_sha256"


@dataclass(frozen=True)
class Export:
    """Everything an adapter folder says besides the tensors."""

    placement: Placement
    files: Files
    model_class: str
    model_module: str
    labels: tuple[str, ...]
    """Of a classifier; none of a causal language model."""
    fixed: Mapping[str, Tensor]
    """Parameters that no peer trains and the published base lacks, by name: they travel with the adapter."""
    tokenizer: PreTrainedTokenizerBase | None = None
    """Where it has words that the base's own lacks; it travels too."""

    @staticmethod
    def of(
        base: Base, placement: Placement, labels: tuple[str, ...], tokenizer: PreTrainedTokenizerBase | None = None
    ) -> "Export":
        """Takes what is needed from a base model, before a learner changes its layers."""
        assert base.files is not None
        carrying = tuple(f"{path}." for path in placement.modules if not path.startswith(f"{base.prefix}."))
        fixed = {
            name: parameter.detach().clone()
            for name, parameter in base.model.named_parameters(remove_duplicate=False)
            if name not in placement.head and (name in base.drawn or name.startswith(carrying))
        }
        kind = type(base.model)
        return Export(placement, base.files, kind.__name__, kind.__module__, labels, fixed, tokenizer)

    def tensors(self, adapter: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns an adapter under PEFT's names, LoRA folded into the modules that travel whole."""
        result, scaling, adapter = dict(self.fixed), self.placement.lora.scaling, folded(adapter)
        for path in self.placement.modules:
            a, b = adapter[f"{path}.A"].cpu(), adapter[f"{path}.B"].cpu()
            if f"{path}.weight" in self.fixed:
                result[f"{path}.weight"] = self.fixed[f"{path}.weight"] + scaling * b @ a
            else:
                result |= {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}
        result |= {name: adapter[name] for name in self.placement.head}
        return {f"base_model.model.{name}": value.detach().float().contiguous().cpu() for name, value in result.items()}

    def config(self) -> dict[str, Any]:
        """Returns adapter_config.json: the base by id and digest, never by a path."""
        lora = self.placement.lora
        heads = {name.rpartition(".")[0] for name in (*self.placement.head, *self.fixed)}
        config: dict[str, Any] = LoraConfig(
            r=lora.r,
            lora_alpha=lora.lora_alpha,
            lora_dropout=lora.lora_dropout,
            use_rslora=lora.use_rslora,
            fan_in_fan_out=self.placement.transposed,
            target_modules=sorted(p for p in self.placement.modules if f"{p}.weight" not in self.fixed),
            modules_to_save=sorted(heads) or None,
            task_type=None if self.labels else CAUSAL,
            base_model_name_or_path=self.files.name,
            revision=self.files.revision,
            inference_mode=True,
            auto_mapping={
                "base_model_class": self.model_class,
                "parent_library": self.model_module,
                BASE_DIGEST: self.files.weights,
            },
        ).to_dict()
        config["target_modules"], config["modules_to_save"] = sorted(config["target_modules"]), sorted(heads) or None
        return config

    def write(self, folder: Path, adapter: Mapping[str, Tensor], whose: str) -> None:
        """Writes an adapter folder, which appears whole or not at all."""
        with new_folder(folder) as partial:
            (partial / WEIGHTS).write_bytes(save(self.tensors(adapter), metadata={"format": "pt"}))
            (partial / CONFIG).write_text(json.dumps(self.config(), indent=2, default=str))
            (partial / "README.md").write_text(self.readme(whose))
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(str(partial))

    def readme(self, whose: str) -> str:
        base, labels = self.files.name, len(self.labels)
        kind = "AutoModelForSequenceClassification" if labels else "AutoModelForCausalLM"
        told, given = (f"Labels: {', '.join(self.labels)}.\n", f", num_labels={labels}") if labels else ("", "")
        return (
            f"---\nbase_model: {base}\nlibrary_name: peft\n---\n# {whose}\n\n"
            f"Trained by decentralised LoRA fine-tuning; base weights sha256 {self.files.weights}.\n"
            f"{told}\n```python\nfrom peft import PeftModel\nfrom transformers import {kind}\n\n"
            f'base = {kind}.from_pretrained("{base}"{given})\n{self.resizing}'
            'model = PeftModel.from_pretrained(base, "this folder").eval()\n```\n'
        )

    @property
    def carried(self) -> str:
        """What task.tokens makes adapters hold, in words."""
        if self.tokenizer is None:
            return ""
        return (
            f"embeddings of {len(self.tokenizer):,} words" if self.fixed else "no embeddings: there was room for them"
        )

    @property
    def resizing(self) -> str:
        """Returns the line that gives a base the words which the adapter's embeddings have."""
        if self.tokenizer is None or not self.fixed:
            return ""
        return f"base.resize_token_embeddings({len(self.tokenizer)})  # the adapter carries embeddings of added words\n"


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns the configuration and the tensors of an adapter folder; raises where it is missing or damaged."""
    try:
        config = json.loads((folder / CONFIG).read_text())
        if not isinstance(config, dict) or not isinstance(config.get("auto_mapping") or {}, dict):
            raise ValueError(f"{CONFIG} is not the configuration of an adapter")
        return config, load_file(folder / WEIGHTS)
    except FileNotFoundError:
        raise UserError(f"{folder} is not an adapter folder: it needs {CONFIG} and {WEIGHTS}.") from None
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise UserError(f"The adapter in {folder} is damaged ({error}); export it again.") from None


def check_base(config: Mapping[str, Any], files: Files, folder: Path) -> None:
    """Raises where an adapter was trained on other base weights; one that others wrote does not say on which."""
    wanted = (config.get("auto_mapping") or {}).get(BASE_DIGEST)
    if wanted not in (None, files.weights):
        raise UserError(
            f"The adapter in {folder} was trained on {config.get('base_model_name_or_path')} with weights "
            f"{str(wanted)[:12]}, but {files.name} has {files.weights[:12]}; give the base it was trained on."
        )


def fit_words(base: PreTrainedModel, tensors: Mapping[str, Tensor]) -> None:
    """Gives a base as many words as the embeddings have that an adapter carries."""
    output = base.get_input_embeddings()
    for name, value in tensors.items():
        path = name.removeprefix("base_model.model.").rpartition(".")[0]
        if path and not path.endswith(("lora_A", "lora_B")) and base.get_submodule(path) is output:
            base.resize_token_embeddings(len(value), mean_resizing=False)
