"""Small peers filled with random numbers."""

from collections.abc import Callable

import pytest
import torch

from dfl_lora.peers import Peers
from dfl_lora.roles import ROLES
from dfl_lora.rounds import Method
from dfl_lora.schedules import ever_trained
from dfl_lora.streams import torch_stream
from dfl_lora.tensors import Layout, Tensors

NUM_PEERS = 7
LAYOUT = Layout.of(
    {
        "q.A": ("A", (2, 4)),
        "q.B": ("B", (3, 2)),
        "v.A": ("A", (1, 3)),
        "v.B": ("B", (5, 1)),
        "q.core": ("core", (2, 2)),
        "v.core": ("core", (1, 1)),
        "head": ("head", (2, 3)),
    }
)

RandomPeers = Callable[[Method], Peers]


@pytest.fixture
def random_peers() -> RandomPeers:
    """Seven peers of a method in float64, each with its own random numbers; what is never trained is common."""

    def build(method: Method) -> Peers:
        trained = ever_trained(method.schedule, 8)
        layout = LAYOUT.restrict(frozenset(ROLES) if "core" in trained else frozenset(ROLES) - {"core"})
        start = Tensors(torch.zeros(layout.size, dtype=torch.float64), layout)
        frozen = start.select(frozenset(ROLES) - trained)
        common = frozen.with_flat(torch.randn(frozen.flat.shape, generator=torch_stream(1), dtype=torch.float64))
        peers = Peers(range(NUM_PEERS), start.select(trained), common, memory=method.memory)
        peers.x.copy_(torch.randn(peers.x.shape, generator=torch_stream(2), dtype=torch.float64))
        return peers

    return build
