"""Scores of masked-expression prediction: pooled errors, skill, rank correlation and paired intervals.

Errors are kept as sums per cell, so that one pass over the predictions gives the pooled score of any group of
cells and of any bootstrap draw. Raw errors depend on the panel and on the depth: across panels compare
`skill`, `gene_spearman` and the skill of `poisson_deviance`, never errors.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Int
from scipy.special import xlogy
from scipy.stats import rankdata

from scfm_jax.errors import DataWarning, InputError

FEW_BLOCKS = 10


class CellSums(NamedTuple):
    """Weighted errors summed within each cell, and the weights that they were summed with."""

    total: Float64[np.ndarray, " n"]
    weight: Float64[np.ndarray, " n"]

    @property
    def mean(self) -> float:
        """The pooled error: all entries of all cells alike, NaN where there is no entry."""
        weight = self.weight.sum()
        return float(self.total.sum() / weight) if weight > 0 else float("nan")


class GeneSpearman(NamedTuple):
    """Rank correlation of each gene over cells, NaN where it is undefined, and the mean over the others."""

    per_gene: Float64[np.ndarray, " g"]
    mean: float


class Paired(NamedTuple):
    """Error of A relative to B, pooled, each with the lower and the upper end of its 95% interval."""

    ratio: float
    ratio_low: float
    ratio_high: float
    difference: float
    difference_low: float
    difference_high: float


def squared_error(
    target: Float32[np.ndarray, "n g"],
    prediction: Float32[np.ndarray, "n g"],
    mask: Bool[np.ndarray, "n g"],
    nonzero: Bool[np.ndarray, "n g"],
    rates: tuple[float, float],
) -> dict[str, CellSums]:
    """Squared error over the masked entries, in units of the target squared.

    Parameters
    ----------
    target, prediction
        log1p of normalised counts, over the panel.
    mask
        The entries that are scored.
    nonzero
        Whether the count is above zero.
    rates
        How often a non-zero and how often a zero is masked.

    Returns
    -------
    Sums per cell of four parts: `all` masked entries, those `nonzero`, those `zero`, and `inverse_rate`: all,
    each weighted by 1 / its mask rate, which estimates the error of a mask drawn alike for zeros and
    non-zeros.

    Raises
    ------
    InputError
        Where shapes differ, a masked entry's prediction is not finite, or an entry is masked whose rate is
        zero.
    """
    _check_masked(prediction, target, mask, nonzero)
    error = np.square(np.where(mask, prediction, 0).astype(np.float64) - np.where(mask, target, 0))
    return _parts(error, mask, nonzero, rates)


def poisson_deviance(
    counts: Int[np.ndarray, "n g"],
    prediction: Float32[np.ndarray, "n g"],
    mask: Bool[np.ndarray, "n g"],
    nonzero: Bool[np.ndarray, "n g"],
    rates: tuple[float, float],
    *,
    total: Float[np.ndarray, " n"],
    target_sum: float | Float[np.ndarray, " n"],
    floor: float = 1e-3,
) -> dict[str, CellSums]:
    """Poisson deviance over the masked entries, 2 (c log(c / m) - c + m) for count c and expected count m.

    Parameters
    ----------
    counts
        Raw counts over the panel.
    prediction
        log1p of expected counts scaled to `target_sum`; taken back to an expected count with the cell's
        `total`.
    mask, nonzero, rates
        As in `squared_error`.
    total
        The total that the cell's counts were divided by, in counts.
    target_sum
        What they were scaled to: one number, or one for each cell.
    floor
        The least expected count: the deviance of a count that was held impossible is infinite.

    Returns
    -------
    Sums per cell of the parts of `squared_error`.

    Raises
    ------
    InputError
        As `squared_error`.
    """
    _check_masked(prediction, counts, mask, nonzero)
    scale = np.asarray(total, np.float64) / target_sum
    expected = np.expm1(np.where(mask, prediction, 0).astype(np.float64)) * scale[:, None]
    expected = np.maximum(expected, floor)
    observed = np.where(mask, counts, 0).astype(np.float64)
    deviance = 2 * (xlogy(observed, observed / expected) - observed + expected)
    return _parts(deviance, mask, nonzero, rates)


def skill(errors: Mapping[str, CellSums], reference: Mapping[str, CellSums]) -> dict[str, float]:
    """1 - error / error of the reference, for each part: 1 is perfect, 0 no better than the reference.

    The reference of this package is each gene's training mean weighted by the mask rates.
    """
    return {part: 1 - errors[part].mean / reference[part].mean for part in errors}


def gene_spearman(
    target: Float32[np.ndarray, "n g"],
    prediction: Float32[np.ndarray, "n g"],
    mask: Bool[np.ndarray, "n g"],
    *,
    min_entries: int = 20,
) -> GeneSpearman:
    """Spearman's correlation of each gene over the cells where it is masked; ties take their mean rank.

    Parameters
    ----------
    target, prediction, mask
        As in `squared_error`.
    min_entries
        A gene masked in fewer cells is left out.

    Returns
    -------
    NaN for genes left out or of constant target. A constant prediction says nothing of the order and counts
    0: left out, it would flatter whoever gives up on the hard genes.
    """
    _check_masked(prediction, target, mask, mask)
    per_gene = np.full(mask.shape[1], np.nan)
    for gene in np.flatnonzero(mask.sum(0) >= max(min_entries, 2)):
        rows = mask[:, gene]
        true, predicted = rankdata(target[rows, gene]), rankdata(prediction[rows, gene])
        if np.ptp(true) > 0:
            per_gene[gene] = np.corrcoef(true, predicted)[0, 1] if np.ptp(predicted) > 0 else 0.0
    defined = per_gene[~np.isnan(per_gene)]
    return GeneSpearman(per_gene, float(defined.mean()) if defined.size else float("nan"))


def paired_bootstrap(
    errors_a: CellSums,
    errors_b: CellSums,
    block: Int[np.ndarray, " n"],
    *,
    n_draws: int = 1000,
    seed: int = 0,
) -> Paired:
    """Error of A against B on the same masked entries, with 95% percentile intervals over spatial blocks.

    Neighbouring cells are alike, so blocks of tissue are drawn (with replacement) and not cells, the same
    blocks for A and for B, and the pooled scores are computed anew (Efron & Tibshirani 1993, chapters 8 and
    13).

    Parameters
    ----------
    errors_a, errors_b
        One part of `squared_error` or `poisson_deviance`, for the same cells and masks.
    block
        Spatial block of each cell, unique across slides. Blocks without a scored entry are left out.
    n_draws
        Bootstrap draws.
    seed
        Of the draws: the same seed and blocks give the same draws for every pair of methods.

    Raises
    ------
    InputError
        Where A and B were scored on different entries, or fewer than two blocks have entries.

    Warns
    -----
    DataWarning
        Below 10 blocks, where percentile intervals are too narrow.
    """
    if errors_a.weight.shape != errors_b.weight.shape or not np.allclose(errors_a.weight, errors_b.weight):
        raise InputError(
            "paired_bootstrap", "A and B were scored on different entries", "use identical masks"
        )
    _, code = np.unique(block, return_inverse=True)
    sums = np.stack(
        [np.bincount(code, weights=x) for x in (errors_a.total, errors_b.total, errors_a.weight)], axis=1
    )
    sums = sums[sums[:, 2] > 0]
    draws = block_draws(len(sums), n_draws, seed)
    a, b, weight = (np.vstack([sums.sum(0), draws @ sums])).T
    with np.errstate(divide="ignore", invalid="ignore"):  # a perfect B has no ratio
        ratio, difference = a / b, (a - b) / weight
    ratio_low, ratio_high = np.quantile(ratio[1:], [0.025, 0.975])
    low, high = np.quantile(difference[1:], [0.025, 0.975])
    return Paired(*map(float, (ratio[0], ratio_low, ratio_high, difference[0], low, high)))


def block_draws(n_blocks: int, n_draws: int, seed: int) -> Int[np.ndarray, "draws blocks"]:
    """How often each block of tissue is in each bootstrap draw: blocks are drawn with replacement.

    Raises
    ------
    InputError
        Fewer than two blocks.

    Warns
    -----
    DataWarning
        Below 10 blocks, where percentile intervals are too narrow.
    """
    if n_blocks < 2:
        raise InputError("bootstrap", f"{n_blocks} block with scored cells", "give smaller blocks")
    if n_blocks < FEW_BLOCKS:
        warnings.warn(
            f"bootstrap over {n_blocks} blocks: its intervals are too narrow; give smaller blocks",
            DataWarning,
            stacklevel=3,
        )
    return np.random.default_rng(seed).multinomial(n_blocks, np.full(n_blocks, 1 / n_blocks), size=n_draws)


def _parts(
    error: Float64[np.ndarray, "n g"],
    mask: Bool[np.ndarray, "n g"],
    nonzero: Bool[np.ndarray, "n g"],
    rates: tuple[float, float],
) -> dict[str, CellSums]:
    masked_nonzero, masked_zero = mask & nonzero, mask & ~nonzero
    for masked, rate, kind in ((masked_nonzero, rates[0], "non-zero"), (masked_zero, rates[1], "zero")):
        if rate == 0 and masked.any():
            raise InputError(
                "mask", f"a {kind} is masked though its rate is 0", "give the rates of this mask"
            )

    def sums(weight: np.ndarray) -> CellSums:
        return CellSums((error * weight).sum(1), weight.sum(1, dtype=np.float64))

    inverse_nonzero, inverse_zero = (1 / rate if rate else 0.0 for rate in rates)
    return {
        "all": sums(mask),
        "nonzero": sums(masked_nonzero),
        "zero": sums(masked_zero),
        "inverse_rate": sums(inverse_nonzero * masked_nonzero + inverse_zero * masked_zero),
    }


def _check_masked(prediction: np.ndarray, target: np.ndarray, mask: np.ndarray, nonzero: np.ndarray) -> None:
    shapes = [x.shape for x in (prediction, target, mask, nonzero)]
    if len(set(shapes)) > 1:
        raise InputError(
            "prediction, target, mask, nonzero", f"shapes differ: {shapes}", "give the same cells and genes"
        )
    for name, values in (("prediction", prediction), ("target", target)):
        missing = int((mask & ~np.isfinite(values)).sum())
        if missing:
            raise InputError(
                name, f"{missing} masked entries are not finite", "mask only what is measured and predicted"
            )
