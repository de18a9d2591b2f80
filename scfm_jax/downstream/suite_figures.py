"""Figures of a suite's scores: curves over k, confusion, predicted against true values, training.

Each is one PNG of a phone's width, so that its letters stay legible there; a page sets them side by side.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from scfm_jax.downstream.drawing import (
    INK,
    PALETTE,
    WIDTH,
    draw_agreement,
    grid,
    house_style,
    legend_below,
    save,
)
from scfm_jax.downstream.page import Drawing
from scfm_jax.downstream.scores import confusion
from scfm_jax.downstream.suite_results import Method, Pooled, Task, read_json
from scfm_jax.errors import InputError

# Strong ones first, and with another marker and dash each, so that they are told apart in grey too.
COLOURS = tuple(PALETTE[i] for i in (0, 5, 2, 1, 3, 4, 6))
MARKERS = "osD^vPX*"
DASHES: Any = [(0, pattern) for pattern in ((4, 2), (1, 1.2), (6, 1.5, 1, 1.5), (8, 3), (2, 2))]
MOST_NUMBERS = 12  # classes, with shares written into the squares
_ROW = 0.19  # inches, of a legend
_LABELS = {
    "macro_f1": "macro-F1",
    "mae": "MAE",
    "rmse": "RMSE",
    "ece": "ECE",
    "r2": "R²",
    "pearson": "Pearson's r",
    "spearman": "Spearman's ρ",
    "jensen_shannon": "Jensen-Shannon distance",
}


def score_label(name: str) -> str:
    """A score's name as the field writes it."""
    return _LABELS.get(name, name.replace("_", " "))


def draw_curves(task: Task, path: Path) -> Drawing | None:
    """Score against k with its spread, a level line for a method without k.

    None where no method has two k.
    """
    curves: dict[str, list[Method]] = {}
    for method in sorted(task.methods, key=lambda method: method.group != "model"):  # the first colours
        curves.setdefault(method.family, []).append(method)
    ks = sorted({method.k for method in task.methods if method.k is not None})
    place: dict[int | None, int] = {k: i for i, k in enumerate(ks)}
    if task.primary is None or all(len(methods) < 2 for methods in curves.values()):
        return None
    with house_style():
        figure = Figure(figsize=(WIDTH, 3.0 + _ROW * len(curves)), layout="constrained")
        ax = figure.subplots()
        handles = []
        for number, (name, methods) in enumerate(curves.items()):
            model = methods[0].group == "model"
            colour = COLOURS[number % len(COLOURS)]
            line: Any = {
                "color": colour,
                "linestyle": "-" if model else DASHES[number % len(DASHES)],
                "linewidth": 1.8 if model else 1.2,
            }
            points: Any = {
                "marker": MARKERS[number % len(MARKERS)],
                "markersize": 5,
                "markerfacecolor": colour if model else "white",
            }
            values = {method.k: method.over_folds(task.primary) for method in methods}
            if None in values:
                mean, spread = values[None].mean(), deviation(values[None])
                ax.axhline(mean, **line)
                ax.axhspan(mean - spread, mean + spread, color=colour, alpha=0.07, linewidth=0)
                handles.append(Line2D([], [], **line, label=f"{name} (no k)"))
                continue
            # A little aside, or the bars of two methods hide each other.
            at = np.array([place[k] for k in values]) + 0.24 * ((number + 0.5) / len(curves) - 0.5)
            means = [of_k.mean() for of_k in values.values()]
            spreads = [deviation(of_k) for of_k in values.values()]
            ax.errorbar(at, means, spreads, elinewidth=0.9, capsize=2, **line, **points)
            handles.append(Line2D([], [], **line, **points, label=name))
        ax.set_xticks(range(len(ks)), [str(k) for k in ks])
        ax.set(xlabel="k, neighbours", ylabel=score_label(task.primary), xlim=(-0.4, len(ks) - 0.6))
        grid(ax)
        legend_below(figure, handles, columns=1, fontsize=8, handlelength=3.2, handletextpad=0.8)
        better = "higher" if task.higher_is_better else "lower"
        caption = (
            f"{score_label(task.primary)} against k ({better} is better): mean and standard deviation over "
            "folds, or over seeds where there is one fold."
        )
        return save(figure, path, caption)


def deviation(values: np.ndarray) -> float:
    """Standard deviation of a sample; 0 of a single value, which has no spread to draw."""
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0


