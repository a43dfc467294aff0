"""Flower in a cell: its job, its gate and its times."""

from collections.abc import Mapping, Sequence
from subprocess import TimeoutExpired
from typing import Any

from dfl_lora.bench.arms.flower import Mode, Outcome, missing, run_job
from dfl_lora.bench.arms.own import reference
from dfl_lora.bench.cells import Cell, Material
from dfl_lora.bench.gate import ACCURACY, END, LOSS, Verdict, distances, judged, mean
from dfl_lora.bench.setting import Setting, federation_of, setting_of
from dfl_lora.bench.table import NO_BF16, multiplies_bf16
from dfl_lora.bench.trial import spread

ROUNDS = 2
"""One to warm up (the base is loaded, workers start), and one that is timed: start-up costs more than rounds."""


def run_flower(cell: Cell, material: Material, mode: Mode, dtype: str, limit_s: float) -> dict[str, Any]:
    """Returns what Flower's simulation took in a cell, or why it was not run."""
    reason = missing() or (NO_BF16 if dtype == "bfloat16" and not multiplies_bf16() else None)
    if reason is None and limit_s < 1:
        reason = "no time was left in the plan"
    if reason is not None:
        return {"ran": False, "reason": reason}
    recipe = cell.recipe(material, ROUNDS)
    setting = setting_of(federation_of(recipe))
    try:
        outcome = run_job(setting, ROUNDS, dtype, mode, limit_s)
    except TimeoutExpired:
        return {"ran": False, "reason": f"it was stopped after {limit_s:.0f} s, its share of the plan"}
    except RuntimeError as error:
        return {"ran": False, "reason": str(error)}
    oracle = reference(recipe)
    losses = list[Sequence[float]]()
    for _ in range(ROUNDS):
        losses.append(oracle.train_round())
        oracle.mix()
    verdict = verdict_of(outcome, oracle.adapters(), losses, oracle.evaluate(), setting, dtype)
    return told(outcome, verdict, cell, dtype)


def verdict_of(
    outcome: Outcome,
    ends: Sequence[Mapping[str, Any]],
    losses: Sequence[Sequence[float]],
    accuracies: Sequence[float],
    setting: Setting,
    dtype: str,
) -> Verdict:
    """Returns whether Flower did the work; it tells no gradient, so in bfloat16 its losses and accuracies judge it."""
    if dtype == "float32":
        measured = distances(outcome.ends, ends, setting.placement)
        return judged(measured, dict.fromkeys(measured, END))
    curves = [(mean([mean(own) for own in r["losses"]]), mean(theirs)) for r, theirs in zip(
        outcome.out["rounds"], losses, strict=True)]  # fmt: skip
    measured = {
        "loss": max(abs(x - y) / y for x, y in curves),
        "accuracy": abs(mean(outcome.out["rounds"][-1]["accuracies"]) - mean(accuracies)),
    }
    return judged(measured, {"loss": LOSS, "accuracy": ACCURACY + 1e-9})


SECONDS = {"round_s": "total_s", "train_s": "train_s", "mix_s": "mix_s", "evaluate_s": "evaluate_s"}


def told(outcome: Outcome, verdict: Verdict, cell: Cell, dtype: str) -> dict[str, Any]:
    """Returns the figures of a job as those of the other arms."""
    timed = outcome.out["rounds"][1:]
    seconds = {name: spread([r[key] for r in timed]) for name, key in SECONDS.items()}
    return {
        "ran": True, "dtype": dtype, "gate": verdict.as_json(), "repeats": len(timed), "warm": True, **seconds,
        "startup_s": outcome.out["startup_s"], "step_s": seconds["train_s"]["median"] / cell.steps,
        "peak_rss_bytes": outcome.out["peak_rss_bytes"], "versions": outcome.out["versions"], "parts": {},
    }  # fmt: skip
