"""Bidirectional attention over right-padded rows: one function, a list of implementations, no guessing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

AttentionName = Literal["plain", "chunked"]

# The scores of a chunk of queries of one row should stay in a CPU's cache.
_QUERY_CHUNK = 512


def attention(
    query: Float[Array, "b q h d"],
    key: Float[Array, "b s h d"],
    value: Float[Array, "b s h d"],
    lengths: Int[Array, " b"],
    *,
    implementation: AttentionName,
) -> Float[Array, "b q h d"]:
    """Scaled dot-product attention in which every query sees the first `lengths` keys of its row.

    Parameters
    ----------
    query, key, value
        Projections, any float dtype; the softmax is in float32.
    lengths
        Real keys of each row; a row of length 0 gives zeros.
    implementation
        ``plain`` holds the scores of all pairs. ``chunked``, for CPUs, goes through rows and through 512
        queries at a time and recomputes their scores in the backward pass: memory grows with the length and
        not with its square, and the scores stay in the cache.

    Raises
    ------
    ValueError
        An implementation that does not exist.
    """
    if implementation not in _IMPLEMENTATIONS:
        raise ValueError(f"attention {implementation!r} is not one of {sorted(_IMPLEMENTATIONS)}")
    real = jnp.arange(key.shape[1]) < lengths[:, None]
    by_head = (x.swapaxes(1, 2) for x in (query, key, value))
    return _IMPLEMENTATIONS[implementation](*by_head, real).swapaxes(1, 2)


def _plain(
    query: Float[Array, "*b h q d"],
    key: Float[Array, "*b h s d"],
    value: Float[Array, "*b h s d"],
    real: Array,
) -> Float[Array, "*b h q d"]:
    scores = jnp.einsum("...qd,...kd->...qk", query, key, preferred_element_type=jnp.float32)
    scores = jnp.where(real[..., None, None, :], scores * query.shape[-1] ** -0.5, -jnp.inf)
    # A finite maximum keeps the softmax of a row without any key at zero rather than NaN.
    peak = jnp.maximum(jax.lax.stop_gradient(scores.max(-1, keepdims=True)), jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - peak)
    total = jnp.maximum(weights.sum(-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    mixed = jnp.einsum(
        "...qk,...kd->...qd", weights.astype(value.dtype), value, preferred_element_type=jnp.float32
    )
    return (mixed / total).astype(query.dtype)


def _chunked(
    query: Float[Array, "b h q d"], key: Float[Array, "b h s d"], value: Float[Array, "b h s d"], real: Array
) -> Float[Array, "b h q d"]:
    heads, length, size = query.shape[1:]
    chunks = -(-length // _QUERY_CHUNK)
    chunk = -(-length // chunks)
    padded = jnp.pad(query, ((0, 0), (0, 0), (0, chunks * chunk - length), (0, 0)))

    def one_row(row: tuple[Array, Array, Array, Array]) -> Array:
        queries, *rest = row
        attend = jax.checkpoint(lambda part: _plain(part, *rest))
        if chunks == 1:
            return attend(queries)
        parts = queries.reshape(heads, chunks, chunk, size).swapaxes(0, 1)
        return jax.lax.map(attend, parts).swapaxes(0, 1).reshape(heads, -1, size)

    return jax.lax.map(one_row, (padded, key, value, real))[:, :, :length]


_IMPLEMENTATIONS: dict[str, Callable[..., Array]] = {"plain": _plain, "chunked": _chunked}
