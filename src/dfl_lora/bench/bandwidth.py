"""How near mixing comes to the memory's bandwidth: W x on a ring, against copying x, in one process.

Mixing must read and write each number once, which is what a copy does; its check for numbers that are not finite reads
them once more, and is part of the time.
"""

from statistics import median
from time import perf_counter
from typing import Any

import torch

from dfl_lora.graphs import ring
from dfl_lora.networks.memory import MemoryNetwork
from dfl_lora.peers import Peers
from dfl_lora.rounds import Method, mix
from dfl_lora.schedules import SCHEDULES
from dfl_lora.tensors import Layout, Tensors

PEERS, NUMBERS = 1000, 73_728
"""A thousand adapters of MiniLM: rank 4 on queries and values."""
REPEATS = 9


def mixing(num_peers: int = PEERS, num_numbers: int = NUMBERS) -> dict[str, Any]:
    """Returns the medians of seconds of a copy and of mixing, taken in turn; x is one [num_peers, num_numbers]."""
    layout = Layout.of({"B": ("B", (num_numbers,))})
    peers = Peers(range(num_peers), Tensors(torch.ones(num_numbers), layout), Tensors(torch.zeros(0), Layout.of({})))
    graph, copied = ring(num_peers), torch.empty_like(peers.x)
    method = Method(SCHEDULES["lora"]("local"), lambda t: graph)
    copies, mixes = list[float](), list[float]()
    for t in range(1, REPEATS + 2):  # the first of each touches pages and makes the plan of the sweep
        start = perf_counter()
        copied.copy_(peers.x)
        middle = perf_counter()
        mix(peers, method.schedule(t), graph, t, method, MemoryNetwork())
        copies, mixes = [*copies, middle - start], [*mixes, perf_counter() - middle]
    copy_s, mix_s = median(copies[1:]), median(mixes[1:])
    return {
        "num_peers": num_peers, "num_numbers": num_numbers, "copy_s": copy_s, "mix_s": mix_s, "share": copy_s / mix_s,
    }  # fmt: skip
