"""PEFT adapter folders out and in, and merging: what was trained is used with the tools everyone has.

A head module that carries LoRA is written as the full weight W0 + s B A among modules_to_save, since its
base weight is not part of the published base model. So are the heads that peers trained in full.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from dfl_lora.errors import UserError
from dfl_lora.models.base import Files, load_tokenizer, quiet
from dfl_lora.models.placement import Placement

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
    head_bases: Mapping[str, Tensor]
    """Weights and biases of head modules that carry LoRA, by parameter name."""

    @staticmethod
    def of(model: nn.Module, prefix: str, placement: Placement, files: Files, labels: tuple[str, ...]) -> "Export":
        """Takes what is needed from a base model, before a learner changes its layers."""
        carrying = [path for path in placement.modules if not path.startswith(f"{prefix}.")]
        bases = {
            f"{path}.{part}": parameter.detach().clone()
            for path in carrying
            for part, parameter in model.get_submodule(path).named_parameters(recurse=False)
        }
        return Export(placement, files, type(model).__name__, type(model).__module__, labels, bases)

    def tensors(self, adapter: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns an adapter under PEFT's names, head modules folded."""
        result, scaling = {}, self.placement.lora.scaling
        for path in self.placement.modules:
            a, b = adapter[f"{path}.A"], adapter[f"{path}.B"]
            if f"{path}.weight" in self.head_bases:
                result[f"base_model.model.{path}.weight"] = self.head_bases[f"{path}.weight"] + scaling * b @ a
                if f"{path}.bias" in self.head_bases:
                    result[f"base_model.model.{path}.bias"] = self.head_bases[f"{path}.bias"]
            else:
                result[f"base_model.model.{path}.lora_A.weight"] = a
                result[f"base_model.model.{path}.lora_B.weight"] = b
        result |= {f"base_model.model.{name}": adapter[name] for name in self.placement.head}
        return {name: value.detach().float().contiguous().cpu() for name, value in result.items()}

    def config(self) -> dict[str, Any]:
        """Returns adapter_config.json: the base by id and digest, never by a path."""
        lora = self.placement.lora
        heads = {name.rpartition(".")[0] for name in (*self.placement.head, *self.head_bases)}
        config: dict[str, Any] = LoraConfig(
            r=lora.r,
            lora_alpha=lora.lora_alpha,
            lora_dropout=lora.lora_dropout,
            use_rslora=lora.use_rslora,
            target_modules=sorted(p for p in self.placement.modules if f"{p}.weight" not in self.head_bases),
            modules_to_save=sorted(heads),
            base_model_name_or_path=self.files.name,
            revision=self.files.revision,
            inference_mode=True,
            auto_mapping={
                "base_model_class": self.model_class,
                "parent_library": self.model_module,
                BASE_DIGEST: self.files.weights,
            },
        ).to_dict()
        config["target_modules"], config["modules_to_save"] = (
            sorted(config["target_modules"]),
            sorted(config["modules_to_save"]),
        )
        return config

    def write(self, folder: Path, adapter: Mapping[str, Tensor], whose: str) -> None:
        """Writes an adapter folder, which appears whole or not at all."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        partial.chmod(0o755)
        (partial / WEIGHTS).write_bytes(save(self.tensors(adapter), metadata={"format": "pt"}))
        (partial / CONFIG).write_text(json.dumps(self.config(), indent=2, default=str))
        (partial / "README.md").write_text(self.readme(whose))
        replace_folder(partial, folder)

    def readme(self, whose: str) -> str:
        base, labels = self.files.name, len(self.labels)
        return (
            f"---\nbase_model: {base}\nlibrary_name: peft\n---\n# {whose}\n\n"
            f"Trained by decentralised LoRA fine-tuning; base weights sha256 {self.files.weights}.\n"
            f"Labels: {', '.join(self.labels)}.\n\n```python\nfrom peft import PeftModel\n"
            "from transformers import AutoModelForSequenceClassification\n\n"
            f'base = AutoModelForSequenceClassification.from_pretrained("{base}", num_labels={labels})\n'
            'model = PeftModel.from_pretrained(base, "this folder").eval()\n```\n'
        )


def replace_folder(partial: Path, folder: Path) -> None:
    """Renames a finished folder into place, over an older one where there is one."""
    if folder.exists():
        old = partial.with_name(f"{partial.name}.old")
        folder.rename(old)
        partial.rename(folder)
        for file in old.iterdir():
            file.unlink()
        old.rmdir()
    else:
        partial.rename(folder)


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns the configuration and the tensors of an adapter folder; raises where it is missing or damaged."""
    try:
        return json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)
    except FileNotFoundError:
        raise UserError(f"{folder} is not an adapter folder: it needs {CONFIG} and {WEIGHTS}.") from None
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"The adapter in {folder} is damaged ({error}); export it again.") from None


def check_base(config: Mapping[str, Any], files: Files, folder: Path) -> None:
    """Raises where an adapter was trained on other base weights."""
    wanted = (config.get("auto_mapping") or {}).get(BASE_DIGEST)
    if wanted != files.weights:
        raise UserError(
            f"The adapter in {folder} was trained on {config.get('base_model_name_or_path')} with weights "
            f"{str(wanted)[:12]}, but {files.name} has {files.weights[:12]}; give the base it was trained on."
        )


def merge(adapter: Path, files: Files, num_labels: int, to: Path) -> None:
    """Writes the base with an adapter folder merged in, as a model folder with its tokenizer."""
    check_base(read_adapter(adapter)[0], files, adapter)
    with quiet():
        base = AutoModelForSequenceClassification.from_pretrained(
            files.path, num_labels=num_labels, use_safetensors=True, trust_remote_code=False, dtype=torch.float32
        )
        merged = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
    merged.save_pretrained(to, safe_serialization=True)
    load_tokenizer(files).save_pretrained(to)
