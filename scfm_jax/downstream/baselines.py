"""Baselines of masked-expression prediction, from each gene's mean to boosted trees, on the model's masks.

Each learns from whole training cells what a masked entry holds. A non-zero is masked at one rate and a zero
at another, so an entry counts as much as it would be masked: its weight is its rate, which is the expectation
over masks of training on masked entries alone. The features of `ridge` and `gradient_boosting` are the cell's
other genes behind the training cells' own mask, so that they look as they do in a test cell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import scipy.sparse as sp
from jaxtyping import Bool, Float, Float32, Float64, Int
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.model_selection import GroupShuffleSplit
from sklearn.utils.parallel import Parallel, delayed

from scfm_jax.errors import InputError

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
VALIDATION_SHARE = 0.2
N_BINS = 64


@dataclass(frozen=True, eq=False)
class TrainingCells:
    """Whole cells of one panel. Values are log1p of normalised counts.

    Attributes
    ----------
    values
        True values, float32.
    targets
        What each entry would be if it were masked: under normalisation by what is visible, its own count does
        not belong to the total that it is divided by. Otherwise equal to `values`.
    mask
        A mask drawn at the rates of the test's: features look as they do in a test cell.
    nonzero
        Whether the count is above zero.
    neighbour_mean
        Mean over the nearest neighbours of their values of the same gene (`neighbour_mean`).
    depth
        log of the cell's total counts.
    block
        Spatial block of each cell: settings are chosen on whole blocks held out.
    """

    values: Float32[np.ndarray, "n g"]
    targets: Float32[np.ndarray, "n g"]
    mask: Bool[np.ndarray, "n g"]
    nonzero: Bool[np.ndarray, "n g"]
    neighbour_mean: Float32[np.ndarray, "n g"]
    depth: Float32[np.ndarray, " n"]
    block: Int[np.ndarray, " n"]


@dataclass(frozen=True, eq=False)
class MaskedCells:
    """Cells of the same panel behind a mask, fields as in `TrainingCells`; hidden values are never read."""

    values: Float32[np.ndarray, "m g"]
    mask: Bool[np.ndarray, "m g"]
    neighbour_mean: Float32[np.ndarray, "m g"]
    depth: Float32[np.ndarray, " m"]


def neighbour_mean(
    values: Float[np.ndarray, "n_all g"] | sp.csr_array, neighbours: Int[np.ndarray, "n k"]
) -> Float32[np.ndarray, "n g"]:
    """Mean of the neighbours' values, gene by gene.

    Parameters
    ----------
    values
        One row a cell, dense or sparse.
    neighbours
        Rows of `values`, -1 where there is no neighbour.

    Returns
    -------
    float32; zeros for a cell without neighbours.
    """
    present = neighbours >= 0
    number = present.sum(1)
    offsets = np.concatenate([[0], np.cumsum(number)])
    weight = np.repeat(1 / np.maximum(number, 1), number).astype(np.float32)
    average = sp.csr_array((weight, neighbours[present], offsets), shape=(len(neighbours), values.shape[0]))
    mean = average @ values
    return np.asarray(mean.toarray() if sp.issparse(mean) else mean, np.float32)


def weighted_gene_mean(
    train: TrainingCells, test: MaskedCells, rates: tuple[float, float]
) -> Float32[np.ndarray, "m g"]:
    """Each gene's training mean weighted by the mask rates: the best constant for masked entries."""
    mean = _weighted_mean(train.targets, _weights(train, rates))
    return np.broadcast_to(mean.astype(np.float32), test.mask.shape).copy()


def calibrated_neighbours(
    train: TrainingCells, test: MaskedCells, rates: tuple[float, float]
) -> Float32[np.ndarray, "m g"]:
    """Per gene, weighted least squares of the value on an intercept and the gene's mean over neighbours.

    Column masking forbids a model to see what this baseline reads. A gene whose neighbours' mean never varies
    gets its weighted mean.
    """
    weight = _weights(train, rates)
    x_mean = _weighted_mean(train.neighbour_mean, weight)
    y_mean = _weighted_mean(train.targets, weight)
    x = train.neighbour_mean - x_mean
    variance = (weight * x * x).sum(0)
    covariance = (weight * x * (train.targets - y_mean)).sum(0)
    # Below rounding, the variance of a constant is noise and the slope would be too.
    varies = variance > 1e-9 * (weight * np.square(train.neighbour_mean)).sum(0)
    slope = np.divide(covariance, variance, out=np.zeros_like(variance), where=varies)
    return (y_mean + slope * (test.neighbour_mean - x_mean)).astype(np.float32)


