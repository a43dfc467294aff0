"""Where adapters go: PEFT's rules of target_modules, resolved once, and the layout of what peers train.

A module outside the encoder is a head module. One that is named in target_modules carries LoRA like any
other, on a base weight that is equal at all peers and frozen; the role `head` is what is left.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from warnings import catch_warnings, simplefilter

import torch
from peft import LoraConfig, TaskType, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dfl_lora.models.folder import Targets, no_layer, no_linear, output_layer, too_high, unmatched
from dfl_lora.roles import Role, Roles
from dfl_lora.streams import torch_stream
from dfl_lora.tensors import Layout, Shape, Tensors


@dataclass(frozen=True)
class Lora:
    """Rank, scale and place of the adapters, with the meaning `peft.LoraConfig` gives them."""

    target_modules: Targets
    r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    use_rslora: bool = False
    init: str = "kaiming"
    layers_to_transform: Sequence[int] | None = None
    core: bool = False
    """Whether a product is B C A, with a core C [r, r] between the factors (`models.core`)."""

    @property
    def scaling(self) -> float:
        """s = alpha / r, or alpha / sqrt(r) with rank-stabilised LoRA."""
        return self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r)


def kaiming(r: int, d_in: int, generator: torch.Generator) -> Tensor:
    """Returns A [r, d_in] uniform in +-1/sqrt(d_in), as PEFT draws it."""
    return torch.rand((r, d_in), generator=generator).mul_(2).sub_(1).div_(d_in**0.5)


def orthonormal(r: int, d_in: int, generator: torch.Generator) -> Tensor:
    """Returns A [r, d_in] with orthonormal rows, A A' = I: uniformly distributed, by QR of a Gaussian in float64."""
    if r > d_in:
        raise too_high(r, d_in)
    q, upper = torch.linalg.qr(torch.randn((d_in, r), generator=generator, dtype=torch.float64))
    rows: Tensor = (q * upper.diagonal().sign()).T
    return rows.float()


def columns(d_out: int, r: int, generator: torch.Generator) -> Tensor:
    """Returns B [d_out, r] with orthonormal columns, or rows where it has fewer of them."""
    return orthonormal(r, d_out, generator).T if r <= d_out else orthonormal(d_out, r, generator)


INITS = {"kaiming": kaiming, "orthonormal": orthonormal, "gradient_svd": orthonormal}
"""How A is drawn; under gradient_svd it is then turned to the gradients (`gradient_start`)."""


@dataclass(frozen=True)
class Placement:
    """The modules that carry LoRA (path -> (d_in, d_out)), the head's parameters, and the layout of both."""

    lora: Lora
    modules: Mapping[str, tuple[int, int]]
    head: Mapping[str, Shape]
    transposed: bool = False
    """Whether the modules hold W' [d_in, d_out], as GPT-2's do; PEFT says fan_in_fan_out."""

    @property
    def layout(self) -> Layout:
        """The layout of everything an adapter holds: `path.A`, `path.B`, perhaps `path.core`, and the head's."""
        shapes: dict[str, tuple[Role, Shape]] = {}
        for path, (d_in, d_out) in self.modules.items():
            shapes[f"{path}.A"] = ("A", (self.lora.r, d_in))
            shapes[f"{path}.B"] = ("B", (d_out, self.lora.r))
            if self.lora.core:
                shapes[f"{path}.core"] = ("core", (self.lora.r, self.lora.r))
        return Layout.of(shapes | {name: ("head", shape) for name, shape in self.head.items()})

    def start(self, model: nn.Module, seed: int, dtype: torch.dtype) -> Tensors:
        """Returns the start of all: A drawn from the run seed as `lora.init` says, B = 0; or B drawn and its core 0."""
        start = Tensors(torch.zeros(self.layout.size, dtype=dtype), self.layout)
        for path, (d_in, d_out) in self.modules.items():
            start[f"{path}.A"].copy_(INITS[self.lora.init](self.lora.r, d_in, torch_stream(seed, "A", path)))
            if self.lora.core:
                start[f"{path}.B"].copy_(columns(d_out, self.lora.r, torch_stream(seed, "B", path)))
        for name in self.head:
            start[name].copy_(model.get_parameter(name).detach())
        return start


