"""Flower in a cell: its job, its gate and its times."""

from subprocess import TimeoutExpired
from typing import Any

from dfl_lora.bench.arms.flower import Mode, Outcome, missing, run_job
from dfl_lora.bench.cells import Cell
from dfl_lora.bench.gate import ACCURACY, END, LOSS, Verdict, distances, judged, mean
from dfl_lora.bench.table import NO_BF16, multiplies_bf16
from dfl_lora.bench.trial import GATE_ROUNDS, NO_TIME, Stage, spread

ROUNDS = GATE_ROUNDS
"""One to warm up (the base is loaded, workers start), and one that is timed: start-up costs more than rounds."""


def run_flower(stage: Stage, mode: Mode, dtype: str, limit_s: float) -> dict[str, Any]:
    """Returns what Flower's simulation took in a cell, or why it was not run."""
    reason = missing() or (NO_BF16 if dtype == "bfloat16" and not multiplies_bf16() else None)
    if reason is None and limit_s < 1:
        reason = NO_TIME
    if reason is not None:
        return {"ran": False, "reason": reason}
    try:
        outcome = run_job(stage.setting, ROUNDS, dtype, mode, limit_s)
    except TimeoutExpired:
        return {"ran": False, "reason": f"it was stopped after {limit_s:.0f} s, its share of the plan"}
    except RuntimeError as error:
        return {"ran": False, "reason": str(error)}
    return told(outcome, verdict_of(outcome, stage, dtype), stage.cell, dtype)


def verdict_of(outcome: Outcome, stage: Stage, dtype: str) -> Verdict:
    """Returns whether Flower did the work; it tells no gradient, so in bfloat16 its losses and accuracies judge it."""
    end = stage.oracle.end(ROUNDS)
    if dtype == "float32":
        measured = distances(outcome.ends, end, stage.setting.placement)
        return judged(measured, dict.fromkeys(measured, END))
    theirs = stage.oracle.losses
    mine = [[mean(own) for own in told["losses"]] for told in outcome.out["rounds"]]
    measured = {
        "loss": max(abs(mean(x) - mean(y)) / mean(y) for x, y in zip(mine, theirs, strict=True)),
        "accuracy": abs(mean(outcome.out["rounds"][-1]["accuracies"]) - mean(stage.oracle.arm.evaluate())),
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
