"""How much a model may learn from: subsets of whole blocks, and how many different cells a training reads."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64, Int, Int64

from scfm_jax.corpus.context import Context

CHUNK = 1 << 14


def growing_order(
    sizes: Int[np.ndarray, " blocks"],
    slide: Int[np.ndarray, " blocks"],
    draw: Float64[np.ndarray, " blocks"],
) -> Int64[np.ndarray, " taken"]:
    """The order in which a growing subset takes blocks, so that it holds of every slide about the same share.

    A slide's blocks follow one another as drawn, and the next is always of the slide of which the least share
    has been taken. So no slide has a second block before each has one, and the shares taken of two slides
    never differ by more than one block.

    Parameters
    ----------
    sizes
        Cells of each block; those without any are not taken.
    slide
        Slide of each block, from 0.
    draw
        A random number for each block.
    """
    there = np.flatnonzero(sizes)
    order = there[np.lexsort((draw[there], slide[there]))]
    ends, total = np.cumsum(sizes[order]), np.bincount(slide, sizes)
    of_earlier_slides = np.cumsum(total) - total
    taken = ends - sizes[order] - of_earlier_slides[slide[order]]
    return order[np.lexsort((draw[order], taken / total[slide[order]]))]


def nearest_prefix(sizes: Int[np.ndarray, " blocks"], wanted: int) -> int:
    """How many of the first blocks, one at least, together have nearest to the cells wanted."""
    return int(np.abs(np.cumsum(sizes) - wanted).argmin()) + 1


def unique_cells(
    cells: Int64[np.ndarray, " n"], context: Context, *before: tuple[Int64[np.ndarray, " m"], Context]
) -> int:
    """Count the cells whose expression a training on `cells` reads: D of a scaling law.

    Parameters
    ----------
    cells
        Numbers of the centres.
    context
        What stands around each of them.
    *before
        The same of trainings that this one goes on from, whose cells count too.

    Returns
    -------
    How many different cells are a centre, or shown as a neighbour of one. Memory is a byte for each cell of
    the corpus; neighbours are read `CHUNK` cells at a time.

    Raises
    ------
    InputError
        More neighbours than the corpus stores.
    """
    is_read = np.zeros(context.corpus.n_cells, bool)
    for centres, around in ((cells, context), *before):
        for first in range(0, len(centres), CHUNK):
            _, shown = around.members(centres[first : first + CHUNK])
            is_read[shown[shown >= 0]] = True
    return int(np.count_nonzero(is_read))
