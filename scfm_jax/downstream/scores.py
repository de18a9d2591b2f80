"""Scores of what is predicted of cells, each with an interval from resampling blocks of tissue.

Kinds of task, and what `truth` and `predicted` are (rows are cells, of all folds together):

``"classes"``
    codes ``int64[m]``, and probabilities ``float32[m, c]``; the likeliest class is the answer.
``"value"``
    ``float32[m]`` both.
``"composition"``
    ``float32[m, c]`` both, as probabilities are: rows that sum to 1.
``"imputation"``
    ``float32[m]`` both: how many genes were masked, and the sum of what was said of them, errors squared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Float64, Int, Num, Shaped

from scfm_jax.downstream.metrics import block_draws
from scfm_jax.downstream.score_sums import (
    class_counts,
    class_scores,
    composition_scores,
    imputation_scores,
    mean_over_true,
    spearman,
    value_scores,
)
from scfm_jax.errors import InputError

Kind: TypeAlias = Literal["classes", "value", "composition", "imputation"]
# One array, or one for each seed.
Predictions: TypeAlias = Num[np.ndarray, "m ..."] | Sequence[Num[np.ndarray, "m ..."]]

PRIMARY: dict[Kind, str] = {
    "classes": "macro_f1",
    "value": "mae",
    "composition": "jensen_shannon",
    "imputation": "squared_error",
}
HIGHER_IS_BETTER = {
    "accuracy": True,
    "macro_f1": True,
    "balanced_accuracy": True,
    "log_loss": False,
    "ece": False,
    "mae": False,
    "rmse": False,
    "pearson": True,
    "spearman": True,
    "r2": True,
    "jensen_shannon": False,
    "squared_error": False,
}
_FORMULAS: dict[Kind, Callable[..., dict[str, np.ndarray]]] = {
    "classes": class_scores,
    "value": value_scores,
    "composition": composition_scores,
    "imputation": imputation_scores,
}


class Interval(NamedTuple):
    """A score, or a difference of scores, with the lower and the upper end of its 95% interval."""

    value: float
    low: float
    high: float


def score(
    kind: Kind,
    truth: Num[np.ndarray, "m ..."],
    predicted: Num[np.ndarray, "m ..."],
    classes: Sequence[str] | None = None,
) -> dict[str, float]:
    """Score the predictions of a task.

    Parameters
    ----------
    kind, truth, predicted
        See the head of this module.
    classes
        Names of the columns of `predicted`, where there are any: only their number is checked.

    Returns
    -------
    For ``"classes"``: ``accuracy``; ``macro_f1``, F1 averaged over the classes that the truth has, 0 for one
    that is never predicted; ``balanced_accuracy``, recall averaged over the same; ``log_loss``, in nats,
    probabilities held above 1.2e-7; ``ece``, the expected calibration error of the likeliest class in 15 bins
    of equal width (Guo et al. 2017, equation 3).

    For ``"value"``: ``mae`` and ``rmse`` in the task's unit, ``pearson``, ``spearman``, and ``r2`` against
    the mean of the truth.

    For ``"composition"``: ``mae`` over all cells and classes alike; ``pearson`` over cells for each class,
    averaged over the classes whose truth varies; ``jensen_shannon``, the distance (the root of the
    divergence) with base 2, which is 0 to 1, averaged over cells.

    For ``"imputation"``: ``squared_error``, over all masked genes of all cells alike.

    A constant prediction says nothing of the order: its correlation counts 0. Where the truth is constant,
    correlations and ``r2`` are NaN.

    Raises
    ------
    InputError
        Shapes that do not belong together, values that are not finite, codes outside the classes, rows that
        do not sum to 1, no cells.
    """
    truth, predicted = _checked(kind, truth, predicted)
    if classes is not None and predicted.shape[1:] != (len(classes),):
        problem = f"of shape {predicted.shape} for {len(classes)} classes"
        raise InputError("predicted", problem, "give a column for each class of the task, in its order")
    everything = np.zeros(len(truth), np.int64), np.ones((1, 1))
    found = _FORMULAS[kind](truth, predicted, *everything)
    if kind == "value":
        found["spearman"] = spearman(truth, predicted, *everything)
    return {name: float(found[name][0]) for name in HIGHER_IS_BETTER if name in found}


def interval(
    kind: Kind,
    truth: Num[np.ndarray, "m ..."],
    a: Predictions,
    block: Int[np.ndarray, " m"],
    *,
    name: str | None = None,
    n_draws: int = 1000,
    seed: int = 0,
) -> Interval:
    """A score with its 95% percentile interval over spatial blocks; all else as in `paired_difference`."""
    return _interval(*_drawn(kind, truth, [a], block, name, n_draws, seed))


def paired_difference(
    kind: Kind,
    truth: Num[np.ndarray, "m ..."],
    a: Predictions,
    b: Predictions,
    block: Int[np.ndarray, " m"],
    *,
    name: str | None = None,
    n_draws: int = 1000,
    seed: int = 0,
) -> Interval:
    """Score of A minus score of B on the same cells, with a 95% percentile interval over spatial blocks.

    Neighbouring cells are alike and folds share training cells, so the predictions of all folds are pooled,
    and blocks of tissue are drawn with replacement, the same for A and for B. Both scores are computed anew
    from all cells of each draw, since few are means over cells (Efron & Tibshirani 1993, chapters 8 and 13).

    Parameters
    ----------
    kind, truth
        See the head of this module.
    a, b
        Predictions of the same cells. A list holds one for each seed; their scores are averaged within every
        draw, so the interval is over the tissue, for this many seeds. A and B may differ in number.
    block
        Spatial block of each cell, unique over slides.
    name
        The score; by default the primary one of the kind (`PRIMARY`). Mind `HIGHER_IS_BETTER`: of an error,
        the difference is negative where A is better.
    n_draws
        Bootstrap draws.
    seed
        Of the draws: the same seed and blocks give the same draws for every pair of methods.

    Returns
    -------
    The difference on all cells, and the interval over the draws where it is defined; NaN where it is not.

    Raises
    ------
    InputError
        As `score`; an unknown score, no predictions, fewer than two blocks.

    Warns
    -----
    DataWarning
        Below 10 blocks, where percentile intervals are too narrow.
    """
    of_a, of_b = _drawn(kind, truth, [a, b], block, name, n_draws, seed)
    return _interval(of_a - of_b)


def macro_f1(truth: Shaped[np.ndarray, " m"], predicted: Shaped[np.ndarray, " m"]) -> float:
    """F1 averaged over the classes that the truth has, names or codes; 0 for one that is never predicted."""
    classes, codes = np.unique(np.concatenate([truth, predicted]), return_inverse=True)
    true_code, said_code = np.split(codes, 2)
    right, true, said = class_counts(true_code, said_code, np.zeros(len(truth), np.int64), len(classes))
    return float(mean_over_true(2 * right, true + said, true)[0])


def confusion(
    truth: Int[np.ndarray, " m"], predicted: Int[np.ndarray, " m"], n_classes: int
) -> Int[np.ndarray, "c c"]:
    """Numbers of cells by true class (rows) and predicted class (columns), of codes."""
    counts = np.bincount(truth * n_classes + predicted, minlength=n_classes**2)
    return counts.reshape(n_classes, n_classes)


def _interval(drawn: Float64[np.ndarray, " all_and_draws"]) -> Interval:
    defined = drawn[1:][np.isfinite(drawn[1:])]
    low, high = np.quantile(defined, [0.025, 0.975]) if defined.size else (np.nan, np.nan)
    return Interval(float(drawn[0]), float(low), float(high))


def _drawn(
    kind: Kind,
    truth: Num[np.ndarray, "m ..."],
    methods: Sequence[Predictions],
    block: Int[np.ndarray, " m"],
    name: str | None,
    n_draws: int,
    seed: int,
) -> list[Float64[np.ndarray, " all_and_draws"]]:
    """A score of each method, averaged over its seeds: of all cells, then of each draw."""
    of_seeds = [[method] if isinstance(method, np.ndarray) else list(method) for method in methods]
    if not all(of_seeds):
        raise InputError("predicted", "a method has no predictions", "give one array, or one for each seed")
    if np.shape(block) != np.shape(truth)[:1]:
        problem = f"of shape {np.shape(block)} for {len(truth)} cells"
        raise InputError("block", problem, "give the block of every cell")
    # Before the draws, whose errors would hide these.
    checked = [[_checked(kind, truth, predicted) for predicted in method] for method in of_seeds]
    name = PRIMARY[kind] if name is None else name
    _, code = np.unique(block, return_inverse=True)
    draws = block_draws(int(code.max()) + 1, n_draws, seed)
    weights = np.vstack([np.ones(draws.shape[1]), draws])

    def of(truth: np.ndarray, predicted: np.ndarray) -> Float64[np.ndarray, " all_and_draws"]:
        if (kind, name) == ("value", "spearman"):
            return spearman(truth, predicted, code, weights)
        found = _FORMULAS[kind](truth, predicted, code, weights)
        if name not in found:
            raise InputError("name", f"{name!r} is no score of {kind}", f"use one of {', '.join(found)}")
        return found[name]

    return [np.mean([of(*pair) for pair in method], axis=0) for method in checked]


def _checked(kind: Kind, truth: np.ndarray, predicted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if kind not in PRIMARY:
        raise InputError("kind", f"{kind!r} is no kind of task", f"use one of {', '.join(PRIMARY)}")
    truth, predicted = np.asarray(truth), np.asarray(predicted)
    expected = truth.shape if kind != "classes" else truth.shape + predicted.shape[-1:]
    if predicted.shape != expected or predicted.ndim != (2 if kind in ("classes", "composition") else 1):
        problem = f"of shape {predicted.shape} for truth of shape {truth.shape}"
        raise InputError("predicted", problem, f"give the same cells, with the columns that {kind} need")
    if not len(truth):
        raise InputError("truth", "holds no cell", "score at least one")
    for name, values in (("truth", truth), ("predicted", predicted)):
        if missing := int((~np.isfinite(values)).sum()):
            raise InputError(name, f"{missing} values are not finite", "leave these cells out")
        if values.ndim == 2 and (
            values.min() < 0 or np.abs(values.sum(1, dtype=np.float64) - 1).max() > 1e-3
        ):
            raise InputError(name, "some rows are not shares that sum to 1", "normalise the rows")
    if kind == "classes" and (
        truth.dtype.kind not in "iu" or not 0 <= truth.min() <= truth.max() < expected[1]
    ):
        problem = f"codes must be whole numbers from 0 to {expected[1] - 1}"
        raise InputError("truth", problem, "leave cells without a label out")
    return truth, predicted
