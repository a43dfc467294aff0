"""docs/benchmarks.md from a result: every number on the page was measured in one run."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from dfl_lora.bench.targets import fault, slope_of

Result = Mapping[str, Any]
MEGA = 1e6


def page(result: Result, figure: str | None) -> str:
    """Returns the page; `figure` is the picture's place, seen from the page."""
    parts = [*head(result), "## What it must show", *target_table(result["targets"])]
    if figure:
        parts += [f"![seconds a round by arm, and seconds a peer over the number of peers]({figure})"]
    for cell in result["headline"]:
        parts += [f"## {cell['cell']}", *cell_notes(cell), *cell_table(cell), *profile(cell)]
    if result["memory"]:
        parts += ["## Memory and start-up", *memory_table(result["memory"])]
    if result["scale"]:
        parts += ["## Scale", *scale_tables(result["scale"]), *mixing_line(result["mixing"])]
    if result["grid"]:
        parts += ["## The grid", *grid_table(result["grid"])]
    return "\n\n".join(parts) + "\n"


def head(result: Result) -> Iterator[str]:
    machine, versions = result["machine"], ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    yield "# Benchmarks"
    yield (
        f"Written by `make {result['scope']}` from one run; benchmarks.json beside it holds every number. Arms are "
        "timed "
        "in turn (ABAB) in one process, after an untimed round each, as often as the plan has time for (n), and ratios "
        "are of the medians; with n = 1 a ratio carries what the machine's speed did between two rounds, so beside "
        "each "
        "stands the ratio at an equal speed of products, that of the MFUs. Flower is timed apart. All arms do the same "
        "rounds on the same batches from the same start, without dropout. A time counts only if the arm passed the "
        "gate: in fp32 A, B and head end within 1e-4 of plain PEFT, one peer at a time; in bf16 the first gradient is "
        "within 5e-2 (Flower does not tell its own), the loss within 2 %, the accuracy within a point."
    )
    yield table(
        ("", ""),
        [
            ("machine", f"{machine['processor']}, {machine['cores']} cores ({machine['usable']:g} usable), "
             f"{' '.join(machine['features']) or 'no known vector units'}, {machine['memory_bytes'] / 2**30:.0f} GiB"),
            ("threads", f"{machine['threads']}; load before the run {machine['load_before']:.1f}"),
            ("versions", versions),
            ("commit, date", f"{result['commit'] or 'no git'}, {result['date']}"),
            ("rows, model", f"{result['rows']}; {result['model']}"),
            ("took", f"{result['seconds'] / 60:.1f} minutes"),
        ],
    )  # fmt: skip


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def target_table(targets: Sequence[Result]) -> Iterator[str]:
    def row(t: Result) -> Sequence[str]:
        sign = "≥" if t["at_least"] else "≤"
        passed = {True: "yes", False: "**no**", None: "n/a"}[t["passed"]]
        measured = "" if t["measured"] is None else f"{t['measured']:.3g}{t['unit']}"
        return t["name"], f"{sign} {t['wanted']:.3g}{t['unit']}", measured, passed, t["reason"]

    yield table(("", "wanted", "measured", "passed", "note"), map(row, targets))


def cell_notes(cell: Result) -> Iterator[str]:
    rates = ", ".join(
        f"{name}: {min(r) / 1e9:.0f} to {max(r) / 1e9:.0f} GF/s over {len(r)} measurements"
        for name, r in cell["gemm"].items()
    )
    yield (
        f"{cell['real_tokens']:,} real tokens and {cell['useful_flops'] / 1e9:.1f} GF of useful training a round; "
        f"{cell['evaluated_rows']} rows evaluated a peer. GEMM between the arms, {rates}."
    )
    yield from limit(cell["arms"])


