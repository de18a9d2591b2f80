"""The task "neighbourhood composition": which cell types surround a cell, as shares that sum to 1.

The radius belongs to the task and not to a model: it stays when the model's k changes. (The AIDO.Tissue paper
calls this task density.)
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float, Float32, Int64

from scfm_jax.corpus import Corpus
from scfm_jax.downstream.spatial_labels import Unit, sum_around
from scfm_jax.errors import InputError


def composition(
    corpus: Corpus,
    codes: Int64[np.ndarray, " n"],
    n_classes: int,
    radius: float,
    *,
    unit: Unit = "um",
    min_neighbours: int = 5,
) -> tuple[Float32[np.ndarray, "n c"], dict[str, Any]]:
    """Shares of the cell types among the labelled cells within a radius, the cell itself excluded.

    Parameters
    ----------
    corpus
        Slides are apart.
    codes
        Type of every cell of the corpus, -1 where it is missing.
    n_classes
        Types; codes are below it.
    radius
        In `unit`.
    unit
        ``"um"``, or ``"file"`` for each file's own units, where their length is not known.
    min_neighbours
        A cell with fewer labelled ones within the radius is left out: its shares would be noise.

    Returns
    -------
    value
        Of every cell; its row is NaN where it is left out.
    report
        ``unit``, ``radius``, ``min_neighbours``, ``median_neighbours`` (labelled ones of the scored cells),
        and numbers of ``cells``: ``scored``, ``few_neighbours`` and ``without_coordinates``.

    Raises
    ------
    InputError
        Codes that do not belong to the corpus or to the types, a radius that is not positive or that leaves
        no cell, a slide whose unit is not known where µm are asked for.
    """
    if not radius > 0:
        raise InputError("radius", f"is {radius}", "give a positive one")
    if codes.shape != (corpus.n_cells,) or codes.min() < -1 or codes.max() >= n_classes:
        problem = f"are not {corpus.n_cells} numbers from -1 to {n_classes - 1}"
        raise InputError("codes", problem, "give the type of every cell of the corpus")
    types = _one_hot(codes, n_classes)
    counts, placed = sum_around(corpus, types.toarray(), radius, unit)
    neighbours = counts.sum(1)
    scored = placed & (neighbours >= max(min_neighbours, 1))
    if not scored.any():
        problem = f"no cell has {min_neighbours} labelled neighbours within {radius:g} ({unit})"
        raise InputError(corpus.path, problem, "raise the radius or lower min_neighbours")
    value = np.full(counts.shape, np.nan, np.float32)
    value[scored] = counts[scored] / neighbours[scored, None]
    return value, {
        "unit": unit,
        "radius": radius,
        "min_neighbours": min_neighbours,
        "median_neighbours": float(np.median(neighbours[scored])),
        "cells": {
            "scored": int(scored.sum()),
            "few_neighbours": int((placed & ~scored).sum()),
            "without_coordinates": int((~placed).sum()),
        },
    }


def composition_by_type(
    value: Float32[np.ndarray, "n c"],
    codes: Int64[np.ndarray, " n"],
    train: Int64[np.ndarray, " a"],
    test: Int64[np.ndarray, " m"],
) -> Float32[np.ndarray, "m c"]:
    """Baseline: the mean over the training cells of the cell's own type.

    A test cell without a type, or of one that no training cell has, gets the mean over all training cells.
    """
    train = train[np.isfinite(value[train]).all(1)]
    members = _one_hot(codes[train], codes.max() + 1).T
    number = members.sum(1)
    known = (codes[test] >= 0) & (number[codes[test]] > 0)
    predicted = np.tile(value[train].mean(0), (len(test), 1))
    of_type = (members @ value[train]) / np.maximum(number, 1)[:, None]
    predicted[known] = of_type[codes[test][known]]
    return predicted


def composition_of_predicted(
    corpus: Corpus,
    probabilities: Float[np.ndarray, "n c"],
    test: Int64[np.ndarray, " m"],
    radius: float,
    *,
    unit: Unit = "um",
) -> Float32[np.ndarray, "m c"]:
    """Baseline: what a classifier says of the cells within the radius, averaged.

    Parameters
    ----------
    corpus, radius, unit
        As in `composition`.
    probabilities
        Of the types, for every cell of the corpus with coordinates. Those of cells that the classifier learnt
        from are too certain: give held-out ones where that matters.
    test
        Cell numbers, of cells that `composition` scored.

    Raises
    ------
    InputError
        Probabilities that are missing, or a test cell with nothing around it.
    """
    if probabilities.shape[0] != corpus.n_cells:
        problem = f"{probabilities.shape[0]} rows for {corpus.n_cells} cells"
        raise InputError("probabilities", problem, "give one for every cell of the corpus")
    sums = sum_around(corpus, probabilities, radius, unit)[0][test]
    total = sums.sum(1, keepdims=True)
    if not (total > 0).all():  # NaN as well
        problem = f"{int((~(total > 0)).sum())} test cells have none, or missing ones, around them"
        raise InputError(
            "probabilities", problem, "predict every cell, and test those that `composition` scored"
        )
    return (sums / total).astype(np.float32)


def _one_hot(codes: Int64[np.ndarray, " n"], n_classes: int) -> sp.csr_array:
    """A row a cell, without an entry where the type is missing."""
    rows = np.flatnonzero(codes >= 0)
    return sp.csr_array((np.ones(len(rows)), (rows, codes[rows])), shape=(len(codes), n_classes))
