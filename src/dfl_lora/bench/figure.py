"""The picture of a benchmark: what a round costs by arm, and what a peer costs as there are more."""

from collections.abc import Mapping
from io import BytesIO
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dfl_lora.bench.targets import fault

Result = Mapping[str, Any]
PARTS = (("train_s", "training", "#2a6fb5"), ("mix_s", "mixing", "#c2611f"), ("evaluate_s", "evaluation", "#8a8f98"))
DOTS = 140


def figure(result: Result) -> bytes:
    """Returns the picture as PNG."""
    cells = result["headline"]
    drawn = Figure(figsize=(6.0, 2.6 * len(cells) + 2.6), layout="constrained")
    FigureCanvasAgg(drawn)
    axes = drawn.subplots(len(cells) + 1, 1, squeeze=False)[:, 0]
    for place, cell in zip(axes, cells, strict=False):
        rounds(place, cell)
    peers(axes[-1], result["scale"])
    content = BytesIO()
    drawn.savefig(content, format="png", dpi=DOTS, metadata={"Software": None})
    return content.getvalue()


def rounds(axes: Axes, cell: Result) -> None:
    """Draws a bar for each arm that passed the gate, by part."""
    arms = {name: arm for name, arm in cell["arms"].items() if fault(arm) is None}
    left = [0.0] * len(arms)
    for key, label, color in PARTS:
        values = [float(arm[key]["median"]) for arm in arms.values()]
        axes.barh(list(arms), values, left=left, color=color, label=label)
        left = [a + b for a, b in zip(left, values, strict=True)]
    axes.invert_yaxis()
    axes.set_title(cell["cell"], fontsize=9)
    axes.set_xlabel("seconds a round", fontsize=8)
    axes.tick_params(labelsize=7)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=7, frameon=False)


def peers(axes: Axes, scale: Result) -> None:
    """Draws milliseconds a peer and round over the number of peers."""
    for base, runs in scale.items():
        there = [run for run in runs if run["ran"]]
        if not there:
            continue
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        times = [1000 * (run["train_s"] + run["mix_s"]) / run["num_peers"] for run in there]
        axes.plot([run["num_peers"] for run in there], times, marker="o", label=base)
    axes.set_xlabel("peers", fontsize=8)
    axes.set_ylabel("ms a peer and round", fontsize=8)
    axes.tick_params(labelsize=7)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=7, frameon=False)
