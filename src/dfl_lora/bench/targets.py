"""What the benchmark must show, and whether it does: a row for each target, measured or with the reason why not."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from dfl_lora.bench.table import NO_BF16, multiplies_bf16

Result = Mapping[str, Any]
NOT_MEASURED = "not measured in this run"


@dataclass(frozen=True)
class Target:
    """A target: `at_least` or at most `wanted`; passed is None where it was not measured, and `reason` says why."""

    name: str
    wanted: float
    measured: float | None
    reason: str = ""
    at_least: bool = True
    unit: str = "x"

    @property
    def passed(self) -> bool | None:
        if self.measured is None:
            return None
        return self.measured >= self.wanted if self.at_least else self.measured <= self.wanted

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


def targets(result: Result) -> list[dict[str, Any]]:
    """Returns every target as data."""
    rows = [
        *ratios(result["headline"]),
        *memory(result),
        mixing(result["mixing"]),
        *scale(result["scale"]),
        mfu(result["headline"]),
    ]
    return [row.as_json() for row in rows]


def fault(arm: Result | None) -> str | None:
    """Returns why an arm's time does not count, or None."""
    if arm is None:
        return NOT_MEASURED
    if not arm["ran"]:
        return str(arm["reason"])
    return None if arm["gate"]["passed"] else "it failed the gate"


def default_of(arms: Result) -> str:
    """Returns the name of ours in the precision that `auto` takes on the machine."""
    bf16 = arms.get("ours, bf16", {"ran": False})
    return "ours, bf16" if bf16["ran"] else "ours, fp32"


def ratio(arms: Result, baseline: str, own: str, figure: str) -> tuple[float | None, str]:
    """Returns how many times faster ours is, or why that is not known; an arm that fails the gate has no ratio."""
    for name in (baseline, own):
        reason = fault(arms.get(name))
        if reason is not None:
            return None, f"{name}: {reason}"
    return seconds(arms[baseline], figure) / seconds(arms[own], figure), ""


def seconds(arm: Result, figure: str) -> float:
    return float(arm[figure]["median"])


def ratios(cells: list[Result]) -> Iterator[Target]:
    for cell in cells:
        arms, where = cell["arms"], f"{cell['method']}, batch {cell['batch_size']}"
        own = default_of(arms)
        yield Target(f"round against seed ({where})", 8, *ratio(arms, "seed, fp32", own, "round_s"))
        for arm, fp32, bf16 in (("seed+", 2.5, 1.5), ("peft-mixed", 2.0, 1.4)):
            for short, wanted in (("fp32", fp32), ("bf16", bf16)):
                found = ratio(arms, f"{arm}, {short}", own, "train_s")
                yield Target(f"training step against {arm} in {short} ({where})", wanted, *found)
        for short in ("fp32", "bf16"):
            found = ratio(arms, f"flower tuned, {short}", own, "round_s")
            yield Target(f"round against flower tuned in {short} ({where})", 4, *found)


def memory(result: Result) -> Iterator[Target]:
    jobs, runs = result["memory"], {r["num_peers"]: r for r in result["scale"].get("minilm", []) if r["ran"]}
    pair = [jobs.get(f"{arm}, 16 peers x 128 rows") for arm in ("ours", "seed")]
    told = [job["peak_bytes"] if job and job["ran"] else None for job in pair]
    share = told[0] / told[1] if told[0] and told[1] else None
    missing = next((job["reason"] for job in pair if job and not job["ran"]), NOT_MEASURED)
    yield Target("peak memory at 16 peers, batch 128, against seed", 0.5, share, "" if share else missing, False)
    slope = slope_of(runs.get(64), runs.get(512), "resident_bytes")
    state = runs[64]["state_bytes_per_peer"] if 64 in runs else None
    over = slope / state if slope is not None and state else None
    reason = "" if over is not None else unmeasured(result["scale"].get("minilm", []), 64, 512)
    yield Target("memory of one peer more, over its adapter and optimiser state", 1.5, over, reason, False)
    few, more = (jobs.get(f"seed, {n} peers x 16 rows") for n in (1, 8))
    theirs = slope_of(few if few and few["ran"] else None, more if more and more["ran"] else None, "resident_bytes")
    part = slope / theirs if slope is not None and theirs else None
    reason = "" if part is not None else reason or NOT_MEASURED
    yield Target("memory of one peer more, against the seed's", 1 / 50, part, reason, False)


def slope_of(few: Result | None, more: Result | None, key: str) -> float | None:
    """Returns the bytes of one peer more, from two runs."""
    if few is None or more is None:
        return None
    return float(more[key] - few[key]) / float(more["num_peers"] - few["num_peers"])


def unmeasured(series: list[Result], *sizes: int) -> str:
    return next((r["reason"] for r in series if r["num_peers"] in sizes and not r["ran"]), NOT_MEASURED)


def peer_s(run: Result) -> float:
    return float(run["train_s"] + run["mix_s"]) / float(run["num_peers"])


def scale(series: Result) -> Iterator[Target]:
    for base, name in (("toy", "toy"), ("minilm", "MiniLM")):
        runs = {r["num_peers"]: r for r in series.get(base, []) if r["ran"]}
        grown = peer_s(runs[512]) / peer_s(runs[8]) if {8, 512} <= runs.keys() else None
        reason = "" if grown is not None else unmeasured(series.get(base, []), 8, 512)
        yield Target(f"seconds a peer at 512 {name} peers against 8", 1.10, grown, reason, False)
    shares = [r["mix_s"] / (r["train_s"] + r["mix_s"]) for r in series.get("minilm", []) if r["ran"]]
    reason = "" if shares else NOT_MEASURED
    yield Target("largest share of mixing in a round, MiniLM", 0.05, max(shares, default=None), reason, False, "")


def mixing(job: Result) -> Target:
    share = job["share"] if job.get("ran") else None
    reason = "" if share is not None else job.get("reason", NOT_MEASURED)
    return Target("mixing 1,000 x 73,728 numbers, share of the speed of copying them", 0.5, share, reason, unit="")


def mfu(cells: list[Result]) -> Target:
    """MFU of ours in bfloat16 at 16 rows; where bfloat16 is not at hand the reason tells that of float32."""
    arms: Result = next((c["arms"] for c in cells if c["batch_size"] == 16 and c["method"] == "LoRA"), {})
    name, own = "MFU in bf16, 16 rows a peer (LoRA)", arms.get("ours, bf16")
    if own is not None and fault(own) is None:
        return Target(name, 0.70, own["mfu"], f"HFU {own['hfu']:.2f}", unit="")
    plain = arms.get("ours, fp32")
    there = f"; in fp32 it is {plain['mfu']:.2f}" if plain and fault(plain) is None else ""
    reason = NO_BF16 if not multiplies_bf16() else fault(own) or NOT_MEASURED
    return Target(name, 0.70, None, reason + there, unit="")
