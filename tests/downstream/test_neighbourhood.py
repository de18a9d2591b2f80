"""The head over a cell and its neighbours, against plain loops and on a label that it alone can read."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from questions import question

from scfm_jax.downstream.expression import beside_neighbours
from scfm_jax.downstream.linear import linear_answer
from scfm_jax.downstream.neighbourhood import (
    NeighbourhoodConfig,
    apply_neighbourhood,
    init_neighbourhood,
    neighbourhood_answer,
)
from scfm_jax.downstream.scores import score
from scfm_jax.errors import InputError

pytestmark = pytest.mark.usefixtures("compile_fast")

CONFIG = NeighbourhoodConfig(neighbours=8, width=16, epochs=12, batch_size=64, peak_rate=1e-2, dropout=0.1)


def test_the_forward_pass_cell_by_cell():
    rng = np.random.default_rng(0)
    features, near = rng.normal(size=(9, 3)).astype(np.float32), rng.integers(-1, 9, (9, 4))
    near[2] = -1
    drawn = init_neighbourhood(3, 5, 2, jax.random.key(0))
    head = jax.tree.map(lambda leaf: leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32), drawn)
    rows = np.array([4, 2, 0])

    def linear(name, x):
        return x @ np.asarray(head[name]["kernel"]) + np.asarray(head[name]["bias"])

    def gelu(x):  # Hendrycks & Gimpel 2016, by tanh
        return 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))

    def mean(of_each, size):
        return np.mean(of_each, axis=0) if of_each else np.zeros(size)

    expected = []
    for row in rows:
        around = [features[cell] for cell in near[row] if cell >= 0]
        each = [gelu(linear("each_2", gelu(linear("each_1", cell)))) for cell in around]
        own = features[row]
        both = np.concatenate([gelu(linear("own", own)), mean(each, 5), own, mean(around, 3)])
        expected.append(linear("both_2", gelu(linear("both_1", both))))
    said = apply_neighbourhood(head, jnp.asarray(features), jnp.asarray(near), jnp.asarray(rows))
    assert np.asarray(said) == pytest.approx(np.array(expected), abs=1e-5)


@pytest.fixture(scope="module")
def spread():
    """Two regions whose features have one mean and two spreads: only a mean of something nonlinear tells."""
    rng = np.random.default_rng(0)
    block = np.arange(1200) // 40
    codes = block % 2
    features = rng.normal(size=(1200, 2)) * np.where(codes, 1.4, 0.7)[:, None]
    near = np.stack([rng.choice(np.flatnonzero(codes == code), 8) for code in codes])
    return features.astype(np.float32), codes, block, near


def test_learns_what_a_linear_model_of_means_cannot(spread):
    features, codes, block, near = spread
    asked = question("classes", codes, block, near=near, margin=0, n_classes=2)
    said, history, weights = neighbourhood_answer(features, asked, CONFIG)
    assert said.sum(1) == pytest.approx(1, abs=1e-5)
    assert score("classes", asked.truth, said)["accuracy"] > 0.9
    linear, _ = linear_answer(beside_neighbours(features, near, (8,)), asked)
    assert score("classes", asked.truth, linear)["accuracy"] < 0.65
    losses = [row["train_loss"] for row in history]
    assert len(losses) == 12 and losses[-1] < 0.7 * losses[0]
    assert weights == 2 * (2 + 1) * 16 + (16 + 1) * 16 + (2 * (2 + 16) + 1) * 16 + (16 + 1) * 2


def test_values_compositions_seeds_and_no_neighbours(spread):
    features, codes, block, near = spread
    value = (100 + 5 * codes + 0.1 * features[:, 0]).astype(np.float32)
    asked = question("value", value, block, near=near)
    said, *_ = neighbourhood_answer(features, asked, CONFIG, seed=1)
    again, *_ = neighbourhood_answer(features, asked, CONFIG, seed=1)
    other, *_ = neighbourhood_answer(features, asked, CONFIG, seed=2)
    assert np.array_equal(said, again) and not np.array_equal(said, other)
    assert said.dtype == np.float32 and score("value", asked.truth, said)["r2"] > 0.6

    shares = np.stack([0.2 + 0.6 * codes, 0.8 - 0.6 * codes], axis=1).astype(np.float32)
    asked = question("composition", shares, block, near=near, n_classes=2)
    said, *_ = neighbourhood_answer(features, asked, CONFIG)
    assert score("composition", asked.truth, said)["mae"] < 0.15  # 0.3 of the mean

    alone = NeighbourhoodConfig(neighbours=0, width=8, epochs=6)
    asked = question("classes", (features[:, 0] > 0).astype(int), block, near=near[:, :0], n_classes=2)
    said, *_ = neighbourhood_answer(features, asked, alone)
    assert score("classes", asked.truth, said)["accuracy"] > 0.8


def test_members_are_averaged(spread):
    features, codes, block, near = spread
    asked = question("classes", codes, block, near=near, n_classes=2)
    few = replace(CONFIG, epochs=2)
    said, history, weights = neighbourhood_answer(features, asked, replace(few, members=2), seed=3)
    each = [neighbourhood_answer(features, asked, few, seed=seed) for seed in (6, 7)]
    np.testing.assert_allclose(said, np.mean([answer for answer, _, _ in each], axis=0), rtol=1e-6)
    losses = np.mean([[row["train_loss"] for row in of_one] for _, of_one, _ in each], axis=0)
    assert [row["train_loss"] for row in history] == pytest.approx(losses, rel=1e-9)
    assert weights == 2 * each[0][2]


def test_bad_input_says_what_to_mend(spread):
    features, codes, block, near = spread
    asked = question("classes", codes, block, near=near[:, :3], n_classes=2)
    with pytest.raises(InputError, match="holds 3 neighbours of the 8 asked for"):
        neighbourhood_answer(features, asked, CONFIG)
    asked = question("classes", codes, block, near=near, n_classes=2)
    with pytest.raises(InputError, match="features: some are not finite"):
        neighbourhood_answer(np.where(features > 3, np.nan, features), asked, CONFIG)
    with pytest.raises(ValueError, match="epochs is 0"):
        NeighbourhoodConfig(epochs=0)
