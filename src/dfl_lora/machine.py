"""What the machine gives this process: memory and processors, with the limits of the containers it runs in."""

from collections.abc import Iterator
from itertools import product
from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")
LIMITS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
"""What a control group allows and what is used of it, in versions 2 and 1."""


def own_memory() -> int:
    """Returns the resident bytes of this process."""
    return int(psutil.Process().memory_info().rss)


def available_memory(root: Path = CGROUPS) -> int:
    """Returns the bytes a process started now could use: what the system has left, or less under a limit."""
    return max(0, min([int(psutil.virtual_memory().available), *(limit - used for limit, used in limits(root))]))


def memory_limit(root: Path = CGROUPS) -> int | None:
    """Returns the bytes that a control group allows, or None where it allows all there is."""
    total = int(psutil.virtual_memory().total)
    limit = min((limit for limit, _ in limits(root)), default=total)
    return limit if limit < total else None


def total_memory(root: Path = CGROUPS) -> int:
    """Returns the bytes that this process may use at most."""
    return memory_limit(root) or int(psutil.virtual_memory().total)


def limits(root: Path) -> Iterator[tuple[int, int]]:
    """Yields (limit, used) of each control group above this process that has a limit."""
    for group, (limit, used) in product(groups(root), LIMITS):
        allowed, taken = number(group / limit), number(group / used)
        if allowed is not None and taken is not None:
            yield allowed, taken


def processors(root: Path = CGROUPS) -> float:
    """Returns how many processors this process may use at a time, by affinity and by quota."""
    usable = float(len(psutil.Process().cpu_affinity() or ()) or psutil.cpu_count() or 1)
    for group in groups(root):
        try:
            quota, period = (group / "cpu.max").read_text().split()
            usable = min(usable, int(quota) / int(period))
        except (OSError, ValueError):  # no such group, or "max": no quota
            continue
    return usable


def groups(root: Path) -> Iterator[Path]:
    """Yields the folders of the control groups this process is in (version 2), the innermost first, and the root."""
    try:
        own = Path("/proc/self/cgroup").read_text().rpartition("0::")[2].splitlines()
    except OSError:
        own = []
    place = root / (own[0].lstrip("/") if own else "")
    while place.is_relative_to(root):
        yield place
        place = place.parent


def number(path: Path) -> int | None:
    """Returns the whole number in a file of the kernel; None where there is none."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
