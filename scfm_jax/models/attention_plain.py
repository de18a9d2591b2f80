"""Attention in plain XLA: all pairs at once, or by chunks whose scores stay in a CPU's cache."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

# The scores of a chunk of queries (or of keys, backwards) of some heads should stay in a CPU's cache.
_CHUNK, _HEADS = 256, 2


def attend_pairs(
    query: Float[Array, "b h q d"],
    key: Float[Array, "b h s d"],
    value: Float[Array, "b h s d"],
    visible: Bool[
        Array,
        (
            b  # q s
        ),
    ],
) -> Float[Array, "b h q d"]:
    """Holds the scores of all pairs."""
    return _mix(_scores(query, key, visible[:, None]), value)[0]


def attend_chunks(
    query: Float[Array, "b h q d"],
    key: Float[Array, "b h s d"],
    value: Float[Array, "b h s d"],
    real: Bool[Array, "b s"],
) -> Float[Array, "b h q d"]:
    """Goes through rows, two heads and 256 queries at a time, and through them again for the gradient."""
    rows, heads, length, size = query.shape
    chunks = -(-length // _CHUNK)
    padded = jnp.pad(query, ((0, 0), (0, 0), (0, -length % chunks), (0, 0)))
    together = next(count for count in range(_HEADS, 0, -1) if heads % count == 0)
    groups = (x.reshape(-1, together, *x.shape[2:]) for x in (padded, key, value))
    of_group = jnp.repeat(real, heads // together, axis=0)
    mixed = jax.lax.map(lambda group: _one_group(chunks, *group), (*groups, of_group))
    return mixed.reshape(rows, heads, -1, size)[:, :, :length]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _one_group(
    chunks: int,
    query: Float[Array, "h q d"],
    key: Float[Array, "h s d"],
    value: Float[Array, "h s d"],
    real: Array,
) -> Float[Array, "h q d"]:
    return _one_group_forward(chunks, query, key, value, real)[0]


def _one_group_forward(
    chunks: int, query: Array, key: Array, value: Array, real: Array
) -> tuple[Array, tuple[Array, ...]]:
    mixed, log_total = jax.lax.map(lambda part: _mix(_scores(part, key, real), value), _split(query, chunks))
    mixed, log_total = _join(mixed), _join(log_total)
    return mixed, (query, key, value, real, mixed, log_total)


def _one_group_backward(
    chunks: int, saved: tuple[Array, ...], upstream: Float[Array, "h q d"]
) -> tuple[Array, Array, Array, None]:
    """The weights come again from the saved denominators (Dao et al., FlashAttention, 2022), keys by chunks.

    Keys come first in every matrix here: by chunks of queries a CPU took 3 to 12% longer.
    """
    query, key, value, real, mixed, log_total = saved
    along = (upstream.astype(jnp.float32) * mixed.astype(jnp.float32)).sum(-1)[:, None]
    denominator, scale = log_total.swapaxes(1, 2), query.shape[-1] ** -0.5

    def one_chunk(of_query: Array, part: tuple[Array, ...]) -> tuple[Array, tuple[Array, Array]]:
        keys, values, real = part
        scores = jnp.einsum("hkd,hqd->hkq", keys, query, preferred_element_type=jnp.float32)
        weights = jnp.exp(jnp.where(real, scores * scale, -jnp.inf) - denominator)
        of_weights = jnp.einsum("hkd,hqd->hkq", values, upstream, preferred_element_type=jnp.float32)
        of_scores = (weights * (of_weights - along) * scale).astype(query.dtype)
        of_value = jnp.einsum(
            "hkq,hqd->hkd", weights.astype(value.dtype), upstream, preferred_element_type=jnp.float32
        )
        of_key = jnp.einsum("hkq,hqd->hkd", of_scores, query, preferred_element_type=jnp.float32)
        # Turned, its largest operand is contracted as it lies, which a CPU does in a third of the time.
        of_query += jnp.einsum(
            "hdk,hkq->hdq", keys.swapaxes(1, 2), of_scores, preferred_element_type=jnp.float32
        )
        return of_query, (of_key.astype(key.dtype), of_value.astype(value.dtype))

    length = key.shape[1]
    pieces = -(-length // _CHUNK)
    missing = ((0, 0), (0, -length % pieces), (0, 0))
    parts = tuple(_split(jnp.pad(x, missing), pieces) for x in (key, value, real[None, :, None]))
    none = jnp.zeros((query.shape[0], query.shape[2], query.shape[1]), jnp.float32)
    of_query, of_key_value = jax.lax.scan(one_chunk, none, parts)
    of_key, of_value = (_join(x)[:, :length] for x in of_key_value)
    return of_query.swapaxes(1, 2).astype(query.dtype), of_key, of_value, None


_one_group.defvjp(_one_group_forward, _one_group_backward)


def _split(x: Float[Array, "h q d"], chunks: int) -> Float[Array, "n h c d"]:
    return x.reshape(x.shape[0], chunks, -1, x.shape[-1]).swapaxes(0, 1)


def _join(x: Float[Array, "n h c d"]) -> Float[Array, "h q d"]:
    return x.swapaxes(0, 1).reshape(x.shape[1], -1, x.shape[-1])


def _scores(
    query: Float[Array, "*b q d"], key: Float[Array, "*b s d"], real: Array
) -> Float[Array, "*b q s"]:
    scores = jnp.einsum("...qd,...kd->...qk", query, key, preferred_element_type=jnp.float32)
    return jnp.where(real, scores * query.shape[-1] ** -0.5, -jnp.inf)


def _mix(
    scores: Float[Array, "*b q s"], value: Float[Array, "*b s d"]
) -> tuple[Float[Array, "*b q d"], Float[Array, "*b q 1"]]:
    """Softmax of the scores times the values, and the logarithm of its denominator."""
    # A finite maximum keeps the softmax of a row without any key at zero rather than NaN.
    peak = jnp.maximum(jax.lax.stop_gradient(scores.max(-1, keepdims=True)), jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - peak)
    total = jnp.maximum(weights.sum(-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    mixed = jnp.einsum(
        "...qk,...kd->...qd", weights.astype(value.dtype), value, preferred_element_type=jnp.float32
    )
    return (mixed / total).astype(value.dtype), peak + jnp.log(total)
