"""What a method of a suite is, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32, Int64, Num

from scfm_jax.downstream.cost import Cost
from scfm_jax.downstream.metrics import CellSums
from scfm_jax.downstream.scores import score
from scfm_jax.downstream.suite_tasks import FoldData

Group = Literal["baseline", "model", "control"]


@dataclass(frozen=True, eq=False)
class Answer:
    """What a method says of the test cells.

    Attributes
    ----------
    predicted
        See `scores`; None of ``mixing``, which has scores alone.
    cells, truth
        Of ``imputation``: the test cells that were drawn, and their numbers of masked genes.
    scores
        Of ``mixing`` and ``imputation``; other predictions are scored by whoever asked.
    sums
        Of ``imputation``: squared errors of each cell by part (`metrics.squared_error`).
    stored_bytes
        Of what it learnt, where it keeps anything that is worth counting.
    history
        Rows of its training.
    """

    predicted: Float32[np.ndarray, "m ..."] | None = None
    cells: Int64[np.ndarray, " m"] | None = None
    truth: Float32[np.ndarray, " m"] | None = None
    scores: Mapping[str, float] | None = None
    sums: Mapping[str, CellSums] = field(default_factory=dict)
    stored_bytes: int | None = None
    history: tuple[dict[str, float], ...] = ()

    def judged(
        self, data: FoldData
    ) -> tuple[Int64[np.ndarray, " m"], Num[np.ndarray, "m ..."] | None, Mapping[str, float]]:
        """The cells that it is of, what is true of them, and its scores."""
        cells = data.fold.test if self.cells is None else self.cells
        if self.predicted is None:
            assert self.scores is not None
            return cells, None, self.scores
        truth = data.question.truth if self.truth is None else self.truth
        if self.scores is not None:
            return cells, truth, self.scores
        classes = data.task.classes or None
        return cells, truth, score(data.question.kind, truth, self.predicted, classes)


def _nothing(data: FoldData) -> Cost:
    return Cost()


@dataclass(frozen=True)
class Method:
    """One row of a task's table in one fold.

    Attributes
    ----------
    name, group, k, seed
        As the table has them; k is None where no neighbours are read in a number that is varied.
    answer
        The fold to the answer.
    prepare
        Makes what several methods share, before the answer is asked for and timed, and says what that took
        when it was made, which is a part of this method's cost too.
    model
        Of the suite, ``untrained``, or "".
    asked
        Everything that its answer depends on, beside task, model, fold, k and seed.
    """

    name: str
    group: Group
    k: int | None
    seed: int
    answer: Callable[[FoldData], Answer]
    prepare: Callable[[FoldData], Cost] = _nothing
    model: str = ""
    asked: Mapping[str, Any] = field(default_factory=dict)
