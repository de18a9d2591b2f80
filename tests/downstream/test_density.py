"""Densities against all pairs of cells, and the hull's border against the distance to each of its edges."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial import ConvexHull
from scipy.spatial.distance import cdist
from scipy.stats import linregress

from scfm_jax.downstream import spatial_labels
from scfm_jax.downstream.density import density_from_distance, local_density
from scfm_jax.downstream.spatial_labels import sum_within
from scfm_jax.errors import InputError

UM = (0.5, 0.6)
RADIUS = 50.0


@pytest.fixture(scope="module")
def corpus(place_cells):
    """Two slides whose frames overlap, in units of their own, and one without coordinates."""
    rng = np.random.default_rng(0)
    dense = rng.random((700, 2)) ** np.array([2, 1]) * 1000
    sparse = rng.random((300, 2)) * 1200
    sparse[5] = sparse[4]  # cells may coincide
    return place_cells([dense, sparse, None], (*UM, 1.0))


def places(corpus):
    """Cell numbers and places in µm of each spatial slide."""
    for slide, um in zip(corpus.slides, UM):
        rows = np.arange(slide.start, slide.start + slide.n_cells)
        yield rows, np.stack([corpus.column(axis, rows) for axis in "xy"], 1).astype(float) * um


def to_segment(points, a, b):
    along = np.clip(((points - a) @ (b - a)) / ((b - a) @ (b - a)), 0, 1)
    return np.linalg.norm(points - (a + along[:, None] * (b - a)), axis=1)


def test_density_is_that_of_all_pairs_inside_the_hull(corpus):
    value, report = local_density(corpus, RADIUS)
    assert value.dtype == np.float32 and value.shape == (corpus.n_cells,)
    border = 0
    for rows, xy in places(corpus):
        corners = xy[ConvexHull(xy).vertices]
        edges = zip(corners, np.roll(corners, -1, axis=0))
        kept = np.min([to_segment(xy, a, b) for a, b in edges], axis=0) > RADIUS
        assert 20 < kept.sum() < len(rows)
        assert np.array_equal(np.isfinite(value[rows]), kept)
        others = (cdist(xy, xy) <= RADIUS).sum(1) - 1
        expected = np.log(1 + others / (np.pi * RADIUS**2 / 1000))
        assert value[rows][kept] == pytest.approx(expected[kept], rel=1e-6)
        border += (~kept).sum()
    assert np.isnan(value[1000:]).all()
    assert report["cells"] == {"scored": 1000 - border, "border": border, "without_coordinates": 20}
    assert report["radius"] == RADIUS and "1,000 µm²" in report["unit"]


def test_a_lattice_has_the_density_of_its_spacing(place_cells):
    xy = np.stack(np.meshgrid(np.arange(41.0), np.arange(41.0)), -1).reshape(-1, 2) * 10
    value, report = local_density(place_cells([xy], 1.0), RADIUS)
    # Whole numbers a, b with a² + b² <= 25, the origin apart, are 80 (Gauss's circle problem).
    assert np.unique(value[np.isfinite(value)]) == pytest.approx(np.log1p(80 / (np.pi * 2.5)))
    assert report["cells"]["scored"] == 29**2  # columns at 60 to 340 µm


def test_rows_at_a_time_change_nothing(monkeypatch):
    rng = np.random.default_rng(1)
    xy, values = rng.random((200, 2)), rng.random((200, 3))
    near = cdist(xy, xy) <= 0.2
    np.fill_diagonal(near, False)
    for rows in (1 << 15, 37):
        monkeypatch.setattr(spatial_labels, "_ROWS", rows)
        assert sum_within(xy, values, 0.2) == pytest.approx(near @ values)


@pytest.mark.parametrize("k", [1, 4])
def test_the_distance_baseline_is_least_squares_on_training_cells(corpus, k):
    value, _ = local_density(corpus, RADIUS)
    scored = np.flatnonzero(np.isfinite(value))
    train, test = np.arange(0, 1000, 2), scored[scored % 2 == 1]
    log_distance = np.full(corpus.n_cells, np.nan)
    for rows, xy in places(corpus):
        log_distance[rows] = np.log(np.maximum(np.sort(cdist(xy, xy), axis=1)[:, k], 0.1))
    learnt = train[np.isfinite(value[train])]
    fit = linregress(log_distance[learnt], value[learnt])
    got = density_from_distance(corpus, value, train, test, k=k)
    assert got == pytest.approx(fit.intercept + fit.slope * log_distance[test], rel=1e-4)
    assert got.dtype == np.float32 and fit.slope < 0
    median = np.median(value[learnt])
    assert np.abs(got - value[test]).mean() < np.abs(median - value[test]).mean()


def test_bad_input_is_told(place_cells, corpus):
    square = np.random.default_rng(0).random((50, 2)) * 80
    with pytest.raises(InputError, match=r"slide0 has no um_per_unit.*--um-per-unit"):
        local_density(place_cells([square], None))
    with pytest.raises(InputError, match="farther than 50 µm from its slide's border"):
        local_density(place_cells([square, square[:, [0, 0]], square[:2] / 10], 1.0, n_neighbours=1))
    with pytest.raises(InputError, match="no slide has coordinates"):
        local_density(place_cells([None], None))
    with pytest.raises(InputError, match="positive"):
        local_density(corpus, 0)
    value, _ = local_density(corpus, RADIUS)
    with pytest.raises(InputError, match="20 cells have fewer than 3 neighbours"):
        density_from_distance(corpus, value, np.arange(1000), np.arange(1020), k=3)
