"""Causal language models over a packed pass: hidden states of all tokens, logits of the labelled ones alone.

The base makes [T, d] of all tokens of the peers that share a pass. The tokens whose next token is learnt are gathered,
each peer's filled up to whole blocks, and go through the frozen output layer in chunks: a chunk's logits
[CHUNK, vocabulary] are gone before the next chunk's are made, and no logits are made of the other tokens. The gradient
of a token's loss with respect to its hidden state is made in the same moment and waits, [M, d], for the backward pass:

    l_i = -log softmax(head(h_i))[next token],   dl_i/dh_i kept,   g_h_i = g_l_i dl_i/dh_i

torch's `F.linear_cross_entropy` works in the same way and in the same time, but tells no answers and knows no capped or
scaled logits (torch 2.13, float32, one thread, 512 tokens, 1,024 wide, 32,000 words: 1.0 to 1.3 s, against 1.2 to 1.4
here and 1.0 to 1.7 with all logits at once; scripts/token_losses.py).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from dfl_lora.errors import UserError
from dfl_lora.models.layers import Pass, PeerLinear, dense
from dfl_lora.models.packing import ROW_BLOCK, Lengths, Packing, spans

CHUNK_NUMBERS = 1 << 22
"""Logits of a chunk: at most so many numbers, and at least a block of tokens."""
ALIKE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}
"""How far, relative to their norm, logits of the engine may be from the model's own."""
Head = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Labelled:
    """The tokens of a pass whose next token is learnt."""

    places: Tensor
    """[M] where they lie, each peer's filled up to whole blocks with its own first token."""
    targets: Tensor
    """[M] the tokens that are to follow; 0 at a fill."""
    real: Tensor
    """[m] which of the M are no fills."""
    counts: list[int]
    """Of each peer; they add up to m."""


def labelled(packing: Packing, labels: Sequence[Lengths]) -> Labelled:
    """Returns the learnt tokens of each peer's labels [tokens], which are below 0 where nothing is learnt."""
    own = [np.flatnonzero(values >= 0) for values in labels]
    blocks = spans([len(places) for places in own])
    starts = np.array([span.start for span in packing.token_spans])
    places = np.repeat(starts, [block.stop - block.start for block in blocks])
    targets, real = np.zeros(len(places), dtype=np.int64), list[Lengths]()
    for block, found, values, start in zip(blocks, own, labels, starts, strict=True):
        here = block.start + np.arange(len(found))
        places[here], targets[here] = start + found, values[found]
        real.append(here)
    index = [packing.index(values) for values in (places, targets, np.concatenate(real))]
    return Labelled(index[0], index[1], index[2], [len(found) for found in own])


def hidden_states(model: PreTrainedModel, inputs: Mapping[str, Tensor], current: Pass) -> Tensor:
    """Returns what the base makes of every token of a pass [T, d], fills included."""
    assert current.packing is not None
    positions = torch.from_numpy(current.packing.positions).to(current.packing.device)
    body = model.base_model(
        input_ids=inputs["input_ids"].unsqueeze(0),
        position_ids=positions.unsqueeze(0),
        use_cache=False,
        current=current,
    )
    hidden: Tensor = body.last_hidden_state[0]
    return hidden


def head_of(model: PreTrainedModel) -> Head:
    """Returns the frozen output layer: hidden states [n, d] -> logits [n, vocabulary], n in whole blocks."""
    output, config = model.get_output_embeddings(), model.config
    base = output.base if isinstance(output, PeerLinear) else output
    assert isinstance(base, nn.Linear)
    cap, times = getattr(config, "final_logit_softcapping", None), getattr(config, "logit_scale", None)
    over = getattr(config, "logits_scaling", None)

    def head(hidden: Tensor) -> Tensor:
        logits = dense(hidden.to(base.weight.dtype), base.weight, base.bias)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        logits = logits if times is None else logits * times
        logits = logits if over is None else logits / over
        return logits if cap is None else torch.tanh(logits / cap) * cap

    return head


class TokenLosses(torch.autograd.Function):
    """The loss of every token [M] and the token thought most likely [M], of hidden states [M, d]."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: Head, chunk: int) -> tuple[Tensor, Tensor]:
        wanted, losses, answers = ctx.needs_input_grad[0], list[Tensor](), list[Tensor]()
        kept = torch.empty_like(hidden) if wanted else None
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            own = hidden[part].detach().requires_grad_(wanted)
            with torch.set_grad_enabled(wanted):
                logits = head(own)
                loss = F.cross_entropy(logits, targets[part], reduction="none")
                total = loss.sum()
            if kept is not None:
                kept[part] = torch.autograd.grad(total, own)[0]
            losses.append(loss.detach())
            answers.append(logits.detach().argmax(1))
        ctx.save_for_backward(kept)
        result = torch.cat(losses), torch.cat(answers)
        ctx.mark_non_differentiable(result[1])
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (kept,) = ctx.saved_tensors
        return kept * gradients[0].unsqueeze(1).to(kept.dtype), None, None, None


token_losses = cast(Callable[..., tuple[Tensor, Tensor]], TokenLosses.apply)


def losses_of(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], labels: Sequence[Lengths], current: Pass
) -> tuple[list[Tensor], list[Tensor]]:
    """Returns the answers and the losses of each peer's learnt tokens, [n] each."""
    assert current.packing is not None
    found = labelled(current.packing, labels)
    hidden = hidden_states(model, inputs, current).index_select(0, found.places)
    chunk = max(1, CHUNK_NUMBERS // int(model.config.vocab_size) // ROW_BLOCK) * ROW_BLOCK
    losses, answers = token_losses(hidden, found.targets, head_of(model), chunk)
    return list(torch.split(answers[found.real], found.counts)), list(torch.split(losses[found.real], found.counts))


def own_logits(model: PreTrainedModel, rows: Sequence[Tensor]) -> list[Tensor]:
    """Returns the logits that a model as it was loaded gives of rows of tokens, one row at a time."""
    with torch.no_grad():
        return [model(input_ids=row.unsqueeze(0), use_cache=False).logits[0].float() for row in rows]


def unreadable(model: PreTrainedModel, why: str) -> UserError:
    return UserError(
        f"The engine cannot read models of the family {model.config.model_type} ({why}); use a model of another family."
    )


def check_alike(model: PreTrainedModel, rows: Sequence[Tensor], own: Sequence[Tensor], current: Pass) -> None:
    """Raises where the engine reads rows that share a pass otherwise than the model itself did one by one."""
    if not all(bool(torch.isfinite(logits).all()) for logits in own):
        raise UserError("The base model gives logits that are not finite, so its weights are damaged; fetch it again.")
    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
    lengths = np.array([len(row) for row in rows])
    current.packing = Packing([lengths], [int(lengths.max())], device, dtype, causal=True)
    current.tensors, current.view = {}, "tokens"
    packed = current.packing.pack([torch.cat(list(rows))], 0)
    with torch.no_grad():
        try:
            logits = head_of(model)(hidden_states(model, {"input_ids": packed}, current))
        except (TypeError, ValueError, AttributeError, KeyError, RuntimeError, AssertionError) as error:
            raise unreadable(model, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from None
    for row, start, wanted in zip(rows, current.packing.starts, own, strict=True):
        found = logits[start : start + len(row)].float()
        apart = torch.linalg.vector_norm(found - wanted.to(found)) / torch.linalg.vector_norm(wanted)
        if not apart <= ALIKE[dtype]:
            raise unreadable(model, f"its logits differ from the model's own by {apart:.1g} of their norm")
