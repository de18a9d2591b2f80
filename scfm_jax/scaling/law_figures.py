"""Figures of a law, each as PNG and SVG."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from scfm_jax.downstream.drawing import BLUES, DPI, INK, PALETTE, WIDTH, grid, house_style
from scfm_jax.scaling.figure_style import (
    DATA,
    FAINT,
    MARKERS,
    SIZE,
    legend,
    lines,
    log_ticks,
    loss_ticks,
    points,
)
from scfm_jax.scaling.isoflop import budgets_of
from scfm_jax.scaling.law import Law
from scfm_jax.scaling.neighbour_figure import draw_neighbours
from scfm_jax.scaling.parameter_figure import draw_parameters
from scfm_jax.scaling.recommend import FARTHEST, choices_at

_VERTEX: Any = {"linestyle": "", "marker": "*", "markersize": 10, "color": INK, "markerfacecolor": "none"}
_FEW = 13  # runs whose names can be written


def draw_law(law: Law, folder: Path) -> dict[str, str]:
    """Draw every figure that the law allows; returns a caption, or why there is none, by name."""
    folder.mkdir(parents=True, exist_ok=True)
    captions = {}
    for name, (figure, captions[name]) in figures_of(law).items():
        if figure is None:
            continue
        with house_style():
            # What is no drawing in a file would differ from one time to the next.
            figure.savefig(folder / f"{name}.png", dpi=DPI, metadata={"Software": None})
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    return captions


def figures_of(law: Law) -> dict[str, tuple[Figure | None, str]]:
    """Every figure by name with its caption; or None, and why there is none."""
    draw: dict[str, Callable[[Law], tuple[Figure | None, str]]] = {
        "compute": _compute,
        "isoflop": _isoflop,
        "residuals": _residuals,
        "neighbours": draw_neighbours,
        "parameters": draw_parameters,
        "prediction": _prediction,
    }
    with house_style():
        return {name: make(law) for name, make in draw.items()}


def _compute(law: Law) -> tuple[Figure, str]:
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    ax = figure.subplots()
    ks = law.design.levels
    ranges = np.array([law.budgets(k) for k in ks])
    span = np.geomspace(ranges.min(), ranges.max() * FARTHEST, 60)
    budgets = np.unique(np.concatenate([span, ranges.ravel()]))
    rows = [] if law.refusals else choices_at(law, budgets)
    dashes, markers, handles = lines(len(ks)), points(len(ks)), []
    for k, (least, most), dash, marker in zip(ks, ranges, dashes, markers, strict=True):
        at = law.runs.k == k
        ax.plot(law.runs.flops[at], law.runs.loss[at], **marker)
        best = [(c, choice) for c, row in zip(budgets, rows, strict=False) for choice in row if choice.k == k]
        if best:
            flops, loss = np.array([(c, choice.loss) for c, choice in best]).T
            ax.plot(flops, loss, **dash, linewidth=0.8)
            measured = (least <= flops) & (flops <= most)
            ax.plot(flops[measured], loss[measured], **dash, linewidth=1.8)
            ends = np.array([choice.loss_interval for _, choice in best]).T
            ax.fill_between(flops, *ends, color=dash["color"], alpha=0.1, linewidth=0)
        handles.append(Line2D([], [], **(marker | (dash if best else {})), label=f"k = {k}"))
    ax.set(xscale="log", yscale="log", xlabel="training FLOPs", ylabel="held-out loss")
    loss_ticks(ax)
    log_ticks(ax.xaxis)
    grid(ax)
    legend(figure, handles, columns=4, handlelength=2.6)
    caption = "Loss of every run against its FLOPs"
    if law.refusals:
        return figure, f"{caption}; no frontier: {'; '.join(law.refusals)}."
    return figure, (
        f"{caption}, and the compute-optimal frontier of the law for each k with 95% intervals; thin where "
        "it lies beyond the FLOPs of the runs at that k."
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
            marker = MARKERS[every.index(power) % len(MARKERS)]
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
                ax.plot(parabola.size, parabola.loss, **_VERTEX)
        ax.set(xscale="log", title=f"k = {k}", xlabel=f"{SIZE[law.config.size]}, N")
        log_ticks(ax.xaxis)
        grid(ax)
    for ax in axes[len(ks) :]:
        ax.set_visible(False)
    axes[0].set_ylabel("held-out loss")
    handles = [
        Line2D([], [], color=shade[power], marker=MARKERS[place % len(MARKERS)], label=f"$10^{{{power:g}}}$")
        for place, power in enumerate(every)
    ]
    handles.append(Line2D([], [], **_VERTEX, label="best size"))
    legend(figure, handles, columns=5, handlelength=1.6, title="training FLOPs", title_fontsize=8.5)
    refused = sum(bool(parabola.why) for parabola in law.parabolas)
    more = f" {refused} have no minimum inside and are dashed." if refused else ""
    return figure, f"IsoFLOP curves: loss over size at one budget of FLOPs; a star is the best size.{more}"


def _residuals(law: Law) -> tuple[Figure, str]:
    figure = Figure(figsize=(1.5 * WIDTH, 3.3), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    off = 100 * np.log(law.runs.loss / law.fitted)
    spread = 200 * law.deviation / float(law.fitted.mean())
    coordinates = (
        (law.design.size, f"{SIZE[law.config.size].replace(' without', chr(10) + 'without')}, N"),
        (law.design.data, f"{DATA[law.config.data]}, D"),
        (law.runs.flops, "training FLOPs"),
    )
    ks = law.design.levels
    for ax, (values, label) in zip(axes, coordinates, strict=True):
        ax.axhspan(-spread, spread, color="#eef1f3", linewidth=0)
        ax.axhline(0, color=INK, linewidth=0.8)
        for k, marker in zip(ks, points(len(ks)), strict=True):
            at = law.runs.k == k
            ax.plot(values[at], off[at], **marker)
        ax.set(xscale="log", xlabel=label)
        log_ticks(ax.xaxis)
    axes[0].set_ylabel("measured over fitted loss (%)")
    legend(
        figure,
        [Line2D([], [], **marker, label=f"k = {k}") for k, marker in zip(ks, points(len(ks)), strict=True)],
        columns=6,
    )
    return figure, "Residuals of the law; the band is two of their standard deviations either way."


def _prediction(law: Law) -> tuple[Figure | None, str]:
    if not law.predictions:
        return None, law.predictions_why
    figure = Figure(figsize=(1.6 * WIDTH, 3.6), layout="constrained")
    ax, beside = figure.subplots(1, 2, width_ratios=(1.2, 1))
    predicted = np.array([each.predicted for each in law.predictions])
    measured = np.array([each.measured for each in law.predictions])
    ends = np.array([each.interval for each in law.predictions])
    ax.plot(law.fitted, law.runs.loss, linestyle="", marker=".", color=FAINT, label="runs, fitted")
    style: Any = {"color": PALETTE[5], "marker": "D", "markersize": 4.5}
    ax.plot(predicted, measured, linestyle="", **style, label="largest runs, predicted")
    line = [float(min(law.runs.loss.min(), predicted.min())), float(law.runs.loss.max())]
    ax.plot(line, line, color=INK, linewidth=1, linestyle=(0, (4, 3)), label="predicted = measured")
    ax.set(xlabel="predicted loss", ylabel="measured loss")
    grid(ax)
    # On the scale of the losses, intervals are too narrow to be seen.
    share = 100 * (ends / predicted[:, None] - 1)
    place = np.arange(len(predicted))
    bars: Any = {"color": FAINT, "linewidth": 3.5 if len(place) < _FEW else 1.5}
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
    legend(figure, [*handles, Line2D([], [], **bars, label="95% interval")], columns=4)
    return figure, (
        "Runs of the largest budgets, predicted from the others, beside the fit of all; and how far off each "
        "is, with the 95% interval for a single run."
    )
