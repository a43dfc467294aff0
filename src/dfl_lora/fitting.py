"""Passes that fit into memory: groups of peers shrink instead of dying. Who shares a pass changes no bit of a result.

A rough upper bound tells in no time that most runs fit; where it does not, the run's memory is predicted (`memory`),
with half as many tokens a pass each time, until it fits or every peer has a pass of its own. That is so on a CPU alone:
what a GPU has left is not looked at.
"""

from dataclasses import replace

import numpy as np

from dfl_lora import machine
from dfl_lora.build import Federation
from dfl_lora.learners.stacked import StackedLearner
from dfl_lora.memory import Estimate, estimate, size_of, training_passes
from dfl_lora.recipe import Recipe

KEPT_OF_A_TOKEN = 64
"""Numbers that a layer keeps of a token for the backward pass, for each of its hidden units.

Whole passes of seven peers kept 12 (LoRA on query and value) to 19 (on all linear modules) of MiniLM at 44 to 53 tokens
a row, and 29 to 32 of a Llama 64 wide at 64 to 512, logits and all, in float32.
"""


def fitted(federation: Federation, asked: Recipe, available: int | None = None) -> Federation:
    """Returns the federation with passes that fit into memory; where the recipe asks for a size it is kept."""
    f, learner = federation, federation.learner
    if not isinstance(learner, StackedLearner) or asked.compute.group_tokens != "auto" or learner.device.type != "cpu":
        return federation
    free = machine.available_memory() if available is None else available
    if roughly(learner) + f.peers.x.nbytes < free // 2:
        return federation
    while (needed := estimate(f, available)).total > needed.available and largest(f) > 1:
        learner.group_tokens //= 2
    compute = f.recipe.compute.model_copy(update={"group_tokens": learner.group_tokens})
    short = "" if needed.total <= needed.available else too_much(needed)
    return replace(f, recipe=f.recipe.model_copy(update={"compute": compute}), short=short)


def too_much(needed: Estimate) -> str:
    """Returns what to do where a peer alone needs more than there is; it is a prediction, so the run goes on."""
    mib = [f"{number / 2**20:,.0f} MiB" for number in (needed.total, needed.available)]
    return (
        f"about {mib[0]} of memory will be needed and {mib[1]} are there, with one peer a pass; lower train.batch_size "
        "(train.gradient_accumulation_steps makes up for it) or task.max_length"
    )


def roughly(learner: StackedLearner) -> int:
    """Returns more bytes than a training pass needs, by the sizes of the base and of the largest batch there can be."""
    config = getattr(learner.model, "config", None)
    width = int(getattr(config, "hidden_size", None) or getattr(config, "dim", None) or 64)
    layers = int(getattr(config, "num_hidden_layers", None) or getattr(config, "n_layers", None) or 2)
    rows, shards = learner.work.batch_size, learner.data.train.values()
    batch = max(int(np.sort(own.source.lengths[own.rows])[-rows:].sum()) for own in shards)  # never cut
    return KEPT_OF_A_TOKEN * width * layers * learner.dtype.itemsize * max(learner.group_tokens, batch)


def largest(federation: Federation) -> int:
    """Returns the most peers that share a training pass."""
    assert isinstance(federation.learner, StackedLearner)
    return max(size_of(batches)[0] for batches in training_passes(federation.learner, federation.peers))