def split(start: Tensors, trained: Roles) -> tuple[Tensors, Tensors]:
    """Returns what peers hold themselves (the roles ever trained) and what is common and frozen."""
    frozen = frozenset(e.role for e in start.layout.entries) - trained
    return start.select(trained), start.select(frozen)


def linears(model: nn.Module) -> dict[str, nn.Linear | Conv1D]:
    """Returns the modules that can carry LoRA: nn.Linear, and GPT-2's Conv1D, which holds W' [d_in, d_out]."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}


def size_of(module: nn.Linear | Conv1D) -> tuple[int, int]:
    """Returns (d_in, d_out)."""
    if isinstance(module, Conv1D):
        d_in, d_out = module.weight.shape
        return d_in, d_out
    return module.in_features, module.out_features


def place(model: nn.Module, prefix: str, lora: Lora, *, head: bool = True) -> Placement:
    """Resolves target_modules on a model by PEFT's own rules; raises with the candidates where nothing matches.

    Without `head` what lies outside the module `prefix` is frozen, and carries no LoRA.
    """
    available = linears(model)
    if lora.layers_to_transform is not None:
        check_layers(lora.layers_to_transform, match(model, replace(lora, layers_to_transform=None)))
    matched = match(model, lora)
    refused = sorted(name for name in matched if name not in available)
    if refused:
        raise no_linear(refused[0], type(model.get_submodule(refused[0])).__name__)
    modules = {name: size_of(m) for name, m in available.items() if name in matched}
    transposed = any(isinstance(available[name], Conv1D) for name in modules)
    if not head:
        outside = [name for name in modules if not name.startswith(f"{prefix}.")]
        if outside:
            raise output_layer(outside[0])
        return Placement(lora, modules, {}, transposed)
    own_head = {
        f"{name}.{part}": tuple(parameter.shape)
        for name, module in available.items()
        if not name.startswith(f"{prefix}.") and name not in modules
        for part, parameter in module.named_parameters(recurse=False)
    }
    return Placement(lora, modules, own_head, transposed)


def check_layers(wanted: Iterable[int], matched: Iterable[str]) -> None:
    """Raises where a layer that is asked for has no target module."""
    there = {int(part) for name in matched for part in name.split(".") if part.isdigit()}
    for number in wanted:
        if number not in there:
            raise no_layer(number, there)


def match(model: nn.Module, lora: Lora) -> frozenset[str]:
    """Returns the module names that PEFT would put LoRA on, found by doing so on a copy without memory."""
    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    names = {name.rpartition(".")[2] for name in linears(model)}
    for target in [] if isinstance(targets, str) else targets:
        if not any(name == target or name.endswith(f".{target}") for name, _ in model.named_modules()):
            raise unmatched(target, names)
    skeleton = deepcopy(model, {id(p): nn.Parameter(p.to("meta")) for p in model.parameters()})
    task_type = TaskType.SEQ_CLS if targets == "all-linear" else None
    try:
        with catch_warnings():
            simplefilter("ignore")
            layers = None if lora.layers_to_transform is None else list(lora.layers_to_transform)
            config = LoraConfig(r=1, target_modules=targets, task_type=task_type, layers_to_transform=layers)
            inject_adapter_in_model(config, skeleton)
    except (ValueError, re.error):
        raise unmatched(str(targets), names) from None
    own = {name for name, _ in model.named_modules()}  # PEFT's layers have layers of their own
    return frozenset(n for n, module in skeleton.named_modules() if n in own and isinstance(module, BaseTunerLayer))
