"""Heads against NumPy."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from scfm_jax.models.heads import HeadConfig, apply_head, init_head, pooled, unstandardised

RNG = np.random.default_rng(0)
HIDDEN = RNG.normal(size=(3, 5, 8)).astype(np.float32)
CHOSEN = np.array([[1, 0, 1, 1, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 0]], np.float32)


def head_of(config: HeadConfig) -> Any:
    head = init_head(config, 8, 4, jax.random.key(0))
    return jax.tree.map(lambda leaf: RNG.normal(size=leaf.shape).astype(np.float32), head)


def test_pooling_sees_the_chosen_tokens_alone() -> None:
    for row in (0, 1):
        own = HIDDEN[row][CHOSEN[row] > 0]
        np.testing.assert_allclose(pooled(HIDDEN, CHOSEN, "mean")[row], own.mean(0), rtol=1e-6)
        np.testing.assert_array_equal(pooled(HIDDEN, CHOSEN, "max")[row], own.max(0))
    for pooling in ("mean", "max"):
        assert not np.any(pooled(HIDDEN, CHOSEN, pooling)[2])


@pytest.mark.parametrize("kind", ["linear", "max_linear", "mean_tanh"])
def test_heads_are_their_formulas(kind: Any) -> None:
    config = HeadConfig(kind, hidden=6)
    assert config.pooling == ("max" if kind == "max_linear" else "mean")
    head, x = head_of(config), HIDDEN[:, 0]
    inner = x
    if kind == "mean_tanh":
        assert head["inner"]["kernel"].shape == (8, 6)
        inner = np.tanh(x @ head["inner"]["kernel"] + head["inner"]["bias"])
    stated = inner @ head["out"]["kernel"] + head["out"]["bias"]
    np.testing.assert_allclose(apply_head(head, config, x), stated, rtol=1e-5, atol=1e-5)


def test_a_head_starts_with_outputs_of_the_size_of_its_features() -> None:
    head = init_head(HeadConfig(), 512, 64, jax.random.key(0))
    x = RNG.normal(size=(256, 512)).astype(np.float32)
    assert np.asarray(apply_head(head, HeadConfig(), x)).std() == pytest.approx(1.0, rel=0.05)
    assert init_head(HeadConfig("mean_tanh"), 8, 4, jax.random.key(0))["inner"]["kernel"].shape == (8, 8)


def test_dropout_drops_its_share_and_keeps_the_mean() -> None:
    config = HeadConfig("mean_tanh", hidden=4_000, dropout=0.25)
    head = init_head(config, 8, 4, jax.random.key(0))
    # The output sums what is left of the hidden features, all of them 1.
    head["inner"] = {"kernel": np.zeros((8, 4_000), np.float32), "bias": np.full(4_000, 100, np.float32)}
    head["out"] = {"kernel": np.ones((4_000, 1), np.float32), "bias": np.zeros(1, np.float32)}
    x = HIDDEN[:, 0]
    first, again, other = (apply_head(head, config, x, jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)
    assert len(np.unique(first)) == 3  # rows drop features of their own
    assert np.asarray(first) * 0.75 / 4_000 == pytest.approx(0.75, abs=0.03)
    np.testing.assert_allclose(apply_head(head, config, x), 4_000)


@pytest.mark.parametrize("kind", ["linear", "mean_tanh"])
def test_standardisation_goes_into_the_head(kind: Any) -> None:
    config = HeadConfig(kind)
    head, x = head_of(config), HIDDEN[:, 0]
    mean, spread = RNG.normal(size=8).astype(np.float32), RNG.uniform(0.5, 2, 8).astype(np.float32)
    np.testing.assert_allclose(
        apply_head(unstandardised(head, mean, spread), config, x),
        apply_head(head, config, (x - mean) / spread),
        rtol=1e-4,
        atol=1e-5,
    )


def test_settings_that_are_none() -> None:
    for settings in ({"dropout": 1.0}, {"dropout": -0.1}, {"hidden": 0}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            HeadConfig("mean_tanh", **settings)