def ridge(
    train: TrainingCells,
    test: MaskedCells,
    rates: tuple[float, float],
    *,
    neighbours: bool = False,
    strengths: Sequence[float] = STRENGTHS,
    seed: int = 0,
) -> Float32[np.ndarray, "m g"]:
    """Per gene, weighted ridge regression on the cell's other visible genes and its depth.

    A masked feature is replaced by the gene's mean over masked entries. Depth is standardised, the intercept
    free of penalty.

    Parameters
    ----------
    train, test
        Cells of one panel.
    rates
        Mask rates of non-zeros and zeros.
    neighbours
        Read the neighbours' mean of the visible genes too, brought to the spread of the cells' own values.
        The mask is by column: what is masked in the cell is hidden in its neighbours.
    strengths
        L2 penalties of the squared weights per unit of entry weight; each gene takes the best on training
        blocks held out and is then fitted on all.
    seed
        Of the blocks held out.

    Notes
    -----
    Weights take two values, so a gene's Gram matrix is the shared one plus an update over its non-zero cells:
    for g genes, z non-zeros in all and s strengths it costs g^2 z + s g^4 / 3 multiply-adds, minutes on two
    cores at 8,000 cells of 960 genes.
    """
    weight = _weights(train, rates)
    own_mean, near_mean = (_weighted_mean(x, weight) for x in (train.values, train.neighbour_mean))
    scale = train.values.std() / max(float(train.neighbour_mean.std()), 1e-6)
    centre, spread = train.depth.mean(), max(float(train.depth.std()), 1e-6)

    def design(cells: TrainingCells | MaskedCells) -> Float64[np.ndarray, "n p"]:
        blocks = [np.where(cells.mask, 0, cells.values - own_mean)]
        if neighbours:
            blocks.append(np.where(cells.mask, 0, (cells.neighbour_mean - near_mean) * scale))
        depth = (cells.depth - centre) / spread
        return np.column_stack([*blocks, depth, np.ones(len(depth))]).astype(np.float64)

    x, x_test, n_genes = design(train), design(test), test.mask.shape[1]
    validation = _validation_cells(train.block, seed)
    folds = [
        _Fold(x[rows], train.targets[rows], train.nonzero[rows], rates) for rows in (~validation, validation)
    ]
    x_validation, y_validation = x[validation], train.targets[validation]
    prediction = np.empty(test.mask.shape, np.float32)
    for gene in range(n_genes):
        fit, held_out = (fold.normal_equations(gene) for fold in folds)
        hidden = [gene, n_genes + gene] if neighbours else [gene]
        errors = []
        for strength in strengths:
            coefficients = _solve_ridge(fit, hidden, strength)
            residual = y_validation[:, gene] - x_validation @ coefficients
            errors.append(weight[validation, gene] @ np.square(residual))
        whole = fit + held_out
        coefficients = _solve_ridge(whole, hidden, strengths[int(np.argmin(errors))])
        prediction[:, gene] = x_test @ coefficients
    return prediction


def gradient_boosting(
    train: TrainingCells,
    test: MaskedCells,
    rates: tuple[float, float],
    *,
    genes: Int[np.ndarray, " s"] | None = None,
    learning_rate: float = 0.1,
    max_iterations: int = 200,
    max_leaf_nodes: int = 8,
    seed: int = 0,
) -> Float32[np.ndarray, "m s"]:
    """Per gene, boosted trees on the cell's depth and its other genes, which are missing values where masked.

    Parameters
    ----------
    train, test
        Cells of one panel.
    rates
        Mask rates of non-zeros and zeros.
    genes
        Columns of the panel to predict; all where not given. The others remain features.
    learning_rate, max_iterations, max_leaf_nodes
        Of the boosting; each gene takes the number of trees that is best on training blocks held out and is
        then fitted on all.
    seed
        Of the blocks held out.

    Returns
    -------
    One column for each of `genes`, in their order.
    """
    weight = _weights(train, rates)
    edges = [_bin_edges(values) for values in (*train.values.T, train.depth)]

    def design(values: np.ndarray, mask: np.ndarray, depth: np.ndarray) -> Float32[np.ndarray, "n g+1"]:
        codes = [np.searchsorted(e, v) for e, v in zip(edges, (*values.T, depth))]
        hidden = np.column_stack([mask, np.zeros(len(mask), bool)])
        return np.where(hidden, np.nan, np.stack(codes, axis=1)).astype(np.float32)

    x, x_test = design(train.values, train.mask, train.depth), design(test.values, test.mask, test.depth)
    validation = _validation_cells(train.block, seed)
    columns = np.arange(weight.shape[1]) if genes is None else np.asarray(genes)
    # One thread a gene: over so few cells OpenMP's threads wait for one another.
    predictions = Parallel(n_jobs=-1)(
        delayed(_boosted)(
            np.delete(x, gene, axis=1),
            train.targets[:, gene],
            weight[:, gene],
            np.delete(x_test, gene, axis=1),
            validation=validation,
            trees=HistGradientBoostingRegressor(
                learning_rate=learning_rate,
                max_iter=max_iterations,
                max_leaf_nodes=max_leaf_nodes,
                early_stopping=False,
                random_state=seed,
            ),
        )
        for gene in columns
    )
    return np.stack(predictions, axis=1).astype(np.float32)


