"""Ours, and its ablations: the federation of the recipe with one choice taken back; and the reference."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from dfl_lora.bench.setting import Setting, federation_of
from dfl_lora.build import Federation
from dfl_lora.learners.optimizers import OPTIMIZERS
from dfl_lora.learners.stacked import StackedLearner
from dfl_lora.metrics import METRICS
from dfl_lora.networks.memory import MemoryNetwork
from dfl_lora.peers import Peers
from dfl_lora.recipe import Recipe
from dfl_lora.rounds import mix
from dfl_lora.running import Stopwatch
from dfl_lora.tensors import Tensors

PARTS = ("data", "forward", "backward", "optimiser")


class Own:
    """A federation as `dfl-lora run` trains it, from a start that was moved."""

    def __init__(self, federation: Federation) -> None:
        self.federation = federation
        self.round = 0
        self.clock = Stopwatch()
        """Seconds of the training by part."""
        if isinstance(federation.learner, StackedLearner):
            federation.learner.clock = self.clock

    def train_round(self) -> Sequence[float]:
        self.round += 1
        f = self.federation
        progress = f.learner.train(f.peers, f.method.schedule(self.round), self.round)
        return [p.loss for p in progress.values()]

    def mix(self) -> None:
        f, t = self.federation, self.round
        mix(f.peers, f.method.schedule(t), f.method.topology(t), t, f.method, MemoryNetwork())

    def evaluate(self) -> Sequence[float]:
        answers = self.federation.learner.evaluate(self.federation.peers)
        return [METRICS["accuracy"](own) for own in answers.values()]

    def adapters(self) -> Sequence[Mapping[str, Tensor]]:
        return [self.federation.peers.adapter(row) for row in range(len(self.federation.peers))]

    def first_moments(self) -> Sequence[Mapping[str, Tensor]]:
        trained = self.federation.method.schedule(1).trained
        return [
            {e.name: peer.optimizer["exp_avg"][e.name] for e in peer.adapter.layout.entries if e.role in trained}
            for peer in self.federation.peers
        ]

    @property
    def embeddings(self) -> Sequence[nn.Module]:
        learner = self.federation.learner
        model = learner.model if isinstance(learner, StackedLearner) else None
        return [m for m in [model.get_input_embeddings()] if m is not None] if model is not None else []  # type: ignore[operator]


def computing(recipe: Recipe, **compute: object) -> Federation:
    """Returns the federation of a recipe that computes so."""
    changed = recipe.model_copy(update={"compute": recipe.compute.model_copy(update=compute)})
    return federation_of(changed)


def ours(recipe: Recipe, setting: Setting, dtype: str) -> Own:
    return Own(computing(recipe, dtype=dtype))


def one_peer_a_pass(recipe: Recipe, setting: Setting, dtype: str) -> Own:
    return Own(computing(recipe, dtype=dtype, group_tokens=1))


def other_attention(recipe: Recipe, setting: Setting, dtype: str) -> Own:
    """Takes the attention that `auto` does not take here."""
    chosen = computing(recipe, dtype=dtype)
    other = {"eager": "sdpa", "sdpa": "eager"}[str(chosen.recipe.compute.attention)]
    return Own(computing(recipe, dtype=dtype, attention=other))


def own_a(recipe: Recipe, setting: Setting, dtype: str) -> Own:
    """Keeps A at every peer, where DFL-LoRA holds one common copy."""
    federation = computing(recipe, dtype=dtype)
    return Own(replace(federation, peers=apart(federation)))


def apart(federation: Federation) -> Peers:
    """Returns the peers of a federation with every tensor in their own rows and none in common."""
    old = federation.peers
    assert federation.export is not None
    layout = federation.export.placement.layout
    whole = Tensors(torch.zeros(layout.size), layout)
    empty = Tensors.of({}, layout.restrict(()))
    optimizer = OPTIMIZERS[federation.recipe.train.optimizer].state
    peers = Peers(old.ids, whole, empty, optimizer=optimizer, memory=old.memory)
    for row, peer in enumerate(peers):
        for name, value in old.adapter(row).items():
            peer.adapter[name].copy_(value)
    return peers


def padded(recipe: Recipe, setting: Setting, dtype: str) -> Own:
    """Pads batches to rectangles where the learner packs them."""
    federation = computing(recipe, dtype=dtype)
    assert isinstance(federation.learner, StackedLearner)
    federation.learner.packed = False
    return Own(federation)


def reference(recipe: Recipe) -> Own:
    """Returns plain PEFT in float32, one peer at a time: what every arm must equal."""
    compute = recipe.compute.model_copy(update={"dtype": "float32", "attention": "auto"})
    return Own(federation_of(recipe.model_copy(update={"compute": compute}), learner="sequential"))
