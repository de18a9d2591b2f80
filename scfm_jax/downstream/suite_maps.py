"""Cells in the plane: maps of a task's tissue, and of the embeddings that a model gives its cells."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, Num
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from sklearn.decomposition import PCA

from scfm_jax.downstream.drawing import (
    BLUES,
    PALETTE,
    WIDTH,
    cell_size,
    class_colour,
    class_handle,
    house_style,
    legend_below,
    place_axes,
    save,
)
from scfm_jax.downstream.page import Drawing
from scfm_jax.downstream.suite_results import Method, Pooled, Task, Tissue, read_arrays
from scfm_jax.errors import InputError

MOST_SLIDES = 4
MOST_EMBEDDED = 20_000
MOST_COLOURS = 16  # more are not told apart
RIGHT, WRONG, ABSENT = "#b4bec6", PALETTE[5], "#e6eaed"
VALUES = "cividis"  # rises in lightness, so that it reads in grey
_ROW = 0.2  # inches, of a legend


class Painted(NamedTuple):
    """A colour for each cell, and what explains them: the legend's entries, or a scale and what it is of."""

    colours: Float[np.ndarray, "m 3"]
    handles: list[Line2D]
    scale: ScalarMappable | None = None
    what: str = ""


def draw_maps(task: Task, tissue: Tissue, method: Method, pooled: Pooled, stem: str) -> list[list[Drawing]]:
    """Truth, prediction and error of each slide, three PNG files that begin with `stem`.

    The slides with most tested cells come first, and no more than four are drawn; none of dissociated cells.

    Raises
    ------
    InputError
        Predictions of cells that have no place.
    """
    beyond = int(pooled.cells.max(initial=-1))
    if beyond >= len(tissue.xy):
        where = task.folder / "tissue" / f"{task.name}.npz"
        problem = f"'xy' has {len(tissue.xy)} rows, and cell {beyond} is predicted"
        raise InputError(where, problem, "write the places of every cell of the task")
    placed = pooled.cells[np.isfinite(tissue.xy[pooled.cells]).all(1)]  # dissociated cells have no map
    slides, tested = np.unique(tissue.slide[placed], return_counts=True)
    shown = slides[np.argsort(-tested, kind="stable")][:MOST_SLIDES]
    drawn = []
    for slide in shown.tolist():
        everyone = np.flatnonzero(tissue.slide == slide)
        on_slide = tissue.slide[pooled.cells] == slide
        cells, true, said = pooled.cells[on_slide], pooled.truth[on_slide], pooled.by_seed[0][on_slide]
        wrong, error_caption = paint_error(task, true, said)
        parts = {
            "truth": (
                everyone,
                paint(task, tissue.truth, tissue.truth[everyone]),
                f"{task.what}, all cells.",
            ),
            "predicted": (cells, paint(task, tissue.truth, said), f"As {method.label} predicts it."),
            "error": (cells, wrong, error_caption),
        }
        row = []
        for part, (of, painted, caption) in parts.items():
            if part == "predicted" and len(cells) < len(everyone):
                caption += f" Palest: {len(everyone) - len(cells):,} cells that were not tested."
            with house_style():
                title = f"slide {slide}: {part}"
                figure = _map(tissue.xy[everyone], tissue.xy[of], painted, title)
                row.append(save(figure, Path(f"{stem}_slide{slide}_{part}.png"), caption))
        drawn.append(row)
    return drawn


