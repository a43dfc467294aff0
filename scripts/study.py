"""Runs the study of recipes/study/study.yaml, block by block, and writes docs/results: rows, curves, figures, tables.

    python scripts/study.py [BLOCK...] [--stop-after MINUTES] [--part K/N]
                                                    runs what has no row yet; no block: all
    python scripts/study.py --report                                writes the page from the rows there are

A run is known by block, arm, seed and learning rate; seeds come before arms, so that what is there can always be
compared in pairs. Run directories lie under runs/study and go on where they were stopped.
"""

import argparse
import csv
import io
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import yaml
from scipy import stats

matplotlib.rcParams["svg.hashsalt"] = "the same figure, the same file"
matplotlib.rcParams["svg.fonttype"] = "none"
HERE = Path(__file__).parent.parent
RECIPES, RESULTS, RUNS = HERE / "recipes/study", HERE / "docs/results", HERE / "runs/study"
ROWS, CURVES, PAGE = RESULTS / "runs.csv", RESULTS / "curves.csv", RESULTS / "README.md"
COLUMNS = (
    "block", "arm", "seed", "rate", "mean", "worst", "consensus", "relative_disagreement", "late_disagreement",
    "consensus_error", "bytes_per_peer", "recipe", "per_peer",
)  # fmt: skip
CELLS = (
    "arm", "seeds", "mean", "worst peer", "consensus", "minus server", "minus lora", "late disagreement",
    "bytes / lora's",
)  # fmt: skip
Row = dict[str, str]
HEAD = """\
# What the study found

Made by `python scripts/study.py --report` from [runs.csv](runs.csv) and [curves.csv](curves.csv); what was run is in
[recipes/study](../../recipes/study). Accuracies are over peers, ± half of a 95 % interval (Student's t over seeds);
`minus server` and `minus lora` are the difference of the mean to the server's average and to LoRA gossip, paired by
seed (a block without them is paired with one that runs the same recipe); late disagreement is the median over seeds of
the median relative disagreement of the second half of the rounds.
"""


@dataclass(frozen=True)
class Trial:
    """One run of the study."""

    block: str
    arm: str
    seed: int
    rate: float
    recipe: Path
    settings: Mapping[str, Any]

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.block, self.arm, str(self.seed), f"{self.rate:g}"

    @property
    def folder(self) -> Path:
        name = self.arm.replace(", ", "-").replace(" ", "-")
        return RUNS / self.block / f"{name}-{self.seed}-{self.rate:g}"

    def command(self, verb: str, *more: str) -> list[str]:
        values = {**self.settings, "train.seed": self.seed, "train.learning_rate": self.rate}
        sets = [part for key, value in values.items() for part in ("--set", f"{key}={value}")]
        return [sys.executable, "-m", "dfl_lora", verb, str(self.recipe), *sets, *more]


def trials(study: Mapping[str, Any], blocks: Sequence[str]) -> Iterator[Trial]:
    """Yields the runs of some blocks, seed by seed."""
    for name in blocks:
        block = study["blocks"][name]
        for seed in range(block["seeds"]):
            for arm in block["arms"]:
                settings = {**block.get("set", {}), **study["arms"][arm]}
                own = settings.pop("train.learning_rate", 1e-3)
                for rate in block.get("rates", [own]):
                    yield Trial(name, arm, seed, rate, RECIPES / block["recipe"], settings)


def read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Adds rows to a file in one write, so that several parts of the study can run at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    if not path.exists():
        writer.writeheader()
    writer.writerows(rows)
    with path.open("a", newline="") as file:
        file.write(text.getvalue())


