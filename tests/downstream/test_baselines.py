"""Baselines against np.average, least squares, scikit-learn's own ridge, and tissue whose answer is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp
from sklearn.linear_model import LinearRegression, Ridge

from scfm_jax.downstream.baselines import (
    MaskedCells,
    TrainingCells,
    calibrated_neighbours,
    gradient_boosting,
    neighbour_mean,
    ridge,
    weighted_gene_mean,
)
from scfm_jax.errors import InputError

RATES = (0.4, 0.1)
BASELINES = (weighted_gene_mean, calibrated_neighbours, ridge, gradient_boosting)


def tissue(n=1200, n_genes=6, seed=0):
    """Genes that share one hidden programme; a test cell's mask is drawn as a training cell's is."""
    rng = np.random.default_rng(seed)
    programme = rng.normal(size=n)
    counts = rng.poisson(np.exp(np.outer(programme, np.linspace(0.2, 1.0, n_genes)) - 0.3))
    values = np.log1p(counts).astype(np.float32)
    nonzero = counts > 0
    around = (values.mean(1, keepdims=True) * 0.5 + rng.gamma(1, 0.3, values.shape)).astype(np.float32)
    depth = np.log(counts.sum(1) + 5).astype(np.float32)
    mask = rng.random(values.shape) < np.where(nonzero, *RATES)
    half = n // 2
    train = TrainingCells(
        values[:half],
        values[:half],
        mask[:half],
        nonzero[:half],
        around[:half],
        depth[:half],
        np.arange(half) // 30,
    )
    test = MaskedCells(values[half:], mask[half:], around[half:], depth[half:])
    return train, test


def weights(train):
    return np.where(train.nonzero, *RATES)


def error(test, prediction):
    return np.square(test.values - prediction)[test.mask].mean()


def test_gene_mean_is_numpys_weighted_average_and_the_best_constant():
    train, test = tissue()
    prediction = weighted_gene_mean(train, test, RATES)
    assert prediction == pytest.approx(
        np.broadcast_to(np.average(train.values, axis=0, weights=weights(train)), test.mask.shape), rel=1e-5
    )
    assert error(test, prediction) < error(test, train.values.mean(0))


def test_calibrated_neighbours_is_weighted_least_squares():
    train, test = tissue()
    prediction = calibrated_neighbours(train, test, RATES)
    for gene in range(train.values.shape[1]):
        model = LinearRegression().fit(
            train.neighbour_mean[:, [gene]], train.values[:, gene], weights(train)[:, gene]
        )
        expected = model.predict(test.neighbour_mean[:, [gene]])
        assert prediction[:, gene] == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_calibrated_neighbours_without_variation_is_the_gene_mean():
    train, test = tissue()
    flat = replace(train, neighbour_mean=np.full_like(train.neighbour_mean, 0.1))
    moved = replace(test, neighbour_mean=test.neighbour_mean + 5)
    expected = weighted_gene_mean(train, test, RATES)
    assert calibrated_neighbours(flat, moved, RATES) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("neighbours", [False, True])
@pytest.mark.parametrize("nonzero_share", ["few", "many"])
def test_ridge_is_sklearns_with_sample_weights(nonzero_share, neighbours):
    """Both ways round: a gene's update runs over its non-zero cells, or over its zeros if those are fewer."""
    train, test = tissue()
    if nonzero_share == "many":
        train = replace(train, nonzero=~train.nonzero)
    strength = 0.03
    prediction = ridge(train, test, RATES, strengths=[strength], neighbours=neighbours)

    weight = weights(train)
    masked_mean = np.average(train.values, axis=0, weights=weight)
    x = np.where(train.mask, masked_mean, train.values)
    x_test = np.where(test.mask, masked_mean, test.values)
    near_mean, scale = np.average(train.neighbour_mean, axis=0, weights=weight), 0.0
    if neighbours:
        scale = train.values.std() / train.neighbour_mean.std()
    near, near_test = (scale * np.where(of.mask, near_mean, of.neighbour_mean) for of in (train, test))
    depth, depth_test = ((d - train.depth.mean()) / train.depth.std() for d in (train.depth, test.depth))
    for gene in range(x.shape[1]):
        w = weight[:, gene]
        model = Ridge(alpha=strength * w.sum())
        own, near_own = (np.delete(of, gene, 1) for of in (x, near))
        model.fit(np.column_stack([own, near_own, depth]), train.values[:, gene], sample_weight=w)
        own, near_own = (np.delete(of, gene, 1) for of in (x_test, near_test))
        expected = model.predict(np.column_stack([own, near_own, depth_test]))
        assert prediction[:, gene] == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_ridge_chooses_strong_shrinkage_for_noise_and_weak_for_signal():
    train, test = tissue(n_genes=30)
    chosen, strong = (ridge(train, test, RATES, strengths=s) for s in ([1e-3, 1e3], [1e3]))
    assert error(test, chosen) < 0.9 * error(test, strong)

    noise = np.random.default_rng(1).permuted(train.values, axis=0)
    shuffled = replace(
        train, values=noise, nonzero=noise > 0, depth=np.random.default_rng(2).permuted(train.depth)
    )
    chosen, weak = (ridge(shuffled, test, RATES, strengths=s) for s in ([1e-6, 1e3], [1e-6]))
    strong = ridge(shuffled, test, RATES, strengths=[1e3])
    assert np.abs(chosen - strong).mean() < 0.5 * np.abs(weak - strong).mean()


