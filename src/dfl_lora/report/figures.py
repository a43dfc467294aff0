"""Figures of a run, each an <svg> element that can stand inside a page: no script, no address, nothing around it.

Nothing a person wrote is drawn: names and labels stand in the page, where the template escapes them.
The colours of the theme are drawn as fixed values and then written as CSS variables, so light and dark share an SVG.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from math import isfinite, nan, sqrt
from typing import Any
from xml.etree import ElementTree

import networkx as nx
import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Outline
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray
from scipy.special import stdtrit  # type: ignore[import-untyped, unused-ignore]

Array = NDArray[np.float64]
Record = Mapping[str, Any]

INK, MUTED, GRID, PAPER, FIRST, SECOND = "#1f2328", "#656d76", "#d8dee4", "#ffffff", "#2a6fb5", "#c2611f"
THEME = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--line)",
    PAPER: "var(--card)",
    FIRST: "var(--first)",
    SECOND: "var(--second)",
}
LABELS = ("#4c86c0", "#dd8f3d", "#53a374", "#c4637a", "#8d74bd", "#a98b5f", "#4fa9b3", "#b9a63a", "#8a8f98", "#d48fc0")
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "dfl-lora",
    "text.usetex": False,
    "text.parse_math": False,
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
}
NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
MOST_NUMBERED = 50
"""With more peers, those of a graph have no numbers."""
MOST_LINES = 64
"""With more peers, the thin lines of this many of them are drawn."""
MOST_MARKERS = 30
"""With more rounds, a curve has markers only where no line reaches."""


@dataclass(frozen=True)
class Key:
    """A row of a legend; the colour is CSS."""

    text: str
    color: str
    opacity: float = 1.0


@dataclass(frozen=True)
class Drawing:
    """An <svg> element, its legend and what a reader has to know about it."""

    svg: str
    legend: tuple[Key, ...] = ()
    note: str = ""


def number(record: Any, *path: str) -> float:
    """Returns the number at that path of nested mappings, nan where there is none."""
    for key in path:
        record = record.get(key) if isinstance(record, Mapping) else None
    return float(record) if isinstance(record, int | float) and not isinstance(record, bool) else nan


def series(records: Sequence[Record], *path: str) -> Array:
    """Returns the finite numbers at that path of each record, nan elsewhere."""
    values = np.array([number(record, *path) for record in records], dtype=np.float64)
    return np.where(np.isfinite(values), values, nan)


def per_peer(record: Record, key: str) -> Array:
    """Returns a metric of each peer in a round or a summary, empty where there is none."""
    measured = record.get(key)
    values = measured.get("per_peer") if isinstance(measured, Mapping) else None
    return np.array([number(v) for v in values] if isinstance(values, list) else [], dtype=np.float64)


def half_width(values: Array) -> float:
    """Returns the half width of the 95 % Student-t interval of the mean, nan for fewer than two values."""
    values = values[np.isfinite(values)]
    if values.size < 2:
        return nan
    return float(stdtrit(values.size - 1, 0.975) * values.std(ddof=1) / sqrt(values.size))


def metric(records: Sequence[Record], key: str, name: str) -> Drawing | None:
    """Returns a metric per peer and round, or None if it was never evaluated."""
    evaluated = [record for record in records if isfinite(number(record, key, "mean"))]
    if not evaluated:
        return None
    rounds, mean = series(evaluated, "round"), series(evaluated, key, "mean")
    rows = [per_peer(record, key) for record in evaluated]
    half, lines, peers = np.array([half_width(row) for row in rows]), chosen_lines(rows), max(map(len, rows))

    def draw(axes: Axes) -> None:
        alpha = 0.5 if len(lines.T) <= 20 else 0.2
        for line in lines.T:
            axes.plot(rounds, line, color=MUTED, linewidth=0.7, alpha=alpha, marker=".", markevery=alone(line))
        band(axes, rounds, mean - half, mean + half)
        curve(axes, rounds, mean, FIRST)
        round_axis(axes, rounds)

    legend = [Key("mean", THEME[FIRST])]
    legend += [Key("95 % interval of the mean", THEME[FIRST], 0.3)] if np.isfinite(half).any() else []
    legend += [Key("each peer", THEME[MUTED], 0.6)] if lines.size else []
    note = f"Thin lines: {lines.shape[1]} of {peers} peers." if lines.shape[1] < peers else ""
    return Drawing(svg(key, f"{name} of the peers in each round", draw), tuple(legend), note)


def chosen_lines(rows: Sequence[Array]) -> Array:
    """Returns values [rounds, lines] of at most MOST_LINES evenly chosen peers, nan where a peer has none."""
    peers = max(map(len, rows))
    table = np.full((len(rows), peers), nan)
    for row, values in zip(table, rows, strict=True):
        row[: len(values)] = np.where(np.isfinite(values), values, nan)
    return table[:, np.unique(np.linspace(0, peers - 1, min(peers, MOST_LINES)).round().astype(int))]


def loss(records: Sequence[Record]) -> Drawing | None:
    """Returns the training loss per round, or None if there is no finite one."""
    rounds, mean = series(records, "round"), series(records, "loss", "mean")
    if not np.isfinite(mean).any():
        return None

    def draw(axes: Axes) -> None:
        band(axes, rounds, series(records, "loss", "min"), series(records, "loss", "max"))
        curve(axes, rounds, mean, FIRST)
        round_axis(axes, rounds)

    missing = int(np.isnan(mean).sum())
    note = f"{missing} of {len(mean)} rounds have no finite loss and are left out." if missing else ""
    legend = (Key("mean", THEME[FIRST]), Key("lowest to highest", THEME[FIRST], 0.3))
    return Drawing(svg("loss", "Training loss in each round", draw), legend, note)


def consensus(records: Sequence[Record]) -> Drawing | None:
    """Returns the two distances of the peers from agreement, or None if there are none."""
    curves = {
        "consensus error": (series(records, "consensus_error"), FIRST),
        "product disagreement": (series(records, "product_disagreement"), SECOND),
    }
    return distances("consensus", "Distance of the peers from agreement in each round", records, curves)


def relative(records: Sequence[Record]) -> Drawing | None:
    """Returns the relative disagreement per round, or None if there is none."""
    curves = {"relative disagreement": (series(records, "relative_disagreement"), FIRST)}
    return distances("relative", "Relative disagreement of the peers in each round", records, curves)


def distances(
    name: str, label: str, records: Sequence[Record], curves: Mapping[str, tuple[Array, str]]
) -> Drawing | None:
    """Returns curves on a logarithmic axis, zeros as open triangles below; linear if all are zero."""
    rounds, values = series(records, "round"), np.concatenate([v for v, _ in curves.values()])
    positive = values[values > 0]
    if not np.isfinite(values).any():
        return None

    def draw(axes: Axes) -> None:
        if positive.size:
            log_axis(axes, positive.min(), positive.max())
        for distance, color in curves.values():
            curve(axes, rounds, np.where(distance > 0, distance, nan), color)
            zeros = np.where(distance == 0, positive.min() / 3 if positive.size else 0.0, nan)
            axes.plot(rounds, zeros, "v", color=color, markersize=5, markerfacecolor="none")
        if not positive.size:
            axes.set_ylim(-0.05, 1)
        round_axis(axes, rounds)

    note = "Open triangles are zeros, which a logarithmic axis cannot show." if (values == 0).any() else ""
    note = note if positive.size else "All are zero: the peers agree exactly."
    return Drawing(svg(name, label, draw), tuple(Key(text, THEME[color]) for text, (_, color) in curves.items()), note)


def topology(num_peers: int, edges: Sequence[tuple[int, int]]) -> Drawing:
    """Returns the graph, its peers on a circle, peer 0 on top, clockwise."""
    label = f"Graph of {num_peers} peers and {len(edges)} edges, drawn on a circle"
    note = "" if num_peers <= MOST_NUMBERED else "Peer 0 is on top; the others follow clockwise."
    return Drawing(svg("topology", label, lambda axes: circle(axes, num_peers, edges), 3.2), note=note)


def circle(axes: Axes, num_peers: int, edges: Sequence[tuple[int, int]]) -> None:
    """Draws a graph, its peers on a circle, peer 0 on top, clockwise."""
    layout = nx.circular_layout(nx.empty_graph(num_peers))
    places = np.array([layout[i] for i in range(num_peers)])[:, ::-1]
    ends = [(places[i], places[j], (nan, nan)) for i, j in edges]
    lines = np.array(ends).reshape(-1, 2)
    few, font = num_peers <= MOST_NUMBERED, 9 if num_peers <= 25 else 6
    width = min(1.1, max(0.15, 90 / max(1, len(edges))))
    axes.plot(lines[:, 0], lines[:, 1], color=MUTED, linewidth=width)
    axes.plot(places[:, 0], places[:, 1], "o", color=FIRST, markersize=min(18, max(3, 400 / num_peers)))
    for i, (x, y) in enumerate(places if few else ()):
        axes.text(x, y, str(i), color=PAPER, fontsize=font, ha="center", va="center_baseline")
    axes.set_aspect("equal")
    axes.margins(0.12)
    axes.set_axis_off()


def partition(counts: Array, labels: Sequence[str]) -> Drawing | None:
    """Returns stacked bars, the training rows [peers, labels] of each label, or None without labels."""
    num_peers = len(counts)
    if not counts.size:
        return None
    ends, colors = counts.cumsum(axis=1), label_colors(len(labels))
    step = next((step for step in (1, 2, 5, 10, 20, 50) if num_peers <= 30 * step), 100)

    def draw(axes: Axes) -> None:
        for i, color in enumerate(colors):
            axes.add_patch(PathPatch(bars(ends[:, i] - counts[:, i], ends[:, i]), facecolor=color, linewidth=0))
        axes.set_xlim(0, max(1.0, ends.max() * 1.02))
        axes.set_ylim(num_peers - 0.4, -0.6)
        axes.set_yticks(range(0, num_peers, step))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 2.5, 5, 10]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
        axes.set(xlabel="training rows", ylabel="peer")
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")

    label = f"Training rows of each label for each of {num_peers} peers"
    height = min(5.2, max(1.4, 0.8 + 0.34 * num_peers))
    legend = tuple(Key(text, color) for text, color in zip(labels, colors, strict=True))
    return Drawing(svg("partition", label, draw, height), legend)


def bars(starts: Array, ends: Array) -> Outline:
    """Returns one outline of the horizontal bars of all peers that are not empty."""
    half = 0.36 if len(starts) <= 40 else 0.5
    boxes = [
        Outline([(a, i - half), (b, i - half), (b, i + half), (a, i + half), (a, i - half)], closed=True)
        for i, (a, b) in enumerate(zip(starts, ends, strict=True))
        if b > a
    ]
    return Outline.make_compound_path(*boxes) if boxes else Outline(np.empty((0, 2)))


def label_colors(count: int) -> list[str]:
    """Returns a colour for each label: ten that are easy to tell apart, or as many as needed around a colour map."""
    if count <= len(LABELS):
        return list(LABELS[:count])
    return [to_hex(colormaps["turbo"](x)) for x in np.linspace(0.05, 0.95, count)]


def curve(axes: Axes, rounds: Array, values: Array, color: str) -> None:
    """Draws a curve with a marker for each round; where there are many, only for those no line reaches."""
    marked = alone(values) if len(values) > MOST_MARKERS else np.isfinite(values)
    axes.plot(rounds, values, color=color, linewidth=1.8, marker="o", markersize=4, markevery=marked)


def alone(values: Array) -> NDArray[np.bool_]:
    """Returns which values are finite between two that are not: no line would show them."""
    finite = np.isfinite(np.concatenate([[nan], values, [nan]]))
    result: NDArray[np.bool_] = finite[1:-1] & ~finite[:-2] & ~finite[2:]
    return result


def band(axes: Axes, rounds: Array, low: Array, high: Array) -> None:
    """Draws the area between two curves, a bar where there is one round only."""
    if len(rounds) == 1:
        axes.vlines(rounds, low, high, color=FIRST, alpha=0.3, linewidth=8)
    else:
        axes.fill_between(rounds, low, high, color=FIRST, alpha=0.18, linewidth=0)


def round_axis(axes: Axes, rounds: Array) -> None:
    """Makes the horizontal axis one of whole rounds."""
    if len(rounds) == 1:
        axes.set_xticks(rounds, [f"{rounds[0]:.0f}"])
    else:
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlabel("round")
    axes.grid(axis="y")


def log_axis(axes: Axes, low: float, high: float) -> None:
    """Makes the vertical axis logarithmic, with plain numbers that suit the range."""
    axes.set_yscale("log")
    decades = np.log10(high) - np.log10(low)
    logarithmic = LogLocator(subs=(1.0,) if decades > 3 else (1.0, 2.0, 5.0), numticks=8)
    axes.yaxis.set_major_locator(logarithmic if decades >= 1 else MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.4g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def svg(name: str, label: str, draw: Callable[[Axes], None], height: float = 2.8) -> str:
    """Returns what `draw` draws as an <svg> element; `name` tells its ids from those of the other figures."""
    with rc_context(STYLE):
        figure, file = Figure(figsize=(4.3, height), layout="constrained"), BytesIO()
        draw(figure.subplots())
        canvas: Any = FigureCanvasSVG(figure)
        canvas.print_svg(file, metadata=NO_METADATA)  # savefig would draw everything twice
    return inline(file.getvalue(), name, label)


def inline(document: bytes, name: str, label: str) -> str:
    """Returns an SVG document as an element for HTML: no namespaces, ids of its own, the page's font and colours."""
    root = ElementTree.fromstring(document)
    for element in root.iter():
        for style in element.findall("{*}style"):
            element.remove(style)
        element.tag = local(element.tag)
        element.attrib = {local(key): own(local(key), value, name) for key, value in element.attrib.items()}
    kept = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": label}
    root.attrib = kept
    return ElementTree.tostring(root, encoding="unicode")


def local(tag: str) -> str:
    """Returns a tag or an attribute without its namespace, which HTML knows by itself."""
    return tag.rpartition("}")[2]


def own(key: str, value: str, name: str) -> str:
    """Returns the value of an attribute with the figure's ids, the theme's colours and the page's font."""
    if key == "id":
        return f"{name}-{value}"
    if key == "style":
        value = re.sub(r"font-family:[^;]*;? *", "", value)
        return re.sub(r"#[0-9a-f]{6}", lambda found: THEME.get(found[0], found[0]), value)
    return re.sub(r"^(url\()?#", rf"\g<0>{name}-", value)
