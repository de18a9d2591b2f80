"""Bidirectional attention over right-padded rows: one function, one list of implementations, chosen and never guessed."""

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
        ``plain`` holds the scores of all pairs. ``chunked``, for CPUs, goes through rows and through 512 queries at a
        time and recomputes their scores in the backward pass: memory grows with the length and not with its
        square, and the scores stay in the cache.

    Raises
    ------
    ValueError
        An implementation that does not exist.
    """
    if implementation not in _IMPLEMENTATIONS:
        raise ValueError(f"attention {implementation!r} is not one of {sorted(_IMPLEMENTATIONS)}")
    real = jnp.arange(key.shape[1]) < lengths[:, None]
    return _IMPLEMENTATIONS[implementation](query, key, value, real)


def _plain(
    query: Float[Array, "b q h d"], key: Float[Array, "b s h d"], value: Float[Array, "b s h d"], real: Array
) -> Float[Array, "b q h d"]:
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
    scores = jnp.where(real[:, None, None, :], scores * query.shape[-1] ** -0.5, -jnp.inf)
    # A finite maximum keeps the softmax of a row without any key at zero rather than NaN.
    peak = jnp.maximum(jax.lax.stop_gradient(scores.max(-1, keepdims=True)), jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - peak)
    total = jnp.maximum(weights.sum(-1), jnp.finfo(jnp.float32).tiny)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", weights.astype(value.dtype), value)
    return (mixed / total.transpose(0, 2, 1)[..., None]).astype(query.dtype)


def _chunked(
    query: Float[Array, "b q h d"], key: Float[Array, "b s h d"], value: Float[Array, "b s h d"], real: Array
) -> Float[Array, "b q h d"]:
    batch, length, heads, size = query.shape
    chunks = -(-length // _QUERY_CHUNK)
    chunk = -(-length // chunks)
    padded = jnp.pad(query, ((0, 0), (0, chunks * chunk - length), (0, 0), (0, 0)))

    def one_row(row: tuple[Array, Array, Array, Array]) -> Array:
        queries, *rest = row
        rest = [part[None] for part in rest]
        attend = jax.checkpoint(lambda part: _plain(part[None], *rest)[0])
        if chunks == 1:
            return attend(queries)
        return jax.lax.map(attend, queries.reshape(chunks, chunk, heads, size)).reshape(-1, heads, size)

    return jax.lax.map(one_row, (padded, key, value, real))[:, :length]


_IMPLEMENTATIONS: dict[str, Callable[..., Array]] = {"plain": _plain, "chunked": _chunked}
