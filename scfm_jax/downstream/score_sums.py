"""The formulas of `scores`, as functions of sums over the cells of each block, for many draws at once.

`block` numbers the blocks of the cells from 0, all in use; `weights` says how often each draw has each block.
A score that is not defined in a draw is NaN there.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float64, Int, Num
from scipy.special import rel_entr

ECE_BINS = 15
# A certainty that proves wrong would cost infinitely much; float32, as probabilities are, ends here.
LEAST_PROBABILITY = float(np.finfo(np.float32).eps)
_CONSTANT = 1e-12  # a variance below this share of the second moment is rounding
_DRAWS_AT_ONCE = 100


def class_scores(
    truth: Int[np.ndarray, " m"],
    predicted: Num[np.ndarray, "m c"],
    block: Int[np.ndarray, " m"],
    weights: Float64[np.ndarray, "draws blocks"],
) -> dict[str, Float64[np.ndarray, " draws"]]:
    """Accuracy, macro-F1, balanced accuracy, log loss and calibration error of probabilities."""
    answer = predicted.argmax(1)
    right, true, said = (
        weights @ counts for counts in class_counts(truth, answer, block, predicted.shape[1])
    )
    of_truth = predicted[np.arange(len(truth)), truth].astype(np.float64)
    surprise = -np.log(np.maximum(of_truth, LEAST_PROBABILITY))
    confidence = predicted.max(1).astype(np.float64)
    place = np.clip(np.ceil(confidence * ECE_BINS).astype(np.int64) - 1, 0, ECE_BINS - 1)
    gap = weights @ _count(block, place, ECE_BINS, confidence - (answer == truth))
    total = true.sum(1)
    return {
        "accuracy": right.sum(1) / total,
        "macro_f1": mean_over_true(2 * right, true + said, true),
        "balanced_accuracy": mean_over_true(right, true, true),
        "log_loss": weights @ np.bincount(block, surprise) / total,
        "ece": np.abs(gap).sum(1) / total,
    }


def value_scores(
    truth: Num[np.ndarray, " m"],
    predicted: Num[np.ndarray, " m"],
    block: Int[np.ndarray, " m"],
    weights: Float64[np.ndarray, "draws blocks"],
) -> dict[str, Float64[np.ndarray, " draws"]]:
    """MAE, RMSE, Pearson's correlation and R2; Spearman's is apart, in `spearman`."""
    t, p = truth.astype(np.float64), predicted.astype(np.float64)
    total = weights @ np.bincount(block)
    absolute, squared = (weights @ np.bincount(block, x) for x in (np.abs(p - t), np.square(p - t)))
    variance, pearson = (x[:, 0] for x in _moments(t[:, None], p[:, None], block, weights))
    with np.errstate(divide="ignore", invalid="ignore"):
        r2 = np.where(variance > 0, 1 - squared / total / variance, np.nan)
    return {"mae": absolute / total, "rmse": np.sqrt(squared / total), "pearson": pearson, "r2": r2}


def composition_scores(
    truth: Num[np.ndarray, "m c"],
    predicted: Num[np.ndarray, "m c"],
    block: Int[np.ndarray, " m"],
    weights: Float64[np.ndarray, "draws blocks"],
) -> dict[str, Float64[np.ndarray, " draws"]]:
    """MAE, Pearson's correlation (mean over classes) and the Jensen-Shannon distance (mean over cells)."""
    t, p = truth.astype(np.float64), predicted.astype(np.float64)
    total = weights @ np.bincount(block)
    a, b = (x / x.sum(1, keepdims=True) for x in (t, p))
    middle = (a + b) / 2
    divergence = (rel_entr(a, middle) + rel_entr(b, middle)).sum(1) / (2 * np.log(2))
    distance = np.sqrt(np.maximum(divergence, 0))  # of equal rows rounding may leave less than 0
    return {
        "mae": weights @ np.bincount(block, np.abs(p - t).mean(1)) / total,
        "pearson": _nanmean(_moments(t, p, block, weights)[1]),
        "jensen_shannon": weights @ np.bincount(block, distance) / total,
    }


def imputation_scores(
    truth: Num[np.ndarray, " m"],
    predicted: Num[np.ndarray, " m"],
    block: Int[np.ndarray, " m"],
    weights: Float64[np.ndarray, "draws blocks"],
) -> dict[str, Float64[np.ndarray, " draws"]]:
    """Squared error over all masked genes alike, from each cell's number of them and sum of errors."""
    errors, masked = (weights @ np.bincount(block, x.astype(np.float64)) for x in (predicted, truth))
    with np.errstate(divide="ignore", invalid="ignore"):
        return {"squared_error": errors / masked}


