"""What the figures of laws share: series told apart in grey, by marker, by dash and by how dark they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import (
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
    ScalarFormatter,
)

from scfm_jax.downstream.drawing import legend_below

FAINT = "#b4bbc1"
MARKERS = "osD^vPX"
DASHES: Any = (
    "-",
    *((0, pattern) for pattern in ((5, 2), (1, 1.2), (6, 1.5, 1, 1.5), (8, 3), (2, 2), (3, 1))),
)
SIZE = {
    "parameters_without_embeddings": "parameters without embeddings",
    "parameters": "parameters",
}
DATA = {"unique_cells": "unique cells", "cells": "cells seen", "tokens": "tokens seen"}
_LIGHTEST = 0.75  # of viridis, from 0: what comes after is lost on white
_FEW_DECADES = 1.6  # below which an axis would have one or two powers of ten to label


def shades(count: int) -> list[str]:
    """Colours of ordered series, the darkest first: viridis, whose lightness is even."""
    return [to_hex(colour) for colour in mpl.colormaps["viridis"](np.linspace(0, _LIGHTEST, max(count, 2)))][
        :count
    ]


def lines(count: int) -> list[dict[str, Any]]:
    """A colour and a dash for each of several lines."""
    return [
        {"color": colour, "linestyle": DASHES[place % len(DASHES)]}
        for place, colour in enumerate(shades(count))
    ]


def points(count: int) -> list[dict[str, Any]]:
    """A colour and a marker for each of several kinds of points, every other one hollow."""
    return [
        {
            "linestyle": "",
            "marker": MARKERS[place % len(MARKERS)],
            "markersize": 4.5,
            "color": colour,
            "markerfacecolor": "white" if place % 2 else colour,
        }
        for place, colour in enumerate(shades(count))
    ]


def legend(figure: Figure, handles: Sequence[Line2D], *, columns: int, **style: Any) -> None:
    """A legend under the panels, small enough for four entries."""
    shared: Any = {"fontsize": 8.5, "handlelength": 2.0, "handletextpad": 0.6} | style
    legend_below(figure, handles, columns=columns, **shared)


def number(value: float) -> str:
    """A count or a coefficient for a reader: 0.25, 15,993, and powers of ten from a million on."""
    if not 1e-3 <= abs(value) < 1e6:
        if value == 0:
            return "0"
        mantissa, power = f"{value:.2e}".split("e")
        times = "" if float(mantissa) == 1 else rf"{float(mantissa):g} \times "
        return f"${times}10^{{{int(power)}}}$"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def log_ticks(axis: Axis) -> None:
    """Powers of ten, and 3 or 2 and 5 times them where the axis holds few; call it when all is drawn."""
    low, high = axis.get_view_interval()
    axis.set_minor_formatter(NullFormatter())
    decades = np.log10(high / low)
    if decades > _FEW_DECADES:
        return
    axis.set_major_locator(LogLocator(subs=(1, 3) if decades > _FEW_DECADES / 2 else (1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))


def loss_ticks(ax: Axes) -> None:
    """Losses as numbers at even steps, though their axis is logarithmic."""
    ax.yaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 2.5, 5, 10)))
    ax.yaxis.set_major_formatter(ScalarFormatter(useOffset=False))
    ax.yaxis.set_minor_locator(NullLocator())