def draw_embedding(task: Task, tissue: Tissue | None, what: str, path: Path, figure_path: Path) -> Drawing:
    """Two dimensions of an embedding: UMAP where umap-learn is installed, else principal components."""
    held = read_arrays(path, ("embedding", "cells"))
    embedding, cells = held["embedding"], held["cells"]
    if embedding.ndim != 2 or embedding.shape[1] < 2 or np.isfinite(embedding).all(1).sum() < 3:
        problem = f"'embedding', of shape {embedding.shape}, has no three cells in two dimensions"
        raise InputError(path, problem, "give [cells, dimensions], or remove the file")
    if tissue is not None and cells.max() >= len(tissue.truth):
        problem = f"'cells' has number {cells.max()}, and the tissue of {task.name} has {len(tissue.truth)}"
        raise InputError(path, problem, "give corpus cell numbers of the task's file")
    known = np.isfinite(embedding).all(1)  # a model that knows none of a cell's genes says nothing
    embedding, cells = embedding[known], cells[known]
    if len(cells) > MOST_EMBEDDED:
        some = np.sort(np.random.default_rng(0).permutation(len(cells))[:MOST_EMBEDDED])
        embedding, cells = embedding[some], cells[some]
    xy, axes = project(embedding)
    if tissue is None:
        painted = Painted(np.tile(to_rgb(PALETTE[0]), (len(cells), 1)), [])
    else:
        painted = paint(task, tissue.truth, tissue.truth[cells])
    with house_style():
        figure = Figure(figsize=(WIDTH, 3.9 + _below(painted)), layout="constrained")
        ax = figure.subplots()
        size = 0.5 * cell_size(xy, (3.6, 3.4))
        ax.scatter(xy[:, 0], xy[:, 1], s=size, c=painted.colours, linewidths=0, rasterized=True)
        ax.set(xlabel=axes[0], ylabel=axes[1], xticks=[], yticks=[])
        _explain(figure, painted)
        caption = f"Embeddings of {len(cells):,} cells{f', {what}' if what else ''}, by {task.what}."
        return save(figure, figure_path, caption)


def embeddings_of(task: Task, tasks: Sequence[Task]) -> dict[str, Path]:
    """Files of `embeddings` whose names begin with the task's, by the rest of the name.

    Of files that differ by a checksum alone, as those of folds do, the first. Files of no task are of an
    earlier suite.
    """
    names = sorted((other.name for other in tasks), key=len, reverse=True)
    found: dict[str, Path] = {}
    for path in sorted((task.folder / "embeddings").glob("*.npz")):
        owner = next((name for name in names if path.stem.startswith(name)), None)
        if owner == task.name and not path.stem.endswith(".partial"):
            what = re.sub("-[0-9a-f]{12}$", "", path.stem.removeprefix(owner))
            found.setdefault(what.strip("-_. "), path)
    return found


def project(embedding: Float[np.ndarray, "n d"]) -> tuple[Float[np.ndarray, "n 2"], tuple[str, str]]:
    """Two dimensions of an embedding, and what they are called; the same for the same input."""
    if find_spec("umap"):
        from umap import UMAP

        return UMAP(random_state=0, n_jobs=1).fit_transform(embedding), ("UMAP 1", "UMAP 2")
    pca = PCA(2, svd_solver="full")
    xy = pca.fit_transform(embedding.astype(np.float64))
    first, second = (f"PC {i + 1} ({part:.0%})" for i, part in enumerate(pca.explained_variance_ratio_))
    return xy, (first, second)


def paint(task: Task, everyone: Num[np.ndarray, "n ..."], said: Num[np.ndarray, "m ..."]) -> Painted:
    """Colours of truths or predictions; `everyone`'s truth fixes them, so that all maps of a task agree."""
    if task.kind == "value":
        known = everyone[np.isfinite(everyone)]
        low, high = np.quantile(known, [0.01, 0.99]) if len(known) else (0.0, 1.0)
        scale = ScalarMappable(Normalize(low, max(high, low + 1e-9)), VALUES)
        return Painted(_scaled(scale, said), [], scale, task.scale)
    truth, codes = _codes(everyone), _codes(said)
    names = list(task.classes) or [str(code) for code in range(int(truth.max(initial=0)) + 1)]
    order = np.arange(len(names))
    if len(names) > MOST_COLOURS:  # the commonest have their own
        order = np.argsort(-np.bincount(truth[truth >= 0], minlength=len(names)), kind="stable")
    own = np.sort(order[: len(names) if len(names) <= MOST_COLOURS else MOST_COLOURS - 1])
    # The last two rows are of all other classes, and of cells that have none.
    table = np.array([to_rgb("#d3dadf")] * (len(names) + 1) + [to_rgb(ABSENT)])
    table[own] = [class_colour(i) for i in range(len(own))]
    handles = [class_handle(names[code], table[code]) for code in own]
    if others := len(names) - len(own):
        handles.append(class_handle(f"other ({others} classes)", table[-2]))
    if (codes < 0).any():
        handles.append(class_handle("no label", table[-1]))
    return Painted(table[np.where(codes < 0, len(table) - 1, codes)], handles)