def run(trial: Trial) -> None:
    """Runs a trial to its end, and adds what came of it to the rows and the curves."""
    known = (trial.folder / "recipe.yaml").exists()
    more = ["--out", str(trial.folder), "--json", *(["--resume"] if known else [])]
    subprocess.run(trial.command("run", *more), check=True, stdout=subprocess.DEVNULL)
    summary = json.loads((trial.folder / "summary.json").read_text())
    lines = [json.loads(line) for line in (trial.folder / "rounds.jsonl").read_text().splitlines()]
    apart = [line.get("relative_disagreement") or 0.0 for line in lines]
    accuracy = summary["accuracy"]
    row = dict(zip(COLUMNS, (
        *trial.key, *(f"{accuracy[name]:.4f}" for name in ("mean", "min", "consensus")), f"{apart[-1]:.3g}",
        f"{np.median(apart[len(apart) // 2 :]):.3g}", f"{summary['consensus_error']:.3g}",
        round(summary["bytes_sent_per_peer"]), summary["recipe_digest"][:12],
        " ".join(f"{a:.4f}" for a in accuracy["per_peer"]),
    ), strict=True))  # fmt: skip
    columns = ("block", "arm", "seed", "rate", "round", "loss", "relative_disagreement")
    curve = [
        dict(zip(columns, (*trial.key, line["round"], f"{line['loss']['mean']:.4f}", f"{far:.4g}"), strict=True))
        for line, far in zip(lines, apart, strict=True)
    ]
    append(CURVES, curve, columns)
    append(ROWS, [row], COLUMNS)


def key_of(row: Row) -> tuple[str, str, str, str]:
    return row["block"], row["arm"], row["seed"], row["rate"]


def interval(values: Sequence[float]) -> str:
    """Returns mean ± half of the 95 % interval of Student's t."""
    if not values:
        return "–"
    if len(values) < 2:
        return f"{np.mean(values):.3f}"
    half = stats.sem(values) * stats.t.ppf(0.975, len(values) - 1)
    return f"{np.mean(values):.3f} ± {half:.3f}"


def named(rows: Sequence[Row], block: str) -> dict[str, list[Row]]:
    """Returns a block's rows by arm and learning rate."""
    found = dict[str, list[Row]]()
    for row in rows:
        if row["block"] == block:
            found.setdefault(f"{row['arm']} ({float(row['rate']):g})", []).append(row)
    return found


def table(rows: Sequence[Row], block: str, study: Mapping[str, Any]) -> Iterator[str]:
    """Yields the table of a block: paired with the server and with LoRA gossip where they were run at one rate."""
    arms = named(rows, block)
    server, lora = (reference(rows, block, study, name) for name in ("server", "lora"))
    yield f"| {' | '.join(CELLS)} |"
    yield "|---" * len(CELLS) + "|"
    for arm, found in arms.items():
        cells = [interval([number(row, name) for row in found]) for name in ("mean", "worst", "consensus")]
        for other in (server, lora):
            pairs = paired(found, other, "mean") if found != other else []
            cells.append(interval(pairs) + (f" (of {len(pairs)})" if 0 < len(pairs) < len(found) else ""))
        cells.append(f"{np.median([number(row, 'late_disagreement') for row in found]):.2g}")
        cost = np.mean([number(row, "bytes_per_peer") for row in found])
        cells.append(f"{cost / np.mean([number(row, 'bytes_per_peer') for row in lora]):.2f}" if lora else "–")
        yield f"| {arm} | {len(found)} | {' | '.join(cells)} |"


def reference(rows: Sequence[Row], block: str, study: Mapping[str, Any], name: str) -> list[Row]:
    """Returns the rows of an arm: the block's own, else those of a block that runs the same recipe as it is."""

    def asks(name: str) -> tuple[Any, Any]:
        return study["blocks"][name]["recipe"], study["blocks"][name].get("set")

    same = [other for other, has in study["blocks"].items() if name in has["arms"] and asks(other) == asks(block)]
    for other in (block, *same):
        if found := alone(named(rows, other), name):
            return found
    return []


def alone(arms: Mapping[str, list[Row]], name: str) -> list[Row]:
    """Returns the rows of an arm of which there is one learning rate, else none."""
    found = [rows for arm, rows in arms.items() if arm.startswith(f"{name} (")]
    return found[0] if len(found) == 1 else []


def paired(found: Sequence[Row], other: Sequence[Row], name: str) -> list[float]:
    """Returns the differences of a column, of the seeds that both have."""
    theirs = {row["seed"]: number(row, name) for row in other}
    return [number(row, name) - theirs[row["seed"]] for row in found if row["seed"] in theirs]


