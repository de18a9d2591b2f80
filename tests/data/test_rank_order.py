"""The order of rows against Python's own sort, also where a 32-bit key cannot tell values apart."""

from __future__ import annotations

import numpy as np
import pytest

from scfm_jax.data.rank_order import falling_bits, order_rows

RANDOM = np.random.default_rng(0)
NEAR = 1 + RANDOM.integers(0, 4, 40) * 2.0**-23  # differ in the last bits alone


def wide(n: int) -> np.ndarray:
    return np.exp(RANDOM.normal(scale=9, size=n))


@pytest.mark.parametrize(
    "rows",
    [
        [wide(n) for n in (1, 7, 8, 3)],
        [wide(1_000) * RANDOM.choice([1, -1], 1_000), wide(1_024), -wide(1_025), wide(20)],
        [np.where(RANDOM.random(900) < 0.5, wide(900), RANDOM.choice(NEAR, 900)) for _ in range(5)],
        [np.concatenate([[1e-30, 1e30], RANDOM.choice(NEAR, n)]) for n in (62, 30, 254)],
        [np.concatenate([[3e38, -3e38], -RANDOM.choice(NEAR, 510)]), np.array([])],
        [RANDOM.choice([1.0, 2.0, 0.5], n) for n in (300, 511, 512, 513)],
        [1 + RANDOM.random(n) * 1e-4 for n in (4_000, 3_999)] + [wide(4_096)],
        [np.full(512, 1e-30), wide(512), np.full(512, 1e-30), wide(512), np.full(512, 1e-30)],
    ],
    ids=["short", "negative", "near", "span", "both", "ties", "long", "borders"],
)
def test_rows_are_in_order_of_value_and_then_of_place(rows: list[np.ndarray]) -> None:
    lengths = np.array([len(row) for row in rows])
    starts = np.cumsum(lengths) - lengths
    chosen = RANDOM.permutation(len(rows))
    numbers = falling_bits(np.concatenate([*rows, np.zeros(max(lengths))]))
    order = order_rows(numbers, starts[chosen], lengths[chosen])
    for found, row in zip(order, chosen, strict=True):
        values = rows[row].astype(np.float32).tolist()
        plain = sorted(range(len(values)), key=lambda place: (-values[place], place))
        assert (found[: len(values)] - starts[row]).tolist() == plain


def test_the_greatest_key_is_not_taken_for_padding() -> None:
    """As many numbers as places, from 0 to all ones: the last key is all ones."""
    numbers = np.array([0, 2**32 - 1, 2**32 - 2, 2**32 - 1, 2**32 - 3, 2**32 - 4, 5, 2**32 - 5], np.uint32)
    order = order_rows(np.tile(numbers, 2), np.array([0]), np.array([8]))
    assert order[0].tolist() == np.argsort(numbers, kind="stable").tolist()
    assert order_rows(np.zeros(0, np.uint32), np.zeros(2, int), np.zeros(2, int)).shape == (2, 0)