def paint_error(
    task: Task, true: Num[np.ndarray, "m ..."], said: Num[np.ndarray, "m ..."]
) -> tuple[Painted, str]:
    """Which cells are wrong, or by how much, and a sentence on it."""
    if task.kind == "classes":
        wrong = true != said.argmax(1)
        colours = np.where(wrong[:, None], to_rgb(WRONG), to_rgb(RIGHT))
        handles = [class_handle("wrong", WRONG), class_handle("right", RIGHT)]
        return Painted(colours, handles), f"{wrong.mean():.1%} of {len(wrong):,} tested cells are wrong."
    if task.kind == "value":
        error, what = np.abs(said - true), f"error of {task.scale}"
        sentence = f"Absolute error, its mean {error.mean():.3g}."
    else:
        error, what = np.abs(said - true).sum(1) / 2, "share in the wrong class"
        sentence = (
            f"Share of a neighbourhood put in the wrong class (total variation), its mean {error.mean():.3g}."
        )
    high = 1.0 if task.kind == "composition" else float(np.quantile(error, 0.99)) or 1.0
    scale = ScalarMappable(Normalize(0, high), BLUES)
    return Painted(_scaled(scale, error), [], scale, what), sentence


def _codes(values: Num[np.ndarray, "m ..."]) -> Int[np.ndarray, " m"]:
    """Codes as they are, shares as their largest class; -1 where there is no label."""
    if values.ndim == 1:
        return values.astype(np.int64)
    known = np.isfinite(values).all(1)
    return np.where(known, np.where(known[:, None], values, 0).argmax(1), -1)


def _scaled(scale: ScalarMappable, values: Float[np.ndarray, " m"]) -> Float[np.ndarray, "m 3"]:
    colours = scale.to_rgba(np.nan_to_num(values))[:, :3]
    return np.where(np.isfinite(values)[:, None], colours, to_rgb(ABSENT))


def _map(
    background: Float[np.ndarray, "n 2"],
    xy: Float[np.ndarray, "m 2"],
    painted: Painted,
    title: str,
) -> Figure:
    """Cells where they lie, all others of the slide behind them, and the explanation below."""
    width = WIDTH - 0.8
    span = np.maximum(np.ptp(background, axis=0), 1e-9)
    height = float(np.clip(width * span[1] / span[0], 1.2, 5.0))
    figure = Figure(figsize=(WIDTH, height + 0.85 + _below(painted)), layout="constrained")
    ax = figure.subplots()
    size = cell_size(background, (width, height))
    disc: Any = {"s": size, "linewidths": 0, "rasterized": True}
    if len(xy) < len(background):
        ax.scatter(background[:, 0], background[:, 1], color=ABSENT, **disc)
    ax.scatter(xy[:, 0], xy[:, 1], c=painted.colours, **disc)
    ax.set_title(title)
    place_axes(ax, "")
    ax.set_anchor("N")
    _explain(figure, painted)
    return figure


def _columns(handles: list[Line2D]) -> int:
    """As many as fit the width, at eight points a letter of half its height."""
    longest = max(len(str(handle.get_label())) for handle in handles)
    return max(1, min(int(62 / (longest + 7)), len(handles)))


def _below(painted: Painted) -> float:
    """Height, in inches, of what explains the colours."""
    if painted.scale is not None:
        return 0.75
    return _ROW * math.ceil(len(painted.handles) / _columns(painted.handles)) if painted.handles else 0.0


def _explain(figure: Figure, painted: Painted) -> None:
    if painted.scale is not None:
        bar = figure.colorbar(
            painted.scale,
            ax=figure.axes[0],
            label=painted.what,
            location="bottom",
            shrink=0.7,
            aspect=28,
            extend="max",
        )
        bar.outline.set_visible(False)
    elif painted.handles:
        legend_below(figure, painted.handles, columns=_columns(painted.handles), fontsize=8)
