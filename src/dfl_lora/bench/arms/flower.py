"""flower: the same rounds by Flower's simulation, as a process in an environment of its own.

Flower's pins exclude ours, so `benchmarks/flower/run.py` runs under `benchmarks/flower/.venv`. A job folder holds
job.json, start.safetensors (the common start) and data.safetensors (the batches of every peer, round and step as
they are read here); out.json and end.safetensors come back. The round is measured inside; start-up is told apart.
"""

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from safetensors.torch import load_file, save_file
from torch import Tensor

from dfl_lora.bench.arms import EVALUATION_ROWS
from dfl_lora.bench.arms.plain import attention_of
from dfl_lora.bench.reading import Reader, Rectangle
from dfl_lora.bench.setting import Setting

Mode = Literal["tuned", "template"]
FOLDER = Path("benchmarks/flower")


@dataclass(frozen=True)
class Outcome:
    """What a job took by round, and where its peers ended."""

    out: Mapping[str, Any]
    ends: list[dict[str, Tensor]]


def folder_of() -> Path:
    """Returns the folder of the Flower arm: in the current directory, or in the checkout this package runs from."""
    checkout = Path(__file__).parents[4] / FOLDER
    return FOLDER if FOLDER.is_dir() else checkout


def missing() -> str | None:
    """Returns why Flower cannot be timed here, or None."""
    folder = folder_of()
    if not (folder / "run.py").exists():
        return f"{FOLDER}/run.py is not there: it comes with the source, not with the package"
    if not interpreter(folder).exists():
        return f"{FOLDER}/.venv is not there: make bench-flower-env makes it"
    return None


def interpreter(folder: Path) -> Path:
    return folder / ".venv" / "bin" / "python"


def write_job(setting: Setting, rounds: int, dtype: str, mode: Mode, job: Path) -> None:
    """Writes the job folder."""
    work, lora = setting.work, setting.placement.lora
    steps = work.steps_of(setting.data.train[0])
    rates = [[work.learning_rate_at(t, s, steps) for s in range(steps)] for t in range(1, rounds + 1)]
    content = {
        "model": str(Path(setting.files.path).resolve()), "num_labels": setting.num_labels,
        "r": lora.r, "lora_alpha": lora.lora_alpha, "target_modules": list(setting.placement.modules),
        "learning_rates": rates, "rounds": rounds, "steps": steps, "num_peers": setting.num_peers,
        "W": setting.weights, "train_a": "A" in setting.schedule(1).trained,
        "shared_head": "head" in setting.schedule(1).shared, "dtype": dtype, "attention": attention_of(dtype),
        "threads": setting.compute.threads, "mode": mode,
    }  # fmt: skip
    (job / "job.json").write_text(json.dumps(content))
    save_file({name: value.contiguous() for name, value in setting.starts[0].items()}, job / "start.safetensors")
    save_file(data_of(setting, rounds, steps), job / "data.safetensors")


def data_of(setting: Setting, rounds: int, steps: int) -> dict[str, Tensor]:
    """Returns every batch of the job by name, padded to its longest row."""
    reader, tensors = Reader(setting), dict[str, Tensor]()
    for peer in range(setting.num_peers):
        for t in range(rounds):
            for s in range(steps):
                tensors |= named(f"peer{peer}/round{t + 1}/step{s}", reader.batch(peer, t * steps + s))
    for b, batch in enumerate(reader.validation(0, EVALUATION_ROWS)):
        tensors |= named(f"validation/{b}", batch)
    return tensors


def named(place: str, batch: Rectangle) -> dict[str, Tensor]:
    return {f"{place}/{name}": value for name, value in {**batch.inputs, "labels": batch.labels}.items()}


def run_job(setting: Setting, rounds: int, dtype: str, mode: Mode, limit_s: float) -> Outcome:
    """Runs a job to its end; raises RuntimeError with its last line where it fails, TimeoutExpired after `limit_s`."""
    folder = folder_of()
    with TemporaryDirectory(prefix="dfl-lora-flower-") as place:
        job = Path(place)
        write_job(setting, rounds, dtype, mode, job)
        command = [str(interpreter(folder).absolute()), str((folder / "run.py").absolute()), str(job)]
        environment = {**os.environ, "FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}
        environment.pop("PYTHONPATH", None)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit_s)
        if done.returncode or not (job / "out.json").exists():
            said = (done.stderr.strip() or done.stdout.strip() or "nothing was said").splitlines()[-1]
            raise RuntimeError(f"Flower's process ended with {done.returncode}: {said}")
        out, ends = json.loads((job / "out.json").read_text()), load_file(job / "end.safetensors")
    names = setting.placement.layout.by_name
    peers = range(setting.num_peers)
    return Outcome(out, [{n: ends.get(f"peer{i}/{n}", setting.starts[i][n]) for n in names} for i in peers])
