"""Where and from what a benchmark was made: the machine, the versions, the commit, the date."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

from dfl_lora import machine

FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16")
LIBRARIES = ("torch", "transformers", "peft", "numpy")


def facts() -> dict[str, Any]:
    """Returns what a reader must know of the machine to judge the figures."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": {
            "processor": processor(), "cores": psutil.cpu_count(logical=False), "usable": machine.processors(),
            "features": features(), "threads": torch.get_num_threads(), "load_before": os.getloadavg()[0],
            "memory_bytes": int(psutil.virtual_memory().total), "system": f"{platform.system()} {platform.machine()}",
        },
        "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
    }  # fmt: skip


def cpuinfo(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


def processor() -> str:
    return cpuinfo("model name") or platform.processor() or platform.machine()


def features() -> list[str]:
    """Returns which of the vector and matrix units that matter the processor has."""
    flags = cpuinfo("flags").split()
    return [name for name in FEATURES if name in flags]


def commit() -> str | None:
    """Returns the commit of the checkout this package runs from, with + where files differ; None without git."""
    try:
        told = [
            subprocess.run(
                ["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
            ).stdout
            for words in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    return told[0].strip() + ("+" if told[1].strip() else "")
