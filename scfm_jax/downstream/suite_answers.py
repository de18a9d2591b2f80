"""What a method of a suite is, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32, Int64

from scfm_jax.downstream.cost import Cost
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
    stored_bytes
        Of what it learnt, where it keeps anything that is worth counting.
    history
        Rows of its training.
    """

    predicted: Float32[np.ndarray, "m ..."] | None = None
    cells: Int64[np.ndarray, " m"] | None = None
    truth: Float32[np.ndarray, " m"] | None = None
    scores: Mapping[str, float] | None = None
    stored_bytes: int | None = None
    history: tuple[dict[str, float], ...] = ()


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
