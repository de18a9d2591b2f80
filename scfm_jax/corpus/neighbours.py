"""Space within one section: the order of cells along a Hilbert curve, and each cell's nearest neighbours."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Int
from scipy.spatial import cKDTree

_CURVE_ORDER = 16
_QUERY_ROWS = 1 << 16


def hilbert_order(xy: Float[np.ndarray, "n 2"]) -> Int[np.ndarray, " n"]:
    """Order points along a Hilbert curve, so that near points are near in the order.

    Parameters
    ----------
    xy
        Coordinates in any unit. The curve fills their bounding square, in 65,536 steps a side.

    Returns
    -------
    The permutation that sorts the points; points in one cell of the curve keep their given order.

    Notes
    -----
    The curve's index is found from the top bit down: each step takes the quadrant, then turns the square so
    that the next smaller curve starts in its corner (Hilbert 1891; Sagan, Space-Filling Curves, 1994).
    """
    if len(xy) == 0:
        return np.empty(0, np.int64)
    low = xy.min(axis=0)
    extent = float((xy.max(axis=0) - low).max()) or 1.0
    side = 1 << _CURVE_ORDER
    x, y = np.minimum((xy - low) / extent * side, side - 1).astype(np.int64).T
    index = np.zeros(len(xy), np.int64)
    for bit in reversed(range(_CURVE_ORDER)):
        right, upper = (x >> bit) & 1, (y >> bit) & 1
        index += ((3 * right) ^ upper) << (2 * bit)
        flip = (upper == 0) & (right == 1)
        x, y = np.where(flip, side - 1 - x, x), np.where(flip, side - 1 - y, y)
        x, y = np.where(upper == 0, y, x), np.where(upper == 0, x, y)
    return np.argsort(index, kind="stable")


def nearest(
    xy: Float[np.ndarray, "n 2"], k: int, *, threads: int = -1
) -> Iterator[tuple[Int[np.ndarray, "rows k"], Float[np.ndarray, "rows k"]]]:
    """Find the ``k`` nearest other points of every point, a bounded number of rows at a time.

    Parameters
    ----------
    xy
        Coordinates of one section, in any unit.
    k
        Neighbours of each point.
    threads
        Of the search; -1 for one a core.

    Yields
    ------
    Row numbers (int64, -1 where there are fewer than ``k``) and distances (float64, infinite there) of the
    next rows, nearest first, equal distances by row number. A point is never its own neighbour, even where
    points coincide.
    """
    tree = cKDTree(xy)
    for start in range(0, len(xy), _QUERY_ROWS):
        rows = np.arange(start, min(start + _QUERY_ROWS, len(xy)))
        distance, found = map(np.asarray, tree.query(xy[rows], k=k + 1, workers=threads))
        found = np.where(np.isfinite(distance), found, -1)
        # Where more than k points coincide the tree may not list the point itself: then the last one goes.
        own = found == rows[:, None]
        own[~own.any(axis=1), -1] = True
        distance, found = (a[~own].reshape(len(rows), k) for a in (distance, found))
        order = np.lexsort((found, distance))
        yield np.take_along_axis(found, order, 1), np.take_along_axis(distance, order, 1)


def spacing_warnings(
    nearest_distance: Float[np.ndarray, " n"],
    last_distance: Float[np.ndarray, " n"],
    k: int,
    um_per_unit: float | None,
) -> list[str]:
    """Say what in a section's distances looks like cells that are missing or pieces that are not one section.

    Parameters
    ----------
    nearest_distance, last_distance
        Distance of every cell to its first and to its ``k``-th neighbour, in the file's units, infinite where
        there is none.
    k
        Which neighbour the last one is.
    um_per_unit
        Length of one unit in µm; ``None`` skips what needs it.

    Returns
    -------
    One sentence for each thing found.
    """
    first, last = (d[np.isfinite(d)] for d in (nearest_distance, last_distance))
    found = []
    if last.size:
        far = float(np.mean(last > 3 * np.median(last)))
        if far > 0.01:
            found.append(
                f"{far:.1%} of cells have neighbour {k} farther than 3 times its median: is it one piece?"
            )
    if um_per_unit is None or not first.size:
        return found
    if (um := float(np.median(first)) * um_per_unit) > 25:
        found.append(f"the median nearest neighbour is {um:.0f} µm away (over 25): are the cells subsampled?")
    # The limit is for neighbour 64; the distance to the k-th grows with the root of k.
    if last.size and (um := float(np.median(last)) * um_per_unit) > (limit := 250 * (k / 64) ** 0.5):
        found.append(
            f"the median neighbour {k} is {um:.0f} µm away (over {limit:.0f}): are the cells subsampled?"
        )
    return found