def number(row: Row, name: str) -> float:
    return float(row[name])


def figure(rows: Sequence[Row], curves: Sequence[Row], block: str) -> Path:
    """Draws each seed's accuracy, and how far peers' products are apart by round: the median over seeds."""
    arms, apart = named(rows, block), named(curves, block)
    fig, (left, right) = plt.subplots(1, 2, figsize=(12, max(4, 0.3 * len(arms))))
    for place, (arm, found) in enumerate(arms.items()):
        style = {"color": f"C{place % 10}", "linestyle": ("-", "--", ":")[place // 10 % 3]}
        means = [number(row, "mean") for row in found]
        left.plot(means, [place] * len(means), "o", color=style["color"], alpha=0.5)
        left.plot(np.mean(means), place, "k|", markersize=14)
        points = dict[int, list[float]]()
        for row in apart[arm]:
            points.setdefault(int(row["round"]), []).append(number(row, "relative_disagreement"))
        right.plot(list(points), [float(np.median(v)) for v in points.values()], label=arm, **style)
    left.set(xlabel="accuracy: each seed, and their mean", yticks=range(len(arms)), yticklabels=arms, title=block)
    left.invert_yaxis()
    right.set(xlabel="round", ylabel="relative disagreement", yscale="log")
    right.legend(fontsize=6)
    fig.tight_layout()
    path = RESULTS / f"{block}.svg"
    fig.savefig(path, metadata={"Date": None})
    plt.close(fig)
    return path


def legend(study: Mapping[str, Any], rows: Sequence[Row]) -> Iterator[str]:
    """Yields the table of the arms there are rows of: what each sets, beside its learning rate."""
    yield "| arm | what it sets |"
    yield "|---|---|"
    for arm in dict.fromkeys(row["arm"] for row in rows):
        told = [f"`{key}={value}`" for key, value in study["arms"][arm].items() if key != "train.learning_rate"]
        yield f"| {arm} | {', '.join(told) or 'nothing: LoRA, plain gossip, fp32'} |"


def report(study: Mapping[str, Any]) -> None:
    """Writes the page of tables, and a figure for each block."""
    rows, curves = read(ROWS), read(CURVES)
    rows.sort(key=lambda row: "rates" in study["blocks"][row["block"]])  # what a rate was chosen by comes last
    text = [HEAD, *legend(study, rows)]
    for block in dict.fromkeys(row["block"] for row in rows):
        picture = figure(rows, curves, block).name
        settings = study["blocks"][block].get("set", {}).items()
        recipe = ", ".join([study["blocks"][block]["recipe"], *(f"{key}={value}" for key, value in settings)])
        text += [f"\n## {block}\n", f"`{recipe}`; learning rates in brackets.", "", *table(rows, block, study)]
        text += ["", f"![Accuracy and disagreement in {block}]({picture})"]
    PAGE.write_text("\n".join(text) + "\n", encoding="utf-8")


def main() -> None:
    study = yaml.safe_load((RECIPES / "study.yaml").read_text(encoding="utf-8"))
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("blocks", nargs="*", choices=[*study["blocks"], []])
    asked.add_argument("--stop-after", type=float, metavar="MINUTES", help="begin no run after so many minutes")
    asked.add_argument("--report", action="store_true", help="write the page and run nothing")
    asked.add_argument("--part", default="1/1", metavar="K/N", help="run every N-th run alone, from the K-th on")
    given, start = asked.parse_args(), monotonic()
    first, parts = map(int, given.part.split("/"))
    planned = list(trials(study, given.blocks or list(study["blocks"])))[first - 1 :: parts]
    for trial in () if given.report else planned:
        if trial.key in {key_of(row) for row in read(ROWS)}:
            continue
        if given.stop_after is not None and monotonic() - start > 60 * given.stop_after:
            break
        print(f"{(monotonic() - start) / 60:6.1f} min  {trial.block}: {trial.arm}, seed {trial.seed}", flush=True)
        run(trial)
    report(study)


if __name__ == "__main__":
    main()
