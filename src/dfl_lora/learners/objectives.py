"""Objectives: what is learnt of a packed pass: of every peer the answers and losses of its rows, or of its tokens."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from dfl_lora.data.batches import Batch
from dfl_lora.models.causal import losses_of
from dfl_lora.models.layers import Pass
from dfl_lora.models.reading import read


@dataclass(frozen=True)
class Outcome:
    """What a pass made of each peer's batch."""

    answers: list[Tensor]
    """The labels thought most likely [n] of what is learnt."""
    losses: list[Tensor]
    """[n] cross-entropies."""
    num_labels: int
    """Of which one is the answer."""
    logits: list[Tensor] | None = None
    """[rows, labels]; None where only the answers are kept."""

    @property
    def means(self) -> Tensor:
        """The mean loss of each peer [k]."""
        return torch.stack([own.mean() for own in self.losses])


Objective = Callable[[nn.Module, Mapping[str, Tensor], Sequence[Batch], Pass], Outcome]
"""(the model, the packed inputs, the peers' batches, the pass that holds their packing) -> outcome."""


def classification(model: nn.Module, inputs: Mapping[str, Tensor], batches: Sequence[Batch], current: Pass) -> Outcome:
    """Returns the losses of rows, each with a label."""
    assert current.packing is not None
    logits = read(model, inputs, current)[current.packing.row_index]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    labels = torch.cat([batch.labels for batch in batches]).to(current.packing.device)
    losses = F.cross_entropy(logits, labels, reduction="none")
    counts = [len(batch.labels) for batch in batches]
    own = list(torch.split(logits.detach(), counts))
    return Outcome([values.argmax(1) for values in own], list(torch.split(losses, counts)), logits.shape[1], own)


def causal_lm(model: nn.Module, inputs: Mapping[str, Tensor], batches: Sequence[Batch], current: Pass) -> Outcome:
    """Returns the losses of tokens that are to follow others."""
    assert isinstance(model, PreTrainedModel)
    answers, losses = losses_of(model, inputs, [batch.labels.numpy() for batch in batches], current)
    return Outcome(answers, losses, int(model.config.vocab_size))


OBJECTIVES: dict[str, Objective] = {"classification": classification, "causal_lm": causal_lm}
