"""Fused attention kernels of accelerators, as JAX ships them: cuDNN on NVIDIA GPUs, splash on TPUs."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention
from jaxtyping import Array, Float, Int

# A TPU's kernel takes lengths that are multiples of its lanes, and goes by the longest block that divides.
_LANES, _BLOCKS = 128, (512, 384, 256, 128)


def attend_cudnn(
    query: Float[Array, "b q h d"],
    key: Float[Array, "b s h d"],
    value: Float[Array, "b s h d"],
    lengths: Int[Array, " b"],
    segments: None = None,
) -> Float[Array, "b q h d"]:
    """By lengths: a dense mask would be read from memory for every pair. Padding queries give zeros."""
    # A row of no key at all has no softmax: it sees one, and gives zeros.
    seen = jnp.maximum(lengths, 1).astype(jnp.int32)
    itself = query.shape[1] == key.shape[1]
    mixed = jax.nn.dot_product_attention(
        query,
        key,
        value,
        query_seq_lengths=seen if itself else jnp.full_like(seen, query.shape[1]),
        key_value_seq_lengths=seen,
        implementation="cudnn",
    )
    return jnp.where((lengths > 0)[:, None, None, None], mixed, 0)


def attend_splash(
    query: Float[Array, "b q h d"],
    key: Float[Array, "b s h d"],
    value: Float[Array, "b s h d"],
    lengths: Int[Array, " b"] | None,
    segments: Int[Array, "b s"] | None = None,
    *,
    interpret: bool = False,
) -> Float[Array, "b q h d"]:
    """By segments; the mask is full, so that a packed row costs the square of its length.

    Parameters
    ----------
    interpret
        Run the kernel step by step on any platform, for tests.
    """
    if segments is None:
        assert lengths is not None
        # A padding query must see something, and a row without keys nothing.
        of_key = (jnp.arange(key.shape[1]) < jnp.maximum(lengths, 1)[:, None]).astype(jnp.int32)
        of_query = jnp.ones(query.shape[:2], jnp.int32)
        nothing = jnp.equal(lengths, 0)
    else:
        of_key, of_query, nothing = segments, segments, jnp.zeros(len(segments), bool)
    kernel = _splash_kernel(
        query.shape[2], _padded(query.shape[1]), _padded(key.shape[1]), query.shape[3], interpret
    )
    ids = splash_attention.SegmentIds(_pad(of_query, 1), _pad(of_key, 1))
    scaled = query * np.asarray(query.shape[-1] ** -0.5, query.dtype)
    by_head = (_pad(x, 1).swapaxes(1, 2) for x in (scaled, key, value))
    mixed = jnp.asarray(jax.vmap(kernel)(*by_head, ids)).swapaxes(1, 2)
    return jnp.where(nothing[:, None, None, None], 0, mixed[:, : query.shape[1]])


@functools.lru_cache
def _splash_kernel(
    heads: int, queries: int, keys: int, head_size: int, interpret: bool
) -> splash_attention.splash_attention_kernel.SplashAttentionKernel:
    q, kv = (next(block for block in _BLOCKS if length % block == 0) for length in (queries, keys))
    sizes = splash_attention.BlockSizes(
        block_q=q,
        block_kv=kv,
        block_q_dkv=q,
        block_kv_dkv=kv,
        block_q_dq=q,
        block_kv_dq=kv,
    )
    mask = splash_attention.MultiHeadMask([splash_attention.FullMask((queries, keys))] * heads)
    with jax.ensure_compile_time_eval():  # the kernel is kept, and must hold no tracer
        return splash_attention.make_splash_mha_single_device(mask, block_sizes=sizes, interpret=interpret)


def _padded(length: int) -> int:
    return -(-length // _LANES) * _LANES


def _pad(x: Array, axis: int) -> Array:
    """Zeros after the end of an axis, up to a multiple of a TPU's lanes."""
    missing = [(0, 0)] * x.ndim
    missing[axis] = (0, _padded(x.shape[axis]) - x.shape[axis])
    return jnp.pad(x, missing)
