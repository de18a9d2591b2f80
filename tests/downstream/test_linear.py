"""Linear answers against scikit-learn fitted by hand, on targets that are known to be readable, or not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from questions import question
from sklearn.linear_model import LogisticRegression, Ridge

from scfm_jax.downstream.folds import Fold
from scfm_jax.downstream.linear import constant_answer, linear_answer
from scfm_jax.downstream.scores import score
from scfm_jax.errors import InputError


def labelled(n=600, n_features=12, spread=1.0, seed=0):
    """Cells of three classes around their centres, in blocks of 20."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(3, size=n)
    centres = np.random.default_rng(99).normal(size=(3, n_features))
    features = centres[codes] + rng.normal(0, spread, (n, n_features))
    return features.astype(np.float32), codes, np.arange(n) // 20


def standardised(features, train):
    return (features - features[train].mean(0, dtype=float)) / features[train].std(0, dtype=float)


def test_reads_what_is_there_and_no_more():
    features, codes, block = labelled()
    asked = question("classes", codes, block, n_classes=3)
    answer, _ = linear_answer(features, asked)
    assert answer.dtype == np.float32 and answer.sum(1) == pytest.approx(1, abs=1e-5)
    assert score("classes", asked.truth, answer)["accuracy"] > 0.9
    shuffled = question("classes", np.random.default_rng(2).permutation(codes), block, n_classes=3)
    assert score("classes", shuffled.truth, linear_answer(features, shuffled)[0])["accuracy"] < 0.6


def test_classes_are_sklearns_regression_with_a_column_for_every_class():
    features, codes, block = labelled(spread=3.0)
    features = features * np.geomspace(0.01, 100, 12, dtype=np.float32)
    codes = codes + (codes > 0)  # nothing has class 1
    asked = question("classes", codes, block, n_classes=5)
    answer, strength = linear_answer(features, asked, strengths=(0.1,))
    train, test = asked.fold.train, asked.fold.test
    x = standardised(features, train)
    model = LogisticRegression(C=0.1, max_iter=2000).fit(x[train], codes[train])
    assert answer[:, [0, 2, 3]] == pytest.approx(model.predict_proba(x[test]), abs=1e-3)
    assert strength == 0.1 and not answer[:, [1, 4]].any()


@pytest.mark.parametrize("kind", ["value", "composition"])
def test_values_and_compositions_are_sklearns_ridge(kind):
    features, _, block = labelled()
    rng = np.random.default_rng(1)
    if kind == "value":
        target = (features[:, 0] + 0.1 * rng.normal(size=len(features))).astype(np.float32)
    else:
        target = np.exp(4 * features[:, :3])
        target = (target / target.sum(1, keepdims=True)).astype(np.float32)
    asked = question(kind, target, block, n_classes=0 if kind == "value" else 3)
    train, test = asked.fold.train, asked.fold.test
    x = standardised(features, train)
    by_hand = {c: Ridge(1 / c).fit(x[train], target[train]).predict(x[test]) for c in (1e-4, 1e-2)}
    if kind == "composition":
        assert (by_hand[1e-2] < 0).any()
        cut = {c: np.maximum(said, 0) for c, said in by_hand.items()}
        by_hand = {c: said / said.sum(1, keepdims=True) for c, said in cut.items()}
    answer, strength = linear_answer(features, asked, strengths=(1e-4, 1e-2))
    assert strength == 1e-2
    assert answer == pytest.approx(by_hand[1e-2], abs=1e-4)


def in_places(per_place, per_block):
    """Features shared within a place tell the labels of its other cells, and nothing of another place."""
    rng = np.random.default_rng(0)
    place = np.repeat(np.arange(44), per_place)
    majority = rng.permutation(44) % 2
    codes = np.where(rng.random(len(place)) < 0.95, majority[place], 1 - majority[place])
    signal = codes[:, None] + rng.normal(0, 1.0, (len(place), 4))
    features = np.hstack([signal, rng.normal(size=(44, 30))[place]]).astype(np.float32)
    near = np.stack([np.flatnonzero(place == own) for own in place])
    return features, codes, np.arange(len(place)) // per_block, near


def test_the_strength_is_chosen_on_blocks_held_out_with_a_margin():
    features, codes, block, near = in_places(20, 20)
    of = {"n_classes": 2, "train": np.arange(800), "near": near}
    strengths = (1e-2, 1e3)
    by_block = linear_answer(features, question("classes", codes, block, **of), strengths=strengths)
    by_cell = question("classes", codes, np.arange(880), margin=0, **of)
    assert by_block[1] == 1e-2 and linear_answer(features, by_cell, strengths=strengths)[1] == 1e3
    # Half a place in each block: the other half is a neighbour.
    halves = question("classes", codes, np.arange(880) // 10, **of)
    assert linear_answer(features, halves, strengths=strengths)[1] == 1e-2
    assert linear_answer(features, replace(halves, margin=0), strengths=strengths)[1] == 1e3


def test_a_cell_without_features_gets_the_training_mean():
    features, codes, block = labelled()
    asked = question("classes", codes, block, n_classes=3)
    some = features.copy()
    some[asked.fold.test[3]] = some[asked.fold.train[5]] = np.nan
    mean = np.delete(features[asked.fold.train], 5, axis=0).mean(0)
    filled = features.copy()
    filled[asked.fold.test[3]] = filled[asked.fold.train[5]] = mean
    assert np.array_equal(linear_answer(some, asked)[0], linear_answer(filled, asked)[0])
    with pytest.raises(InputError, match="fold 0: the features of all training cells are missing"):
        linear_answer(np.full_like(features, np.nan), asked)


def test_constant_answers():
    _, codes, block = labelled()
    asked = question("classes", codes, block, n_classes=4)
    shares = [(codes[asked.fold.train] == code).mean() for code in range(4)]
    assert constant_answer(asked) == pytest.approx(np.tile(shares, (len(asked.truth), 1)))
    value = np.random.default_rng(0).normal(size=600).astype(np.float32)
    asked = question("value", value, block)
    assert constant_answer(asked) == pytest.approx(np.full(len(asked.truth), np.median(asked.to_learn)))
    shares = np.random.default_rng(0).dirichlet(np.ones(3), 600).astype(np.float32)
    asked = question("composition", shares, block, n_classes=3)
    mean = shares[asked.fold.train].mean(0)
    assert constant_answer(asked) == pytest.approx(np.tile(mean, (len(asked.truth), 1)))
    assert constant_answer(asked).dtype == np.float32


def test_bad_input_says_what_to_mend():
    features, codes, block = labelled()
    with pytest.raises(InputError, match="one block"):
        linear_answer(features, question("classes", codes, 0 * block, train=np.arange(300), n_classes=3))
    everyone = np.tile(np.arange(600), (600, 1))
    with pytest.raises(InputError, match="leave nothing to choose a penalty on"):
        linear_answer(features, question("classes", codes, block, near=everyone, n_classes=3))
    asked = question("classes", np.where(block % 3, 0, codes), block, n_classes=3)
    with pytest.raises(InputError, match="fold 0: its training cells have one class"):
        asked.fold.labelled(asked.target)
    with pytest.raises(InputError, match="fold 1: has no labelled test cell"):
        Fold("1", np.arange(9), np.arange(9, 12)).labelled(np.repeat([0, 1, 0, -1], 3))
