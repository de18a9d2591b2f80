"""The report of a run: figures as PNG files, and one HTML page that holds them and needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Shaped
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy.stats import pearsonr

from scfm_jax.downstream.drawing import (
    INK,
    PALETTE,
    cell_size,
    class_colour,
    class_handle,
    draw_agreement,
    grid,
    house_style,
    legend_below,
    place_axes,
    save,
)
from scfm_jax.downstream.page import Section, Table, write_page
from scfm_jax.errors import InputError

PANEL_WIDTH = 4.2  # inches, of one panel of the tissue


class Predictions(NamedTuple):
    """True and predicted expression of masked entries, log1p of normalised counts."""

    true: Float[np.ndarray, " n"]
    predicted: Float[np.ndarray, " n"]


class Tissue(NamedTuple):
    """Cells of each slide with their domain and the one predicted; `unit` is that of the coordinates."""

    xy: Sequence[Float[np.ndarray, "n 2"]]
    domain: Sequence[Shaped[np.ndarray, " n"]]
    predicted: Sequence[Shaped[np.ndarray, " n"]]
    slides: Sequence[str]
    unit: str = "µm"


def write_report(
    folder: str | Path,
    *,
    title: str,
    history: Sequence[Mapping[str, Any]],
    tables: Sequence[Table] = (),
    predictions: Predictions | None = None,
    tissue: Tissue | None = None,
    notes: Sequence[str] = (),
) -> Path:
    """Write `figures/*.png` and `report.html` into a run folder.

    Parameters
    ----------
    folder
        The run folder, made where it is absent; an older report there is replaced.
    title
        Heading of the page.
    history
        Rows of `metrics.jsonl`, each with `step` and any of `loss` and `held_out_loss`.
    tables
        Shown in this order.
    predictions
        Masked entries, for the figure of predicted against true expression.
    tissue
        Cells for the figure of domains.
    notes
        Paragraphs of plain text: what was run, and what to beware of.

    Returns
    -------
    The page.

    Raises
    ------
    InputError
        Where there is nothing to draw in a part that was given.
    """
    folder = Path(folder)
    figures = folder / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    sections = []
    with house_style():
        drawn = [("loss.png", "Loss", *_draw_loss(history))]
        if predictions is not None:
            drawn.append(("expression.png", "Masked expression", *_draw_expression(predictions)))
        if tissue is not None:
            drawn.append(("tissue.png", "Tissue", *_draw_tissue(tissue)))
        for name, heading, figure, caption in drawn:
            sections.append(Section(heading, panels=[[save(figure, figures / name, caption)]]))
    return write_page(folder / "report.html", title, notes, [Section("", tables=tables), *sections])


def _series(history: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    rows = [(row["step"], row[key]) for row in history if row.get(key) is not None]
    steps, values = np.array(rows, float).reshape(-1, 2).T
    return steps, values


def _draw_loss(history: Sequence[Mapping[str, Any]]) -> tuple[Figure, str]:
    steps, loss = _series(history, "loss")
    eval_steps, held_out_loss = _series(history, "held_out_loss")
    if not len(steps) and not len(eval_steps):
        raise InputError("history", "no row has loss or held_out_loss", "give the rows of metrics.jsonl")
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    ax = figure.subplots()
    caption = "Loss over the steps of training"
    if len(steps):
        window = max(1, len(steps) // 40)
        smooth = np.convolve(loss, np.full(window, 1 / window), mode="valid")
        if window > 1:
            ax.plot(steps, loss, color=PALETTE[4], linewidth=0.8, alpha=0.55)
            caption += f" (pale: each record, dark: mean of {window})"
        ax.plot(
            steps[window // 2 :][: len(smooth)], smooth, color=PALETTE[0], linewidth=1.8, label="training"
        )
    if len(eval_steps):
        style: Any = {"color": PALETTE[5], "linewidth": 1.4, "marker": "o", "markersize": 4}
        ax.plot(eval_steps, held_out_loss, label="held-out cells", **style)
    ax.legend(loc="upper right")
    every = np.concatenate([loss, held_out_loss])
    every = every[np.isfinite(every)]
    if len(every) and every.min() > 0 and every.max() > 10 * every.min():
        ax.set_yscale("log")
    ax.set(xlabel="step", ylabel="loss")
    grid(ax)
    return figure, caption + "."


def _draw_expression(predictions: Predictions) -> tuple[Figure, str]:
    true, predicted = (np.asarray(x, float) for x in predictions)
    if len(true) < 2:
        raise InputError("predictions", "fewer than two entries", "give the masked entries of held-out cells")
    figure = Figure(figsize=(5.4, 4.6), layout="constrained")
    what = "expression, log1p of normalised counts"
    draw_agreement(figure, true, predicted, what, "masked entries")
    varied = np.ptp(true) > 0 and np.ptp(predicted) > 0
    correlation = f", Pearson's r {pearsonr(true, predicted).statistic:.2f}" if varied else ""
    caption = (
        f"{len(true):,} masked entries of held-out cells{correlation}. "
        "A sure prediction lies on the dashed line; a calibrated one has its means there."
    )
    return figure, caption


def _draw_tissue(tissue: Tissue) -> tuple[Figure, str]:
    if not len(tissue.xy):
        raise InputError("tissue", "no slide", "give the cells of at least one slide")
    domains = [np.asarray(d).astype(str) for d in tissue.domain]
    predicted = [np.asarray(d).astype(str) for d in tissue.predicted]
    classes = np.unique(np.concatenate(domains + predicted))
    colours = np.array([class_colour(i) for i in range(len(classes))])

    spans = [np.maximum(np.ptp(xy, axis=0), 1e-9) for xy in tissue.xy]
    heights = [float(np.clip(PANEL_WIDTH * span[1] / span[0], 1.6, 6.0)) for span in spans]
    legend_rows = math.ceil(len(classes) / 5)
    figure = Figure(
        figsize=(9.2, sum(heights) + 0.75 * len(heights) + 0.25 * legend_rows), layout="constrained"
    )
    axes = figure.subplots(len(heights), 2, squeeze=False, height_ratios=heights)
    n_wrong = n_cells = 0
    for i, (left, right) in enumerate(axes):
        xy, wrong = np.asarray(tissue.xy[i]), domains[i] != predicted[i]
        n_wrong, n_cells = n_wrong + int(wrong.sum()), n_cells + len(wrong)
        size = cell_size(xy, (PANEL_WIDTH, heights[i]))
        for ax, labels in ((left, domains[i]), (right, predicted[i])):
            colour = colours[np.searchsorted(classes, labels)]
            ax.scatter(*xy.T, s=size, c=colour, linewidths=0, rasterized=True)
            place_axes(ax, tissue.unit)
        right.scatter(*xy[wrong].T, s=0.7 * size, c=INK, marker="x", linewidths=0.16 * math.sqrt(size))
        left.set_title(f"{tissue.slides[i]}: domain")
        right.set_title(f"predicted, {1 - wrong.mean():.1%} right" if len(wrong) else "predicted")
        right.set_ylabel("")
    handles = [class_handle(name, colour) for name, colour in zip(classes, colours)]
    handles.append(
        Line2D([], [], linestyle="", marker="x", markersize=5, markeredgewidth=1.1, color=INK, label="wrong")
    )
    legend_below(figure, handles, columns=6)
    caption = (
        f"{n_cells:,} held-out cells; {n_wrong:,} of them ({n_wrong / n_cells:.1%}) wrong, marked by a cross."
    )
    return figure, caption
