"""Runs a job as a Flower simulation: python run.py JOBDIR.

Every round the server sends each client its own adapter, the clients do their local steps, the server mixes what comes
back, x_i <- x_i + sum_j w_ij (x_j - x_i), and each client evaluates its own mixture: gossip's work on the same graph,
done in Flower's way. README.md says what JOBDIR holds and what is written there.
"""

import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"  # read when flwr is imported
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  # ray's 15 lets any other process slow the clients alone
os.environ["HF_HUB_OFFLINE"] = "1"

import client
import numpy as np
import psutil
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

Arrays = dict[str, NDArray[np.float32]]
PACKAGES = ("flwr", "ray", "torch", "transformers", "peft", "numpy")
FLOWERS_CPUS = 2  # of a client, where the backend's configuration does not say
ACTOR = "ray::ClientAppActor"  # how a worker that serves clients calls itself


class Clients:
    """The simulation's clients, in the order of the peers."""

    def __init__(self, grid: Grid, num_peers: int, config: Mapping[str, str | int]) -> None:
        self.grid, self.config = grid, config
        while len(nodes := sorted(grid.get_node_ids())) < num_peers:  # they register while the server starts
            time.sleep(0.01)
        self.nodes = nodes

    def ask(self, kind: str, t: int, peers: list[Arrays]) -> list[RecordDict]:
        """Sends every client its arrays and returns every client's reply; raises where one has failed."""
        messages = [
            Message(
                RecordDict(
                    {
                        "arrays": ArrayRecord({name: Array(value) for name, value in arrays.items()}),
                        "config": ConfigRecord({**self.config, "round": t, "peer": peer}),
                    }
                ),
                node,
                kind,
            )
            for peer, (node, arrays) in enumerate(zip(self.nodes, peers, strict=True))
        ]
        replies = {reply.metadata.src_node_id: reply for reply in self.grid.send_and_receive(messages)}
        for reply in replies.values():
            if reply.has_error():
                raise RuntimeError(f"A client failed: {reply.error.reason}")
        return [replies[node].content for node in self.nodes]


class PeakMemory(threading.Thread):
    """The largest sum of resident memory of this process and ray's workers, sampled; with ray's daemons apart."""

    def __init__(self, interval_s: float = 0.2) -> None:
        super().__init__(daemon=True)
        self.interval_s, self.finished = interval_s, threading.Event()
        self.workers_bytes = self.all_bytes = 0

    def run(self) -> None:
        driver = psutil.Process()
        while not self.finished.wait(self.interval_s):
            sizes = {True: driver.memory_info().rss, False: 0}
            for child in driver.children(recursive=True):
                try:
                    sizes["".join(child.cmdline()).startswith(ACTOR)] += child.memory_info().rss
                except psutil.Error:  # it has ended
                    continue
            self.workers_bytes = max(self.workers_bytes, sizes[True])
            self.all_bytes = max(self.all_bytes, sum(sizes.values()))


def mixed(peers: list[Arrays], w: NDArray[np.float64]) -> list[Arrays]:
    """Returns x_i + sum_j w_ij (x_j - x_i) of every peer: what the rows of W leave of 1 stays the peer's own."""
    pull = w - np.diag(w.sum(axis=1))
    stacked = {name: np.stack([arrays[name] for arrays in peers]) for name in peers[0]}  # [N, ...]
    moved = {name: (x + np.tensordot(pull, x, 1)).astype(np.float32) for name, x in stacked.items()}
    return [{name: x[i] for name, x in moved.items()} for i in range(len(peers))]


def numpy_of(record: ArrayRecord) -> Arrays:
    return {name: array.numpy() for name, array in record.items()}


def start_of(directory: Path, num_peers: int) -> list[Arrays]:
    start, names = load_file(directory / "start.safetensors"), client.names_in(str(directory)).all
    return [{name: start.get(f"peer{i}/{name}", start.get(name)) for name in names} for i in range(num_peers)]


def resources(job: client.Job) -> tuple[int, int]:
    """Returns the number of actors and the CPUs of each."""
    if job["mode"] == "template":
        actors, cpus = job["threads"] // FLOWERS_CPUS, FLOWERS_CPUS
    elif job["mode"] == "tuned":
        actors = job.get("actors", min(job["threads"], job["num_peers"]))
        cpus = job["threads"] // actors
    else:
        raise ValueError(f"mode is tuned or template, not {job['mode']!r}")
    if not (actors and cpus):
        raise ValueError(f"{job['threads']} threads are too few: mode {job['mode']}, {actors} actors")
    return actors, cpus


def run(directory: Path) -> None:
    """Writes out.json and end.safetensors into the job's directory."""
    job = client.job_in(str(directory))
    actors, cpus = resources(job)
    rounds: list[dict[str, Any]] = []
    out: dict[str, Any] = {"mode": job["mode"], "actors": actors, "threads_per_actor": cpus, "rounds": rounds}
    end: Arrays = {}
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        if job["mode"] == "tuned":
            grid.pull_interval = 0.005  # type: ignore[attr-defined]  # seconds; 0.1 would be a part of short rounds
        clients = Clients(grid, job["num_peers"], {"directory": str(directory), "threads": cpus})
        peers, w = start_of(directory, job["num_peers"]), np.array(job["W"])
        for t in range(1, job["rounds"] + 1):
            times = [time.perf_counter()]
            trained = clients.ask("train", t, peers)
            times.append(time.perf_counter())
            peers = mixed([numpy_of(reply["arrays"]) for reply in trained], w)
            times.append(time.perf_counter())
            evaluated = clients.ask("evaluate", t, peers)
            times.append(time.perf_counter())
            if t == 1:
                began = min(float(reply["metrics"]["began"]) for reply in trained)
                out["startup_s"] = began - psutil.Process().create_time()
            parts = dict(zip(("train_s", "mix_s", "evaluate_s"), np.diff(times).tolist(), strict=True))
            rounds.append(
                {
                    **parts,
                    "total_s": times[-1] - times[0],
                    "clients_s": sum(reply["metrics"]["seconds"] for reply in (*trained, *evaluated)),
                    "accuracies": [reply["metrics"]["accuracy"] for reply in evaluated],
                    "losses": [list(reply["metrics"]["losses"]) for reply in trained],
                }
            )
        kept = [numpy_of(reply["arrays"]) for reply in clients.ask("query", job["rounds"], [{}] * job["num_peers"])]
        for i, arrays in enumerate(peers):
            end.update({f"peer{i}/{name}": value for name, value in (arrays | kept[i]).items()})

    memory, ray_files = PeakMemory(), tempfile.mkdtemp(prefix="ray-")
    memory.start()
    backend: dict[str, dict[str, Any]] = {
        "init_args": {"address": "local", "num_cpus": actors * cpus, "_temp_dir": ray_files},
        "client_resources": {"num_cpus": cpus, "num_gpus": 0.0},
    }
    try:
        run_simulation(server, client.app, job["num_peers"], backend_config=backend)
    finally:
        memory.finished.set()
        shutil.rmtree(ray_files, ignore_errors=True)
    out |= {"peak_rss_bytes": memory.workers_bytes, "peak_rss_with_ray_bytes": memory.all_bytes}
    out["versions"] = {"python": sys.version.split()[0], **{package: version(package) for package in PACKAGES}}
    save_file(end, directory / "end.safetensors")
    (directory / "out.json").write_text(json.dumps(out, indent=1))


if __name__ == "__main__":
    run(Path(sys.argv[1]).resolve())
