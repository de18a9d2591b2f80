"""What labels of places are computed from: where cells lie, and sums over the cells within a radius."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, TypeAlias

import numpy as np
import scipy.sparse as sp
from jaxtyping import Bool, Float, Float64
from scipy.spatial import cKDTree

from scfm_jax.corpus import Corpus
from scfm_jax.errors import InputError

Unit: TypeAlias = Literal["um", "file"]
_ROWS = 1 << 15


def placed_slides(corpus: Corpus, unit: Unit = "um") -> Iterator[tuple[slice, Float64[np.ndarray, "n 2"]]]:
    """Cell numbers of each slide that has coordinates, and where its cells lie.

    Parameters
    ----------
    corpus
        Its slides are apart: frames of sections may overlap.
    unit
        µm, or each file's own units.

    Raises
    ------
    InputError
        No slide has coordinates, or µm are asked for where a slide's unit is not known.
    """
    slides = [slide for slide in corpus.slides if slide.spatial]
    if not slides:
        raise InputError(corpus.path, "no slide has coordinates", "give spatial files, or leave the task out")
    for slide in slides:
        if unit == "um" and slide.um_per_unit is None:
            raise InputError(
                corpus.path,
                f"slide {slide.name} has no um_per_unit, and the radius is in µm",
                "build the corpus with --um-per-unit (um_per_unit in sources.toml)",
            )
        rows = slice(slide.start, slide.start + slide.n_cells)
        cells = np.arange(rows.start, rows.stop)
        xy = np.stack([corpus.column(axis, cells) for axis in ("x", "y")], axis=1).astype(np.float64)
        yield rows, xy * (slide.um_per_unit if unit == "um" and slide.um_per_unit is not None else 1.0)


def sum_around(
    corpus: Corpus, values: Float[np.ndarray, "n c"], radius: float, unit: Unit = "um"
) -> tuple[Float64[np.ndarray, "n c"], Bool[np.ndarray, " n"]]:
    """`sum_within` each slide of a corpus, 0 for cells without coordinates; and which cells have some."""
    sums, placed = np.zeros(values.shape), np.zeros(corpus.n_cells, bool)
    for rows, xy in placed_slides(corpus, unit):
        sums[rows], placed[rows] = sum_within(xy, values[rows], radius), True
    return sums, placed


def sum_within(
    xy: Float64[np.ndarray, "n 2"], values: Float[np.ndarray, "n c"], radius: float
) -> Float64[np.ndarray, "n c"]:
    """Sum, for each cell, of the values of all other cells at most `radius` away.

    A cell in the very same place counts; the cell itself never does.
    """
    tree, sums = cKDTree(xy), np.empty(values.shape)
    for start in range(0, len(xy), _ROWS):  # so that the pairs of a large slide need not fit into memory
        rows = slice(start, start + _ROWS)
        pairs = cKDTree(xy[rows]).sparse_distance_matrix(tree, radius, output_type="ndarray")
        pairs = pairs[pairs["i"] + start != pairs["j"]]
        near = (np.ones(len(pairs)), (pairs["i"], pairs["j"]))
        sums[rows] = sp.csr_array(near, shape=(len(xy[rows]), len(xy))) @ values
    return sums
