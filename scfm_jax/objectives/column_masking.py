"""Column masking: predict the masked genes of a cell from its other genes and from its neighbours.

A gene that is masked in the centre is masked in every neighbour too, so that it cannot be copied
(AIDO.Tissue). Everything here is a pure function of (parameters, batch, key) that traces under `jax.jit`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from scfm_jax.data.batch import TissueBatch
from scfm_jax.data.masks import MaskRates, column_mask, mask_bits
from scfm_jax.models.tissue import TissueModel


@dataclass(frozen=True)
class ColumnMaskingConfig:
    """What is masked, how values are scaled, how errors are counted.

    Attributes
    ----------
    nonzero_rate, zero_rate
        Shares of the centre's expressed and unexpressed panel genes that are masked (not public; ours).
    loss
        ``mse`` on log1p values (published); ``poisson`` or ``nb`` on raw counts, with the depth as an offset.
    loss_weights
        ``none`` (published) counts each masked entry once; ``inverse_rate`` divides it by its rate, which
        undoes that non-zeros are masked more often than zeros.
    normalise
        ``published`` divides by a cell's whole total, from which the masked mass can be told; ``visible``
        divides by the total over its unmasked genes, in inputs, depth tokens and targets alike.
    target_sum
        Counts that a cell is scaled to: 10,000 (published), another number, or ``median``, the slide's median
        total.
    depth_floor
        Lower bound of the depth tokens, in log10 counts: 5 as published, which no cell of a few hundred
        counts reaches; None for none.
    published_numerics
        Compute values as the authors' code does: in bfloat16, and divided by the sum of the whole batch
        (over each cell's place in it). For agreement with that code only: nothing may be masked.
    """

    nonzero_rate: float = 0.30
    zero_rate: float = 0.03
    loss: Literal["mse", "poisson", "nb"] = "mse"
    loss_weights: Literal["none", "inverse_rate"] = "none"
    normalise: Literal["published", "visible"] = "published"
    target_sum: float | Literal["median"] = 10_000.0
    depth_floor: float | None = 5.0
    published_numerics: bool = False

    @property
    def rates(self) -> MaskRates:
        return MaskRates(self.nonzero_rate, self.zero_rate)


@dataclass(frozen=True)
class Visible:
    """The encoder's input: the tokens that survive the mask, right-padded, and what they were scaled by."""

    genes: Int[Array, "b s"]
    values: Float[Array, "b s"]
    cells: Int[Array, "b s"]
    slots: Int[Array, "b s"]
    lengths: Int[Array, " b"]
    totals: Float[Array, "b c"]
    target_sum: Float[Array, " b"]


MAX_VALUE = 20.0


def draw_mask(batch: TissueBatch, key: jax.Array, config: ColumnMaskingConfig) -> Bool[Array, "b p"]:
    """Which decoder places are masked; what was not measured never is."""
    bits = mask_bits(jax.random.key_data(key), batch.draw, batch.index, batch.decoder_genes)
    return column_mask(bits, batch.decoder_counts, config.rates)


def visible_tokens(
    batch: TissueBatch, masked: Bool[Array, "b p"] | None, config: ColumnMaskingConfig, n_genes: int
) -> Visible:
    """Drop masked genes from every cell, close the gaps, and scale what is left.

    The loader has usually dropped them already; that this function does it again is what makes the loss
    correct whatever the loader sent.
    """
    keep = batch.cells >= 0
    if masked is not None:
        at_slot = jnp.take_along_axis(masked, jnp.maximum(batch.slots, 0), axis=1)
        keep &= ~(at_slot & (batch.slots >= 0))
    rows, width = jnp.arange(keep.shape[0])[:, None], keep.shape[1]
    destination = jnp.where(keep, jnp.cumsum(keep, axis=1) - 1, width)

    def compact(tokens: Int[Array, "b s"], fill: int) -> Int[Array, "b s"]:
        return jnp.full_like(tokens, fill).at[rows, destination].set(tokens, mode="drop")

    genes, counts = compact(batch.genes, 0), compact(batch.counts, 0)
    cells, slots = compact(batch.cells, -1), compact(batch.slots, -1)
    totals = batch.totals
    if config.normalise == "visible":
        totals = jnp.zeros_like(totals).at[rows, cells].add(counts, mode="drop", wrap_negative_indices=False)
    scale = jnp.maximum(totals, 1).astype(jnp.float32)
    if config.published_numerics:
        if masked is not None:
            raise ValueError("published_numerics has no masked form: the authors' code has no training")
        scale = _batch_sums(counts, cells, totals.shape[1])
    target_sum = (
        batch.target_sum
        if config.target_sum == "median"
        else jnp.full_like(batch.target_sum, config.target_sum)
    )
    of_token = jnp.take_along_axis(scale, jnp.maximum(cells, 0), axis=1)
    depth = _bfloat16(jnp.log10(of_token)) if config.published_numerics else jnp.log10(of_token)
    if config.depth_floor is not None:
        depth = jnp.maximum(depth, config.depth_floor)
    scaled = _normalised_bfloat16 if config.published_numerics else normalised
    values = jnp.where(genes >= n_genes, depth, scaled(counts, of_token, target_sum[:, None]))
    return Visible(genes, values, cells, slots, keep.sum(1), scale, target_sum)


def normalised(counts: Array, total: Array, target_sum: Array) -> Array:
    """``log1p(counts / total * target_sum)``, at most 20, float32."""
    return jnp.minimum(jnp.log1p(counts.astype(jnp.float32) / total * target_sum), MAX_VALUE)


def _bfloat16(x: Array) -> Array:
    """float32 rounded to what bfloat16 can hold, which no compiler may skip."""
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def _batch_sums(counts: Int[Array, "b s"], cells: Int[Array, "b s"], n_cells: int) -> Float[Array, "b c"]:
    """For each cell's place, the sum over the whole batch of counts as bfloat16, the same in every row."""
    rounded = _bfloat16(counts.astype(jnp.float32))
    sums = jnp.zeros(n_cells).at[cells].add(rounded, mode="drop", wrap_negative_indices=False)
    return jnp.broadcast_to(_bfloat16(sums), (counts.shape[0], n_cells))


def _normalised_bfloat16(counts: Array, total: Array, target_sum: Array) -> Array:
    """`normalised` with every step rounded to bfloat16."""
    share = _bfloat16(_bfloat16(counts.astype(jnp.float32)) / total)
    return jnp.minimum(_bfloat16(jnp.log1p(_bfloat16(share * target_sum))), MAX_VALUE)


def encode(
    model: TissueModel, batch: TissueBatch, tokens: Visible, coordinates: bool
) -> Float[Array, "b s d"]:
    """Encoder outputs of `tokens`, with the rotary positions that the model uses."""
    positions = rotary_positions(batch, tokens, coordinates)
    return model.encode(tokens.genes, tokens.values, positions, tokens.lengths)


def rotary_positions(batch: TissueBatch, tokens: Visible, coordinates: bool) -> Float[Array, "b s 2"]:
    """x and y from the centre in um, or the indices of gene and cell."""
    cells = jnp.maximum(tokens.cells, 0)
    if coordinates:
        return jnp.take_along_axis(batch.offsets, cells[..., None], axis=1)
    return jnp.stack([tokens.genes, cells], axis=-1).astype(jnp.float32)


@dataclass(frozen=True)
class Prediction:
    """What the decoder says of the centre cell, and the truth in the same units.

    `value` and `target` are log1p values. For the count losses `value` is ``log1p(exp(raw))`` of the
    predicted rate, where `raw` is what the head gave. `total` is the number of counts that `target_sum`
    stands for.
    """

    raw: Float[Array, "b p"]
    value: Float[Array, "b p"]
    target: Float[Array, "b p"]
    masked: Bool[Array, "b p"]
    total: Float[Array, "b 1"]
    target_sum: Float[Array, "b 1"]


def predict(
    model: TissueModel,
    batch: TissueBatch,
    key: jax.Array,
    config: ColumnMaskingConfig,
    *,
    n_genes: int,
    coordinates: bool = False,
) -> Prediction:
    """Mask, encode and decode a batch."""
    masked = draw_mask(batch, key, config)
    tokens = visible_tokens(batch, masked, config, n_genes)
    return predict_from(model, batch, tokens, masked, config, coordinates=coordinates)


def predict_from(
    model: TissueModel,
    batch: TissueBatch,
    tokens: Visible,
    masked: Bool[Array, "b p"],
    config: ColumnMaskingConfig,
    *,
    coordinates: bool = False,
) -> Prediction:
    """Encode and decode what a mask left visible."""
    hidden = encode(model, batch, tokens, coordinates)
    genes = jnp.maximum(batch.decoder_genes, 0)
    own = jnp.zeros_like(genes)
    first = own if coordinates else genes
    raw = model.decode(
        hidden,
        jnp.where(tokens.cells == 0, tokens.slots, -1),
        genes,
        masked,
        jnp.stack([first, own], axis=-1).astype(jnp.float32),
        (batch.decoder_genes >= 0).sum(1),
    )
    total, target_sum = tokens.totals[:, :1], tokens.target_sum[:, None]
    value = raw if config.loss == "mse" else jax.nn.softplus(raw)
    target = normalised(jnp.maximum(batch.decoder_counts, 0), total, target_sum)
    return Prediction(raw, value, target, masked, total, target_sum)


def column_masking_loss(
    model: TissueModel,
    batch: TissueBatch,
    key: jax.Array,
    config: ColumnMaskingConfig,
    *,
    n_genes: int,
    coordinates: bool = False,
) -> dict[str, Float[Array, ""]]:
    """Sums over the batch, never means, so that microbatches, devices and hosts add up to the same loss.

    Returns
    -------
    ``loss`` and ``weight`` (their ratio is the loss), and for the squared error in log1p units, whatever the
    loss, sums and counts over the masked non-zeros and zeros; ``tokens`` and ``pairs``, the real tokens that
    the encoder saw and their (query, key) pairs; ``second_tokens`` and ``second_pairs``, the same of the
    decoder.
    """
    said = predict(model, batch, key, config, n_genes=n_genes, coordinates=coordinates)
    counts = jnp.maximum(batch.decoder_counts, 0).astype(jnp.float32)  # -1 is not measured, and never masked
    if config.loss == "mse":
        error = (said.value - said.target) ** 2
    else:
        log_mean = said.raw + jnp.log(said.total / said.target_sum)
        if config.loss == "poisson":
            error = jnp.exp(log_mean) - counts * log_mean + jax.lax.lgamma(counts + 1)
        else:
            size = jnp.exp(-model.log_dispersion[...][jnp.maximum(batch.decoder_genes, 0)])
            error = _negative_binomial(counts, log_mean, size)
    expressed = counts > 0
    entry = said.masked * batch.weight[:, None]
    weight = entry
    if config.loss_weights == "inverse_rate":
        weight = entry / jnp.where(expressed, config.nonzero_rate, config.zero_rate)
    squared = (said.value - said.target) ** 2
    real, decoded = (batch.cells >= 0).sum(1), (batch.decoder_genes >= 0).sum(1)
    return {
        "loss": (weight * error).sum(),
        "weight": weight.sum(),
        "nonzero_error": (entry * expressed * squared).sum(),
        "nonzero_count": (entry * expressed).sum(),
        "zero_error": (entry * ~expressed * squared).sum(),
        "zero_count": (entry * ~expressed).sum(),
        "tokens": (real * batch.weight).sum(),
        "pairs": (real.astype(jnp.float32) ** 2 * batch.weight).sum(),
        "second_tokens": (decoded * batch.weight).sum(),
        "second_pairs": (decoded.astype(jnp.float32) ** 2 * batch.weight).sum(),
    }


def _negative_binomial(counts: Array, log_mean: Array, size: Array) -> Array:
    """Negative log likelihood with mean ``exp(log_mean)`` and variance ``mean + mean**2 / size``."""
    log_total = jnp.logaddexp(log_mean, jnp.log(size))
    combinations = jax.lax.lgamma(counts + size) - jax.lax.lgamma(size) - jax.lax.lgamma(counts + 1)
    return -(combinations + size * (jnp.log(size) - log_total) + counts * (log_mean - log_total))
