"""Scores against scikit-learn, SciPy and a bootstrap written out as a loop."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import mean_poisson_deviance, mean_squared_error

from scfm_jax.downstream.metrics import (
    CellSums,
    gene_spearman,
    paired_bootstrap,
    poisson_deviance,
    skill,
    squared_error,
)
from scfm_jax.errors import DataWarning, InputError

RATES = (0.3, 0.05)


@pytest.fixture
def entries():
    rng = np.random.default_rng(0)
    counts = rng.poisson(rng.gamma(0.7, 1.0, size=(300, 12)))
    total = counts.sum(1) + 20.0
    target = np.log1p(counts / total[:, None] * 50).astype(np.float32)
    prediction = (target * 0.6 + 0.4 + rng.normal(0, 0.3, target.shape)).astype(np.float32)
    nonzero = counts > 0
    mask = rng.random(counts.shape) < np.where(nonzero, *RATES)
    return counts, total, target, prediction, nonzero, mask


def test_squared_error_is_sklearns_on_each_part(entries):
    _, _, target, prediction, nonzero, mask = entries
    errors = squared_error(target, prediction, mask, nonzero, RATES)
    parts = {"all": mask, "nonzero": mask & nonzero, "zero": mask & ~nonzero}
    for part, chosen in parts.items():
        assert errors[part].mean == pytest.approx(mean_squared_error(target[chosen], prediction[chosen]))
        assert errors[part].weight.sum() == chosen.sum()
    weight = 1 / np.where(nonzero, *RATES)[mask]
    assert errors["inverse_rate"].mean == pytest.approx(
        mean_squared_error(target[mask], prediction[mask], sample_weight=weight)
    )


def test_inverse_rate_estimates_the_error_over_every_entry(entries):
    _, _, target, prediction, nonzero, _ = entries
    rng = np.random.default_rng(1)
    draws = []
    for _ in range(300):
        mask = rng.random(target.shape) < np.where(nonzero, *RATES)
        errors = squared_error(target, prediction, mask, nonzero, RATES)
        draws.append((errors["inverse_rate"].mean, errors["all"].mean))
    weighted, plain = np.array(draws).T
    truth = np.square(target - prediction).mean()
    standard_error = weighted.std() / np.sqrt(len(weighted))
    assert abs(weighted.mean() - truth) < 4 * standard_error
    assert abs(plain.mean() - truth) > 4 * standard_error


def test_unmasked_entries_are_never_read(entries):
    counts, total, target, prediction, nonzero, mask = entries
    holes = np.where(mask, prediction, np.nan)
    assert squared_error(target, holes, mask, nonzero, RATES)["all"].mean == pytest.approx(
        squared_error(target, prediction, mask, nonzero, RATES)["all"].mean
    )
    assert np.isfinite(
        poisson_deviance(counts, holes, mask, nonzero, RATES, total=total, target_sum=50.0)["all"].mean
    )


def test_poisson_deviance_is_sklearns_with_a_target_for_each_cell(entries):
    counts, total, _, prediction, nonzero, mask = entries
    target_sum = np.where(np.arange(len(total)) % 2, 50.0, 200.0)
    errors = poisson_deviance(counts, prediction, mask, nonzero, RATES, total=total, target_sum=target_sum)
    expected = np.maximum(np.expm1(prediction.astype(float)) * (total / target_sum)[:, None], 1e-3)
    for part, chosen in {"all": mask, "nonzero": mask & nonzero}.items():
        assert errors[part].mean == pytest.approx(mean_poisson_deviance(counts[chosen], expected[chosen]))


def test_skill_of_the_truth_the_reference_and_something_worse(entries):
    _, _, target, prediction, nonzero, mask = entries

    def errors(values):
        return squared_error(target, values, mask, nonzero, RATES)

    reference = errors(prediction)
    assert skill(errors(target), reference) == dict.fromkeys(reference, 1.0)
    assert skill(reference, reference) == dict.fromkeys(reference, 0.0)
    twice = target + np.float32(np.sqrt(2)) * (prediction - target)
    assert list(skill(errors(twice), reference).values()) == pytest.approx([-1.0] * 4, rel=1e-5)


def test_gene_spearman_is_scipys_and_a_constant_prediction_counts_zero(entries):
    _, _, target, prediction, _, mask = entries
    prediction[:, 3] = 1.0
    target[:, 4] = 0.0
    mask[:, 5] = np.arange(len(mask)) < 4
    result = gene_spearman(target, prediction, mask, min_entries=5)
    for gene in (0, 1, 2):
        rows = mask[:, gene]
        assert result.per_gene[gene] == pytest.approx(
            spearmanr(target[rows, gene], prediction[rows, gene]).statistic
        )
    assert result.per_gene[3] == 0
    assert np.isnan(result.per_gene[[4, 5]]).all()
    assert result.mean == pytest.approx(np.nanmean(result.per_gene))


def test_gene_spearman_without_a_gene_of_enough_entries(entries):
    _, _, target, prediction, _, mask = entries
    assert np.isnan(gene_spearman(target, prediction, mask, min_entries=10_000).mean)


def test_bootstrap_agrees_with_cells_gathered_draw_by_draw(entries):
    _, _, target, prediction, nonzero, mask = entries
    a = squared_error(target, prediction, mask, nonzero, RATES)["all"]
    b = squared_error(target, prediction * 0.5, mask, nonzero, RATES)["all"]
    block = np.arange(300) // 15 * 7 - 20
    result = paired_bootstrap(a, b, block, n_draws=3000, seed=1)
    assert result.ratio == pytest.approx(a.mean / b.mean)
    assert result.difference == pytest.approx(a.mean - b.mean)

    rng = np.random.default_rng(2)
    members = [np.flatnonzero(block == name) for name in np.unique(block)]
    ratios, differences = [], []
    for _ in range(3000):
        cells = np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))])
        error_a = a.total[cells].sum() / a.weight[cells].sum()
        error_b = b.total[cells].sum() / b.weight[cells].sum()
        ratios.append(error_a / error_b)
        differences.append(error_a - error_b)
    # Two sets of 3,000 draws: the ends differ by some hundredths of the interval.
    for (low, high), draws in (
        ((result.ratio_low, result.ratio_high), ratios),
        ((result.difference_low, result.difference_high), differences),
    ):
        expected = np.quantile(draws, [0.025, 0.975])
        assert np.abs([low, high] - expected).max() < 0.08 * np.ptp(expected)


def test_bootstrap_covers_the_truth_where_cells_of_a_block_are_alike():
    rng = np.random.default_rng(3)
    block = np.repeat(np.arange(40), 25)
    covered = alone = 0
    for seed in range(200):
        shared = rng.normal(0, 0.3, 40)[block] + rng.normal(0, 0.1, 1000)
        a, b = CellSums(2.0 + shared, np.ones(1000)), CellSums(np.full(1000, 2.0), np.ones(1000))
        result = paired_bootstrap(a, b, block, n_draws=300, seed=seed)
        covered += result.difference_low <= 0 <= result.difference_high
        cells = paired_bootstrap(a, b, np.arange(1000), n_draws=300, seed=seed)
        alone += cells.difference_low <= 0 <= cells.difference_high
    assert covered >= 0.88 * 200
    assert alone < 0.6 * 200  # cells resampled one by one would claim far too much


def test_bootstrap_is_paired_and_reproducible(entries):
    _, _, target, prediction, nonzero, mask = entries
    errors = squared_error(target, prediction, mask, nonzero, RATES)["all"]
    block = np.arange(300) // 15
    assert paired_bootstrap(errors, errors, block)[:3] == (1.0, 1.0, 1.0)
    other = squared_error(target, prediction + 1, mask, nonzero, RATES)["all"]
    first, again = (paired_bootstrap(errors, other, block, seed=4) for _ in range(2))
    assert first == again
    assert first != paired_bootstrap(errors, other, block, seed=5)


def test_bad_input_says_what_to_mend(entries):
    _, _, target, prediction, nonzero, mask = entries
    with pytest.raises(InputError, match="shapes differ"):
        squared_error(target, prediction[:, :3], mask, nonzero, RATES)
    broken = prediction.copy()
    broken[mask] = np.nan
    with pytest.raises(InputError, match=f"{mask.sum()} masked entries are not finite"):
        squared_error(target, broken, mask, nonzero, RATES)
    with pytest.raises(InputError, match="a zero is masked though its rate is 0"):
        squared_error(target, prediction, mask, nonzero, (0.3, 0.0))
    errors = squared_error(target, prediction, mask, nonzero, RATES)
    with pytest.raises(InputError, match="different entries"):
        paired_bootstrap(errors["all"], errors["zero"], np.arange(300))
    with pytest.raises(InputError, match="1 block"):
        paired_bootstrap(errors["all"], errors["all"], np.zeros(300, int))
    with pytest.warns(DataWarning, match="3 blocks"):
        paired_bootstrap(errors["all"], errors["all"], np.arange(300) % 3)
