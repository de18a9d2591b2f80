"""Figures of a law, each as PNG and SVG: told apart by marker and dash, so that they are readable in grey."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter

from scfm_jax.downstream.drawing import BLUES, DPI, INK, PALETTE, WIDTH, grid, house_style, legend_below
from scfm_jax.scaling.forms import Design, predict
from scfm_jax.scaling.isoflop import budgets_of
from scfm_jax.scaling.law import Law
from scfm_jax.scaling.recommend import FARTHEST, choices_at

_COLOURS = tuple(PALETTE[i] for i in (0, 5, 2, 1, 3, 4, 6))
_MARKERS = "osD^vPX"
_DASHES: Any = [
    "-",
    *((0, pattern) for pattern in ((5, 2), (1, 1.2), (6, 1.5, 1, 1.5), (8, 3), (2, 2), (3, 1))),
]
_FAINT = "#b4bbc1"
_FEW = 13  # runs whose names can be written
_CURVES = 5  # sizes, or budgets' labels, that a reader can follow
_SIZE = {
    "parameters_without_embeddings": "parameters without embeddings, N",
    "parameters": "parameters, N",
}
_DATA = {"unique_cells": "unique cells, D", "cells": "cells seen, D", "tokens": "tokens seen, D"}


def draw_law(law: Law, folder: Path) -> dict[str, str]:
    """Draw every figure that the law allows; returns a caption, or why there is none, by name."""
    folder.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Callable[[Law], tuple[Figure | None, str]]] = {
        "compute": _compute,
        "isoflop": _isoflop,
        "residuals": _residuals,
        "neighbours": _neighbours,
        "parameters": _parameters,
        "prediction": _prediction,
    }
    captions = {}
    for name, draw in figures.items():
        with house_style():
            figure, captions[name] = draw(law)
            if figure is None:
                continue
            # What is no drawing in a file would differ from one time to the next.
            figure.savefig(folder / f"{name}.png", dpi=DPI, metadata={"Software": None})
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    return captions


def _style(place: int) -> dict[str, Any]:
    return {"color": _COLOURS[place % len(_COLOURS)], "linestyle": _DASHES[place % len(_DASHES)]}


def _points(place: int) -> dict[str, Any]:
    colour = _COLOURS[place % len(_COLOURS)]
    face = colour if place % 2 == 0 else "white"
    return {
        "linestyle": "",
        "marker": _MARKERS[place % len(_MARKERS)],
        "markersize": 4.5,
        "color": colour,
        "markerfacecolor": face,
    }


def _legend(figure: Figure, handles: Sequence[Line2D], *, columns: int, handlelength: float = 2.0) -> None:
    style: Any = {"fontsize": 8.5, "handlelength": handlelength, "handletextpad": 0.6}
    legend_below(figure, handles, columns=columns, **style)


def _compute(law: Law) -> tuple[Figure, str]:
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    ax = figure.subplots()
    low, high = float(law.runs.flops.min()), float(law.runs.flops.max())
    handles = []
    budgets = np.geomspace(low, high * FARTHEST, 60)
    rows = [] if law.refusals else choices_at(law, budgets)
    for place, k in enumerate(law.design.levels):
        at = law.runs.k == k
        ax.plot(law.runs.flops[at], law.runs.loss[at], **_points(place), alpha=0.55)
        if rows:
            mine = [next(choice for choice in row if choice.k == k) for row in rows]
            loss = np.array([choice.loss for choice in mine])
            ends = np.array([choice.loss_interval for choice in mine]).T
            inside = budgets <= high
            ax.plot(budgets[inside], loss[inside], **_style(place), linewidth=1.7)
            ax.plot(budgets[~inside], loss[~inside], **_style(place), linewidth=0.8)
            ax.fill_between(budgets, *ends, color=_COLOURS[place % len(_COLOURS)], alpha=0.12, linewidth=0)
        line = _style(place) if rows else {}
        handles.append(Line2D([], [], **(_points(place) | line), label=f"k = {k}"))
    ax.set(xscale="log", yscale="log", xlabel="training FLOPs", ylabel="held-out loss")
    _plain_ticks(ax)
    if rows:
        ax.axvline(high, color=_FAINT, linewidth=0.8)
    grid(ax)
    _legend(figure, handles, columns=4, handlelength=2.6)
    caption = "Loss of every run against its FLOPs"
    if law.refusals:
        return figure, f"{caption}; no frontier: {'; '.join(law.refusals)}."
    return figure, (
        f"{caption}, and the compute-optimal frontier of the law for each k with 95% intervals; thin past "
        "the largest budget measured."
    )


def _isoflop(law: Law) -> tuple[Figure | None, str]:
    if not law.parabolas:
        return None, "no budget has four sizes at one k"
    ks = sorted({parabola.k for parabola in law.parabolas})
    columns = min(2, len(ks))
    rows = -(-len(ks) // columns)
    figure = Figure(figsize=(max(WIDTH, 3.1 * columns), 2.7 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    budget = budgets_of(law.runs.flops)
    every = sorted({round(np.log10(parabola.flops), 1) for parabola in law.parabolas})
    shade = {power: BLUES(0.25 + 0.75 * place / max(len(every) - 1, 1)) for place, power in enumerate(every)}
    for ax, k in zip(axes, ks, strict=False):
        for parabola in (each for each in law.parabolas if each.k == k):
            power = round(np.log10(parabola.flops), 1)
            marker = _MARKERS[every.index(power) % len(_MARKERS)]
            number = budget[np.abs(np.log(law.runs.flops / parabola.flops)).argmin()]
            inside = (law.runs.k == k) & (budget == number)
            size = law.design.size[inside]
            ax.plot(
                size, law.runs.loss[inside], linestyle="", marker=marker, markersize=4, color=shade[power]
            )
            x = np.linspace(np.log(size.min()), np.log(size.max()), 80) - np.log(parabola.centre)
            curve = np.polynomial.Polynomial(parabola.coefficients)(x)
            dash = "-" if not parabola.why else (0, (2, 2))
            ax.plot(parabola.centre * np.exp(x), curve, color=shade[power], linewidth=1.2, linestyle=dash)
            if parabola.size is not None:
                ax.plot(parabola.size, parabola.loss, marker="*", markersize=9, color=INK)
        ax.set(xscale="log", title=f"k = {k}", xlabel=_SIZE[law.config.size])
        ax.xaxis.set_minor_formatter(NullFormatter())
        grid(ax)
    for ax in axes[len(ks) :]:
        ax.set_visible(False)
    axes[0].set_ylabel("held-out loss")
    handles = [
        Line2D(
            [], [], color=shade[power], marker=_MARKERS[place % len(_MARKERS)], label=f"$10^{{{power:g}}}$"
        )
        for place, power in enumerate(every)
    ]
    _legend(figure, handles, columns=6, handlelength=1.6)
    refused = sum(bool(parabola.why) for parabola in law.parabolas)
    more = f" {refused} have no minimum inside and are dashed." if refused else ""
    return figure, f"IsoFLOP curves: loss over size at one budget of FLOPs; a star is the best size.{more}"


def _residuals(law: Law) -> tuple[Figure, str]:
    figure = Figure(figsize=(1.5 * WIDTH, 2.9), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    off = 100 * np.log(law.runs.loss / law.fitted)
    spread = 200 * law.deviation / float(law.fitted.mean())
    coordinates = (
        (law.design.size, "N"),
        (law.design.data, "D"),
        (law.runs.flops, "training FLOPs"),
    )
    for ax, (values, label) in zip(axes, coordinates, strict=True):
        ax.axhspan(-spread, spread, color="#eef1f3", linewidth=0)
        ax.axhline(0, color=INK, linewidth=0.8)
        for place, k in enumerate(law.design.levels):
            at = law.runs.k == k
            ax.plot(values[at], off[at], **_points(place))
        ax.set(xscale="log", xlabel=label)
        ax.xaxis.set_minor_formatter(NullFormatter())
    axes[0].set_ylabel("measured over fitted loss (%)")
    handles = [Line2D([], [], **_points(i), label=f"k = {k}") for i, k in enumerate(law.design.levels)]
    _legend(figure, handles, columns=6)
    return figure, "Residuals of the law; the band is two of their standard deviations either way."


def _neighbours(law: Law) -> tuple[Figure | None, str]:
    ks = law.design.levels
    if len(ks) < 2:
        return None, f"all runs have k = {ks[0]}"
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    ax = figure.subplots()
    sizes = np.unique(law.design.size)
    if len(sizes) > _CURVES:
        sizes = np.exp(np.linspace(np.log(sizes[0]), np.log(sizes[-1]), _CURVES))
    data = float(np.exp(np.log(law.design.data).mean()))
    nearest = np.abs(np.log(law.design.size[:, None] / sizes)).argmin(1)
    off = law.runs.loss - law.fitted
    handles = []
    for place, size in enumerate(sizes):
        n = len(ks)
        curve = Design(np.full(n, size), np.full(n, data), np.array(ks))
        middle = predict(law.form, curve, law.estimate[None])[0]
        drawn = predict(law.form, curve, law.draws)
        ends = np.quantile(100 * (drawn / drawn[:, :1] - 1), law.tails, axis=0)
        at = np.arange(n) + 0.1 * (place - (len(sizes) - 1) / 2)
        ax.fill_between(at, *ends, color=_COLOURS[place % len(_COLOURS)], alpha=0.12, linewidth=0)
        ax.plot(at, 100 * (middle / middle[0] - 1), **_style(place), linewidth=1.2)
        mine = [off[(nearest == place) & (law.runs.k == k)] for k in ks]
        shift = np.array([each.mean() if len(each) else np.nan for each in mine])
        ax.plot(at, 100 * ((middle + shift) / middle[0] - 1), **_points(place))
        handles.append(Line2D([], [], **(_points(place) | _style(place)), label=f"N = {size:.2g}"))
    ax.set_xticks(range(len(ks)), [str(k) for k in ks])
    ax.axhline(0, color=_FAINT, linewidth=0.8, zorder=0)
    ax.set(xlabel="k, neighbours", ylabel=f"loss over that at k = {ks[0]} (%)")
    grid(ax)
    _legend(figure, handles, columns=3, handlelength=2.6)
    unit = _DATA[law.config.data].removesuffix(", D")
    return figure, (
        f"Loss over that at k = {ks[0]}, at each size and for {data:.3g} {unit}: the law with its 95% "
        "interval, and points that are the law plus the mean residual of the runs nearest in size."
    )


def _parameters(law: Law) -> tuple[Figure, str]:
    n = len(law.parameters)
    figure = Figure(figsize=(WIDTH, 0.5 * n + 0.7), layout="constrained")
    axes = figure.subplots(n, 1, squeeze=False).ravel()
    for ax, parameter in zip(axes, law.parameters, strict=True):
        ax.spines[:].set_visible(False)
        ax.set_yticks([0.5], [parameter.name])
        ax.set(ylim=(-0.6, 1.6))
        ax.tick_params(axis="y", length=0)
        if parameter.value is None or parameter.bootstrap is None or parameter.profile is None:
            ax.set_xticks([])
            why = f"not identified: {parameter.why}"
            text: Any = {"va": "center", "fontsize": 6.5, "color": "#5b646c", "wrap": True}
            ax.text(0, 0.5, why, transform=ax.get_yaxis_transform(), **text)
            continue
        for height, ends, dash in ((1, parameter.bootstrap, "-"), (0, parameter.profile, (0, (3, 1.5)))):
            ax.plot(ends, [height] * 2, color=PALETTE[0], linestyle=dash, linewidth=1.8)
        ax.plot([parameter.value], [0.5], marker="o", color=INK, markersize=5)
        if parameter.name in law.huber:
            ax.plot([law.huber[parameter.name]], [0.5], marker="x", color=PALETTE[5], markersize=6)
        ax.tick_params(axis="x", labelsize=6.5, length=2, pad=1)
        ax.locator_params(axis="x", nbins=5)
    handles = [
        Line2D([], [], linestyle="", marker="o", color=INK, label="least squares"),
        Line2D([], [], linestyle="", marker="x", color=PALETTE[5], label="Huber"),
        Line2D([], [], color=PALETTE[0], linewidth=1.8, label="bootstrap"),
        Line2D([], [], color=PALETTE[0], linewidth=1.8, linestyle=(0, (3, 1.5)), label="profile"),
    ]
    _legend(figure, handles, columns=4)
    return figure, f"Parameters of {law.form.equation} with 95% intervals."


def _prediction(law: Law) -> tuple[Figure | None, str]:
    if not law.predictions:
        return None, law.predictions_why
    figure = Figure(figsize=(1.6 * WIDTH, 3.6), layout="constrained")
    ax, beside = figure.subplots(1, 2, width_ratios=(1.2, 1))
    predicted = np.array([each.predicted for each in law.predictions])
    measured = np.array([each.measured for each in law.predictions])
    ends = np.array([each.interval for each in law.predictions])
    ax.plot(law.fitted, law.runs.loss, linestyle="", marker=".", color=_FAINT, label="runs, fitted")
    style: Any = {"color": PALETTE[5], "marker": "D", "markersize": 4.5}
    ax.plot(predicted, measured, linestyle="", **style, label="largest runs, predicted")
    line = [float(min(law.runs.loss.min(), predicted.min())), float(law.runs.loss.max())]
    ax.plot(line, line, color=INK, linewidth=1, linestyle=(0, (4, 3)), label="predicted = measured")
    ax.set(xlabel="predicted loss", ylabel="measured loss")
    grid(ax)
    # On the scale of the losses, intervals are too narrow to be seen.
    share = 100 * (ends / predicted[:, None] - 1)
    place = np.arange(len(predicted))
    bars: Any = {"color": _FAINT, "linewidth": 3.5 if len(place) < _FEW else 1.5}
    beside.vlines(place, share[:, 0], share[:, 1], **bars)
    beside.plot(place, 100 * (measured / predicted - 1), linestyle="", **style)
    beside.axhline(0, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    beside.set(ylabel="measured over predicted (%)", xlim=(-1, len(place)))
    if len(place) < _FEW:
        names = [each.run for each in law.predictions]
        beside.set_xticks(place, names, rotation=60, ha="right", rotation_mode="anchor", fontsize=7)
    else:
        beside.set(xticks=[], xlabel=f"{len(place)} largest runs")
    handles: Any = ax.get_legend_handles_labels()[0]
    _legend(figure, [*handles, Line2D([], [], **bars, label="95% interval")], columns=4)
    return figure, (
        "Runs of the largest budgets, predicted from the others, beside the fit of all; and how far off each "
        "is, with the 95% interval for a single run."
    )


def _plain_ticks(ax: Axes) -> None:
    """Losses as numbers rather than powers of ten."""
    for set_formatter in (ax.yaxis.set_major_formatter, ax.yaxis.set_minor_formatter):
        set_formatter("{x:.3g}")
    ax.tick_params(axis="y", which="minor", labelsize=8)