def _boosted(
    x: Float32[np.ndarray, "n p"],
    y: Float32[np.ndarray, " n"],
    weight: Float32[np.ndarray, " n"],
    x_test: Float32[np.ndarray, "m p"],
    *,
    validation: Bool[np.ndarray, " n"],
    trees: HistGradientBoostingRegressor,
) -> Float64[np.ndarray, " m"]:
    fit = ~validation
    if not weight[fit].any():  # a gene that is never masked
        return np.zeros(len(x_test))
    trees.fit(x[fit], y[fit], sample_weight=weight[fit])
    errors = [weight[validation] @ np.square(y[validation] - p) for p in trees.staged_predict(x[validation])]
    trees.set_params(max_iter=int(np.argmin(errors)) + 1)
    return trees.fit(x, y, sample_weight=weight).predict(x_test)


def _bin_edges(values: Float32[np.ndarray, " n"]) -> Float32[np.ndarray, " e"]:
    """Quantiles of the distinct values: scikit-learn's binning of weighted data is slower than the trees."""
    return np.quantile(np.unique(values), np.linspace(0, 1, N_BINS + 1)[1:-1])


class _Fold:
    """Cells of a ridge regression, with the part of every gene's normal equations that all genes share."""

    def __init__(
        self,
        x: Float64[np.ndarray, "n p"],
        y: Float32[np.ndarray, "n g"],
        nonzero: Bool[np.ndarray, "n g"],
        rates: tuple[float, float],
    ) -> None:
        self.x, self.y, self.nonzero, self.rates = x, y.astype(np.float64), nonzero, rates
        self.gram = x.T @ x

    def normal_equations(self, gene: int) -> Float64[np.ndarray, "p p+1"]:
        """x' W [x, y] of one gene; those of two folds add up to those of both."""
        rate_nonzero, rate_zero = self.rates
        nonzero, y = self.nonzero[:, gene], self.y[:, gene]
        # The shared matrix carries the larger half of the cells, the update the smaller.
        if 2 * nonzero.sum() <= len(y):
            x = self.x[nonzero]
            gram = rate_zero * self.gram + (rate_nonzero - rate_zero) * (x.T @ x)
        else:
            x = self.x[~nonzero]
            gram = rate_nonzero * self.gram + (rate_zero - rate_nonzero) * (x.T @ x)
        moment = self.x.T @ (np.where(nonzero, rate_nonzero, rate_zero) * y)
        return np.column_stack([gram, moment])


def _solve_ridge(
    equations: Float64[np.ndarray, "p p+1"], hidden: Sequence[int], strength: float
) -> Float64[np.ndarray, " p"]:
    """Coefficients of the features, the last the intercept; those of the gene itself are exactly zero."""
    matrix, moment = equations[:, :-1].copy(), equations[:, -1].copy()
    total_weight = matrix[-1, -1]
    if total_weight == 0:
        return np.zeros_like(moment)
    matrix[np.diag_indices(len(matrix) - 1)] += strength * total_weight
    matrix[hidden] = matrix[:, hidden] = moment[hidden] = 0
    matrix[hidden, hidden] = 1
    return scipy.linalg.solve(matrix, moment, assume_a="pos", overwrite_a=True, overwrite_b=True)


def _weights(train: TrainingCells, rates: tuple[float, float]) -> Float32[np.ndarray, "n g"]:
    return np.where(train.nonzero, *map(np.float32, rates))


def _weighted_mean(
    values: Float[np.ndarray, "n g"], weight: Float[np.ndarray, "n g"]
) -> Float64[np.ndarray, " g"]:
    """Zero for a gene that is never masked."""
    total = (weight * values).sum(0, dtype=np.float64)
    return total / np.maximum(weight.sum(0, dtype=np.float64), np.finfo(np.float64).tiny)


def _validation_cells(block: Int[np.ndarray, " n"], seed: int) -> Bool[np.ndarray, " n"]:
    if len(np.unique(block)) < 2:
        raise InputError(
            "block", "all training cells lie in one block", "give at least two blocks to choose settings"
        )
    split = GroupShuffleSplit(n_splits=1, test_size=VALIDATION_SHARE, random_state=seed)
    _, held_out = next(split.split(block, groups=block))
    cells = np.zeros(len(block), bool)
    cells[held_out] = True
    return cells
