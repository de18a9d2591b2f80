"""AIDO.Tissue: an encoder over a cell's and its neighbours' expressed genes, a decoder over the cell alone.

Follows the model of GenBio's AIDO.Tissue (bioRxiv 2025) on the asymmetric design of xTrimoGene (NeurIPS
2023). What is not public there (decoder block type, feed-forward width) is ours and said to be ours in
``docs/models.md``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from scfm_jax.errors import check_least
from scfm_jax.models.attention import AttentionName
from scfm_jax.models.embeddings import GeneEmbedding, ValueEmbedding, ValueInit, padded_size
from scfm_jax.models.linear import make_linear
from scfm_jax.models.stack import RematName, StackConfig
from scfm_jax.models.transformer import Transformer, TransformerConfig

# Each cell carries two tokens with its read depth, at the indices after the last gene; padding has the next.
DEPTH_TOKENS, PAD_TOKENS = 2, 1


@dataclass(frozen=True)
class TissueConfig:
    """Sizes and choices of the tissue model; the defaults are published.

    Attributes
    ----------
    encoder, decoder
        Geometry of the two stacks.
    bins, bin_alpha
        Bins of the value embedding, and the weight of its residual path.
    positions
        ``index`` turns queries and keys by gene and cell index; ``coordinates`` by x and y in um from the
        centre.
    init_std
        Standard deviation of the initial weights.
    value_init
        How the value embedding starts; see `ValueEmbedding`.
    gene_bias
        Add one learnt number a gene to the prediction (ours; the published head has none).
    attention
        Implementation, see `scfm_jax.models.attention`.
    dtype
        What activations are computed in; parameters, softmax and loss are float32.
    remat, unroll
        What the backward pass computes again, and how many layers are compiled as one, see
        `scfm_jax.models.stack.StackConfig`.
    attend_padding
        Let the encoder see padding as the authors' code does: keys of logit 0, with values of their own. A
        sample then depends on the longest of its batch; for agreement with that code only.
    """

    encoder: TransformerConfig
    decoder: TransformerConfig
    bins: int = 100
    bin_alpha: float = 1.0
    positions: Literal["index", "coordinates"] = "index"
    init_std: float = 0.02
    value_init: ValueInit = "published"
    gene_bias: bool = False
    attention: AttentionName = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: RematName = "none"
    unroll: int = 0
    attend_padding: bool = False

    def __post_init__(self) -> None:
        check_least(self, 1, "bins")
        check_least(self, 0, "unroll")

    def meaning(self) -> dict[str, object]:
        """What tells one function of the same parameters from another, and no shape shows."""
        named: dict[str, object] = {"bin_alpha": self.bin_alpha, "positions": self.positions}
        for name, stack in (("encoder", self.encoder), ("decoder", self.decoder)):
            named |= {f"{name}.{field}": getattr(stack, field) for field in ("heads", "norm", "norm_epsilon")}
        return named


class TissueModel(nnx.Module):
    """Encoder, decoder and head.

    Parameters
    ----------
    config
        Sizes.
    n_genes
        Genes of the vocabulary, without the depth tokens.
    dispersion
        Hold a log dispersion for each gene, for the negative-binomial loss.
    """

    def __init__(
        self, config: TissueConfig, n_genes: int, *, dispersion: bool = False, rngs: nnx.Rngs
    ) -> None:
        dtype, std = jnp.dtype(config.dtype), config.init_std
        wide, narrow = config.encoder, config.decoder
        self.dtype, self.attention, self.attend_padding = dtype, config.attention, config.attend_padding
        self.pad_index = n_genes + DEPTH_TOKENS
        rows = self.pad_index + PAD_TOKENS
        self.gene_embedding = GeneEmbedding(rows, wide.width, init_std=std, rngs=rngs)
        self.value_embedding = ValueEmbedding(
            config.bins,
            wide.width,
            alpha=config.bin_alpha,
            init=config.value_init,
            init_std=std,
            rngs=rngs,
        )
        compute = StackConfig(dtype, config.remat, config.unroll)
        self.encoder = Transformer(wide, init_std=std, compute=compute, rngs=rngs)
        self.decoder_embed = make_linear(
            wide.width,
            narrow.width,
            ("embed", None),
            use_bias=narrow.use_bias,
            init_std=std,
            dtype=dtype,
            rngs=rngs,
        )
        self.decoder = Transformer(narrow, init_std=std, compute=compute, rngs=rngs)
        # scFoundation's wiring: one more norm after the stack's own, always a LayerNorm.
        self.decoder_norm = nnx.LayerNorm(
            narrow.width,
            epsilon=1e-5,
            dtype=jnp.float32,
            scale_metadata={"logical": ("embed",)},
            bias_metadata={"logical": ("embed",)},
            rngs=rngs,
        )
        self.head = make_linear(
            narrow.width,
            1,
            ("embed", None),
            use_bias=narrow.use_bias,
            init_std=std,
            dtype=jnp.float32,
            rngs=rngs,
        )
        if config.gene_bias:
            self.gene_bias = nnx.Param(jnp.zeros(padded_size(rows)), logical=("vocabulary",))
        if dispersion:
            self.log_dispersion = nnx.Param(jnp.zeros(padded_size(rows)), logical=("vocabulary",))

    def encode(
        self,
        genes: Int[Array, "b s"],
        values: Float[Array, "b s"],
        positions: Float[Array, "b s 2"],
        lengths: Int[Array, " b"],
    ) -> Float[Array, "b s d"]:
        """Hidden states of right-padded token rows.

        Parameters
        ----------
        genes
            Vocabulary index of each token.
        values
            Normalised expression, or log10 depth at the depth tokens.
        positions
            The two rotary coordinates of each token.
        lengths
            Real tokens of each row.
        """
        return self.encoder(
            self.embed(genes, values, lengths),
            positions,
            lengths,
            implementation=self.attention,
            attend_padding=self.attend_padding,
        )

    def embed(
        self, genes: Int[Array, "b s"], values: Float[Array, "b s"], lengths: Int[Array, " b"]
    ) -> Float[Array, "b s d"]:
        """Tokens as the first layer sees them."""
        padding = None
        if self.attend_padding:
            padding = jnp.arange(genes.shape[1]) >= lengths[:, None]
            genes = jnp.where(padding, self.pad_index, genes)
        value = self.value_embedding(values, padding=padding, dtype=self.dtype)
        return value + self.gene_embedding(genes, self.dtype)

    def decode(
        self,
        hidden: Float[Array, "b s d"],
        slots: Int[Array, "b s"],
        genes: Int[Array, "b p"],
        masked: Bool[Array, "b p"],
        positions: Float[Array, "b p 2"],
        lengths: Int[Array, " b"],
    ) -> Float[Array, "b p"]:
        """Predict the centre cell's value of every gene in `genes`, float32.

        Parameters
        ----------
        hidden
            Encoder outputs.
        slots
            For each encoder token, its place in `genes` if it belongs to the centre cell; -1 otherwise.
        genes
            Genes to decode, right-padded.
        masked
            Places that get the mask vector; the rest get the encoder's output or, where there is none, the
            embedding of the value 0.
        positions, lengths
            Rotary coordinates and number of real places.
        """
        batch, places = genes.shape
        rows = jnp.arange(batch)[:, None]
        nowhere = jnp.full((batch, places), -1, jnp.int32)
        source = nowhere.at[rows, jnp.where(slots < 0, places, slots)].set(
            jnp.arange(slots.shape[1], dtype=jnp.int32)[None], mode="drop"
        )
        seen = jnp.take_along_axis(hidden, jnp.maximum(source, 0)[..., None], axis=1)
        zero = self.value_embedding(jnp.zeros((1, 1)), dtype=self.dtype)
        mask = self.value_embedding.mask[...].astype(self.dtype)
        x = jnp.where((source >= 0)[..., None], seen, zero)
        x = jnp.where(masked[..., None], mask, x) + self.gene_embedding(genes, self.dtype)
        x = self.decoder(self.decoder_embed(x), positions, lengths, implementation=self.attention)
        prediction = self.head(self.decoder_norm(x.astype(jnp.float32)))[..., 0]
        if hasattr(self, "gene_bias"):
            prediction += self.gene_bias[...][genes]
        return prediction
