"""Linear probes: how much of a label can be read, linearly, from an embedding or from expression itself."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float, Float32, Float64, Int, Shaped
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score
from sklearn.model_selection import GroupShuffleSplit
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from scfm_jax.downstream.baselines import neighbour_mean
from scfm_jax.downstream.scores import macro_f1
from scfm_jax.errors import InputError

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)
VALIDATION_SHARE = 0.2


@dataclass(frozen=True, eq=False)
class Probe:
    """What a probe says of the test cells.

    Attributes
    ----------
    predictions
        The likeliest class of each test cell.
    probabilities
        Of the classes, in the order of `classes`.
    classes
        Those of the training cells, sorted.
    accuracy
        Share of test cells that are right.
    macro_f1
        F1 averaged over the classes that the test cells have; one that is never predicted counts 0.
    strength
        The inverse penalty C that was chosen.
    """

    predictions: Shaped[np.ndarray, " m"]
    probabilities: Float64[np.ndarray, "m c"]
    classes: Shaped[np.ndarray, " c"]
    accuracy: float
    macro_f1: float
    strength: float


def probe(
    features_train: Float[np.ndarray, "n d"],
    labels_train: Shaped[np.ndarray, " n"],
    features_test: Float[np.ndarray, "m d"],
    labels_test: Shaped[np.ndarray, " m"],
    *,
    blocks_train: Int[np.ndarray, " n"],
    seed: int = 0,
    n_components: int | None = 50,
    strengths: tuple[float, ...] = STRENGTHS,
) -> Probe:
    """Logistic regression on standardised features, or on their principal components.

    Scaling, components and regression see training cells only. The penalty is chosen by accuracy on whole
    training blocks held out, then all is fitted again on every training cell.

    Parameters
    ----------
    features_train, features_test
        One row a cell.
    labels_train, labels_test
        Class of each cell, names or codes; leave cells without a label out.
    blocks_train
        Spatial block of each training cell.
    seed
        Of the blocks held out and of the components.
    n_components
        Principal components kept (at most as many as there are features), None for none.
    strengths
        The inverse penalties C to choose from.

    Raises
    ------
    InputError
        Where labels are missing, features are not finite, or the training blocks leave fewer than two
        classes.
    """
    for name, labels in (("labels_train", labels_train), ("labels_test", labels_test)):
        if np.issubdtype(labels.dtype, np.number) and (labels < 0).any():
            raise InputError(name, "negative codes mean no label", "leave these cells out")
    for name, features in (("features_train", features_train), ("features_test", features_test)):
        if not np.isfinite(features).all():
            raise InputError(name, "some features are not finite", "leave these cells or features out")

    def reduced(rows: np.ndarray) -> Pipeline:
        steps = [StandardScaler()]
        if n_components is not None:
            steps.append(PCA(min(n_components, len(rows), features_train.shape[1]), random_state=seed))
        return make_pipeline(*steps).fit(features_train[rows])

    fit, held_out = _split_blocks(labels_train, blocks_train, seed)
    reduce = reduced(fit)
    x_fit, x_held_out = reduce.transform(features_train[fit]), reduce.transform(features_train[held_out])
    scores = [
        _regression(c).fit(x_fit, labels_train[fit]).score(x_held_out, labels_train[held_out])
        for c in strengths
    ]
    strength = strengths[int(np.argmax(scores))]  # of equals the first: the strongest penalty
    reduce = reduced(np.arange(len(labels_train)))
    model = _regression(strength).fit(reduce.transform(features_train), labels_train)
    x_test = reduce.transform(features_test)
    predictions = model.predict(x_test)
    return Probe(
        predictions=predictions,
        probabilities=model.predict_proba(x_test),
        classes=model.classes_,
        accuracy=float(accuracy_score(labels_test, predictions)),
        macro_f1=macro_f1(labels_test, predictions),
        strength=strength,
    )


def own_and_neighbour_features(
    log_values: Float[np.ndarray, "n_all g"] | sp.csr_array,
    neighbours: Int[np.ndarray, "n k"],
    cells: Int[np.ndarray, " n"] | None = None,
) -> Float32[np.ndarray, "n 2g"]:
    """A cell's own expression beside the mean of its neighbours', the baseline of a spatial embedding.

    Parameters
    ----------
    log_values
        log1p of normalised counts, one row a cell, dense or sparse.
    neighbours
        Rows of `log_values`, nearest first, -1 where there is no neighbour; pass the first k columns for k.
    cells
        The row of each cell itself; not given, `neighbours` has a row for every row of `log_values`.

    Returns
    -------
    float32; the second half is zero for a cell without neighbours. The first half alone is the baseline
    without space.
    """
    own = log_values if cells is None else log_values[cells]
    own = own if isinstance(own, np.ndarray) else own.toarray()
    return np.hstack([np.asarray(own, np.float32), neighbour_mean(log_values, neighbours)])


def _regression(strength: float) -> LogisticRegression:
    return LogisticRegression(C=strength, max_iter=2000)


def _split_blocks(
    labels: Shaped[np.ndarray, " n"], blocks: Int[np.ndarray, " n"], seed: int
) -> tuple[Int[np.ndarray, " f"], Int[np.ndarray, " v"]]:
    """Rows to fit on, and rows of other blocks to choose on: the draw of several that keeps most classes."""
    if len(np.unique(blocks)) < 2:
        raise InputError("blocks_train", "all training cells lie in one block", "give at least two blocks")
    draws = GroupShuffleSplit(n_splits=16, test_size=VALIDATION_SHARE, random_state=seed)
    classes = [(len(np.unique(labels[fit])), fit, held) for fit, held in draws.split(labels, groups=blocks)]
    n_classes, fit, held_out = max(classes, key=lambda draw: draw[0])
    if n_classes < 2:
        raise InputError("labels_train", "the blocks to fit on hold one class", "give more blocks or cells")
    return fit, held_out