def spearman(
    truth: Num[np.ndarray, " m"],
    predicted: Num[np.ndarray, " m"],
    block: Int[np.ndarray, " m"],
    weights: Float64[np.ndarray, "draws blocks"],
) -> Float64[np.ndarray, " draws"]:
    """Pearson's correlation of the ranks within each draw, where a block drawn twice counts twice."""
    levels = [np.unique(x, return_inverse=True)[1] for x in (truth, predicted)]
    found = []
    for first in range(0, len(weights), _DRAWS_AT_ONCE):
        weight = weights[first : first + _DRAWS_AT_ONCE, block]
        t, p = (_centred_ranks(level, weight) for level in levels)
        tt, pp, tp = (np.einsum("dm,dm,dm->d", weight, x, y) for x, y in ((t, t), (p, p), (t, p)))
        found.append(_correlation(tp, tt, pp))
    return np.concatenate(found)


def class_counts(
    truth: Int[np.ndarray, " m"], answer: Int[np.ndarray, " m"], block: Int[np.ndarray, " m"], n_classes: int
) -> list[Float64[np.ndarray, "blocks c"]]:
    """Cells of each block and class that are right, that are of the class, that are said to be."""
    right = (truth == answer).astype(np.float64)
    return [
        _count(block, *what) for what in ((truth, n_classes, right), (truth, n_classes), (answer, n_classes))
    ]


def mean_over_true(
    part: Float64[np.ndarray, "draws c"],
    whole: Float64[np.ndarray, "draws c"],
    true: Float64[np.ndarray, "draws c"],
) -> Float64[np.ndarray, " draws"]:
    """Mean of part / whole over the classes that the truth of a draw has."""
    return _nanmean(np.where(true > 0, part / np.maximum(whole, 1), np.nan))


def _count(
    block: Int[np.ndarray, " m"],
    place: Int[np.ndarray, " m"],
    n_places: int,
    weight: Float64[np.ndarray, " m"] | None = None,
) -> Float64[np.ndarray, "blocks places"]:
    n_blocks = int(block.max()) + 1
    flat = np.bincount(block * n_places + place, weight, minlength=n_blocks * n_places)
    return flat.reshape(n_blocks, n_places).astype(np.float64)


def _moments(
    truth: Float64[np.ndarray, "m c"],
    predicted: Float64[np.ndarray, "m c"],
    block: Int[np.ndarray, " m"],
    weights: Float64[np.ndarray, "draws blocks"],
) -> tuple[Float64[np.ndarray, "draws c"], Float64[np.ndarray, "draws c"]]:
    """Variance of each column of the truth, and its correlation with the prediction."""
    # About the mean of all cells first, or the difference of two large numbers would be left.
    t, p = truth - truth.mean(0), predicted - predicted.mean(0)
    in_block = sp.csr_array((np.ones(len(block)), (block, np.arange(len(block)))))
    total = (weights @ in_block.sum(1))[:, None]
    mean_t, mean_p, tt, pp, tp = (weights @ (in_block @ x) / total for x in (t, p, t * t, p * p, t * p))
    var_t, var_p = (
        np.where((v := second - first**2) > _CONSTANT * second, v, 0)
        for first, second in ((mean_t, tt), (mean_p, pp))
    )
    return var_t, _correlation(tp - mean_t * mean_p, var_t, var_p)


def _correlation(both: np.ndarray, of_truth: np.ndarray, of_predicted: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        correlation = both / np.sqrt(of_truth * of_predicted)
    return np.where(of_truth == 0, np.nan, np.where(of_predicted == 0, 0, correlation))


def _centred_ranks(
    level: Int[np.ndarray, " m"], weight: Float64[np.ndarray, "draws m"]
) -> Float64[np.ndarray, "draws m"]:
    """Mean rank of each cell's level, less the mean of all ranks, where cells count `weight` times."""
    order = np.argsort(level, kind="stable")
    starts = np.searchsorted(level[order], np.arange(level.max() + 1))
    tied = np.add.reduceat(weight[:, order], starts, axis=1)
    up_to = np.cumsum(tied, axis=1)
    return (up_to - (tied + up_to[:, -1:]) / 2)[:, level]


def _nanmean(values: Float64[np.ndarray, "draws c"]) -> Float64[np.ndarray, " draws"]:
    """Mean over the defined entries of each row, NaN where there is none."""
    defined = np.isfinite(values)
    total = np.where(defined, values, 0).sum(1)
    return np.divide(total, defined.sum(1), out=np.full(len(values), np.nan), where=defined.any(1))
