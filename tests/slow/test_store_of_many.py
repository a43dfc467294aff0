"""A hundred thousand peers on disk: they mix in place, and little of them is ever in the process's own memory."""

import shutil
from pathlib import Path

import psutil
import pytest
import torch

from dfl_lora.graphs import GRAPHS
from dfl_lora.networks.memory import MemoryNetwork
from dfl_lora.peers import Peers
from dfl_lora.rounds import Method, mix
from dfl_lora.schedules import SCHEDULES
from dfl_lora.tensors import Layout, Tensors

NUM_PEERS, NUMBERS = 100_000, 4_096
QUANTITIES = ("exp_avg", "exp_avg_sq")
SIZE = 4 * NUM_PEERS * NUMBERS


def anonymous() -> int:
    """Returns the resident bytes of this process that are no file's."""
    memory = psutil.Process().memory_info()
    return int(memory.rss - memory.shared)


@pytest.mark.slow
def test_a_hundred_thousand_peers_on_disk_mix_in_place(tmp_path: Path) -> None:
    needed = SIZE * (1 + len(QUANTITIES))
    if (free := shutil.disk_usage(tmp_path).free) < 1.5 * needed:
        pytest.skip(f"needs {1.5 * needed / 2**30:.0f} GiB of disk, and {free / 2**30:.0f} GiB are free")
    layout, before = Layout.of({"q.B": ("B", (NUMBERS, 1))}), anonymous()
    start, nothing = Tensors(torch.zeros(NUMBERS), layout), Tensors(torch.zeros(0), Layout.of({}))
    peers = Peers(range(NUM_PEERS), start, nothing, optimizer=QUANTITIES, place=tmp_path)
    assert free - shutil.disk_usage(tmp_path).free > 0.9 * needed
    for row in peers.x.split(1000):
        row.normal_(generator=torch.Generator().manual_seed(0)).add_(torch.arange(len(row)).unsqueeze(1))
    few = {i: peers.x[[(i - 1) % NUM_PEERS, i, (i + 1) % NUM_PEERS]].clone() for i in (0, 1, 50_000, NUM_PEERS - 1)}
    mean = peers.mean().flat
    graph = GRAPHS["ring"](NUM_PEERS)
    with_graph = anonymous()
    method = Method(SCHEDULES["freeze_a"]("frozen"), lambda t: graph)
    traffic = mix(peers, method.schedule(1), graph, 1, method, MemoryNetwork())
    assert traffic.messages == 2 * NUM_PEERS
    assert torch.allclose(peers.mean().flat, mean, rtol=1e-6)
    for i, (below, own, above) in few.items():
        third, total = 1 / 3, own.clone()
        for j, other in sorted((((i - 1) % NUM_PEERS, below), ((i + 1) % NUM_PEERS, above))):
            total = total + (other - own) * third if j > i else total - (own - other) * third
        assert torch.equal(peers.x[i], total)
    print(
        f"own memory: {(with_graph - before) / 2**20:.0f} MiB, and {(anonymous() - with_graph) / 2**20:.0f} MiB mixing"
    )
    assert anonymous() - before < SIZE / 5
