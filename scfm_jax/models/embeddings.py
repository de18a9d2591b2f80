"""What a token is made of: a gene and a value."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from scfm_jax.models.sharding import constrain

ValueInit = Literal["published", "spread"]


def padded_size(size: int, multiple: int = 128) -> int:
    """`size` rounded up so that any mesh divides it: 19,266 and 20,340 divide by nothing."""
    return -(-size // multiple) * multiple


def rows_of(table: nnx.Param, rows: Int[Array, "b s"], dtype: DTypeLike) -> Float[Array, "b s d"]:
    """Rows of a table, which is gathered whole first where a mesh splits it.

    The partitioner alone would make what was taken whole. Rows are cast after they are taken: gradients of a
    token that stands at many places, of the mask above all, add up in float32. In bfloat16 they would be
    lost, and a GPU takes fifty times as long.
    """
    return constrain(table[...], None, None)[rows].astype(dtype)


class GeneEmbedding(nnx.Module):
    """A table of gene vectors, its rows padded in memory to a multiple of 128.

    Parameters
    ----------
    n_genes
        Genes and special tokens.
    width
        Features of a vector.
    init_std
        Standard deviation of the initial normal weights.
    """

    def __init__(self, n_genes: int, width: int, *, init_std: float, rngs: nnx.Rngs) -> None:
        shape = (padded_size(n_genes), width)
        table = init_std * jax.random.normal(rngs.params(), shape, jnp.float32)
        self.table = nnx.Param(table, logical=("vocabulary", "embed"))

    def __call__(self, genes: Int[Array, "b s"], dtype: DTypeLike) -> Float[Array, "b s d"]:
        return rows_of(self.table, genes, dtype)


class ValueEmbedding(nnx.Module):
    """A scalar as a soft mixture of learnt bins (auto-discretisation, xTrimoGene, NeurIPS 2023).

    The value goes through Linear(1 -> bins) and LeakyReLU(0.1) to h; ``softmax(alpha * h + Linear(h))`` mixes
    the rows of a table of bins. Two vectors of their own stand for a masked value and for padding.

    Parameters
    ----------
    bins
        Rows of the table; 100 as published.
    alpha
        Weight of h beside its own projection; a constant, 1 as published.
    init
        ``published``: normal 0.02 and zero biases throughout, which starts with every value looking alike.
        ``spread``: the first layer starts with unit weights and biases, so that different values mix
        different bins from step 0.
    """

    def __init__(
        self,
        bins: int,
        width: int,
        *,
        alpha: float = 1.0,
        init: ValueInit,
        init_std: float,
        rngs: nnx.Rngs,
    ) -> None:
        def normal(*shape: int, std: float = init_std) -> Array:
            return std * jax.random.normal(rngs.params(), shape, jnp.float32)

        self.alpha = alpha
        first = 1.0 if init == "spread" else init_std
        self.scale = nnx.Param(normal(1, bins, std=first), logical=(None, None))
        self.shift = nnx.Param(
            normal(bins, std=1.0) if init == "spread" else jnp.zeros(bins), logical=(None,)
        )
        self.mix = nnx.Param(normal(bins, bins), logical=(None, None))
        self.mix_bias = nnx.Param(jnp.zeros(bins), logical=(None,))
        table_std = 1.0 if init == "spread" else init_std
        self.table = nnx.Param(normal(bins, width, std=table_std), logical=(None, "embed"))
        self.mask = nnx.Param(normal(width), logical=("embed",))
        self.pad = nnx.Param(normal(width), logical=("embed",))

    def __call__(
        self,
        values: Float[Array, "b s"],
        *,
        masked: Bool[Array, "b s"] | None = None,
        padding: Bool[Array, "b s"] | None = None,
        dtype: DTypeLike,
    ) -> Float[Array, "b s d"]:
        """Embed `values`, which are seen in float32 whatever `dtype` the rest computes in."""
        hidden = values.astype(jnp.float32)[..., None] * self.scale[...][0] + self.shift[...]
        hidden = jax.nn.leaky_relu(hidden, 0.1)
        weights = jax.nn.softmax(self.alpha * hidden + hidden @ self.mix[...] + self.mix_bias[...], axis=-1)
        embedded = weights.astype(dtype) @ self.table[...].astype(dtype)
        if masked is not None:
            embedded = jnp.where(masked[..., None], self.mask[...].astype(dtype), embedded)
        if padding is not None:
            embedded = jnp.where(padding[..., None], self.pad[...].astype(dtype), embedded)
        return embedded
