"""Repeats the seed's study of the consensus error over its graphs: python scripts/consensus.py DIR [--figure PATH].

Runs recipes/seed/consensus.yaml for LoRA and DFL-LoRA on link3 ... link6 with three seeds into DIR, where a run is
not there yet, and prints the errors beside the published ones and the linear model.
"""

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from dfl_lora import graphs, mixing
from dfl_lora.reading import load_recipe
from dfl_lora.simulate import run_recipe

GRAPHS, SEEDS = ("link3", "link4", "link5", "link6"), (0, 1, 2)
SCHEDULES = {"lora": "LoRA", "freeze_a": "DFL-LoRA"}
PUBLISHED = {"lora": (12.42, 9.84, 5.37, 4.29), "freeze_a": (1.70, 1.38, 0.82, 0.53)}
RECIPE = Path(__file__).parents[1] / "recipes" / "seed" / "consensus.yaml"
Errors = Mapping[str, NDArray[np.float64]]
"""The consensus error of each schedule [graphs, seeds, rounds]."""


def run_all(into: Path, settings: list[str]) -> Errors:
    """Returns the consensus errors, from runs that are there or made now."""
    errors = {}
    for schedule in SCHEDULES:
        errors[schedule] = np.array(
            [[curve(into, graph, schedule, seed, settings) for seed in SEEDS] for graph in GRAPHS]
        )
    return errors


def curve(into: Path, graph: str, schedule: str, seed: int, settings: list[str]) -> list[float]:
    run = into / f"{graph}-{schedule}-{seed}"
    if not (run / "summary.json").exists():
        keys = {"peers.topology": graph, "method.schedule": schedule, "train.seed": seed}
        recipe = load_recipe(RECIPE, [f"{key}={value}" for key, value in keys.items()] + settings)
        resume = (run / "recipe.yaml").exists()
        run_recipe(recipe, run, [], resume=resume, overwrite=False)
    return [json.loads(line)["consensus_error"] for line in (run / "rounds.jsonl").read_text().splitlines()]


def profile(values: Any) -> str:
    """Returns numbers relative to the first."""
    return " / ".join(f"{v / values[0]:.2f}" for v in values)


def table(errors: Errors) -> str:
    """Returns what was measured in the last round, in Markdown."""
    last = {schedule: values[:, :, -1] for schedule, values in errors.items()}
    ratios = last["lora"] / last["freeze_a"]
    published = np.array(PUBLISHED["lora"]) / np.array(PUBLISHED["freeze_a"])
    ws = [mixing.matrix(graphs.GRAPHS[name](7), mixing.metropolis) for name in GRAPHS]
    model, pull = [mixing.expected_consensus(w) for w in ws], [mixing.expected_drift(w) for w in ws]
    rows = [("| |", [f" {g} |" for g in GRAPHS], " profile |"), ("|---|", ["---|" for _ in GRAPHS], "---|")]

    def row(name: str, values: Any, text: Callable[[Any], str], told: str) -> None:
        rows.append((f"| {name} |", [f" {text(v)} |" for v in values], f" {told} |"))

    for schedule, name in SCHEDULES.items():
        row(name, last[schedule], lambda v: f"{v.mean():.3f} ± {v.std(ddof=1):.3f}", profile(last[schedule].mean(1)))
    row("LoRA / DFL-LoRA", ratios, lambda v: f"{v.mean():.2f} ± {v.std(ddof=1):.2f}", "")
    for schedule, name in SCHEDULES.items():
        row(f"published, {name}", PUBLISHED[schedule], lambda v: f"{v:.2f}", profile(PUBLISHED[schedule]))
    row("published, LoRA / DFL-LoRA", published, lambda v: f"{v:.1f}", "")
    row("linear model, new noise each round", model, lambda v: f"{v:.3f}", profile(model))
    row("linear model, constant pull", pull, lambda v: f"{v:.3f}", profile(pull))
    return "\n".join(start + "".join(cells) + end for start, cells, end in rows)


def draw(errors: Errors, to: Path) -> None:
    """Draws the errors and their ratio over the rounds."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, graph in enumerate(GRAPHS):
        for schedule, style in (("lora", "-"), ("freeze_a", "--")):
            mean = errors[schedule][i].mean(0)
            left.plot(range(1, len(mean) + 1), mean, style, color=f"C{i}", label=f"{graph}, {SCHEDULES[schedule]}")
        ratio = (errors["lora"][i] / errors["freeze_a"][i]).mean(0)
        right.plot(range(1, len(ratio) + 1), ratio, color=f"C{i}", label=graph)
    left.set(xlabel="round", ylabel="consensus error", yscale="log")
    right.set(xlabel="round", ylabel="LoRA / DFL-LoRA")
    right.axhline(1, color="0.7", linewidth=0.8)
    left.legend(fontsize=6, ncols=2)
    right.legend(fontsize=7)
    figure.savefig(to, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("into", type=Path, metavar="DIR")
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE")
    given = parser.parse_args()
    errors = run_all(given.into, given.settings)
    print(table(errors))
    if given.figure is not None:
        draw(errors, given.figure)


if __name__ == "__main__":
    main()
