from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from plain_transformer import turn

from scfm_jax.models.rotary import inverse_frequencies, rotary_tables, rotate


def test_inverse_frequencies_are_torch_arithmetic_in_float32() -> None:
    for size in (2, 16, 64):
        mine = inverse_frequencies(size)
        stated = 1 / np.float32(10_000) ** (np.arange(0, size, 2).astype(np.float32) / np.float32(size))
        assert mine.dtype == stated.dtype == np.float32
        np.testing.assert_array_equal(mine, stated)
        np.testing.assert_allclose(mine, 10_000.0 ** (-np.arange(0, size, 2) / size), rtol=5e-7)


def test_rotation_against_a_loop_over_pairs() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 3, 8))
    positions = np.stack([rng.integers(0, 300, (2, 5)), rng.integers(0, 65, (2, 5))], -1).astype(float)
    mine = rotate(jnp.asarray(x, jnp.float32), rotary_tables(jnp.asarray(positions), 8))
    np.testing.assert_allclose(mine, turn(x, positions), atol=1e-4)  # float32 angles of up to 300 radians


def test_first_half_turns_by_the_first_coordinate_only() -> None:
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 1, 1, 8)), jnp.float32)
    by_first = rotate(x, rotary_tables(jnp.asarray([[[3.0, 0.0]]]), 8))
    by_second = rotate(x, rotary_tables(jnp.asarray([[[0.0, 3.0]]]), 8))
    assert (by_first[..., 4:] == x[..., 4:]).all()
    assert (by_first[..., :4] != x[..., :4]).all()
    assert (by_second[..., :4] == x[..., :4]).all()
    assert (by_second[..., 4:] != x[..., 4:]).all()


def test_scores_depend_on_differences_of_positions() -> None:
    rng = np.random.default_rng(2)
    query, key = (jnp.asarray(rng.normal(size=(1, 4, 1, 16)), jnp.float32) for _ in range(2))
    positions = jnp.asarray(rng.integers(0, 50, (1, 4, 2)), jnp.float32)

    def scores(shift: tuple[float, float]) -> np.ndarray:
        tables = rotary_tables(positions + jnp.asarray(shift), 16)
        return np.einsum("bqhd,bkhd->bqk", rotate(query, tables), rotate(key, tables))

    np.testing.assert_allclose(scores((0, 0)), scores((37, -12)), atol=1e-4)
    by_one = rotate(key, rotary_tables(positions + jnp.asarray((1.0, 0.0)), 16))
    unturned = rotate(query, rotary_tables(positions, 16))
    assert np.abs(np.einsum("bqhd,bkhd->bqk", unturned, by_one) - scores((0, 0))).max() > 0.1


def test_bfloat16_heads_turn_by_float32_angles() -> None:
    x = jnp.ones((1, 1, 1, 4), jnp.bfloat16)
    at = np.array([[[19_263.0, 64.0]]])  # bfloat16 would read 19,200
    turned = rotate(x, rotary_tables(jnp.asarray(at), 4))
    assert turned.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(turned, float), turn(np.ones((1, 1, 1, 4)), at), atol=1e-2)
