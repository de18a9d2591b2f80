"""Nicheformer: a cell as a sentence of its genes by rank, read by a post-norm encoder.

Follows the model of Schaar, Tejada-Lapuerta et al. (Nature Methods 2025) and its released code: learned
positions, ReLU, LayerNorm after each residual. The niche as a second input, with a segment embedding, is
described in the paper and lacks in the code; with ``niche=False`` the model is the published one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Int

from scfm_jax.errors import check_least
from scfm_jax.models.attention import AttentionName, attention
from scfm_jax.models.embeddings import GeneEmbedding, padded_size, rows_of
from scfm_jax.models.linear import make_linear
from scfm_jax.models.sharding import constrain
from scfm_jax.models.stack import RematName, StackConfig, scan_layers, stacked
from scfm_jax.reserved_tokens import PAD, RESERVED_TOKENS, SPARE_ROWS

SEGMENTS = 2


@dataclass(frozen=True)
class NicheformerConfig:
    """Sizes and choices of Nicheformer; the defaults are published.

    Attributes
    ----------
    layers, heads, width, hidden
        Depth, attention heads, features of a token, features inside the feed-forward.
    positions
        Learned positions: the longest sentence of a cell, and of a niche.
    niche
        Take the niche as a second sentence, told apart by a segment embedding.
    norm_epsilon
        Of the LayerNorms.
    attention
        Implementation, see `scfm_jax.models.attention`.
    dtype
        What activations are computed in; parameters, softmax and loss are float32.
    remat, unroll
        What the backward pass computes again, and how many layers are compiled as one, see
        `scfm_jax.models.stack.StackConfig`.
    """

    layers: int = 12
    heads: int = 16
    width: int = 512
    hidden: int = 1_024
    positions: int = 1_500
    niche: bool = False
    norm_epsilon: float = 1e-12
    attention: AttentionName = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: RematName = "none"
    unroll: int = 0

    @property
    def head_size(self) -> int:
        return self.width // self.heads

    def meaning(self) -> dict[str, object]:
        """What tells one function of the same parameters from another, and no shape shows."""
        return {"heads": self.heads, "norm_epsilon": self.norm_epsilon}

    def __post_init__(self) -> None:
        check_least(self, 1, "layers", "heads", "width", "hidden", "positions")
        check_least(self, 0, "unroll")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of heads ({self.heads})")


class PostNormBlock(nnx.Module):
    """One layer: self-attention, residual, norm; ReLU feed-forward, residual, norm."""

    def __init__(self, config: NicheformerConfig, *, rngs: nnx.Rngs) -> None:
        dtype = jnp.dtype(config.dtype)

        def linear(inputs: int, outputs: int, *names: str, beside: int = 1) -> nnx.Linear:
            # Xavier-normal: the standard deviation sees both sides. PyTorch draws query, key and value as one
            # matrix, so that each sees three times its outputs.
            return make_linear(
                inputs,
                outputs,
                (names[0], names[1]),
                use_bias=True,
                init_std=(2 / (inputs + beside * outputs)) ** 0.5,
                dtype=dtype,
                rngs=rngs,
            )

        width = config.width
        self.heads = config.heads
        self.query = linear(width, width, "embed", "heads", beside=3)
        self.key = linear(width, width, "embed", "heads", beside=3)
        self.value = linear(width, width, "embed", "heads", beside=3)
        self.output = linear(width, width, "heads", "embed")
        self.attention_norm = _layer_norm(config, dtype, rngs)
        self.up = linear(width, config.hidden, "embed", "mlp")
        self.down = linear(config.hidden, width, "mlp", "embed")
        self.feed_forward_norm = _layer_norm(config, dtype, rngs)

    def __call__(
        self, x: Float[Array, "b s d"], lengths: Int[Array, " b"], implementation: AttentionName
    ) -> Float[Array, "b s d"]:
        def heads(y: Float[Array, "bs d"]) -> Float[Array, "b s h e"]:
            return y.reshape(*x.shape[:2], self.heads, -1)

        # Projections see tokens in one axis, as in `transformer.Block`.
        y = x.reshape(-1, x.shape[-1])
        query, key, value = (heads(project(y)) for project in (self.query, self.key, self.value))
        mixed = attention(query, key, value, lengths, implementation=implementation)
        y = self.attention_norm(y + self.output(mixed.reshape(y.shape)))
        y = self.feed_forward_norm(y + self.down(constrain(jax.nn.relu(self.up(y)), "batch", "mlp")))
        return y.reshape(x.shape)


class Nicheformer(nnx.Module):
    """Embeddings, encoder and the head over all tokens.

    Parameters
    ----------
    config
        Sizes.
    n_genes
        Genes of the vocabulary; a gene's token is its index + 30.
    """

    def __init__(self, config: NicheformerConfig, n_genes: int, *, rngs: nnx.Rngs) -> None:
        self.dtype, self.attention = jnp.dtype(config.dtype), config.attention
        self.compute = StackConfig(self.dtype, config.remat, config.unroll)
        self.n_tokens = n_genes + RESERVED_TOKENS
        width = config.width

        def normal(rows: int) -> Array:
            return jax.random.normal(rngs.params(), (rows, width), jnp.float32)

        self.token_embedding = GeneEmbedding(self.n_tokens + SPARE_ROWS, width, init_std=1.0, rngs=rngs)
        table = self.token_embedding.table
        table[...] = table[...].at[PAD].set(0.0)
        self.position_embedding = nnx.Param(normal(config.positions), logical=(None, "embed"))
        self.has_niche = config.niche
        if config.niche:
            self.segment_embedding = nnx.Param(normal(SEGMENTS), logical=(None, "embed"))

        self.blocks = stacked(config.layers, lambda rngs: PostNormBlock(config, rngs=rngs), rngs)
        classes = padded_size(self.n_tokens)
        self.head = make_linear(
            width,
            classes,
            ("embed", "vocabulary"),
            use_bias=True,
            init_std=(2 / (width + self.n_tokens)) ** 0.5,
            dtype=self.dtype,
            rngs=rngs,
        )

    def encode(
        self,
        tokens: Int[Array, "b s"],
        positions: Int[Array, "b s"],
        segments: Int[Array, "b s"],
        lengths: Int[Array, " b"],
        *,
        layer: int | None = None,
    ) -> Float[Array, "b s d"]:
        """Hidden states of right-padded sentences; what stands at the padding is undefined.

        Parameters
        ----------
        tokens
            Reserved tokens, and genes from 30 onwards.
        positions
            Rank in the cell's sentence, or in the niche's.
        segments
            0 for the cell's tokens, 1 for the niche's; not read by a model without niche.
        lengths
            Real tokens of each row.
        layer
            Of the hidden states, counted from 0; the last if not given.
        """
        last, every = self.layers(self.embed(tokens, positions, segments), lengths, keep=layer is not None)
        return last if every is None else every[layer]

    def embed(
        self, tokens: Int[Array, "b s"], positions: Int[Array, "b s"], segments: Int[Array, "b s"]
    ) -> Float[Array, "b s d"]:
        """Sentences as the first layer sees them."""
        x = self.token_embedding(tokens, self.dtype)
        x += rows_of(self.position_embedding, positions, self.dtype)
        if self.has_niche:
            x += rows_of(self.segment_embedding, segments, self.dtype)
        return x

    def layers(
        self, x: Float[Array, "b s d"], lengths: Int[Array, " b"], *, keep: bool = False
    ) -> tuple[Float[Array, "b s d"], Float[Array, "l b s d"] | None]:
        """The last layer's output, and with `keep` the output of every layer."""
        return scan_layers(
            self.blocks,
            lambda block, x: block(x, lengths, self.attention),
            x,
            config=self.compute,
            keep=keep,
        )

    def logits(self, hidden: Float[Array, "*n d"]) -> Float[Array, "*n v"]:
        """Scores of every token, float32; rows that only pad the vocabulary in memory are minus infinity."""
        names = ("batch", *(None,) * (hidden.ndim - 2), "vocabulary")
        scores = constrain(self.head(hidden).astype(jnp.float32), *names)
        return jnp.where(jnp.arange(scores.shape[-1]) < self.n_tokens, scores, -jnp.inf)


def _layer_norm(config: NicheformerConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.LayerNorm:
    names = {"logical": ("embed",)}
    return nnx.LayerNorm(
        config.width,
        epsilon=config.norm_epsilon,
        dtype=dtype,
        use_fast_variance=False,
        scale_metadata=names,
        bias_metadata=names,
        rngs=rngs,
    )
