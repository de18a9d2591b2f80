"""Blocks held out of the training cells, and the margin around them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial import cKDTree

from scfm_jax.downstream.choosing import blocks_in_turn, held_out_blocks, neighbour_rows
from scfm_jax.errors import InputError


@pytest.fixture(scope="module")
def tissue():
    """Training cells among others of a square, their blocks, and all cells' nearest neighbours."""
    rng = np.random.default_rng(0)
    xy = rng.random((800, 2))
    block = (xy // 0.2501).astype(int) @ [1, 4]
    near = cKDTree(xy).query(xy, 7)[1][:, 1:]
    near[rng.random(near.shape) < 0.05] = -1
    return rng.permutation(800)[:600], block, near


def test_no_cell_that_is_fitted_neighbours_one_that_chooses(tissue):
    cells, block, near = tissue
    rows = neighbour_rows(cells, near[cells])
    assert [cells[row] if row >= 0 else -1 for row in rows[7]] == [
        cell if cell in cells else -1 for cell in near[cells[7]]
    ]
    chosen_on = []
    draws = [*blocks_in_turn(block[cells], rows, 0), held_out_blocks(block[cells], rows, 0)]
    for fit, held_out in draws:
        held = set(cells[held_out])
        blocks = set(block[cells[held_out]])
        others = [row for row in range(600) if block[cells[row]] not in blocks]
        of_held = {cell for cell in held for cell in near[cell]}
        expected = [row for row in others if not held & set(near[cells[row]]) and cells[row] not in of_held]
        assert fit.tolist() == expected and len(expected) < len(others)
        assert set(held_out) == set(range(600)) - set(others)
        chosen_on += [held_out]
    assert np.array_equal(np.sort(np.concatenate(chosen_on[:4])), np.arange(600))
    assert len(np.unique(block[cells[chosen_on[4]]])) == 4  # a fifth of 16
    assert all(len(fit) == 600 - len(held) for fit, held in blocks_in_turn(block[cells], rows[:, :0], 0))


def test_the_draw_that_keeps_most_classes_is_taken():
    """A rare class lies in one block: it must not be held out."""
    block = np.repeat(np.arange(4), 10)
    labels = np.where(block == 2, "rare", np.where(np.arange(40) % 2, "a", "b"))
    nobody = np.zeros((40, 0), int)
    for seed in range(8):
        fit, held_out = held_out_blocks(block, nobody, seed, labels=labels, share=0.25)
        assert 2 not in block[held_out] and set(labels[fit]) == {"a", "b", "rare"}
    assert any(2 in block[held_out_blocks(block, nobody, seed, share=0.25)[1]] for seed in range(8))


def test_bad_input_says_what_to_mend():
    block, nobody = np.repeat([0, 1], 10), np.zeros((20, 0), int)
    for choose in (held_out_blocks, lambda *of: next(blocks_in_turn(*of))):
        with pytest.raises(InputError, match="all training cells lie in one block"):
            choose(0 * block, nobody, 0)
    with pytest.raises(InputError, match="hold one class outside the margin"):
        held_out_blocks(block, nobody, 0, labels=block)
    with pytest.raises(InputError, match="hold no cell outside the margin"):
        held_out_blocks(block, np.tile(np.arange(20), (20, 1)), 0)
