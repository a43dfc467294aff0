"""A cell of the benchmark, run: all arms from one start on the same batches, one round each in turn (ABAB)."""

import gc
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from dfl_lora.bench.arms import Adapter, Arm, Kind
from dfl_lora.bench.arms.own import Own, reference
from dfl_lora.bench.arms.plain import DTYPES
from dfl_lora.bench.cells import Cell, Material
from dfl_lora.bench.gate import Course, Verdict, same_course, same_end
from dfl_lora.bench.planner import repeats
from dfl_lora.bench.setting import Setting, federation_of, setting_of
from dfl_lora.bench.table import NO_BF16, multiplies_bf16
from dfl_lora.bench.timing import Counted, Roof, Round, copied, counting, run_round
from dfl_lora.data.batches import Rows
from dfl_lora.machine import available_memory
from dfl_lora.recipe import Recipe

GATE_ROUNDS, COURSE_ROUNDS, COURSE_ROWS = 2, 4, 128
ALWAYS = 3
NO_TIME = "no time was left in the plan"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Entry:
    """An arm in one precision."""

    kind: Kind
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.kind.name}, {'fp32' if self.dtype == 'float32' else 'bf16'}"


@dataclass
class Oracle:
    """The reference, taken on as far as it is asked for."""

    arm: Own
    ends: list[list[Adapter]] = field(default_factory=list)
    losses: list[Sequence[float]] = field(default_factory=list)

    def end(self, rounds: int) -> list[Adapter]:
        """Returns the peers' adapters after so many rounds."""
        while len(self.ends) < rounds:
            self.losses.append(self.arm.train_round())
            self.arm.mix()
            self.ends.append(copied(self.arm.adapters()))
        return self.ends[rounds - 1]


@dataclass
class Trial:
    """An arm on its way through a cell."""

    entry: Entry
    arm: Arm
    startup_s: float
    roof: Roof
    counted: Counted = field(default_factory=Counted)
    first: Round | None = None
    timed: list[Round] = field(default_factory=list)
    done: int = 0
    ends: list[list[Adapter]] = field(default_factory=list)

    def warm(self) -> None:
        """Does the first round, counting: it is never timed, since it is cold, and counting takes time of its own."""
        self.first = self.run(counting(self.arm, self.counted))

    def run(self, count: AbstractContextManager[Any] | None = None) -> Round:
        taken = run_round(self.arm, self.roof, count or nullcontext())
        self.done += 1
        if self.done <= GATE_ROUNDS:
            self.ends.append(copied(self.arm.adapters()))
        return taken


@dataclass(frozen=True)
class Stage:
    """A cell with its rows read, and the reference for its gate."""

    cell: Cell
    material: Material
    recipe: Recipe
    setting: Setting
    oracle: Oracle

    @classmethod
    def of(cls, cell: Cell, material: Material, rounds: int) -> "Stage":
        recipe = cell.recipe(material, rounds)
        return cls(cell, material, recipe, setting_of(federation_of(recipe)), Oracle(reference(recipe)))


