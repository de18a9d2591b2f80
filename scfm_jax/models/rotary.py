"""Two-dimensional rotary positions: each half of a head turns with a coordinate of its own.

AIDO.Tissue turns the first half by the gene and the second by the cell (0 is the centre); in its coordinate
mode the two halves turn by x and y in um, relative to the centre.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def inverse_frequencies(size: int, base: float = 10_000.0) -> Float[np.ndarray, size // 2]:
    """Angular frequencies of a rotary table over `size` features, float32.

    They are computed by NumPy in float32, step by step as PyTorch does: float64, or XLA's power, differ in
    the last bit, and at gene index 19,000 that bit is an angle that shows.
    """
    exponent = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
    return np.float32(1.0) / np.power(np.float32(base), exponent, dtype=np.float32)


def rotary_tables(
    positions: Float[Array, "b s 2"], head_size: int, base: float = 10_000.0
) -> tuple[Float[Array, "b s 1 d"], Float[Array, "b s 1 d"]]:
    """Cosines and sines for `rotate`, float32, shared by all heads and layers.

    Parameters
    ----------
    positions
        The two coordinates of each token.
    head_size
        Features of one head, divisible by 4.
    """
    frequencies = jnp.asarray(inverse_frequencies(head_size // 2, base))
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    angles = jnp.concatenate([angles, angles], axis=-1)  # each half of the head is itself split in two
    angles = angles.reshape(*positions.shape[:2], 1, head_size)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "b s h d"], tables: tuple[Float[Array, "b s 1 d"], Float[Array, "b s 1 d"]]
) -> Float[Array, "b s h d"]:
    """Turn queries or keys by their positions: within each half of the head (x1, x2) goes with (-x2, x1)."""
    cosines, sines = tables
    quarters = x.astype(jnp.float32).reshape(*x.shape[:-1], 2, 2, x.shape[-1] // 4)
    turned = jnp.concatenate([-quarters[..., 1:, :], quarters[..., :1, :]], axis=-2).reshape(x.shape)
    return (x * cosines + turned * sines).astype(x.dtype)
