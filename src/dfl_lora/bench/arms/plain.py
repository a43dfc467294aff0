"""Plain transformers and PEFT: one base with one or several named adapters, heads among modules_to_save."""

import warnings
from collections.abc import Mapping, Sequence

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from dfl_lora.bench.reading import Rectangle
from dfl_lora.bench.setting import Setting
from dfl_lora.models.base import load_encoder

Parameters = Mapping[str, nn.Parameter]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class FloatLinear(nn.Linear):
    """A head in float32 over a base in bfloat16, as every arm keeps it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


def attention_of(dtype: str) -> str:
    """Returns the attention of the baselines: the faster one of a precision at short lengths on a processor."""
    return "eager" if dtype == "bfloat16" else "sdpa"


def base_of(setting: Setting, dtype: str) -> nn.Module:
    """Returns the frozen base, its head in float32, without dropout."""
    model = load_encoder(setting.files, setting.num_labels, attention_of(dtype), DTYPES[dtype], setting.work.seed).model
    for path in head_modules(setting):
        module = model.get_submodule(path)
        assert isinstance(module, nn.Linear)
        module.__class__ = FloatLinear
    return model


def head_modules(setting: Setting) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[0] for name in setting.placement.head))


def adapted(model: nn.Module, setting: Setting, names: Sequence[str]) -> PeftModel:
    """Returns the base with named adapters, each at the start of a peer, in order; evaluation mode: no dropout."""
    lora = setting.placement.lora
    config = LoraConfig(
        r=lora.r, lora_alpha=lora.lora_alpha, lora_dropout=0.0, use_rslora=lora.use_rslora,
        target_modules=list(setting.placement.modules), modules_to_save=head_modules(setting) or None,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = get_peft_model(model, config, adapter_name=names[0])
        for name in names[1:]:
            peft.add_adapter(name, config)
    return peft.eval()


def parameters_of(peft: PeftModel, setting: Setting, adapter: str) -> dict[str, nn.Parameter]:
    """Returns the parameters of one adapter by the layout's names."""
    return {name: peft.get_parameter(path_of(name, adapter)) for name in setting.placement.layout.by_name}


def path_of(name: str, adapter: str) -> str:
    module, _, part = name.rpartition(".")
    if part in ("A", "B"):
        return f"base_model.model.{module}.lora_{part}.{adapter}.weight"
    return f"base_model.model.{module}.modules_to_save.{adapter}.{part}"


def start_at(parameters: Parameters, values: Mapping[str, Tensor], trained: frozenset[str]) -> None:
    """Sets an adapter to a peer's numbers, and trains of it what a round trains."""
    for name, parameter in parameters.items():
        parameter.data.copy_(values[name])
        parameter.requires_grad_(name in trained)


def logits_of(model: nn.Module, batch: Rectangle, **options: object) -> Tensor:
    logits: Tensor = model(**batch.inputs, **options).logits
    return logits.float()


def loss_of(model: nn.Module, batch: Rectangle) -> Tensor:
    return F.cross_entropy(logits_of(model, batch), batch.labels)


def moments(optimizer: torch.optim.Optimizer, parameters: Parameters, trained: frozenset[str]) -> dict[str, Tensor]:
    """Returns Adam's first moments by the layout's names."""
    return {n: optimizer.state[p]["exp_avg"] for n, p in parameters.items() if n in trained}


def gossip(
    states: Sequence[Mapping[str, Tensor]], weights: Sequence[Sequence[float]], shared: frozenset[str], sparse: bool
) -> None:
    """Replaces every peer's shared tensors by sum_j w_ij x_j, over all peers or (sparse) those of weight not 0."""
    mixed = []
    for row in weights:
        neighbours = [(w, state) for w, state in zip(row, states, strict=True) if w or not sparse]
        total = {name: torch.zeros_like(states[0][name]) for name in shared}
        for weight, state in neighbours:
            for name in shared:
                total[name] += weight * state[name]
        mixed.append(total)
    for state, total in zip(states, mixed, strict=True):
        for name, value in total.items():
            state[name].copy_(value)
