"""Compositions and their baselines against loops over all pairs of cells."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.spatial.distance import cdist

from scfm_jax.downstream.composition import (
    composition,
    composition_by_type,
    composition_of_predicted,
)
from scfm_jax.errors import InputError

UM, RADIUS, N_TYPES = 2.0, 60.0, 4


@pytest.fixture(scope="module")
def corpus(place_cells):
    rng = np.random.default_rng(0)
    return place_cells([rng.random((250, 2)) * 200, None, rng.random((150, 2)) * 150], UM)


@pytest.fixture(scope="module")
def codes(corpus):
    return np.random.default_rng(1).integers(-1, N_TYPES - 1, size=corpus.n_cells)


@pytest.fixture(scope="module")
def near(corpus):
    """Which cells are within the radius of which, over the whole corpus."""
    xy = np.stack([corpus.column(axis) for axis in "xy"], 1).astype(float) * UM
    slide = corpus.slide_of(np.arange(corpus.n_cells))
    with np.errstate(invalid="ignore"):
        near = (cdist(xy, xy) <= RADIUS) & (slide[:, None] == slide)
    np.fill_diagonal(near, False)
    return near


def test_composition_is_that_of_all_pairs(corpus, codes, near):
    value, report = composition(corpus, codes, N_TYPES, RADIUS)
    assert value.dtype == np.float32 and value.shape == (corpus.n_cells, N_TYPES)
    numbers, scored = [], 0
    for cell in range(corpus.n_cells):
        types = codes[near[cell] & (codes >= 0)]
        if len(types) < 5:
            assert np.isnan(value[cell]).all()
            continue
        assert value[cell] == pytest.approx(np.bincount(types, minlength=N_TYPES) / len(types))
        scored += 1
        numbers.append(len(types))
    assert 100 < scored < 400
    assert report["cells"] == {"scored": scored, "few_neighbours": 400 - scored, "without_coordinates": 20}
    assert report["median_neighbours"] == np.median(numbers)
    # A cell that has no type itself is scored, and no cell counts itself.
    assert np.isfinite(value[codes < 0]).any()


def test_units_and_the_least_number_are_arguments(place_cells, corpus, codes):
    value, _ = composition(corpus, codes, N_TYPES, RADIUS)
    same, report = composition(corpus, codes, N_TYPES, RADIUS / UM, unit="file")
    assert np.array_equal(same, value, equal_nan=True) and report["unit"] == "file"
    more, report = composition(corpus, codes, N_TYPES, RADIUS, min_neighbours=1)
    assert report["cells"]["scored"] > np.isfinite(value[:, 0]).sum()
    assert np.array_equal(more[np.isfinite(value)], value[np.isfinite(value)])
    unknown = place_cells([np.random.default_rng(0).random((40, 2))], None)
    composition(unknown, codes[:40], N_TYPES, 0.5, unit="file")
    with pytest.raises(InputError, match="um_per_unit"):
        composition(unknown, codes[:40], N_TYPES, 0.5)


def test_the_baseline_by_type_is_the_mean_over_its_training_cells(corpus, codes):
    value, _ = composition(corpus, codes, N_TYPES, RADIUS)
    scored = np.flatnonzero(np.isfinite(value[:, 0]))
    test = scored[scored >= 270]
    train = np.flatnonzero(codes[:270] != 1)  # type 1 is new to the test cells; some rows are NaN
    table = pd.DataFrame(value[train]).assign(type=codes[train]).dropna()
    overall = table.drop(columns="type").mean().to_numpy()
    by_type = table[table["type"] >= 0].groupby("type").mean()
    got = composition_by_type(value, codes, train, test)
    expected = [by_type.loc[code] if code in by_type.index else overall for code in codes[test]]
    assert {-1, 0, 1, 2} == set(codes[test])
    assert (
        got.dtype == np.float32
        and got == pytest.approx(np.array(expected))
        and got.sum(1) == pytest.approx(1)
    )


def test_predicted_types_are_averaged_over_the_neighbours(corpus, codes, near):
    value, _ = composition(corpus, codes, N_TYPES, RADIUS)
    test = np.flatnonzero(np.isfinite(value[:, 0]))[::3]
    probabilities = np.random.default_rng(2).dirichlet(np.ones(N_TYPES), corpus.n_cells).astype(np.float32)
    got = composition_of_predicted(corpus, probabilities, test, RADIUS)
    expected = [probabilities[near[cell]].mean(0) for cell in test]
    assert got == pytest.approx(np.array(expected)) and got.dtype == np.float32
    # A classifier that is right everywhere is right here.
    right = np.eye(N_TYPES)[np.random.default_rng(3).integers(N_TYPES, size=corpus.n_cells)]
    truth, _ = composition(corpus, right.argmax(1), N_TYPES, RADIUS)
    assert composition_of_predicted(corpus, right, test, RADIUS) == pytest.approx(truth[test])


def test_bad_input_is_told(corpus, codes):
    with pytest.raises(InputError, match=r"are not 420 numbers from -1 to 1"):
        composition(corpus, codes, 2, RADIUS)
    with pytest.raises(InputError, match="every cell of the corpus"):
        composition(corpus, codes[1:], N_TYPES, RADIUS)
    with pytest.raises(InputError, match=r"5 labelled neighbours within 0\.1"):
        composition(corpus, codes, N_TYPES, 0.1)
    with pytest.raises(InputError, match="positive"):
        composition(corpus, codes, N_TYPES, -1)
    probabilities = np.full((corpus.n_cells, N_TYPES), np.nan)
    with pytest.raises(InputError, match="1 test cells have none"):
        composition_of_predicted(corpus, probabilities, np.array([0]), RADIUS)
    with pytest.raises(InputError, match="5 rows for 420 cells"):
        composition_of_predicted(corpus, probabilities[:5], np.array([0]), RADIUS)
