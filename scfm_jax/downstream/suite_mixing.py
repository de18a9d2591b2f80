"""Tasks of mixing in a suite: scores of features as they are, for which nothing is learnt."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from scfm_jax.downstream.mixing import mixing
from scfm_jax.downstream.suite_answers import Answer
from scfm_jax.downstream.suite_tasks import FoldData


def mixing_answer(data: FoldData, features: Float[np.ndarray, "n d"], seed: int) -> Answer:
    """Scores of the labelled cells that have features and a batch."""
    task, cells = data.task, data.fold.test
    assert task.batch is not None and task.target is not None
    cells = cells[np.isfinite(features[cells]).all(1) & (task.batch[cells] >= 0)]
    return Answer(scores=mixing(features[cells], task.batch[cells], task.target[cells], seed))
