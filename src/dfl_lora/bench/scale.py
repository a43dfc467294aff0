"""Scale: what a peer more costs, from 8 to 4,096 of them, each size in a process of its own.

A round here is training and mixing; nobody is evaluated. Time per peer should be flat, and a peer more should cost
its adapter and its optimiser's state. The toy's 1,000 rows are too few for 4,096 peers, so each toy peer draws its own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch

from dfl_lora.bench.arms.own import Own
from dfl_lora.bench.cells import Cell, Material
from dfl_lora.bench.child import ask, peak_memory, settle
from dfl_lora.bench.setting import federation_of
from dfl_lora.build import Federation, build
from dfl_lora.data.batches import Shard, VectorSource
from dfl_lora.graphs import ring
from dfl_lora.learners.optimizers import OPTIMIZERS
from dfl_lora.learners.stacked import StackedLearner
from dfl_lora.learners.work import PeerData
from dfl_lora.machine import own_memory
from dfl_lora.peer_data import TOY_INPUTS, TOY_LABELS
from dfl_lora.peers import Peers
from dfl_lora.reading import resolve
from dfl_lora.streams import torch_stream
from dfl_lora.tensors import Tensors
from dfl_lora.topologies import topology_of

STEPS, TOY_BATCH, MINILM_BATCH = 2, 16, 4
WARM, LEAST_ROUNDS, LEAST_S = 1, 2, 2.0
"""Rounds are timed until there are two of them that took two seconds together, after one to warm up."""
MOST_ROUNDS = 50
Say = Callable[[str], None]


def measured(base: str, num_peers: int, material: dict[str, Any]) -> dict[str, Any]:
    """Returns seconds and memory of a federation of so many peers; runs in a process of its own."""
    federation = toys(num_peers) if base == "toy" else minilm(num_peers, material)
    own, seconds = Own(federation), list[tuple[float, float]]()
    while not enough(seconds):
        start = perf_counter()
        own.train_round()
        trained = perf_counter()
        own.mix()
        seconds.append((trained - start, perf_counter() - trained))
    peak = peak_memory()
    settle()
    peers = federation.peers
    state = peers.x.shape[1] * (1 + len(peers.optimizer)) * peers.x.element_size()
    return {
        "num_peers": num_peers, "rounds": len(seconds) - WARM,
        "train_s": median(s[0] for s in seconds[WARM:]), "mix_s": median(s[1] for s in seconds[WARM:]),
        "resident_bytes": own_memory(), "peak_bytes": peak, "state_bytes_per_peer": state,
    }  # fmt: skip


def enough(seconds: Sequence[tuple[float, float]]) -> bool:
    timed = seconds[WARM:]
    return len(timed) >= MOST_ROUNDS or (len(timed) >= LEAST_ROUNDS and sum(map(sum, timed)) >= LEAST_S)


def minilm(num_peers: int, material: Mapping[str, Any]) -> Federation:
    """Returns peers with equal parts of the rows; on a ring."""
    cell = Cell("DFL-LoRA", num_peers, MINILM_BATCH, STEPS, {"kind": "iid"})
    chosen = Material(**{**material, "targets": tuple(material["targets"])})
    return federation_of(cell.recipe(chosen, MOST_ROUNDS + WARM))


def toys(num_peers: int) -> Federation:
    """Returns toy peers on a ring with rows of their own."""
    small = build(
        resolve(
            {
                "name": "scale", "model": {"name_or_path": "toy"}, "task": {"kind": "toy"},
                "lora": {"r": 2, "target_modules": ["first", "second"]}, "data": {"path": "builtin/toy"},
                "method": {"schedule": "lora"},
                "peers": {"num_peers": 3, "topology": "ring"},
                "train": {"rounds": MOST_ROUNDS + WARM, "local": {"steps": STEPS}, "batch_size": TOY_BATCH},
            }
        )
    )  # fmt: skip
    rows = TOY_BATCH * STEPS
    inputs = torch.randn(num_peers * rows, TOY_INPUTS, generator=torch_stream(0, "scale rows"))
    source = VectorSource(inputs, (inputs[:, :TOY_LABELS]).argmax(1))
    train = {i: Shard(source, np.arange(i * rows, (i + 1) * rows)) for i in range(num_peers)}
    assert isinstance(small.learner, StackedLearner)
    small.learner.data = PeerData(train, train)
    topology, start = topology_of(ring(num_peers)), Tensors(small.peers.x[0].clone(), small.peers.layout)
    peers = Peers(range(num_peers), start, small.peers.common, optimizer=OPTIMIZERS["adam"].state)
    return replace(small, topology=topology, peers=peers, method=replace(small.method, topology=topology))


def scale(
    material: Material, toy_peers: Sequence[int], minilm_peers: Sequence[int], budget_s: float, say: Say
) -> dict[str, Any]:
    """Returns both series, the smallest first; a size that would not fit into the budget is told as not run."""
    begun = perf_counter()
    sizes = {"toy": toy_peers, "minilm": minilm_peers}
    result = dict[str, Any]()
    for base, counts in sizes.items():
        result[base] = []
        for count in counts:
            say(f"  {count} {base} peers")
            job = {"what": "scale", "base": base, "num_peers": count, "material": asdict(material)}
            left = budget_s - (perf_counter() - begun)
            told = ask(job, left) if left > 1 else {"ran": False, "reason": "no time was left in the plan"}
            result[base].append({"num_peers": count, **told})
    return result
