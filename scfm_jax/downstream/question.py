"""A task in one fold, as every method is asked it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32, Int64, Num

from scfm_jax.downstream.folds import Fold
from scfm_jax.downstream.scores import Kind


@dataclass(frozen=True, eq=False)
class Question:
    """What to learn from which cells, and which cells to answer for.

    Attributes
    ----------
    kind
        What the target is (`scores`).
    target
        Of every cell of the cohort: codes ``int64[n]``, values ``float32[n]``, or shares ``float32[n, c]``;
        of the fold's cells none is missing.
    classes
        Names of the codes, or of the columns of shares; empty for values.
    fold
        Cells to learn from, and to be judged by.
    block
        Spatial block of every cell.
    near
        Nearest neighbours of every cell, by cell number, -1 where there are fewer.
    margin
        How many of them are a margin: whoever holds cells out of the training cells to choose a setting does
        not learn from a cell that has one of those among so many neighbours. None: all that `near` holds.
    """

    kind: Kind
    target: Num[np.ndarray, "n ..."]
    classes: tuple[str, ...]
    fold: Fold
    block: Int32[np.ndarray, " n"]
    near: Int64[np.ndarray, "n k"]
    margin: int | None = None

    @property
    def to_learn(self) -> Num[np.ndarray, "t ..."]:
        """Targets of the training cells."""
        return self.target[self.fold.train]

    @property
    def truth(self) -> Num[np.ndarray, "m ..."]:
        """Targets of the test cells."""
        return self.target[self.fold.test]