def draw_confusion(task: Task, method: Method, pooled: Pooled, path: Path) -> Drawing:
    """What share of each true class is called what, over all folds and seeds."""
    n = len(task.classes)
    counts = np.sum([confusion(pooled.truth, answer.argmax(1), n) for answer in pooled.by_seed], axis=0)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    with house_style():
        letters = float(np.clip(110 / n, 4.5, 8.5))
        side = max(WIDTH, 0.14 * n + 1.8)
        figure = Figure(figsize=(side, side), layout="constrained")
        ax = figure.subplots()
        image = ax.imshow(share, cmap="Blues", vmin=0, vmax=1)
        ax.set_xticks(range(n), task.classes, rotation=90, fontsize=letters)
        ax.set_yticks(range(n), task.classes, fontsize=letters)
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
        ax.set(xlabel="predicted", ylabel="true")
        for (row, column), value in np.ndenumerate(share):
            if n <= MOST_NUMBERS and value >= 0.005:
                ink = "white" if value > 0.55 else INK
                style: Any = {"ha": "center", "va": "center", "color": ink, "fontsize": letters}
                ax.text(column, row, f"{100 * value:.0f}", **style)
        bar = figure.colorbar(
            image,
            ax=ax,
            location="bottom",
            shrink=0.6,
            aspect=28,
            label="share of the true class",
            format="{x:.0%}",
        )
        bar.outline.set_visible(False)
        caption = f"{method.label}: what the cells of each true class are called; a row sums to 100%."
        return save(figure, path, caption)


def draw_predicted(task: Task, method: Method, pooled: Pooled, path: Path) -> Drawing:
    """Predicted against true values, of a composition the shares of all classes."""
    shares = task.kind == "composition"
    what, count = ("share of a class", "cells × classes") if shares else (task.scale, "cells")
    true, predicted = (np.asarray(x, np.float64).ravel() for x in (pooled.truth, pooled.by_seed[0]))
    with house_style():
        figure = Figure(figsize=(WIDTH, 4.3), layout="constrained")
        draw_agreement(figure, true, predicted, what, count)
        caption = f"{method.label}: {len(pooled.cells):,} tested cells of all folds, one seed."
        return save(figure, path, caption)


def draw_training(task: Task, path: Path) -> Drawing | None:
    """Loss and validation over the epochs: mean over the runs of a method, a band from least to most.

    A run's history is the file that its row names, or that is called like its predictions. None where there
    are no histories; files of no run are of an earlier suite.

    Raises
    ------
    InputError
        A file whose rows lack `epoch`, `loss` or `validation` (which may be null).
    """
    runs: dict[str, list[np.ndarray]] = {}
    for method in task.methods:
        for row in method.rows:
            like_predictions = f"history/{Path(row.get('predictions') or '').stem}.json"
            file = task.folder / (row.get("history") or like_predictions)
            if row.get("history") or file.is_file():
                runs.setdefault(method.label, []).append(_history(file))
    if not runs:
        return None
    validated = any(np.isfinite(table[:, 2]).any() for tables in runs.values() for table in tables)
    with house_style():
        rows = 1 + validated
        figure = Figure(figsize=(WIDTH, 0.4 + 2.1 * rows + _ROW * len(runs)), layout="constrained")
        axes = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
        handles = []
        for number, (what, tables) in enumerate(runs.items()):
            colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
            style: Any = {"color": colour, "marker": marker, "markersize": 3.5, "linewidth": 1.3}
            epochs = np.unique(np.concatenate([table[:, 0] for table in tables]))
            for ax, column in zip(axes, (1, 2)):
                at = [np.concatenate([t[t[:, 0] == epoch, column] for t in tables]) for epoch in epochs]
                ax.plot(epochs, [values.mean() for values in at], **style)
                ends = [values.min() for values in at], [values.max() for values in at]
                ax.fill_between(epochs, *ends, color=colour, alpha=0.12, linewidth=0)
            many = f"{len(tables)} run{'s' * (len(tables) != 1)}"
            handles.append(Line2D([], [], **style, label=f"{what} ({many})"))
        for ax, name in zip(axes, ("training loss", "validation")):
            ax.set_ylabel(name)
            grid(ax)
        axes[-1].set_xlabel("epoch")
        legend_below(figure, handles, columns=1, fontsize=8, handletextpad=0.8)
        return save(figure, path, "Training: mean over runs, the band from the least to the most.")


def _history(path: Path) -> np.ndarray:
    """Columns epoch, loss and validation, NaN where there was none."""
    rows = read_json(path)
    if not isinstance(rows, list) or not rows:
        raise InputError(path, "holds no rows", "give a list of objects with epoch, loss and validation")
    names = ("epoch", "loss", "validation")
    try:
        return np.array([[np.nan if row[n] is None else float(row[n]) for n in names] for row in rows])
    except (KeyError, TypeError, ValueError) as error:
        problem = f"a row has no number for one of {', '.join(names)} ({error!r})"
        raise InputError(path, problem, "let the suite write it anew") from error
