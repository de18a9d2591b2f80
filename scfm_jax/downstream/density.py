"""The task "local cell density": how crowded a cell's surroundings are, to be read from expression alone.

Inputs of a model have no coordinates here: they would be the answer.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, Int64
from scipy.spatial import ConvexHull, QhullError
from sklearn.linear_model import LinearRegression

from scfm_jax.corpus import Corpus
from scfm_jax.downstream.spatial_labels import placed_slides, sum_within
from scfm_jax.errors import InputError

UNIT = "log1p(cells per 1,000 µm²)"
_AREA = 1000.0
_LEAST_DISTANCE = 0.1  # µm, of cells that coincide


def local_density(corpus: Corpus, radius: float = 50.0) -> tuple[Float32[np.ndarray, " n"], dict[str, Any]]:
    """log1p of the other cells within a radius, per 1,000 µm² of the disc inside the slide's hull.

    Cells at most `radius` from the border of their slide's convex hull are left out. The disc of every other
    cell lies inside the hull whole, so its area is that of the disc, and no density rests on a sliver of one.

    The hull is not the tissue. Holes and bays lie inside it, and beside them a cell's disc is partly empty:
    its density is that of tissue and void together, as for a cell beside a lumen. Pieces of tissue that lie
    apart must be sections of their own (``--section``), or the border between them is not seen.

    Parameters
    ----------
    corpus
        Slides are apart; each spatial one needs a known unit.
    radius
        In µm.

    Returns
    -------
    value
        Of every cell, NaN where it is left out.
    report
        ``unit``, ``radius`` and numbers of ``cells``: ``scored``, left out at the ``border``, and
        ``without_coordinates``.

    Raises
    ------
    InputError
        A spatial slide whose unit is not known, a radius that is not positive or that leaves no cell.
    """
    if not radius > 0:
        raise InputError("radius", f"is {radius} µm", "give a positive one")
    value, border = np.full(corpus.n_cells, np.nan, np.float32), 0
    for rows, xy in placed_slides(corpus):
        inside = _depth(xy) > radius
        others = sum_within(xy, np.ones((len(xy), 1)), radius)[:, 0]
        value[rows] = np.where(inside, np.log1p(others / (np.pi * radius**2) * _AREA), np.nan)
        border += int((~inside).sum())
    scored = int(np.isfinite(value).sum())
    if not scored:
        problem = f"no cell lies farther than {radius:g} µm from its slide's border"
        raise InputError(corpus.path, problem, "lower the radius")
    cells = {"scored": scored, "border": border, "without_coordinates": corpus.n_cells - scored - border}
    return value, {"unit": UNIT, "radius": radius, "cells": cells}


def density_from_distance(
    corpus: Corpus,
    value: Float32[np.ndarray, " n"],
    train: Int64[np.ndarray, " a"],
    test: Int64[np.ndarray, " m"],
    *,
    k: int = 10,
) -> Float32[np.ndarray, " m"]:
    """Baseline: least squares on the log of the distance to the k-th neighbour.

    That distance is itself a measure of density, k / (pi d²), taken from coordinates that no other method
    sees: a ceiling to look up to rather than a rival.

    Parameters
    ----------
    corpus, value
        Given to and returned by `local_density`.
    train, test
        Cell numbers; training cells that are left out are passed over.
    k
        At most what the corpus stores.

    Raises
    ------
    InputError
        A cell with fewer than `k` neighbours, or `k` over what is stored.
    """
    train = train[np.isfinite(value[train])]
    model = LinearRegression().fit(_log_distance(corpus, train, k), value[train])
    return model.predict(_log_distance(corpus, test, k)).astype(np.float32)


def _depth(xy: Float64[np.ndarray, "n 2"]) -> Float64[np.ndarray, " n"]:
    """Distance of each point to the border of their convex hull: to the nearest of its edges' lines."""
    depth = np.full(len(xy), np.inf)
    try:
        edges = ConvexHull(xy).equations
    except QhullError:  # too few points, or on one line: all of them are border
        return np.zeros(len(xy))
    for x, y, offset in edges:
        np.minimum(depth, -(xy[:, 0] * x + xy[:, 1] * y + offset), out=depth)
    return depth


def _log_distance(corpus: Corpus, cells: Int64[np.ndarray, " n"], k: int) -> Float64[np.ndarray, "n 1"]:
    um = np.array([slide.um_per_unit or np.nan for slide in corpus.slides])[corpus.slide_of(cells)]
    distance = corpus.distances(cells, k)[:, -1] * um
    if few := int((~np.isfinite(distance)).sum()):
        raise InputError(corpus.path, f"{few} cells have fewer than {k} neighbours", "lower k")
    return np.log(np.maximum(distance, _LEAST_DISTANCE))[:, None]