def limit(arms: Result) -> Iterator[str]:
    """Yields how fast a round can be at all in a precision, against the seed: what the arithmetic leaves to gain."""
    seed = arms.get("seed, fp32")
    for short in ("fp32", "bf16"):
        own = arms.get(f"ours, {short}")
        if seed is not None and own is not None and fault(seed) is None and fault(own) is None:
            nominal, took, theirs = own["mfu_round"] * own["round_s"]["median"], own["round_s"], seed["round_s"]
            least = nominal * own["executed_over_useful"]
            yield (
                f"In {short} the arithmetic that ours executes in a round takes {least:.2f} s at the speed of products "
                f"measured beside it, {theirs['median'] / least:.1f}x faster than the seed, which is what could be "
                "had at "
                f"most; it takes {took['median']:.2f} s. (The nominal work counts the last layer for all tokens, of "
                "which "
                f"ours computes the first alone, exactly: so HFU lies below MFU.)"
            )


def cell_table(cell: Result) -> Iterator[str]:
    """Yields the table of the arms that ran, then what did not run and why."""
    titles = (
        "arm",
        "gate",
        "round s (min-max, n)",
        "train",
        "mix",
        "evaluate",
        "x ours",
        "at equal speed",
        "tokens/s",
        "MFU",
        "HFU",
        "padding",
    )
    arms = cell["arms"]
    ours = arms.get("ours, bf16", {"ran": False})
    ours = ours if ours["ran"] else arms["ours, fp32"]
    yield table(titles, [arm_row(name, arm, ours) for name, arm in arms.items() if arm["ran"]])
    left_out = [f"- {name}: {arm['reason']}" for name, arm in arms.items() if not arm["ran"]]
    if left_out:
        yield "Not run:"
        yield "\n".join(left_out)


def arm_row(name: str, arm: Result, ours: Result) -> Sequence[str]:
    took = arm["round_s"]
    counts = fault(arm) is None and fault(ours) is None
    return (
        name,
        f"{'passed' if arm['gate']['passed'] else '**failed**'} ({max(arm['gate']['measured'].values()):.0e})",
        f"{took['median']:.2f} ({took['min']:.2f}-{took['max']:.2f}, {arm['repeats']})",
        *(f"{arm[key]['median']:.3g}" for key in ("train_s", "mix_s", "evaluate_s")),
        f"{took['median'] / ours['round_s']['median']:.2f}" if counts else "",
        f"{ours['mfu_round'] / arm['mfu_round']:.2f}" if counts and arm.get("mfu_round") else "",
        *(maybe(arm.get(key), form) for key, form in
          (("tokens_per_s", ",.0f"), ("mfu", ".2f"), ("hfu", ".2f"), ("padding_efficiency", ".2f"))),
    )  # fmt: skip


