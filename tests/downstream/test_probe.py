"""Probes on data whose labels are known to be readable, or not, and against scikit-learn fitted by hand."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, log_loss

from scfm_jax.downstream.probe import own_and_neighbour_features, probe
from scfm_jax.errors import InputError

NAMES = np.array(["cortex", "medulla", "stroma"])


def labelled(n=900, n_features=20, spread=1.0, seed=0):
    rng = np.random.default_rng(seed)
    codes = rng.integers(3, size=n)
    centres = np.random.default_rng(99).normal(size=(3, n_features))
    features = (centres[codes] + rng.normal(0, spread, (n, n_features))).astype(np.float32)
    return features, NAMES[codes], np.arange(n) // 45


def test_reads_what_is_there_and_no_more():
    features, labels, blocks = labelled()
    test_features, test_labels, _ = labelled(seed=1)
    result = probe(features, labels, test_features, test_labels, blocks_train=blocks)
    assert result.accuracy > 0.95
    assert result.accuracy == np.mean(result.predictions == test_labels)
    shuffled = np.random.default_rng(2).permutation(labels)
    assert probe(features, shuffled, test_features, test_labels, blocks_train=blocks).accuracy < 0.6


def test_is_sklearns_regression_on_features_standardised_by_training_cells():
    features, labels, blocks = labelled(spread=3.0)
    features = features * np.geomspace(0.01, 100, 20, dtype=np.float32)
    test_features, test_labels, _ = labelled(spread=3.0, seed=1)
    result = probe(
        features, labels, test_features, test_labels, blocks_train=blocks, n_components=None, strengths=(0.1,)
    )
    mean, spread = features.mean(0, dtype=float), features.std(0, dtype=float)
    model = LogisticRegression(C=0.1, max_iter=2000).fit((features - mean) / spread, labels)
    expected = model.predict_proba((test_features - mean) / spread)
    assert result.probabilities == pytest.approx(expected, abs=1e-3)
    assert list(result.classes) == sorted(NAMES)
    assert np.array_equal(result.classes[result.probabilities.argmax(1)], result.predictions)


def test_components_change_nothing_where_all_are_kept_and_much_where_one_is():
    features, labels, blocks = labelled(spread=2.0)
    test_features, test_labels, _ = labelled(spread=2.0, seed=1)

    def loss(n_components):
        result = probe(
            features,
            labels,
            test_features,
            test_labels,
            blocks_train=blocks,
            n_components=n_components,
            strengths=(0.1,),
        )
        return log_loss(test_labels, result.probabilities)

    assert loss(50) == pytest.approx(loss(None), abs=1e-3)
    assert loss(1) > loss(50) + 0.2


def test_strength_is_chosen_on_blocks_held_out():
    """Features shared within a block tell the labels of its other cells, and nothing of another block."""
    rng = np.random.default_rng(0)
    blocks = np.repeat(np.arange(40), 10)
    majority = rng.integers(2, size=40)
    labels = np.where(rng.random(400) < 0.95, majority[blocks], 1 - majority[blocks])
    signal = labels[:, None] + rng.normal(0, 1.0, (400, 4))
    features = np.hstack([signal, rng.normal(size=(40, 60))[blocks]]).astype(np.float32)
    arguments = (features, labels, features, labels)
    by_block = probe(*arguments, blocks_train=blocks, n_components=None, strengths=(1e-3, 1e3))
    by_cell = probe(*arguments, blocks_train=np.arange(400), n_components=None, strengths=(1e-3, 1e3))
    assert (by_block.strength, by_cell.strength) == (1e-3, 1e3)


def test_macro_f1_counts_a_class_never_predicted_as_zero():
    features, labels, blocks = labelled()
    test_features, test_labels, _ = labelled(seed=1)
    test_labels[::3] = "never trained on"
    result = probe(features, labels, test_features, test_labels, blocks_train=blocks)
    every = f1_score(test_labels, result.predictions, average=None, labels=NAMES)
    assert result.macro_f1 == pytest.approx(every.sum() / 4)


def test_the_same_seed_gives_the_same_probe():
    features, labels, blocks = labelled(spread=3.0)
    first, again = (probe(features, labels, features, labels, blocks_train=blocks, seed=3) for _ in range(2))
    assert np.array_equal(first.probabilities, again.probabilities)


def test_bad_input_says_what_to_mend():
    features, labels, blocks = labelled(n=90)
    codes = np.unique(labels, return_inverse=True)[1]
    with pytest.raises(InputError, match="labels_train: negative codes"):
        probe(features, codes - 1, features, codes, blocks_train=blocks)
    with pytest.raises(InputError, match="labels_test: negative codes"):
        probe(features, codes, features, codes - 1, blocks_train=blocks)
    with pytest.raises(InputError, match="features_test: some features are not finite"):
        probe(features, labels, np.full_like(features, np.nan), labels, blocks_train=blocks)
    with pytest.raises(InputError, match="one block"):
        probe(features, labels, features, labels, blocks_train=np.zeros(90, int))
    with pytest.raises(InputError, match="hold one class"):
        probe(features, np.full(90, "cortex"), features, labels, blocks_train=blocks)


@pytest.mark.parametrize("sparse", [False, True])
def test_own_and_neighbour_features(sparse):
    values = np.random.default_rng(0).poisson(1.0, (6, 4)).astype(np.float32)
    matrix = sp.csr_array(values) if sparse else values
    neighbours = np.array([[1, 2], [0, -1], [-1, -1]])
    cells = np.array([5, 0, 3])
    features = own_and_neighbour_features(matrix, neighbours, cells)
    expected = np.hstack([values[cells], [values[[1, 2]].mean(0), values[0], np.zeros(4)]])
    assert features.dtype == np.float32
    assert np.array_equal(features, expected)
    every = np.tile(np.arange(6)[:, None], (1, 2))
    assert np.array_equal(own_and_neighbour_features(matrix, every), np.hstack([values, values]))
