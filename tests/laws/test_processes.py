"""Law 4: peers in several processes end with the bits of the simulation."""

import json
import multiprocessing
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from dfl_lora.build import Federation, build
from dfl_lora.codecs.frames import Frame
from dfl_lora.data.generator import sentences
from dfl_lora.graphs import Graph
from dfl_lora.networks import Arrived, Network
from dfl_lora.networks.memory import MemoryNetwork
from dfl_lora.peers import Peers
from dfl_lora.reading import resolve
from dfl_lora.rounds import rounds
from encoders import equal_bits, write_encoder

PATIENCE_S = 120
Hosts = tuple[list[int], list[int]]


@dataclass(frozen=True)
class Job:
    """A recipe, and the peers that each of the two processes hosts."""

    recipe: str
    hosts: Hosts


def read(connection: Connection) -> bytes:
    """Returns the next message; raises where none comes, so that a dead process ends the test."""
    if not connection.poll(PATIENCE_S):
        raise TimeoutError(f"nothing came through the pipe in {PATIENCE_S} s")
    return connection.recv_bytes()


@dataclass(frozen=True)
class PipeNetwork:
    """A network of two processes: a header and the bytes of each frame through one pipe."""

    connection: Connection
    speaks_first: bool

    def exchange(self, round: int, k: int, graph: Graph, outgoing: Mapping[int, Frame]) -> Arrived:
        if self.speaks_first:
            self.send(round, k, outgoing)
        everyone = dict(outgoing) | self.receive(round, k)
        if not self.speaks_first:
            self.send(round, k, outgoing)
        return Arrived({i: {j: everyone[j] for j in graph.neighbours(i)} for i in outgoing})

    def send(self, round: int, k: int, outgoing: Mapping[int, Frame]) -> None:
        self.connection.send_bytes(json.dumps([round, k, list(outgoing)]).encode())
        for frame in outgoing.values():
            self.connection.send_bytes(frame.to_bytes())

    def receive(self, round: int, k: int) -> dict[int, Frame | None]:
        their_round, their_k, ids = json.loads(read(self.connection))
        assert (their_round, their_k) == (round, k)
        return {i: Frame.from_bytes(read(self.connection)) for i in ids}


def run(federation: Federation, network: Network) -> Peers:
    """Returns the hosted peers after all rounds of the recipe."""
    f = federation
    for record in rounds(f.peers, f.method, f.learner, network):
        assert not record.traffic.refused
        if record.round == f.recipe.train.rounds:
            break
    return f.peers


def host(jobs: list[Job], side: int, link: Connection, home: Connection) -> None:
    """What a process does: for each job, host some peers and send home everything they end with."""
    for job in jobs:
        recipe = resolve(json.loads(job.recipe))
        peers = run(build(recipe, job.hosts[side]), PipeNetwork(link, speaks_first=side == 0))
        home.send_bytes(Frame("end", peers.layout.digest, peers.arrays()).to_bytes())


def toy(**parts: Any) -> dict[str, Any]:
    """Returns a recipe of two toy peers and three rounds."""
    return {
        "model": {"name_or_path": "toy"},
        "lora": {"r": 4, "target_modules": ["first", "second"]},
        "task": {"kind": "toy"},
        "data": {"path": "builtin/toy", "partition": "dirichlet(alpha=0.5)"},
        "peers": {"num_peers": 2, "topology": "complete"},
        "method": {"schedule": "lora"},
        "train": {"rounds": 3, "local": {"steps": 3}, "batch_size": 16},
        "compute": {"threads": 1, "dtype": "float32"},
    } | parts


def text(folder: Path, **parts: Any) -> dict[str, Any]:
    """Returns a recipe of two peers on a tiny BERT and three rounds."""
    return (
        toy(
            model={"name_or_path": str(folder / "bert")},
            lora={"r": 4, "target_modules": ["query", "value"]},
            task={"text": "sentence", "max_length": 40},
            data={"path": str(folder / "train"), "validation": str(folder / "validation")},
            train={"rounds": 3, "local": {"steps": 2}, "batch_size": 8, "learning_rate": 5e-3, "max_grad_norm": 1.0},
        )
        | parts
    )


THREE = {"num_peers": 3, "topology": "complete"}
HALVES: Hosts = ([0], [1])
UNEVEN: Hosts = ([0, 2], [1])
NAMES = (
    "toy", "bert", "three toys in two processes", "three berts in bf16 in two processes",
    "three toys whose graphs come in turn", "three toys whose graphs are drawn",
)  # fmt: skip


def jobs_in(folder: Path) -> dict[str, Job]:
    write_encoder("bert", folder / "bert")
    for split, num_rows in (("train", 60), ("validation", 8)):
        Dataset.from_list(sentences(split, num_rows)).save_to_disk(folder / split)
    bf16 = {"threads": 1, "dtype": "bfloat16"}
    in_turn, drawn = (THREE | {"topology": name} for name in ("base(k=1)", "random_edges(p=0.5)"))
    recipes = (
        toy(), text(folder), toy(peers=THREE), text(folder, peers=THREE, compute=bf16),
        toy(peers=in_turn, method={"correction": "k_gt"}), toy(peers=drawn, method={"correction": "k_gt"}),
    )  # fmt: skip
    hosts = (HALVES, HALVES, UNEVEN, UNEVEN, UNEVEN, UNEVEN)
    return {name: Job(json.dumps(recipe), h) for name, recipe, h in zip(NAMES, recipes, hosts, strict=True)}


Ends = dict[str, tuple[Job, list[Frame | None]]]


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ends]:
    """Every job by name, with what the two processes sent home of it."""
    jobs = jobs_in(tmp_path_factory.mktemp("processes"))
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        link, homes = context.Pipe(), (context.Pipe(duplex=False), context.Pipe(duplex=False))
        for side in (0, 1):
            arguments = (list(jobs.values()), side, link[side], homes[side][1])
            process = context.Process(target=host, args=arguments)
            process.start()
            stack.callback(process.join, 10)
            stack.callback(process.terminate)
        for pipe_end in (*link, *(home[1] for home in homes)):
            pipe_end.close()  # now a process that dies closes its pipes, and nobody waits for it
        yield {name: (job, [Frame.from_bytes(read(home[0])) for home in homes]) for name, job in jobs.items()}


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_end_with_the_bits_of_the_simulation(name: str, ends: Ends) -> None:
    job, frames = ends[name]
    simulated = run(build(resolve(json.loads(job.recipe))), MemoryNetwork())
    for ids, frame in zip(job.hosts, frames, strict=True):
        assert frame is not None
        assert frame.layout == simulated.layout.digest
        differing = [key for key, matrix in simulated.arrays().items() if not equal_bits(frame.body[key], matrix[ids])]
        assert not differing
    assert simulated.x.std(0).max() > 0
    assert torch.isfinite(simulated.x).all()
