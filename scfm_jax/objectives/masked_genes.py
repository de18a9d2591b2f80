"""Masked genes: predict which gene stood at a masked rank of the sentence (Nicheformer).

A share of a cell's gene tokens is masked; most become the mask token, some a random gene, some stay as they
are. Pure functions of (parameters, batch, key) that trace under `jax.jit`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from scfm_jax.data.batch import SentenceBatch
from scfm_jax.data.masks import token_bits, under
from scfm_jax.data.ranks import TokenMask, maskable
from scfm_jax.models.nicheformer import Nicheformer
from scfm_jax.reserved_tokens import FIRST_GENE, MASK

# The first of the tokens that the released code draws at random.
_PUBLISHED_FIRST_RANDOM = 10


@dataclass(frozen=True)
class MaskedGenesConfig:
    """What is masked and what stands there instead.

    Attributes
    ----------
    rate
        Share of gene tokens that are masked (published).
    mask_share, random_share
        Of these, how many become the mask token and how many a random gene (published); the rest stay.
    published_draws
        Draw as the released code does rather than as the paper says: 81, 10 and 9%, random tokens from 10
        upwards rather than genes, and context tokens masked too (but token 3). For agreement with that code;
        `mask_share` and `random_share` are not read then.
    """

    rate: float = 0.15
    mask_share: float = 0.80
    random_share: float = 0.10
    published_draws: bool = False

    def __post_init__(self) -> None:
        shares = (self.mask_share, self.random_share, 1 - self.mask_share - self.random_share)
        if not 0 < self.rate <= 1:
            raise ValueError(f"rate is {self.rate}, not a share over 0 and up to 1")
        if not min(shares) >= -1e-9:
            raise ValueError(
                f"mask_share {self.mask_share} and random_share {self.random_share} are no shares of 1"
            )

    @property
    def rates(self) -> TokenMask:
        """What the loader needs to know of the mask."""
        return TokenMask(self.rate, context=self.published_draws)

    @property
    def shares(self) -> tuple[float, float]:
        """Of masked tokens: those that become the mask, and those that become random."""
        return (0.81, 0.10) if self.published_draws else (self.mask_share, self.random_share)


def corrupted(
    batch: SentenceBatch, key: jax.Array, config: MaskedGenesConfig, n_tokens: int
) -> tuple[Int[Array, "b s"], Bool[Array, "b s"]]:
    """The sentence as the model sees it, and which tokens are masked."""
    words = jax.random.key_data(key)
    bits, action = token_bits(words, batch.draw, batch.index, batch.tokens)
    other, _ = token_bits(words, batch.draw, batch.index, batch.tokens, stream=1)
    real = jnp.arange(batch.tokens.shape[1]) < batch.lengths[:, None]
    masked = (
        under(bits, config.rate)
        & real
        & maskable(batch.tokens, batch.segments, context=config.published_draws)
    )
    first = _PUBLISHED_FIRST_RANDOM if config.published_draws else FIRST_GENE
    # The remainder favours no token by more than one part in 200,000.
    random = (first + other % np.uint32(n_tokens - first)).astype(jnp.int32)
    mask_share, random_share = config.shares
    to_mask, to_random = under(action, mask_share), under(action, mask_share + random_share)
    instead = jnp.where(to_mask, MASK, jnp.where(to_random, random, batch.tokens))
    return jnp.where(masked, instead, batch.tokens), masked


class MaskedGeneScores(NamedTuple):
    """Of each masked place of a batch, as many columns as the widest row of ``batch.places`` has.

    Attributes
    ----------
    entry
        1 where there is one, 0 at padding and in rows of weight 0.
    surprise
        Cross-entropy of the gene that stood there, nats.
    missed
        Whether it is not the most likely token.
    agree
        Whether the loader's places and the mask drawn here are equally many.
    """

    entry: Float[Array, "b m"]
    surprise: Float[Array, "b m"]
    missed: Bool[Array, "b m"]
    agree: Bool[Array, ""]


def masked_gene_scores(
    model: Nicheformer, batch: SentenceBatch, key: jax.Array, config: MaskedGenesConfig
) -> MaskedGeneScores:
    """Scores of the masked places; logits are computed there only."""
    seen, masked = corrupted(batch, key, config, model.n_tokens)
    hidden = model.encode(seen, batch.positions, batch.segments, batch.lengths)
    rows, width = jnp.arange(seen.shape[0])[:, None], batch.places.shape[1]
    slot = jnp.where(masked, jnp.cumsum(masked, axis=1) - 1, width)
    places = jnp.full(batch.places.shape, -1).at[rows, slot].set(jnp.arange(seen.shape[1])[None], mode="drop")
    where = jnp.maximum(places, 0)
    logits = model.logits(jnp.take_along_axis(hidden, where[..., None], axis=1))
    truth = jnp.take_along_axis(batch.tokens, where, axis=1)
    return MaskedGeneScores(
        entry=(places >= 0) * batch.weight[:, None],
        surprise=-jnp.take_along_axis(jax.nn.log_softmax(logits), truth[..., None], axis=-1)[..., 0],
        missed=logits.argmax(-1) != truth,
        agree=(masked.sum(1) == (batch.places >= 0).sum(1)).all(),
    )


def masked_genes_loss(
    model: Nicheformer, batch: SentenceBatch, key: jax.Array, config: MaskedGenesConfig
) -> dict[str, Float[Array, ""]]:
    """Sums over the batch, never means, so that microbatches, devices and hosts add up to the same loss.

    Where the loader's places and the mask drawn here differ in number, the loss is NaN rather than a part of
    it.

    Returns
    -------
    ``loss`` and ``weight`` (their ratio is the cross-entropy in nats), ``top1_error`` and ``top1_count``
    (masked genes that are not the most likely one), ``cut_share`` and ``cut_count`` (of the cells' genes,
    those that their sentences had no room for), ``niche_cut_share`` and ``niche_cut_count`` for a model with
    a niche, ``tokens`` and ``pairs``, the real tokens that the encoder saw and their (query, key) pairs,
    ``second_tokens``, the masked places, and ``second_pairs``, of which there are none.
    """
    scores = masked_gene_scores(model, batch, key, config)
    real = jnp.arange(batch.tokens.shape[1]) < batch.lengths[:, None]
    sums = {
        "loss": jnp.where(scores.agree, (scores.entry * scores.surprise).sum(), jnp.nan),
        "weight": scores.entry.sum(),
        "top1_error": (scores.entry * scores.missed).sum(),
        "top1_count": scores.entry.sum(),
        "tokens": (batch.lengths * batch.weight).sum(),
        "pairs": (batch.lengths.astype(jnp.float32) ** 2 * batch.weight).sum(),
        "second_tokens": ((batch.places >= 0).sum(1) * batch.weight).sum(),
        "second_pairs": jnp.zeros(()),
    }
    for segment, name in enumerate(("cut", "niche_cut") if model.has_niche else ("cut",)):
        cut = batch.cut[:, segment]
        kept = (real & (batch.segments == segment) & (batch.tokens >= FIRST_GENE)).sum(1)
        sums[f"{name}_share"] = (cut * batch.weight).sum()
        sums[f"{name}_count"] = ((cut + kept) * batch.weight).sum()
    return sums
