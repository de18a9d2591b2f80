"""The figure of a law's parameters with their intervals: each kind on an axis that suits it."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from scfm_jax.downstream.drawing import BLUES, INK, PALETTE, WIDTH
from scfm_jax.scaling.figure_style import DASHES, legend, log_ticks
from scfm_jax.scaling.intervals import Parameter
from scfm_jax.scaling.law import Law

# A dash may end before its line does.
_CAPPED: Any = {"linewidth": 1.8, "marker": "|", "markersize": 6}
_BOOTSTRAP: Any = {"color": to_hex(BLUES(0.9)), "linestyle": "-", **_CAPPED}
_PROFILE: Any = {"color": PALETTE[4], "linestyle": DASHES[1], **_CAPPED}
_LEAST_SQUARES: Any = {"linestyle": "", "marker": "o", "markersize": 4.5, "color": INK}
_HUBER: Any = {"linestyle": "", "marker": "x", "markersize": 7, "color": PALETTE[5], "zorder": 4}
_ROW = 0.4  # inches
_NOTHING = (
    1e-6  # of a coefficient: an end below it is as good as 0, which a logarithmic axis has no place for
)


def draw_parameters(law: Law) -> tuple[Figure, str]:
    """Exponents, floors and coefficients, a panel each; coefficients on a logarithmic axis."""
    kinds: dict[str, list[Parameter]] = {}
    for parameter in law.parameters:
        kinds.setdefault(_kind(parameter.name), []).append(parameter)
    # Room for each row, and for each panel's ticks and label.
    heights = [len(kinds[kind]) * _ROW + 0.45 for kind in kinds]
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.35), layout="constrained")
    axes = figure.subplots(len(kinds), 1, squeeze=False, height_ratios=[len(each) for each in kinds.values()])
    arrows = False
    for ax, (kind, parameters) in zip(axes.ravel(), kinds.items(), strict=True):
        arrows |= _panel(ax, kind, parameters, law.huber)
    handles = [
        Line2D([], [], **_LEAST_SQUARES, label="least squares"),
        Line2D([], [], **_HUBER, label="Huber"),
        Line2D([], [], **_BOOTSTRAP, label="bootstrap"),
        Line2D([], [], **_PROFILE, label="profile"),
    ]
    legend(figure, handles, columns=4)
    more = " An arrow goes on to 0." if arrows else ""
    return figure, f"Parameters of {law.form.equation} with 95% intervals.{more}"


def _kind(name: str) -> str:
    if name in ("alpha", "beta", "gamma"):
        return "exponent"
    return "floor, in loss" if name[0] == "E" else "coefficient" if name != "k0" else "k0, neighbours"


def _panel(ax: Axes, kind: str, parameters: Sequence[Parameter], huber: dict[str, float]) -> bool:
    """Draw the parameters of one kind; returns whether an interval goes on to 0 past the axis."""
    ax.spines["left"].set_visible(False)
    ax.set_yticks(range(len(parameters)), [parameter.name for parameter in parameters])
    ax.set_ylim(len(parameters) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    known = []
    for row, parameter in enumerate(parameters):
        if parameter.value is not None and parameter.bootstrap is not None and parameter.profile is not None:
            known.append((row, parameter.name, parameter.value, parameter.bootstrap, parameter.profile))
            continue
        why = textwrap.fill(f"not identified: {parameter.why}", 70)
        style: Any = {"va": "center", "fontsize": 7, "color": "#5b646c"}
        style["bbox"] = {"color": "white", "pad": 1}
        ax.text(0, row, why, transform=ax.get_yaxis_transform(), **style)
    if not known:
        ax.set_xticks([])
        ax.spines["bottom"].set_visible(False)
        return False
    log = kind == "coefficient"
    ax.set_xlabel(f"{kind} (logarithmic axis)" if log else kind, fontsize=8.5)
    ax.tick_params(axis="x", labelsize=8, length=2.5)
    ax.grid(axis="x", color="#e8ecef", linewidth=0.7)
    ax.set_axisbelow(True)
    arrows = False
    above = [
        end for _, _, value, *both in known for end in (value, *both[0], *both[1]) if end > _NOTHING * value
    ]
    edge = min(above, default=1.0) / 2
    for row, name, value, bootstrap, profile in known:
        for shift, (low, high), style in ((-0.2, bootstrap, _BOOTSTRAP), (0.2, profile, _PROFILE)):
            to_nothing = log and low <= _NOTHING * value
            ax.plot([edge if to_nothing else low, high], [row + shift] * 2, **style)
            if to_nothing:
                ax.plot(edge, row + shift, marker="<", markersize=5, color=style["color"])
            arrows |= to_nothing
        ax.plot(value, row, **_LEAST_SQUARES)
        if name in huber and (huber[name] > 0 or not log):
            ax.plot(huber[name], row, **_HUBER)
    if log:
        ax.set_xscale("log")
        log_ticks(ax.xaxis)
    return arrows
