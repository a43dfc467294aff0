"""The frozen part of an encoder below the first layer that carries LoRA: what it makes of a row never changes.

With `lora.layers_to_transform` the lower layers are the base's own at every peer and in every round. They are moved
behind `Below`, which stands in the place of the embeddings: what it returns can be kept and given back (`Pass.below`).
"""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dfl_lora.models.firsts import LAYERS
from dfl_lora.models.layers import Pass


def frozen_below(model: nn.Module, prefix: str, adapted: Iterable[str]) -> int:
    """Returns how many layers lie below the first of the `adapted` modules; the last layer is never among them."""
    if prefix not in LAYERS:
        return 0
    path = f"{prefix}.{LAYERS[prefix][0]}."
    numbers = [int(name.removeprefix(path).partition(".")[0]) for name in adapted if name.startswith(path)]
    layers = model.get_submodule(path.rstrip("."))
    assert isinstance(layers, nn.ModuleList)
    return min([*numbers, len(layers) - 1])


class Below(nn.Module):
    """The embeddings and the first layers, or what was kept of them."""

    def __init__(self, embeddings: nn.Module, layers: Iterable[nn.Module], current: Pass) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.layers = nn.ModuleList(layers)
        self.current = current

    def forward(self, *inputs: object, **named: object) -> Tensor:
        """Returns [1, T, d]."""
        if self.current.below is not None:
            return self.current.below.unsqueeze(0)
        with torch.no_grad():
            hidden: Tensor = self.embeddings(*inputs, **named)
            for layer in self.layers:
                hidden = layer(hidden, None, current=self.current)
        self.current.made = hidden[0]
        return hidden


def digest_below(model: nn.Module, prefix: str, num_layers: int) -> str:
    """Returns the sha256 of every number that what lies below `num_layers` layers is made with."""
    path, seen = f"{prefix}.{LAYERS[prefix][0]}", hashlib.sha256()
    below = (f"{prefix}.embeddings.", *(f"{path}.{number}." for number in range(num_layers)))
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if name.startswith(below):
            seen.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            seen.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return seen.hexdigest()


def install_below(model: nn.Module, prefix: str, num_layers: int, current: Pass) -> None:
    """Moves the first layers of an encoder behind its embeddings, in place."""
    layers, encoder = model.get_submodule(f"{prefix}.{LAYERS[prefix][0]}"), model.get_submodule(prefix)
    assert isinstance(layers, nn.ModuleList)
    encoder.embeddings = Below(encoder.get_submodule("embeddings"), list(layers)[:num_layers], current)
    del layers[:num_layers]
