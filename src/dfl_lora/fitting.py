"""Passes that fit into memory: groups of peers shrink instead of dying. Who shares a pass changes no bit of a result.

A rough upper bound tells in no time that most runs fit; where it does not, the run's memory is predicted (`memory`),
with half as many tokens a pass each time, until it fits or every peer has a pass of its own.
"""

from dataclasses import replace

from dfl_lora import machine
from dfl_lora.build import Federation
from dfl_lora.learners.stacked import StackedLearner
from dfl_lora.memory import estimate, size_of, training_passes
from dfl_lora.recipe import Recipe

KEPT_OF_A_TOKEN = 64
"""Numbers that a layer keeps of a token for the backward pass, for each of its hidden units: 13 to 27 were measured."""


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
    return replace(f, recipe=f.recipe.model_copy(update={"compute": compute}))


def roughly(learner: StackedLearner) -> int:
    """Returns more bytes than a training pass needs, by the size of the base alone."""
    config = getattr(learner.model, "config", None)
    width = int(getattr(config, "hidden_size", None) or getattr(config, "dim", None) or 64)
    layers = int(getattr(config, "num_hidden_layers", None) or getattr(config, "n_layers", None) or 2)
    return KEPT_OF_A_TOKEN * width * layers * learner.dtype.itemsize * learner.group_tokens


def largest(federation: Federation) -> int:
    """Returns the most peers that share a training pass."""
    assert isinstance(federation.learner, StackedLearner)
    return max(size_of(batches)[0] for batches in training_passes(federation.learner, federation.peers))
