from __future__ import annotations

import numpy as np
import pytest

from scfm_jax.corpus import neighbours
from scfm_jax.corpus.neighbours import hilbert_order, nearest, spacing_warnings


def brute_force(xy: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    distance = np.sqrt(((xy[:, None] - xy[None]) ** 2).sum(-1))
    np.fill_diagonal(distance, np.inf)
    order = np.argsort(distance, axis=1, kind="stable")[:, :k]
    return order, np.take_along_axis(distance, order, 1)


def together(xy: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    found, distance = zip(*nearest(xy, k))
    return np.concatenate(found), np.concatenate(distance)


@pytest.mark.parametrize("rows_at_once", [7, 1 << 16])
def test_nearest_is_what_all_pairs_give(monkeypatch, rows_at_once):
    monkeypatch.setattr(neighbours, "_QUERY_ROWS", rows_at_once)
    xy = np.random.default_rng(0).normal(size=(200, 2))
    found, distance = together(xy, 12)
    expected, expected_distance = brute_force(xy, 12)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(distance, expected_distance, rtol=1e-12)


def test_fewer_points_than_neighbours_leave_minus_one_and_infinity():
    xy = np.array([[0.0, 0.0], [1.0, 0.0], [3.0, 0.0]])
    found, distance = together(xy, 4)
    np.testing.assert_array_equal(found, [[1, 2, -1, -1], [0, 2, -1, -1], [1, 0, -1, -1]])
    np.testing.assert_array_equal(distance[0], [1, 3, np.inf, np.inf])


def test_no_point_is_its_own_neighbour_even_where_points_coincide():
    xy = np.zeros((10, 2))
    found, distance = together(xy, 4)
    assert not (found == np.arange(10)[:, None]).any()
    assert (found >= 0).all() and (distance == 0).all()
    assert all(len(set(row)) == 4 for row in found.tolist())


def test_equal_distances_come_by_row_number():
    grid = np.stack(np.meshgrid(np.arange(5.0), np.arange(5.0)), -1).reshape(-1, 2)
    found, distance = together(grid, 8)
    tied = distance[:, 1:] == distance[:, :-1]
    assert tied.any() and (found[:, 1:] > found[:, :-1])[tied].all()


def test_hilbert_order_walks_a_grid_one_step_at_a_time():
    grid = np.stack(np.meshgrid(np.arange(32.0), np.arange(32.0)), -1).reshape(-1, 2)
    order = hilbert_order(np.random.default_rng(0).permutation(grid))
    assert sorted(order.tolist()) == list(range(1024))
    walked = np.random.default_rng(0).permutation(grid)[order]
    np.testing.assert_array_equal(np.abs(np.diff(walked, axis=0)).sum(axis=1), 1)


def test_hilbert_order_of_no_point_and_of_one_place():
    assert hilbert_order(np.empty((0, 2))).tolist() == []
    assert hilbert_order(np.ones((4, 2))).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("last", "um", "said"),
    [
        (np.r_[np.full(97, 100.0), np.full(3, 301.0)], 1.0, "3 times its median"),
        (np.r_[np.full(99, 100.0), 301.0], 1.0, None),
        (np.full(100, 251.0), 1.0, "median neighbour 64 is 251 µm"),
        (np.full(100, 251.0), 0.5, None),
        (np.full(100, 251.0), None, None),
    ],
)
def test_spacing_of_the_last_neighbour(last, um, said):
    found = spacing_warnings(np.full(100, 10.0), last, 64, um)
    assert [said in text for text in found] == [True] if said else found == []


def test_spacing_of_the_nearest_neighbour():
    (found,) = spacing_warnings(np.full(10, 26.0), np.full(10, np.inf), 64, 1.0)
    assert "nearest neighbour is 26 µm" in found and "subsampled" in found
