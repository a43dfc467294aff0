"""The toy: a tiny encoder over plain vectors, with the same names and seams as a real one. For laws and scale."""

import torch
from torch import Tensor, nn

from dfl_lora.streams import torch_stream

WIDTH = 16


class ToyEncoder(nn.Module):
    """Two layers with tanh, [rows, d_in] -> [rows, WIDTH]."""

    def __init__(self, num_inputs: int) -> None:
        super().__init__()
        self.first = nn.Linear(num_inputs, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.1)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.dropout(torch.tanh(self.first(inputs)))
        return torch.tanh(self.second(hidden))


class ToyModel(nn.Module):
    """The toy encoder and a classifier; weights are drawn from the run seed."""

    base_model_prefix = "encoder"

    def __init__(self, num_inputs: int, num_labels: int, seed: int) -> None:
        super().__init__()
        self.encoder = ToyEncoder(num_inputs)
        self.classifier = nn.Linear(WIDTH, num_labels)
        for name, parameter in self.named_parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.1
            values = torch.randn(parameter.shape, generator=torch_stream(seed, "toy", name), dtype=torch.float64)
            parameter.data.copy_(scale * values)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.classifier(self.encoder(inputs))  # type: ignore[no-any-return]
