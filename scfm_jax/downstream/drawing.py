"""What the figures of all reports share: palette, style, and the panels that more than one of them draws."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from scfm_jax.downstream.page import Drawing

# Okabe & Ito (2008), told apart by colour-blind readers; yellow last, it is faint on white.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#7A7A7A", "#F0E442")
INK = "#22282e"
# The palest blue of matplotlib's map is lost on white.
BLUES = LinearSegmentedColormap.from_list("blues", mpl.colormaps["Blues"](np.linspace(0.2, 1, 256)))
DPI = 160
WIDTH = 4.4  # inches, of a figure that is read on a phone
STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#8a939b",
    "axes.linewidth": 0.8,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": "#5b646c",
    "ytick.color": "#5b646c",
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


@contextmanager
def house_style() -> Iterator[None]:
    """The style of every figure, whatever the user's matplotlibrc says."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(STYLE)
        yield


def save(figure: Figure, path: Path, caption: str) -> Drawing:
    """Write a PNG; on a page it is as wide as in print."""
    # matplotlib's version is the one thing in the file that is not drawn.
    figure.savefig(path, dpi=DPI, format="png", metadata={"Software": None})
    return Drawing(path, caption, figure.get_figwidth() * 6)


def class_colour(index: int) -> tuple[float, float, float]:
    """The palette, then its colours mixed with white, then with black: 24 in all before one returns."""
    mix, amount = ((1.0, 0.0), (1.0, 0.5), (0.0, 0.45))[index // len(PALETTE) % 3]
    r, g, b = ((1 - amount) * c + amount * mix for c in to_rgb(PALETTE[index % len(PALETTE)]))
    return r, g, b


def class_handle(name: str, colour: Any) -> Line2D:
    """A legend's entry for the cells of one class."""
    return Line2D([], [], linestyle="", marker="o", markersize=6, color=colour, label=name)


def cell_size(xy: Float[np.ndarray, "n 2"], box: tuple[float, float]) -> float:
    """Area, in points squared, a little under that at which discs of evenly spread cells touch.

    `box` is the width and the height, in inches, of the panel that holds them.
    """
    span = np.maximum(np.ptp(xy, axis=0), 1e-9) if len(xy) else np.ones(2)
    scale = 72 * min(box[0] / span[0], box[1] / span[1])
    return float(np.clip(0.8 * scale**2 * np.prod(span) / max(len(xy), 1), 1.0, 40.0))


def place_axes(ax: Axes, unit: str) -> None:
    """Equal scales and labels of a map of places; `unit` is empty where it is not known."""
    x, y = (f"{axis} ({unit})" if unit else axis for axis in "xy")
    ax.set(aspect="equal", xlabel=x, ylabel=y)


def grid(ax: Axes) -> None:
    """Faint lines behind the data, across."""
    ax.grid(axis="y", color="#e8ecef", linewidth=0.7)
    ax.set_axisbelow(True)


def draw_agreement(
    figure: Figure, true: Float[np.ndarray, " n"], predicted: Float[np.ndarray, " n"], what: str, count: str
) -> None:
    """Density of predicted against true values, with the diagonal and means of twentieths.

    `what` names the quantity and `count` what is counted. Two entries at least.
    """
    high = float(max(true.max(), predicted.max()))
    low = min(0.0, float(predicted.min()), float(true.min()))
    high = high + 0.02 * (high - low) or 1.0
    ax = figure.subplots()
    bins = ax.hexbin(
        true,
        predicted,
        gridsize=45,
        bins="log",
        mincnt=1,
        cmap=BLUES,
        linewidths=0.1,
        extent=(low, high) * 2,
    )
    dashes = (0, (4, 3))
    ax.plot([low, high], [low, high], color=INK, linewidth=1, linestyle=dashes)
    edges = np.quantile(predicted, np.linspace(0, 1, 21))
    group = np.searchsorted(edges[1:-1], predicted)
    means = [(true[group == g].mean(), predicted[group == g].mean()) for g in np.unique(group)]
    style: Any = {"color": PALETTE[5], "marker": "o", "markersize": 3.5}
    ax.plot(*zip(*means), linewidth=1.4, **style)
    ax.set(
        xlim=(low, high),
        ylim=(low, high),
        aspect="equal",
        xlabel=f"true {what}",
        ylabel=f"predicted {what}",
    )
    bar = figure.colorbar(bins, ax=ax, label=count, format="{x:,.0f}", shrink=0.7, aspect=24)
    bar.outline.set_visible(False)
    handles = [
        Line2D([], [], color=INK, linewidth=1, linestyle=dashes, label="predicted = true"),
        Line2D([], [], **style, label="mean of each twentieth, by prediction"),
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=2, fontsize=8.5)


def legend_below(figure: Figure, handles: Sequence[Line2D], *, columns: int, **style: Any) -> None:
    """A legend under the panels."""
    columns = max(1, min(len(handles), columns))
    figure.legend(
        handles=list(handles), loc="outside lower center", ncols=columns, **{"handletextpad": 0.2, **style}
    )
