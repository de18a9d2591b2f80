"""Scores against scikit-learn and SciPy, intervals against a loop that resamples rows block by block."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon
from scipy.stats import pearsonr, spearmanr
from sklearn import metrics as sk

from scfm_jax.downstream.metrics import CellSums, paired_bootstrap
from scfm_jax.downstream.scores import (
    HIGHER_IS_BETTER,
    PRIMARY,
    confusion,
    interval,
    macro_f1,
    paired_difference,
    score,
)
from scfm_jax.errors import DataWarning, InputError

NAMES = ["B", "endothelial", "fibroblast", "macrophage", "T"]
M, N_BLOCKS = 600, 24


def shares(logits):
    return (np.exp(logits) / np.exp(logits).sum(1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def tissue():
    """Cells whose classes lie in blocks, so that draws differ in the classes that they have."""
    rng = np.random.default_rng(0)
    block = np.sort(rng.integers(N_BLOCKS, size=M)) * 7 + 3
    codes = np.where(rng.random(M) < 0.4, block // 7 % 4, rng.integers(3, size=M))
    logits = {
        name: rng.normal(0, 1, (M, 5)) + skill * np.eye(5)[codes] for name, skill in (("a", 2), ("b", 1))
    }
    for x in logits.values():
        x[:, 2] = -9  # never predicted
    value = (rng.normal(0, 1, N_BLOCKS)[block // 7] + rng.normal(20, 0.5, M)).astype(np.float32)
    mixed = {name: shares(rng.normal(0, 1, (M, 5))) for name in "tab"}
    mixed["t"][rng.random((M, 5)) < 0.3] = 0
    mixed["t"] /= mixed["t"].sum(1, keepdims=True)
    return block, {
        "classes": (codes, shares(logits["a"]), shares(logits["b"])),
        "value": (value, np.round(value + rng.normal(0, 1, M), 1).astype(np.float32), rng.normal(20, 1, M)),
        "composition": (mixed["t"], (mixed["t"] + mixed["a"]) / 2, mixed["b"]),
    }


def plain(kind, truth, predicted):
    """The same scores from libraries."""
    truth, predicted = np.asarray(truth), np.asarray(predicted, float)
    if kind == "classes":
        answer, there = predicted.argmax(1), np.unique(truth)
        top = predicted.max(1)
        edges = np.linspace(0, 1, 16)
        ece = 0.0
        for low, high in pairwise(edges):
            rows = (top > low) & (top <= high)
            if rows.any():
                ece += rows.mean() * abs((answer == truth)[rows].mean() - top[rows].mean())
        recall = sk.recall_score(truth, answer, labels=there, average="macro", zero_division=0)
        return {
            "accuracy": sk.accuracy_score(truth, answer),
            "macro_f1": sk.f1_score(truth, answer, labels=there, average="macro", zero_division=0),
            "balanced_accuracy": recall,
            "log_loss": sk.log_loss(truth, predicted / predicted.sum(1, keepdims=True), labels=np.arange(5)),
            "ece": ece,
        }
    if kind == "value":
        return {
            "mae": sk.mean_absolute_error(truth, predicted),
            "rmse": sk.root_mean_squared_error(truth, predicted),
            "pearson": pearsonr(truth, predicted).statistic,
            "spearman": spearmanr(truth, predicted).statistic,
            "r2": sk.r2_score(truth, predicted),
        }
    return {
        "mae": sk.mean_absolute_error(truth, predicted),
        "pearson": np.mean([pearsonr(truth[:, c], predicted[:, c]).statistic for c in range(truth.shape[1])]),
        "jensen_shannon": jensenshannon(truth.astype(float), predicted, axis=1, base=2).mean(),
    }


def draws_of_rows(block, n_draws, seed=0):
    """Rows of each draw, blocks as often as they were drawn."""
    blocks = np.unique(block)
    drawn = np.random.default_rng(seed).multinomial(
        len(blocks), np.full(len(blocks), 1 / len(blocks)), n_draws
    )
    rows = [np.flatnonzero(block == b) for b in blocks]
    return [np.concatenate([np.tile(r, times) for r, times in zip(rows, draw)]) for draw in drawn]


@pytest.mark.parametrize("kind", ["classes", "value", "composition"])
def test_scores_are_those_of_libraries(tissue, kind):
    truth, *methods = tissue[1][kind]
    for predicted in methods:
        got, expected = score(kind, truth, predicted), plain(kind, truth, predicted)
        assert list(got) == list(expected) and PRIMARY[kind] in got and got.keys() <= HIGHER_IS_BETTER.keys()
        assert got == pytest.approx(expected, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("classes", n) for n in ("accuracy", "macro_f1", "balanced_accuracy", "log_loss", "ece")]
    + [("value", n) for n in ("mae", "rmse", "pearson", "spearman", "r2")]
    + [("composition", n) for n in ("mae", "pearson", "jensen_shannon")],
)
def test_intervals_are_those_of_resampled_rows(tissue, kind, name):
    block, (truth, a, b) = tissue[0], tissue[1][kind]
    draws = draws_of_rows(block, 40)
    of_a, of_b = ([plain(kind, truth[r], x[r])[name] for r in draws] for x in (a, b))
    whole = [plain(kind, truth, x)[name] for x in (a, b)]
    got = interval(kind, truth, a, block, name=name, n_draws=40)
    assert got == pytest.approx((whole[0], *np.quantile(of_a, [0.025, 0.975])), rel=1e-5, abs=1e-6)
    got = paired_difference(kind, truth, a, b, block, name=name, n_draws=40)
    expected = np.quantile(np.subtract(of_a, of_b), [0.025, 0.975])
    assert got == pytest.approx((whole[0] - whole[1], *expected), rel=1e-5, abs=1e-6)
    assert got.low < got.high


def test_seeds_are_averaged_within_each_draw(tissue):
    block, (truth, a, b) = tissue[0], tissue[1]["classes"]
    draws = draws_of_rows(block, 30)

    def f1(x):
        return np.array([plain("classes", truth[r], x[r])["macro_f1"] for r in [slice(None), *draws]])

    expected = (f1(a) + f1(b)) / 2 - f1(a)
    got = paired_difference("classes", truth, [a, b], a, block, n_draws=30)
    assert got == pytest.approx((expected[0], *np.quantile(expected[1:], [0.025, 0.975])))


def test_a_difference_of_equals_is_zero_and_the_draws_follow_the_seed(tissue):
    block, (truth, a, b) = tissue[0], tissue[1]["value"]
    assert paired_difference("value", truth, a, a, block) == (0, 0, 0)
    one, same, other = (paired_difference("value", truth, a, b, block, seed=seed) for seed in (1, 1, 2))
    assert one == same and one.value == other.value and one.low != other.low
    # Names of blocks do not matter, nor the order of cells.
    order = np.random.default_rng(0).permutation(M)
    shuffled = paired_difference("value", truth[order], a[order], b[order], block[order] * 2, seed=1)
    assert shuffled == pytest.approx(one)


def test_macro_f1_takes_names_and_counts_what_is_never_predicted():
    truth, said = np.array(["a", "a", "b", "c"]), np.array(["a", "a", "a", "d"])
    assert macro_f1(truth, said) == pytest.approx(0.8 / 3)
    assert macro_f1(np.array([0, 1]), np.array([0, 1])) == 1


def test_confusion_is_sklearns(tissue):
    truth, a, _ = tissue[1]["classes"]
    expected = sk.confusion_matrix(truth, a.argmax(1), labels=range(5))
    assert np.array_equal(confusion(truth, a.argmax(1), 5), expected)


def test_what_is_constant(tissue):
    block, (truth, a, _) = tissue[0], tissue[1]["value"]
    same = np.full(M, 0.1, np.float32)
    got = score("value", truth, same)
    assert got["pearson"] == got["spearman"] == 0 and got["mae"] > 0
    got = score("value", same, a)
    assert all(np.isnan(got[name]) for name in ("pearson", "spearman", "r2"))
    assert np.isnan(interval("value", same, a, block, name="pearson")).all()
    # A class that no truth has says nothing of the correlation; equal rows are at distance 0, exactly.
    mixed = tissue[1]["composition"][0]
    padded = np.hstack([mixed, np.zeros((M, 1), np.float32)])
    assert score("composition", padded, padded) == pytest.approx(
        {"mae": 0, "pearson": 1, "jensen_shannon": 0}
    )


def test_a_class_that_few_blocks_have_is_left_out_of_draws_without_it(tissue):
    block, (truth, a, _) = tissue[0], tissue[1]["composition"]
    truth = np.where((np.arange(5) == 4) & (block != block[0])[:, None], 0, truth + 0.01)
    truth = truth / truth.sum(1, keepdims=True)

    def pearson(rows):
        varies = [c for c in range(5) if np.ptp(truth[rows, c]) > 0]
        return len(varies), np.mean([pearsonr(truth[rows, c], a[rows, c]).statistic for c in varies])

    varying, expected = zip(*(pearson(rows) for rows in draws_of_rows(block, 40)))
    assert {4, 5} == set(varying)
    got = interval("composition", truth, a, block, name="pearson", n_draws=40)
    assert got[1:] == pytest.approx(np.quantile(expected, [0.025, 0.975]))


def test_rows_equal_but_for_rounding_are_at_no_distance():
    rng = np.random.default_rng(0)
    truth = rng.dirichlet(np.ones(5), 500)
    got = score("composition", truth, truth + 1e-9 * rng.normal(size=truth.shape))
    assert 0 <= got["jensen_shannon"] < 1e-7


def test_large_values_do_not_cancel(tissue):
    truth, a, _ = tissue[1]["value"]
    far = 1e6
    got = score("value", truth.astype(float) + far, a.astype(float) + far)
    assert got == pytest.approx(score("value", truth, a), rel=1e-6)


def test_certainty_that_is_wrong_costs_a_finite_loss():
    truth, certain = np.array([0, 1, 1]), np.array([[1, 0], [1, 0], [0, 1]], np.float32)
    got = score("classes", truth, certain)
    assert got["log_loss"] == pytest.approx(-np.log(np.finfo(np.float32).eps) / 3)
    assert got["ece"] == pytest.approx(1 / 3)


def test_sums_of_masked_genes_are_pooled_in_every_draw():
    rng = np.random.default_rng(0)
    masked, block = rng.integers(0, 9, 300).astype(np.float32), np.arange(300) // 12
    a, b = (np.float32(masked * rng.gamma(2.0, size=300) * worse) for worse in (1.0, 1.3))
    assert score("imputation", masked, a) == {"squared_error": pytest.approx(a.sum() / masked.sum())}
    found = paired_difference("imputation", masked, a, b, block)
    sums = [CellSums(total.astype(float), masked.astype(float)) for total in (a, b)]
    expected = paired_bootstrap(*sums, block)
    assert found == pytest.approx(expected[3:]) and found.high < 0


def test_bad_input_is_told(tissue):
    block, (truth, a, b) = tissue[0], tissue[1]["classes"]
    with pytest.raises(InputError, match="no kind"):
        score("ranks", truth, a)
    with pytest.raises(InputError, match="shape"):
        score("classes", truth[1:], a)
    with pytest.raises(InputError, match="shape"):
        score("value", truth, a)
    with pytest.raises(InputError, match="4 classes"):
        score("classes", truth, a, NAMES[:4])
    with pytest.raises(InputError, match="without a label"):
        score("classes", np.where(truth == 2, -1, truth), a)
    with pytest.raises(InputError, match="sum to 1"):
        score("classes", truth, a * 2)
    with pytest.raises(InputError, match="1 values are not finite"):
        score("value", np.array([1.0, np.nan]), np.array([1.0, 1.0]))
    with pytest.raises(InputError, match="no cell"):
        score("classes", truth[:0], a[:0])
    with pytest.raises(InputError, match="use one of accuracy"):
        interval("classes", truth, a, block, name="mae")
    with pytest.raises(InputError, match="no predictions"):
        paired_difference("classes", truth, a, [], block)
    with pytest.raises(InputError, match="block of every cell"):
        interval("classes", truth, a, block[1:])
    with pytest.raises(InputError, match="smaller blocks"):
        interval("classes", truth, a, np.zeros(M, int))
    with pytest.warns(DataWarning, match="over 2 blocks"):
        paired_difference("classes", truth, a, b, np.arange(M) % 2)
