"""What baselines read of a cell: components of its expression, and their means over its neighbours."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Float32, Int64
from sklearn.decomposition import PCA
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor

from scfm_jax.downstream.baselines import neighbour_mean
from scfm_jax.downstream.cohort import Cohort
from scfm_jax.downstream.question import Question
from scfm_jax.errors import InputError

COMPONENTS = 50
COORDINATE_NEIGHBOURS = 5


def components(
    cohort: Cohort, train: Int64[np.ndarray, " t"], *, n: int = COMPONENTS, seed: int = 0
) -> Float32[np.ndarray, "n d"]:
    """Principal components of every cell's log counts, fitted on the training cells alone."""
    counts = cohort.log_counts
    size = min(n, len(train) - 1, counts.shape[1] - 1)
    pca = PCA(size, svd_solver="arpack", random_state=seed).fit(counts[train])
    return pca.transform(counts).astype(np.float32)


def beside_neighbours(
    features: Float[np.ndarray, "n d"], near: Int64[np.ndarray, "n k"], sizes: Sequence[int]
) -> Float32[np.ndarray, "n e"]:
    """A cell's own features beside their means over its nearest neighbours, for each number in `sizes`.

    No sizes, or 0: its own alone. A cell without neighbours has means of zero.
    """
    means = [neighbour_mean(features, near[:, :k]) for k in sizes if k]
    return np.hstack([features, *means]).astype(np.float32)


def coordinates_answer(cohort: Cohort, question: Question) -> Float32[np.ndarray, "m ..."]:
    """What the 5 nearest training cells of the same slide are: no expression is read.

    Raises
    ------
    InputError
        A test slide without training cells, or cells without coordinates.
    """
    train, test = question.fold.train, question.fold.test
    shape = (len(test), len(question.classes)) if question.classes else (len(test),)
    answer = np.zeros(shape, np.float32)
    for slide in np.unique(cohort.slide[test]):
        learnt, asked = train[cohort.slide[train] == slide], cohort.slide[test] == slide
        if not len(learnt) or not cohort.corpus.slides[slide].spatial:
            raise InputError(
                f"fold {question.fold.name}",
                f"slide {cohort.corpus.slides[slide].name!r} has no training cells with coordinates",
                "leave the baseline of coordinates out where whole slides are held out",
            )
        k = min(COORDINATE_NEIGHBOURS, len(learnt))
        if question.kind == "classes":
            model = KNeighborsClassifier(k).fit(cohort.xy[learnt], question.target[learnt])
            said = np.zeros((asked.sum(), len(question.classes)), np.float32)
            said[:, model.classes_] = model.predict_proba(cohort.xy[test[asked]])
        else:
            regressor = KNeighborsRegressor(k).fit(cohort.xy[learnt], question.target[learnt])
            said = regressor.predict(cohort.xy[test[asked]])
        answer[asked] = said
    return answer