def run_cell(stage: Stage, entries: Sequence[Entry], budget_s: float, wanted: int, say: Say) -> dict[str, Any]:
    """Returns what every arm took in one cell.

    The arms come in the order of their importance: the first three always run, the others while there is time.
    """
    begun = perf_counter()
    cell, setting = stage.cell, stage.setting
    roofs = {dtype: Roof(tokens_of(setting) // setting.work.steps_of(setting.data.train[0]), setting.shape.hidden, t)
             for dtype, t in DTYPES.items()}  # fmt: skip
    trials, skipped = list[Trial](), dict[str, str]()
    for entry in entries:
        reason = why_not(entry, cell, setting)
        dearest = max((t.first.total_s for t in trials if t.first), default=0.0)
        if reason is None and len(trials) >= ALWAYS and perf_counter() - begun + 2 * dearest > budget_s:
            reason = NO_TIME
        if reason is None:
            say(f"  {entry.name}: first round")
            try:
                start = perf_counter()
                arm = entry.kind.make(stage.recipe, setting, entry.dtype)
                trial = Trial(entry, arm, perf_counter() - start, roofs[entry.dtype])
                trial.warm()
                trials.append(trial)
            except NotImplementedError as error:
                reason = str(error)
        if reason is not None:
            skipped[entry.name] = reason
    reserved = GATE_ROUNDS * median(t.first.total_s for t in trials if t.first) if trials else 0.0
    passes(trials, budget_s - (perf_counter() - begun) - reserved, wanted, say)
    work = work_of(setting, cell, max((t.done for t in trials), default=1))
    arms = {t.entry.name: told(t, verdict(t, stage), cell, setting, work) for t in trials}
    for name, reason in skipped.items():
        arms[name] = {"ran": False, "reason": reason}
    gc.collect()
    return {
        "cell": cell.name, "method": cell.method, "num_peers": cell.num_peers, "batch_size": cell.batch_size,
        "steps": cell.steps, "tokens": cell.tokens, "evaluated_rows": cell.evaluated,
        "real_tokens": work[0].tokens, "useful_flops": work[0].train,
        "gemm": {dtype: roof.rates for dtype, roof in roofs.items() if roof.rates},
        "seconds": perf_counter() - begun, "arms": arms,
    }  # fmt: skip


def why_not(entry: Entry, cell: Cell, setting: Setting) -> str | None:
    """Returns why an arm is not run, or None."""
    weights = sum(path.stat().st_size for path in setting.files.path.glob("*.safetensors"))
    needed = (cell.num_peers if entry.kind.copies else 1) * weights
    if needed > available_memory():
        return f"its bases need {needed / 2**30:.1f} GiB, {available_memory() / 2**30:.1f} GiB are available"
    if entry.dtype == "bfloat16" and not multiplies_bf16():
        return NO_BF16
    if entry.kind.only not in (None, cell.method):
        return f"{entry.kind.only} alone has it"
    return None


def passes(trials: Sequence[Trial], budget_s: float, wanted: int, say: Say) -> None:
    """Times the arms in turn, as often as the budget allows."""
    costs = {t.entry.name: t.first.total_s for t in trials if t.first is not None}
    untimed = {t.entry.name: cost for t in trials if not t.timed and (cost := costs[t.entry.name])}
    counts = repeats(costs, budget_s + sum(costs.values()) - sum(untimed.values()), wanted)
    for number in range(wanted):
        for trial in trials:
            if len(trial.timed) <= number < counts[trial.entry.name]:
                trial.timed.append(trial.run())
                say(f"  {trial.entry.name}: {trial.timed[-1].total_s:.2f} s a round")


@dataclass(frozen=True)
class Work:
    """The useful work of one round."""

    tokens: int
    train: float
    evaluate: float


def lengths_of(setting: Setting, round: int) -> Rows:
    """Returns the lengths of all rows that all peers train on in a round, counted from 0."""
    result = []
    for peer, shard in setting.data.train.items():
        steps = setting.work.steps_of(shard)
        for s in range(steps):
            result.append(shard.source.lengths[setting.work.order.rows(shard, peer, round * steps + s)])
    return np.concatenate(result)


def tokens_of(setting: Setting) -> int:
    return int(lengths_of(setting, 0).sum())


def work_of(setting: Setting, cell: Cell, rounds: int) -> list[Work]:
    """Returns the useful work of each round."""
    evaluated = [shard.source.lengths[shard.rows] for shard in setting.data.validation.values()]
    evaluation = sum(map(setting.shape.evaluation_flops, evaluated))
    works = []
    for t in range(rounds):
        lengths = lengths_of(setting, t)
        train = setting.shape.train_flops(lengths, frozen_a="A" not in setting.schedule(1).trained)
        works.append(Work(int(lengths.sum()), train, evaluation))
    return works


def verdict(trial: Trial, stage: Stage) -> Verdict:
    """Returns whether an arm did the work."""
    if trial.entry.dtype == "float32":
        return same_end(trial.ends[-1], stage.oracle.end(len(trial.ends)), stage.setting.placement)
    recipe = replace(stage.cell, steps=1).recipe(
        stage.material, COURSE_ROUNDS, evaluate={"rows": COURSE_ROWS, "metric": "accuracy"}
    )
    arm = trial.entry.kind.make(recipe, setting_of(federation_of(recipe)), trial.entry.dtype)
    return same_course(course(arm), course(reference(recipe)), stage.setting.placement)


def course(arm: Arm) -> Course:
    """Returns the way of an arm through rounds of one step."""
    losses, gradient = [], list[Adapter]()
    for t in range(COURSE_ROUNDS):
        losses.append(arm.train_round())
        gradient = gradient if t else copied(arm.first_moments())
        arm.mix()
    return Course(gradient, losses, arm.evaluate())


def told(trial: Trial, verdict: Verdict, cell: Cell, setting: Setting, work: Sequence[Work]) -> dict[str, Any]:
    """Returns an arm's figures: medians of its timed rounds and all of them."""
    rounds, first = trial.timed, 1 if trial.timed[0] is not trial.first else 0
    pairs = list(zip(rounds, work[first:], strict=False))
    executed = trial.counted.flops / work[0].train
    return {
        "ran": True, "dtype": trial.entry.dtype, "gate": verdict.as_json(), "repeats": len(rounds),
        "warm": first == 1, "startup_s": trial.startup_s,
        "round_s": spread([r.total_s for r in rounds]),
        "train_s": spread([r.train_s for r in rounds]), "mix_s": spread([r.mix_s for r in rounds]),
        "evaluate_s": spread([r.evaluate_s for r in rounds]),
        "step_s": median(r.train_s for r in rounds) / cell.steps,
        "parts": {part: median(r.parts[part] for r in rounds) for part in rounds[0].parts},
        "tokens_per_s": median(w.tokens / r.train_s for r, w in pairs),
        "mfu": median(w.train / r.train_s / r.peak for r, w in pairs),
        "hfu": executed * median(w.train / r.train_s / r.peak for r, w in pairs),
        "mfu_round": median((w.train + w.evaluate) / r.total_s / r.peak for r, w in pairs),
        "executed_over_useful": executed,
        "padding_efficiency": work[0].tokens / trial.counted.tokens if trial.counted.tokens else None,
        "loss": [sum(r.losses) / len(r.losses) for r in rounds],
    }  # fmt: skip


def spread(values: Sequence[float]) -> Mapping[str, Any]:
    """Returns the median, the least and the most of some seconds, and all."""
    return {"median": median(values), "min": min(values), "max": max(values), "all": list(values)}