def maybe(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def profile(cell: Result) -> Iterator[str]:
    """Yields where a round of ours goes, by part."""
    rows = []
    for name, arm in cell["arms"].items():
        if arm["ran"] and arm["parts"]:
            parts = {**arm["parts"], "mix": arm["mix_s"]["median"], "evaluate": arm["evaluate_s"]["median"]}
            total = sum(parts.values())
            rows.append((name, *(f"{s:.3f} ({s / total:.0%})" for s in parts.values())))
            titles = ("seconds of a round", *parts)
    if rows:
        yield table(titles, rows)


def memory_table(memory: Result) -> Iterator[str]:
    def row(name: str, job: Result) -> Sequence[str]:
        if not job["ran"]:
            return name, "", "", "", "", job["reason"]
        sizes = (job["before_bytes"], job["resident_bytes"], job["peak_bytes"])
        return name, f"{job['startup_s']:.1f}", *("" if b is None else f"{b / MEGA:.0f}" for b in sizes), ""

    yield (
        "Each in a process of its own, which does one round of one step of DFL-LoRA. Start-up is from the process "
        "to its "
        "first step; `before` is the process with the rows read and no model; `after` is what is resident once freed "
        "memory was given back."
    )
    yield table(
        ("arm", "start-up s", "before MB", "after MB", "peak MB", "note"), [row(n, j) for n, j in memory.items()]
    )


SCALE = ("ms a peer and round", "mixing", "resident MB", "MB a peer more", "adapter + optimiser MB", "note")


def scale_tables(scale: Result) -> Iterator[str]:
    yield (
        "A process for each size; a round is training and mixing of two steps of toys (16 rows each, LoRA) or of "
        "MiniLM "
        "peers (4 rows each, DFL-LoRA). Resident is what is left once freed memory was given back. The seed's "
        "memory of "
        "one peer more, above, is from 1 to 8 peers of 16 rows."
    )
    for base, runs in scale.items():
        yield table((f"{base} peers", *SCALE), [scale_row(run, last) for last, run in pairwise([None, *runs])])


def scale_row(run: Result, last: Result | None) -> Sequence[str]:
    """Returns a row; what a peer more costs is told against the size before."""
    if not run["ran"]:
        return str(run["num_peers"]), *[""] * 5, run["reason"]
    total = run["train_s"] + run["mix_s"]
    more = slope_of(last if last and last["ran"] else None, run, "resident_bytes")
    return (
        str(run["num_peers"]), f"{1000 * total / run['num_peers']:.2f}", f"{run['mix_s'] / total:.1%}",
        f"{run['resident_bytes'] / MEGA:.0f}", "" if more is None else f"{more / MEGA:.4f}",
        f"{run['state_bytes_per_peer'] / MEGA:.4f}", "",
    )  # fmt: skip


def mixing_line(job: Result) -> Iterator[str]:
    if job.get("ran"):
        moved = 8e-9 * job["num_peers"] * job["num_numbers"]
        yield (
            f"Mixing {job['num_peers']:,} peers x {job['num_numbers']:,} numbers on a ring takes "
            f"{1000 * job['mix_s']:.0f} ms and copying them {1000 * job['copy_s']:.0f} ms: {moved / job['mix_s']:.1f} "
            f"and {moved / job['copy_s']:.1f} GB/s where each number is read and written once."
        )


def grid_table(cells: Sequence[Result]) -> Iterator[str]:
    """Yields training steps in milliseconds, ours beside each baseline."""
    names = [name for cell in cells if "arms" in cell for name, arm in cell["arms"].items() if arm["ran"]]
    arms = list(dict.fromkeys(names))
    yield "Milliseconds of a training step of all peers; in brackets, how many times faster ours is (its best)."
    rows = []
    for cell in cells:
        begin = (cell["method"], str(cell["num_peers"]), str(cell["tokens"]))
        if "arms" not in cell:
            rows.append((*begin, *[""] * (len(arms) + 1), cell["reason"]))
            continue
        rows.append((*begin, *(grid_entry(cell["arms"], name) for name in arms), own_mfu(cell["arms"]), ""))
    yield table(("method", "peers", "tokens", *arms, "MFU of ours", "note"), rows)
    missing = sorted({f"- {name}: {arm['reason']}" for cell in cells for name, arm in cell.get("arms", {}).items()
                      if not arm["ran"]})  # fmt: skip
    if missing:
        yield "Not run in some cells:"
        yield "\n".join(missing)


def own_of(arms: Result) -> Result | None:
    counted = [arm for name, arm in arms.items() if name.startswith("ours, ") and arm["ran"] and fault(arm) is None]
    return min(counted, key=lambda arm: float(arm["step_s"]), default=None)


def grid_entry(arms: Result, name: str) -> str:
    arm, own = arms.get(name), own_of(arms)
    if arm is None or not arm["ran"]:
        return ""
    if fault(arm) is not None:
        return "failed the gate"
    milliseconds = f"{1000 * arm['step_s']:.0f}"
    return milliseconds if own is None or own is arm else f"{milliseconds} ({arm['step_s'] / own['step_s']:.2f}x)"


def own_mfu(arms: Result) -> str:
    own = own_of(arms)
    return "" if own is None else f"{own['mfu']:.2f}"