@pytest.mark.parametrize("baseline", [ridge, gradient_boosting])
def test_other_genes_help_and_the_better_baseline_wins(baseline):
    train, test = tissue(n=3000)
    assert error(test, baseline(train, test, RATES)) < 0.8 * error(
        test, weighted_gene_mean(train, test, RATES)
    )


def test_boosting_finds_what_no_line_can():
    """A gene that is on where exactly one of two others is."""
    rng = np.random.default_rng(0)
    on = rng.random((3000, 2)) < 0.5
    level = np.column_stack([on, on[:, 0] ^ on[:, 1]])
    values = (level * rng.uniform(1, 2, level.shape)).astype(np.float32)
    mask = np.zeros(values.shape, bool)
    mask[:, 2] = True
    blank = np.zeros_like(values)
    depth = np.zeros(3000, np.float32)
    train = TrainingCells(
        values[:1500],
        values[:1500],
        mask[:1500],
        level[:1500],
        blank[:1500],
        depth[:1500],
        np.arange(1500) // 100,
    )
    test = MaskedCells(values[1500:], mask[1500:], blank[1500:], depth[1500:])
    rates = (0.05, 0.05)
    trees = gradient_boosting(train, test, rates, genes=np.array([2]))
    line = ridge(train, test, rates)[:, [2]]
    truth = values[1500:, [2]]
    assert np.square(trees - truth).mean() < 0.4 * np.square(line - truth).mean()


def test_boosting_of_some_genes_is_those_columns():
    train, test = tissue(n=600, n_genes=4)
    every = gradient_boosting(train, test, RATES, max_iterations=5)
    assert np.array_equal(
        gradient_boosting(train, test, RATES, genes=np.array([3, 1]), max_iterations=5), every[:, [3, 1]]
    )


@pytest.mark.parametrize("baseline", BASELINES)
def test_masked_values_and_the_gene_itself_are_never_read(baseline):
    train, test = tissue(n=600, n_genes=4)
    prediction = baseline(train, test, RATES)
    assert prediction.dtype == np.float32
    assert prediction.shape == test.mask.shape
    hidden = replace(test, values=np.where(test.mask, np.nan, test.values))
    assert np.array_equal(baseline(train, hidden, RATES), prediction)
    # Nor is a visible gene used for itself: its own prediction stays when its value moves.
    moved = test.values.copy()
    moved[:, 2] += 1
    assert baseline(train, replace(test, values=moved), RATES)[:, 2] == pytest.approx(prediction[:, 2])


@pytest.mark.parametrize("baseline", BASELINES)
def test_a_gene_never_seen_is_predicted_zero(baseline):
    train, test = tissue(n=600, n_genes=4)
    values, nonzero = train.values.copy(), train.nonzero.copy()
    values[:, 1], nonzero[:, 1] = 0, False
    silent = replace(train, values=values, targets=values, nonzero=nonzero)
    for rates in (RATES, (0.3, 0.0)):  # with the second it is never masked either
        assert baseline(silent, test, rates)[:, 1] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("baseline", [ridge, gradient_boosting])
def test_one_block_is_refused(baseline):
    train, test = tissue(n=100)
    with pytest.raises(InputError, match="one block"):
        baseline(replace(train, block=np.zeros(50, int)), test, RATES)


@pytest.mark.parametrize("sparse", [False, True])
def test_neighbour_mean_is_the_mean_of_those_present(sparse):
    values = np.random.default_rng(0).poisson(1.0, (8, 5)).astype(np.float32)
    neighbours = np.array([[1, 2, 3], [7, -1, -1], [-1, -1, -1], [5, 6, -1]])
    result = neighbour_mean(sp.csr_array(values) if sparse else values, neighbours)
    expected = [values[[1, 2, 3]].mean(0), values[7], np.zeros(5), values[[5, 6]].mean(0)]
    assert result.dtype == np.float32
    assert result == pytest.approx(np.stack(expected), rel=1e-6)
