"""A tiny Llama with random weights that likes digits, adapters on it as a run writes them, and such a run."""

import json
from pathlib import Path

import torch
import yaml
from peft import LoraConfig, get_peft_model
from tokenizers import processors
from transformers import LlamaConfig, LlamaForCausalLM

from decoders import SHAPE, byte_tokenizer
from dfl_lora.models.adapters import BASE_DIGEST, CAUSAL, CONFIG
from dfl_lora.models.base import locate, quiet

POSITIONS = 320
TARGETS = ["q_proj", "v_proj", "down_proj"]
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
ROWS = [
    {"question": f"Ann has {n} apples and eats {m}. How many?", "answer": f"{n} - {m} = {n - m}\n#### {n - m}"}
    for n, m in ((9, 4), (17, 5), (1200, 100), (8, 8), (30, 7))
]


def write_llama(folder: Path, seed: int = 1, template: str | None = None) -> Path:
    """Writes the model with a tokenizer of bytes that begins a text with <s>; returns the folder."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = template
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(**{**SHAPE, "max_position_embeddings": POSITIONS, "vocab_size": len(tokenizer)})
        )
        digits = tokenizer.convert_tokens_to_ids([*"0123456789"])
        model.lm_head.weight.data[digits] *= 2
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_adapter(folder: Path, base: Path, seed: int | None) -> Path:
    """Writes an adapter with plain PEFT in the layout of a run; with seed None it is fresh, B = 0."""
    files = locate(str(base))
    lora = LoraConfig(r=2, lora_alpha=4, target_modules=TARGETS, task_type=CAUSAL)
    with torch.random.fork_rng(devices=[]), quiet():
        model = get_peft_model(LlamaForCausalLM.from_pretrained(base), lora)
        torch.manual_seed(seed or 0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name and seed is not None:
                parameter.data = 0.3 * torch.randn(parameter.shape)
        model.save_pretrained(folder, save_embedding_layers=False)
    config = json.loads((folder / CONFIG).read_text())
    config["base_model_name_or_path"] = files.name
    config["auto_mapping"] = {
        "base_model_class": "LlamaForCausalLM",
        "parent_library": "transformers.models.llama.modeling_llama",
        BASE_DIGEST: files.weights,
    }
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


def write_questions(path: Path, rows: list[dict[str, str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def write_run(run: Path, base: Path, rows: Path, num_peers: int = 2) -> Path:
    """Writes what eval and chat read of a finished run of gsm8k: the recipe and the adapters."""
    recipe = {
        "name": "spoken",
        "model": {"name_or_path": str(base)},
        "lora": {"r": 2, "lora_alpha": 4, "target_modules": TARGETS},
        "task": {"kind": "causal_lm", "name": "gsm8k"},
        "data": {"path": str(rows), "validation": "test"},
        "peers": {"num_peers": num_peers, "topology": "ring"},
    }
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (run / "partition.json").write_text(json.dumps({"labels": []}))
    for i in range(num_peers):
        write_adapter(run / "adapters" / f"peer-{i:03d}", base, seed=i + 1)
    write_adapter(run / "adapters" / "consensus", base, seed=None)
    return run
