"""What attention looks at: the weights that fused kernels never hold, computed again for a few queries."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from scfm_jax.models.attention import AttentionName
from scfm_jax.models.rotary import rotary_tables, rotate
from scfm_jax.models.transformer import Block, RotaryTables, Transformer


def mean_attention(
    stack: Transformer,
    x: Float[Array, "b s d"],
    positions: Float[Array, "b s 2"],
    lengths: Int[Array, " b"],
    queries: Bool[Array, "b q"],
    *,
    implementation: AttentionName,
) -> Float[Array, "l b s"]:
    """How much of their attention some tokens give to every token, in each layer.

    The layers run as they always do; each layer's weights are then computed from what went into it.

    Parameters
    ----------
    stack
        The transformer.
    x, positions, lengths
        What it is given, right-padded.
    queries
        Which of the first q tokens ask; at least one in each row.
    implementation
        Of the attention that runs the layers.

    Returns
    -------
    float32, mean over heads and queries; each row sums to 1 over its tokens, and is 0 at padding.
    """
    tables = rotary_tables(positions, stack.head_size)
    _, outputs = stack.layers(x, positions, lengths, implementation=implementation, keep=True)
    assert outputs is not None
    graph, parameters = nnx.split(stack.blocks)

    def of_layer(layer: tuple[nnx.State, Array]) -> Array:
        return _mean_weights(nnx.merge(graph, layer[0]), layer[1], tables, lengths, queries)

    return jax.lax.map(of_layer, (parameters, jnp.concatenate([x[None], outputs[:-1]])))


def _mean_weights(
    block: Block,
    x: Float[Array, "b s d"],
    tables: RotaryTables,
    lengths: Int[Array, " b"],
    queries: Bool[Array, "b q"],
) -> Float[Array, "b s"]:
    y = block.attention_norm(x)
    query, key = (
        rotate(project(y).reshape(*x.shape[:2], block.heads, -1), tables)
        for project in (block.query, block.key)
    )

    def of_row(row: tuple[Array, Array, Array, Array]) -> Array:
        query, key, length, asks = row
        scores = jnp.einsum("qhd,khd->hqk", query, key, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores * query.shape[-1] ** -0.5, where=jnp.arange(len(key)) < length)
        return jnp.einsum("hqk,q->k", weights, asks / asks.sum()) / block.heads

    # A row at a time: the weights of all rows at once take gigabytes.
    return jax.lax.map(of_row, (query[:, : queries.shape[1]], key, lengths, queries))
