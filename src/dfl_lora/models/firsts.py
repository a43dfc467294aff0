"""The last layer of an encoder for the first tokens alone, where the head reads nothing else. Exact.

Keys and values are made of all tokens, but only the first token of each row asks, is added to, and goes through the
feed-forward block: about a seventh of the work of a six-layer encoder is never read. The layer is the base's own,
called module by module.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from dfl_lora.models.attention import attend
from dfl_lora.models.layers import Pass

Layer = Callable[[Any, Tensor, Tensor, Pass], Tensor]
"""(the base's layer, hidden [1, T, d], those of first tokens [1, R, d], the pass) -> [1, R, d]."""


def asked(own: Any, query: nn.Module, key: nn.Module, value: nn.Module, x: Tensor, first: Tensor, p: Pass) -> Tensor:
    """Returns what first tokens see of all, [1, R, d]: the order of calls is the base's own, so that masks are too."""
    with p.reading("firsts"):
        q = query(first)
    k, v = key(x), value(x)
    q, k, v = (t.view(*t.shape[:-1], -1, own.attention_head_size).transpose(1, 2) for t in (q, k, v))
    with p.reading("firsts"):
        return attend(own, q, k, v, current=p, scaling=own.scaling)[0].flatten(2)


def bert(layer: Any, hidden: Tensor, first: Tensor, current: Pass) -> Tensor:
    """BERT and RoBERTa."""
    own = layer.attention.self
    seen = asked(own, own.query, own.key, own.value, hidden, first, current)
    with current.reading("firsts"):
        result: Tensor = layer.feed_forward_chunk(layer.attention.output(seen, first))
    return result


def distilbert(layer: Any, hidden: Tensor, first: Tensor, current: Pass) -> Tensor:
    own = layer.attention
    seen = asked(own, own.q_lin, own.k_lin, own.v_lin, hidden, first, current)
    with current.reading("firsts"):
        y = layer.sa_layer_norm(own.out_lin(seen) + first)
        result: Tensor = layer.output_layer_norm(layer.ffn(y) + y)
    return result


LAYERS: Mapping[str, tuple[str, Layer]] = {
    "bert": ("encoder.layer", bert),
    "roberta": ("encoder.layer", bert),
    "distilbert": ("transformer.layer", distilbert),
}
"""By the name under which a classifier holds its encoder: where its layers are, and how one is called for firsts."""


class FirstsOnly(nn.Module):
    """Stands in the place of the last layer, and returns [R, 1, d]: for the head each row is its first token."""

    def __init__(self, layer: nn.Module, call: Layer, current: Pass) -> None:
        super().__init__()
        self.layer = layer
        self.call = call
        self.current = current

    def forward(self, hidden: Tensor, *_: object, **__: object) -> Tensor:
        assert self.current.packing is not None
        first = hidden[:, self.current.packing.firsts]
        result = self.call(self.layer, hidden, first, self.current)
        self.current.view = "rows"
        return result.transpose(0, 1)


def install_firsts(model: nn.Module, prefix: str, current: Pass) -> None:
    """Puts the last layer of the encoder `prefix` behind `FirstsOnly`, in place."""
    path, call = LAYERS[prefix]
    layers = model.get_submodule(f"{prefix}.{path}")
    assert isinstance(layers, nn.ModuleList)
    layers[-1] = FirstsOnly(layers[-1], call, current)
