"""What baselines read, against scikit-learn on dense counts and plain loops."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.sparse as sp
from questions import question
from scipy.spatial.distance import cdist
from sklearn.decomposition import PCA

from scfm_jax.downstream.expression import beside_neighbours, components, coordinates_answer
from scfm_jax.errors import InputError


def test_components_are_fitted_on_training_cells_alone():
    rng = np.random.default_rng(0)
    counts = np.log1p(rng.poisson(1.0, (80, 15)) * np.geomspace(4, 0.5, 15)).astype(np.float32)
    train = np.arange(0, 80, 2)
    found = components(SimpleNamespace(log_counts=sp.csr_array(counts)), train, n=5)
    by_hand = PCA(5, svd_solver="full").fit(counts[train]).transform(counts)
    assert found.dtype == np.float32
    signs = np.sign((found * by_hand).sum(0))
    assert found * signs == pytest.approx(by_hand, abs=1e-3)
    # No more than there are.
    assert components(SimpleNamespace(log_counts=sp.csr_array(counts)), train).shape == (80, 14)
    assert components(SimpleNamespace(log_counts=sp.csr_array(counts)), train[:6]).shape == (80, 5)


def test_means_stand_beside_a_cells_own():
    features = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    near = np.array([[1, 2, 3], [0, 5, -1], [4, -1, -1], [-1, -1, -1], [0, 1, 2], [2, 3, 4]])
    means = [
        np.array(
            [features[[c for c in row[:k] if c >= 0]].mean(0) if row[0] >= 0 else np.zeros(4) for row in near]
        )
        for k in (1, 3)
    ]
    found = beside_neighbours(features, near, (1, 3))
    assert found.dtype == np.float32 and found == pytest.approx(np.hstack([features, *means]), abs=1e-6)
    for sizes in ((), (0,)):
        assert np.array_equal(beside_neighbours(features, near, sizes), features)


@pytest.fixture
def cohort():
    rng = np.random.default_rng(1)
    slides = [SimpleNamespace(name=name, spatial=spatial) for name, spatial in (("a", 1), ("b", 1), ("c", 0))]
    return SimpleNamespace(
        xy=rng.random((300, 2)), slide=np.repeat([0, 1], 150), corpus=SimpleNamespace(slides=slides)
    )


def test_coordinates_ask_the_five_nearest_training_cells_of_the_slide(cohort):
    codes, block = np.random.default_rng(2).integers(3, size=300), np.arange(300)
    asked = question("classes", codes, block, n_classes=4)
    train, test = asked.fold.train, asked.fold.test
    distance = np.where(
        cohort.slide[test][:, None] == cohort.slide[train], cdist(cohort.xy[test], cohort.xy[train]), 9
    )
    nearest = train[np.argsort(distance, axis=1)[:, :5]]
    shares = np.stack([(codes[nearest] == code).mean(1) for code in range(4)], axis=1)
    assert coordinates_answer(cohort, asked) == pytest.approx(shares)
    value = np.random.default_rng(3).normal(size=300).astype(np.float32)
    asked = replace(asked, kind="value", target=value, classes=())
    assert coordinates_answer(cohort, asked) == pytest.approx(value[nearest].mean(1), abs=1e-5)
    two = np.stack([value, -value], axis=1)
    asked = replace(asked, kind="composition", target=two, classes=("x", "y"))
    assert coordinates_answer(cohort, asked) == pytest.approx(two[nearest].mean(1), abs=1e-5)


def test_a_slide_held_out_has_no_places_to_learn_from(cohort):
    codes, block = np.arange(300) % 3, np.arange(300)
    asked = question("classes", codes, block, train=np.arange(150), n_classes=3)
    with pytest.raises(InputError, match="slide 'b' has no training cells with coordinates"):
        coordinates_answer(cohort, asked)
