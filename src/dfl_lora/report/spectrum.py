"""One picture of a graph and its W: who talks to whom, the weights, and the eigenvalues that say how fast peers agree.

An exchange multiplies each eigenvector of W by its eigenvalue. That of the mean is 1; the largest modulus of the
others is rho, by which disagreement shrinks, and 1 - rho is the spectral gap.
"""

from io import BytesIO
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from dfl_lora.errors import UserError
from dfl_lora.files import write_atomically
from dfl_lora.graphs import Graph
from dfl_lora.mixing import Matrix, eigenvalues, rho
from dfl_lora.report.figures import FIRST, GRID, INK, MUTED, PAPER, SECOND, STYLE, circle

ENDINGS = (".png", ".svg", ".pdf")
OF_ONE = ("who talks to whom", "mixing matrix W", "eigenvalues of W")
OF_ROUNDS = ("who talks to whom in any round", "mean of W over the rounds", "its eigenvalues")
"""What the panels are called, of one graph and of several rounds."""
MOST_WEIGHTS = 12
"""With more peers, the weights are colours only."""
WEIGHTS = LinearSegmentedColormap.from_list("weights", [PAPER, FIRST])


def check_place(path: Path) -> None:
    """Raises unless a picture can be written to the path."""
    if path.suffix.lower() not in ENDINGS:
        raise UserError(f"A picture cannot be written to {path}; give a file that ends in {', '.join(ENDINGS)}.")
    if path.is_dir():
        raise UserError(f"{path} is a folder; give a file that ends in {', '.join(ENDINGS)}.")


def picture(
    graph: Graph, w: Matrix, title: str, caption: str, path: Path, panels: tuple[str, str, str] = OF_ONE
) -> None:
    """Writes the three panels to a file, as its ending says; the same graph gives the same bytes."""
    file, kind = BytesIO(), path.suffix.lower().removeprefix(".")
    with rc_context({**STYLE, "figure.facecolor": PAPER}):
        figure = Figure(figsize=(12, 4.4), layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.08))
        who, weights, spectrum = figure.subplots(1, 3, width_ratios=(1, 1.12, 1.1))
        figure.suptitle(title, x=0.012, ha="left", fontsize=13, fontweight="bold")
        circle(who, graph.num_peers, sorted(graph.edges))
        heat(weights, w)
        stems(spectrum, w)
        for axes, panel in zip((who, weights, spectrum), panels, strict=True):
            axes.set_title(panel, loc="left", color=MUTED, fontsize=10)
        figure.supxlabel(caption, x=0.012, ha="left", fontsize=9, color=INK)
        dated = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
        figure.savefig(file, format=kind, dpi=150, metadata=dated[kind])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, file.getvalue())


def heat(axes: Axes, w: Matrix) -> None:
    """Draws W as a heat map, with its numbers where they can be read."""
    n, most = len(w), float(w.max())
    image = axes.imshow(w, cmap=WEIGHTS, vmin=0, vmax=most, interpolation="nearest")
    if n <= MOST_WEIGHTS:
        axes.set_xticks(range(n))
        axes.set_yticks(range(n))
        axes.set_xticks(np.arange(n - 1) + 0.5, minor=True)
        axes.set_yticks(np.arange(n - 1) + 0.5, minor=True)
        axes.grid(which="minor", color=GRID)
        for (i, j), weight in np.ndenumerate(w):
            if weight > 0:
                ink = PAPER if weight > 0.6 * most else INK
                axes.text(j, i, short(weight), color=ink, fontsize=9 if n <= 8 else 7.5, ha="center", va="center")
    else:
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 4, 5, 10]))
        bar = axes.figure.colorbar(image, ax=axes, shrink=0.75, pad=0.02)
        bar.outline.set_visible(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(which="both", length=0)
    axes.set(xlabel="from peer", ylabel="to peer")


def stems(axes: Axes, w: Matrix) -> None:
    """Draws the eigenvalues of W, largest first; those of modulus rho, the slowest to vanish, stand out."""
    values, shrinks = np.sort(eigenvalues(w))[::-1], rho(w)
    places = np.arange(1, len(values) + 1)
    slow = np.isclose(np.abs(values), shrinks, rtol=0, atol=1e-9) & (places > 1) & (shrinks > 0)
    small = len(values) > 64
    for chosen, color in ((places == 1, MUTED), ((places > 1) & ~slow, FIRST), (slow, SECOND)):
        axes.vlines(places[chosen], 0, values[chosen], color=color, linewidth=0.8 if small else 1.6)
        axes.plot(places[chosen], values[chosen], "o", color=color, markersize=2.5 if small else 5)
    axes.axhline(0, color=MUTED, linewidth=0.8)
    if 0 < shrinks < 1:
        axes.axhspan(shrinks, 1, color=SECOND, alpha=0.12, linewidth=0)
    axes.set_ylim(min(0.0, float(values[-1])) - 0.08, 1.08)
    axes.set_xlim(0.4, len(values) + 0.6)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 4, 5, 10]))
    axes.grid(axis="y")
    axes.set_title(f"rho {shrinks:.4g}, gap {1 - shrinks:.4g}", loc="right", color=SECOND, fontsize=10)
    axes.set_xlabel("largest first")


def short(weight: float) -> str:
    """Returns a weight in two digits without the zero in front, such as .25."""
    return f"{weight:.2f}".removeprefix("0").replace("1.00", "1")
