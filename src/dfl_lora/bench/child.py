"""A measurement in a process of its own, where memory and start-up are to be known: `python -m dfl_lora.bench.child`.

The job is JSON in the first argument, the result JSON on standard output. Peaks are VmHWM of this process: what
getrusage tells would include the parent's.
"""

import ctypes
import gc
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from time import perf_counter, time
from typing import Any

import psutil

from dfl_lora.machine import own_memory

KILO = 1024


def peak_memory() -> int | None:
    """Returns the largest resident bytes of this process so far (VmHWM); None where the kernel does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    return int(found[0]) * KILO if found else None


def settle() -> None:
    """Gives freed memory back to the system, and starts the peak anew where the kernel lets a process do so."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):  # another C library or kernel: the peak counts from the start of the process
        return


def started_s() -> float:
    """Returns the seconds since this process was started."""
    return time() - float(psutil.Process().create_time())


def ask(job: dict[str, Any], limit_s: float) -> dict[str, Any]:
    """Runs a job in a process of its own; returns its result, or {"ran": False, "reason": ...}."""
    command = [sys.executable, "-m", "dfl_lora.bench.child", json.dumps(job)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(limit_s, 1))
    except subprocess.TimeoutExpired:
        return {"ran": False, "reason": f"it was stopped after {limit_s:.0f} s, its share of the plan"}
    if done.returncode:
        said = (done.stderr.strip() or "nothing was said").splitlines()[-1]
        return {"ran": False, "reason": f"the process ended with {done.returncode}: {said}"}
    return {"ran": True, **json.loads(done.stdout.splitlines()[-1])}


def memory_of_arm(kind: str, dtype: str, cell: dict[str, Any], material: dict[str, Any]) -> dict[str, Any]:
    """Returns start-up and memory of an arm that does one round."""
    from dfl_lora.bench.cells import Cell, Material
    from dfl_lora.bench.setting import federation_of, setting_of
    from dfl_lora.bench.table import KINDS

    chosen = KINDS[kind]
    recipe = Cell(**cell).recipe(Material(**(material | {"targets": tuple(material["targets"])})), 1)
    setting = setting_of(federation_of(recipe))
    settle()
    before = own_memory()
    arm = chosen.make(recipe, setting, dtype)
    startup_s = started_s()
    start = perf_counter()
    arm.train_round()
    arm.mix()
    peak, round_s = peak_memory(), perf_counter() - start
    settle()
    return {
        "startup_s": startup_s, "round_s": round_s, "before_bytes": before, "resident_bytes": own_memory(),
        "peak_bytes": peak,
    }  # fmt: skip


def arm_job(kind: str, dtype: str, cell: Any, material: Any) -> dict[str, Any]:
    return {"what": "arm", "kind": kind, "dtype": dtype, "cell": asdict(cell), "material": asdict(material)}


def main() -> None:
    job = json.loads(sys.argv[1])
    what = job.pop("what")
    if what == "arm":
        result = memory_of_arm(**job)
    elif what == "mixing":
        from dfl_lora.bench.bandwidth import mixing

        result = mixing(**job)
    else:
        from dfl_lora.bench.scale import measured

        result = measured(**job)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
