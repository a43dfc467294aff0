"""A small topology for every row of the table that is no graph: seven peers where the row can."""

from typing import Any

from dfl_lora.graphs import GRAPHS
from dfl_lora.mixing import Mixing, metropolis, own
from dfl_lora.topologies import OWN_WEIGHTS, TOPOLOGIES, Topology, topology_of

NAMES = sorted(set(TOPOLOGIES) - set(GRAPHS))
DRAWN = [name for name in NAMES if name not in ("base", "one_peer_exponential")]


def changing(name: str, num_peers: int = 7, **options: Any) -> tuple[Topology, Mixing]:
    """Returns a topology and its weights; one_peer_exponential has the next power of two of peers."""
    if name == "one_peer_exponential":
        num_peers = 1 << (num_peers - 1).bit_length()
    made = topology_of(TOPOLOGIES[name](num_peers, **options))
    return made, own if name in OWN_WEIGHTS else metropolis
