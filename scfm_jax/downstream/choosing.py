"""Training cells held out to choose a setting on, a penalty or an epoch: whole blocks, with a margin around.

A neighbour of what is fitted says too little of the setting that a distant test cell wants, so whoever
chooses learns from no cell that has a held-out one among its neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Int, Int64, Shaped
from sklearn.model_selection import GroupKFold, GroupShuffleSplit

from scfm_jax.errors import InputError

FOLDS = 4
VALIDATION_SHARE = 0.2
_DRAWS = 16


def neighbour_rows(
    cells: Int64[np.ndarray, " n"], near: Int64[np.ndarray, "n k"]
) -> Int64[np.ndarray, "n k"]:
    """Neighbours of some cells as rows of `cells`; -1 where there is none, or one that is not among them."""
    row = np.full(max(cells.max(), near.max(initial=0)) + 1, -1)
    row[cells] = np.arange(len(cells))
    return np.where(near >= 0, row[near], -1)


def blocks_in_turn(
    blocks: Int[np.ndarray, " n"], near: Int64[np.ndarray, "n k"], seed: int
) -> Iterator[tuple[Int64[np.ndarray, " f"], Int64[np.ndarray, " v"]]]:
    """Rows to fit on and rows to choose on, four times, so that each row is chosen on once.

    Parameters
    ----------
    blocks
        Spatial block of each row.
    near
        Neighbours of each row that are a margin (`neighbour_rows`).
    seed
        Of the draw.

    Raises
    ------
    InputError
        One block.
    """
    n_blocks = _check(blocks)
    folds = GroupKFold(min(FOLDS, n_blocks), shuffle=True, random_state=seed)
    for fit, held_out in folds.split(blocks, groups=blocks):
        yield _apart(fit, held_out, near), held_out


def held_out_blocks(
    blocks: Int[np.ndarray, " n"],
    near: Int64[np.ndarray, "n k"],
    seed: int,
    *,
    labels: Shaped[np.ndarray, " n"] | None = None,
    share: float = VALIDATION_SHARE,
) -> tuple[Int64[np.ndarray, " f"], Int64[np.ndarray, " v"]]:
    """Rows to fit on, and rows of other blocks to choose on.

    Parameters
    ----------
    blocks, near, seed
        As in `blocks_in_turn`.
    labels
        Classes: of several draws that which keeps most of them to fit on is taken. None: the first draw that
        leaves a row to fit on.
    share
        Of the blocks, to choose on.

    Raises
    ------
    InputError
        One block, no row to fit on, or one class.
    """
    _check(blocks)
    draws = GroupShuffleSplit(n_splits=_DRAWS, test_size=share, random_state=seed)
    best, most = None, 0
    for fit, held_out in draws.split(blocks, groups=blocks):
        apart = _apart(fit, held_out, near)
        n_classes = min(len(apart), 1) if labels is None else len(np.unique(labels[apart]))
        if n_classes > most:
            best, most = (apart, held_out), n_classes
        if labels is None and best:
            break
    if best is None or (labels is not None and most < 2):
        left = "no cell" if best is None else "one class"
        raise InputError(
            "blocks_train",
            f"the blocks to fit on hold {left} outside the margin",
            "give more blocks or cells, or a smaller margin",
        )
    return best


def _check(blocks: Int[np.ndarray, " n"]) -> int:
    if (n_blocks := len(np.unique(blocks))) < 2:
        raise InputError("blocks_train", "all training cells lie in one block", "give at least two blocks")
    return n_blocks


def _apart(
    fit: Int64[np.ndarray, " a"], held_out: Int64[np.ndarray, " v"], near: Int64[np.ndarray, "n k"]
) -> Int64[np.ndarray, " f"]:
    """Rows that have no held-out row among their neighbours, and are among those of none."""
    is_held_out, is_near = np.zeros((2, len(near) + 1), bool)  # the last is of -1
    is_held_out[held_out] = True
    is_near[near[held_out]] = True
    return fit[~(is_held_out[near[fit]].any(1) | is_near[fit])]
