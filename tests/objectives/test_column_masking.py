from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import stats
from tissue_batches import CELLS, N_GENES, PANEL, UNMEASURED, WIDTH, by_gene, make_batch, random_counts

from scfm_jax.data.batch import TissueBatch
from scfm_jax.models.functional import abstract
from scfm_jax.models.tissue import TissueConfig, TissueModel
from scfm_jax.models.transformer import TransformerConfig
from scfm_jax.objectives.column_masking import (
    ColumnMaskingConfig,
    column_masking_loss,
    draw_mask,
    predict,
    visible_tokens,
)

MODEL = TissueConfig(
    encoder=TransformerConfig(layers=2, heads=1, width=16),
    decoder=TransformerConfig(layers=1, heads=1, width=8),
    bins=6,
    attention="plain",
)
KEY = jax.random.key(3)
PUBLISHED = ColumnMaskingConfig(nonzero_rate=0.4, zero_rate=0.25, depth_floor=None)
VISIBLE = dataclasses.replace(PUBLISHED, normalise="visible")
GRAPH, SHAPES, _ = abstract(lambda rngs: TissueModel(MODEL, N_GENES, dispersion=True, rngs=rngs))
RANDOM = np.random.default_rng(0)
PARAMETERS = jax.tree.map(lambda leaf: jnp.asarray(RANDOM.normal(0, 0.4, leaf.shape), jnp.float32), SHAPES)


@cache
def loss_and_gradient(config: ColumnMaskingConfig) -> Callable[[Any, TissueBatch], Any]:
    def summed(parameters: Any, batch: TissueBatch) -> tuple[jax.Array, dict[str, jax.Array]]:
        sums = column_masking_loss(nnx.merge(GRAPH, parameters), batch, KEY, config, n_genes=N_GENES)
        return sums["loss"], sums

    return jax.jit(jax.value_and_grad(summed, has_aux=True))


@cache
def sums_and_prediction(config: ColumnMaskingConfig, coordinates: bool = False) -> Callable[..., Any]:
    def run(batch: TissueBatch) -> Any:
        model, options = nnx.merge(GRAPH, PARAMETERS), {"n_genes": N_GENES, "coordinates": coordinates}
        said = predict(model, batch, KEY, config, **options)
        return column_masking_loss(model, batch, KEY, config, **options), vars(said)

    return jax.jit(run)


def mask_of(batch: TissueBatch, config: ColumnMaskingConfig = PUBLISHED) -> np.ndarray:
    return np.asarray(draw_mask(jax.tree.map(jnp.asarray, batch), KEY, config))


def change_masked_neighbours(counts: np.ndarray) -> np.ndarray:
    """Every neighbour gets more of every masked gene, of which some had none."""
    masked = by_gene(batch := make_batch(counts), mask_of(batch))
    changed = counts.copy()
    changed[:, 1:] += np.where(masked[:, None], 3 + np.arange(N_GENES), 0).astype(np.int32)
    assert ((changed != counts).any(-1).sum(1) == CELLS - 1).all()
    assert ((counts[:, 1:] == 0) & (changed[:, 1:] > 0)).any()
    return changed


def assert_same_bits(first: Any, second: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, first, second)


# The leak test. The batches hold all tokens, so it is the loss itself that has to drop the masked ones.


def test_no_neighbour_shows_a_masked_gene() -> None:
    """Masked genes change in all neighbours, totals do not: loss and gradient stay, to the bit."""
    counts = random_counts()
    totals = counts.sum(-1)
    step = loss_and_gradient(PUBLISHED)
    (loss, sums), gradient = step(PARAMETERS, make_batch(counts, totals))
    (other, others), other_gradient = step(PARAMETERS, make_batch(change_masked_neighbours(counts), totals))
    assert sums["weight"] > 20 and np.isfinite(loss)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient["encoder"])) > 0
    assert_same_bits((loss, gradient), (other, other_gradient))
    seen = {"tokens": 0, "pairs": 0}  # what the loader sends, which usually drops masked tokens itself
    assert_same_bits({**sums, **seen}, {**others, **seen})


def test_visible_normalisation_hides_the_masked_mass_as_well() -> None:
    """Raw counts and totals change, as they would in a file: loss and gradient stay, to the bit."""
    counts = random_counts()
    step = loss_and_gradient(VISIBLE)
    (loss, _), gradient = step(PARAMETERS, make_batch(counts))
    (other, _), other_gradient = step(PARAMETERS, make_batch(change_masked_neighbours(counts)))
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient["encoder"])) > 0
    assert_same_bits((loss, gradient), (other, other_gradient))


def test_published_normalisation_leaks_the_masked_mass() -> None:
    """The same change moves the published loss: what the last test finds unmoved could have moved."""
    counts = random_counts()
    step = loss_and_gradient(PUBLISHED)
    (loss, _), gradient = step(PARAMETERS, make_batch(counts))
    (other, _), other_gradient = step(PARAMETERS, make_batch(change_masked_neighbours(counts)))
    assert abs(loss - other) > 1e-4 * abs(loss)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), gradient["encoder"], other_gradient["encoder"])
    assert max(jax.tree.leaves(moved)) > 0


def test_a_visible_gene_of_a_neighbour_is_seen() -> None:
    counts = random_counts()
    masked = by_gene(batch := make_batch(counts), mask_of(batch))
    changed = counts.copy()
    changed[:, 1:] += (np.isin(np.arange(N_GENES), PANEL) & ~masked)[:, None].astype(np.int32)
    step = loss_and_gradient(PUBLISHED)
    (loss, _), _ = step(PARAMETERS, make_batch(counts, counts.sum(-1)))
    (other, _), _ = step(PARAMETERS, make_batch(changed, counts.sum(-1)))
    assert abs(loss - other) > 1e-4 * abs(loss)


def test_the_centre_does_not_see_its_own_masked_counts() -> None:
    counts = random_counts()
    masked = by_gene(batch := make_batch(counts), mask_of(batch))
    changed = counts.copy()
    changed[:, 0] += np.where(
        masked & (counts[:, 0] > 0), 5, 0
    )  # zeros stay zeros: they are masked at their own rate
    run = sums_and_prediction(VISIBLE)
    (sums, said), (others, saying) = run(make_batch(counts)), run(make_batch(changed))
    np.testing.assert_array_equal(said["raw"], saying["raw"])
    assert abs(sums["loss"] - others["loss"]) > 1e-3


def test_a_loader_that_dropped_the_masked_tokens_changes_nothing() -> None:
    counts = random_counts()
    masked = by_gene(batch := make_batch(counts), mask_of(batch))
    step = loss_and_gradient(VISIBLE)
    (loss, _), gradient = step(PARAMETERS, batch)
    (other, _), other_gradient = step(PARAMETERS, make_batch(counts, dropped=masked))
    assert_same_bits((loss, gradient), (other, other_gradient))


# What the encoder is given.


def visible_by_hand(
    counts: np.ndarray, config: ColumnMaskingConfig
) -> tuple[list[list[tuple[int, float, int]]], np.ndarray]:
    """(gene, value, cell) of every visible token, and each cell's total, by loops."""
    masked = by_gene(batch := make_batch(counts), mask_of(batch))
    rows, totals = [], np.zeros(counts.shape[:2])
    for row, sample in enumerate(counts):
        tokens = []
        target_sum = batch.target_sum[row] if config.target_sum == "median" else config.target_sum
        for cell, of_cell in enumerate(sample):
            seen = [gene for gene in range(N_GENES) if of_cell[gene] and not masked[row, gene]]
            total = of_cell[seen].sum() if config.normalise == "visible" else of_cell.sum()
            totals[row, cell] = total = max(total, 1)
            depth = (
                np.log10(total) if config.depth_floor is None else max(np.log10(total), config.depth_floor)
            )
            tokens += [(N_GENES, depth, cell), (N_GENES + 1, depth, cell)]
            tokens += [(gene, min(np.log1p(of_cell[gene] / total * target_sum), 20), cell) for gene in seen]
        rows.append(tokens)
    return rows, totals


@pytest.mark.parametrize(
    "config",
    [
        ColumnMaskingConfig(),
        VISIBLE,
        dataclasses.replace(VISIBLE, target_sum="median"),
        dataclasses.replace(PUBLISHED, target_sum=1e12, depth_floor=1.4),
    ],
    ids=["published", "visible", "median", "clipped at 20 and floored"],
)
def test_tokens_of_the_encoder(config: ColumnMaskingConfig) -> None:
    config = dataclasses.replace(config, nonzero_rate=0.4, zero_rate=0.25)
    counts = random_counts()
    batch = jax.tree.map(jnp.asarray, make_batch(counts))
    seen = visible_tokens(batch, jnp.asarray(mask_of(batch)), config, N_GENES)
    rows, totals = visible_by_hand(counts, config)
    for row, tokens in enumerate(rows):
        n = len(tokens)
        genes, values, cells = map(np.array, zip(*tokens, strict=True))
        assert seen.lengths[row] == n
        np.testing.assert_array_equal(seen.genes[row, :n], genes)
        np.testing.assert_array_equal(seen.cells[row, :n], cells)
        np.testing.assert_allclose(seen.values[row, :n], values, rtol=1e-6)
        assert (seen.cells[row, n:] == -1).all() and (seen.slots[row, n:] == -1).all()
        of_slot = np.asarray(batch.decoder_genes)[row, np.asarray(seen.slots)[row, :n]]
        np.testing.assert_array_equal(of_slot, genes)
    np.testing.assert_allclose(seen.totals, totals)


def test_depth_tokens_know_the_floor() -> None:
    counts = random_counts()
    depths = []
    for floor in (None, 5.0):
        config = dataclasses.replace(PUBLISHED, depth_floor=floor)
        seen = visible_tokens(jax.tree.map(jnp.asarray, make_batch(counts)), None, config, N_GENES)
        depths.append(
            np.asarray(seen.values)[np.asarray(seen.genes) >= N_GENES].reshape(len(counts), CELLS, 2)
        )
    np.testing.assert_allclose(depths[0], np.repeat(np.log10(counts.sum(-1))[..., None], 2, -1), rtol=1e-6)
    assert (depths[1] == 5).all()


@pytest.mark.parametrize("coordinates", [False, True])
def test_offsets_are_read_in_coordinate_mode_only(coordinates: bool) -> None:
    batch = make_batch(random_counts())
    run = sums_and_prediction(PUBLISHED, coordinates)
    farther = batch.offsets * np.float32(1.5)
    (sums, _), (others, _) = run(batch), run(batch.replace(offsets=farther))
    assert (sums["loss"] != others["loss"]) == coordinates


# Which entries count, and how.


def test_the_mask_is_the_same_whatever_the_neighbours_and_the_order() -> None:
    counts = random_counts()
    alone, with_three = make_batch(counts, neighbours=0), make_batch(counts)
    mask = mask_of(with_three)
    np.testing.assert_array_equal(mask_of(alone), mask)
    order = np.random.default_rng(0).permutation(mask.shape[1])
    shuffled = with_three.replace(
        decoder_genes=with_three.decoder_genes[:, order], decoder_counts=with_three.decoder_counts[:, order]
    )
    np.testing.assert_array_equal(mask_of(shuffled), mask[:, order])
    run = sums_and_prediction(VISIBLE)
    (few, _), (many, _) = run(alone), run(with_three)
    assert (few["nonzero_count"], few["zero_count"]) == (many["nonzero_count"], many["zero_count"])
    assert few["loss"] != many["loss"]


def test_zeros_are_drawn_from_the_panel_at_their_own_rate() -> None:
    counts = np.repeat(random_counts(1), 2000, axis=0)
    batch = make_batch(counts[:1])
    repeat = lambda x: np.repeat(x, 2000, axis=0)  # noqa: E731
    batch = jax.tree.map(repeat, batch).replace(index=np.arange(2000, dtype=np.uint32))
    everything = np.arange(N_GENES + 2, dtype=np.int32)[None].repeat(
        2000, 0
    )  # as with decoder = "vocabulary"
    measured = np.where(np.isin(everything, PANEL), 0, -1)
    measured[:, :N_GENES] += counts[:, 0]
    masked = mask_of(batch.replace(decoder_genes=everything, decoder_counts=measured))
    assert not masked[:, UNMEASURED].any() and not masked[:, N_GENES:].any()
    expressed = counts[0, 0, PANEL] > 0
    for rate, genes in ((0.4, PANEL[expressed]), (0.25, PANEL[~expressed])):
        share = masked[:, genes].mean()
        assert abs(share - rate) < 4 * np.sqrt(rate * (1 - rate) / (2000 * len(genes)))
    assert (~mask_of(batch) | (batch.decoder_counts >= 0)).all()


@pytest.mark.parametrize(
    "config", [PUBLISHED, dataclasses.replace(VISIBLE, target_sum="median", loss_weights="inverse_rate")]
)
def test_squared_error_against_numpy(config: ColumnMaskingConfig) -> None:
    counts = random_counts()
    batch = make_batch(counts)
    sums, said = sums_and_prediction(config)(batch)
    masked, own = mask_of(batch), batch.decoder_counts
    _, totals = visible_by_hand(counts, config)
    target_sum = batch.target_sum if config.target_sum == "median" else np.full(len(counts), 10_000.0)
    names = ("loss", "weight", "nonzero_error", "nonzero_count", "zero_error", "zero_count")
    stated = dict.fromkeys(names, 0.0)
    for row, place in zip(*np.nonzero(masked)):
        target = np.log1p(own[row, place] / totals[row, 0] * target_sum[row])
        error = (float(said["raw"][row, place]) - target) ** 2
        kind, rate = ("nonzero", 0.4) if own[row, place] else ("zero", 0.25)
        stated[f"{kind}_error"] += error
        stated[f"{kind}_count"] += 1
        weight = 1.0 if config.loss_weights == "none" else 1 / rate
        stated["loss"] += weight * error
        stated["weight"] += weight
    assert stated["nonzero_count"] > 20 and stated["zero_count"] > 5
    for name, value in stated.items():
        np.testing.assert_allclose(sums[name], value, rtol=1e-5, err_msg=name)
    real = (batch.cells >= 0).sum(1)
    assert (sums["tokens"], sums["pairs"]) == (real.sum(), (real**2).sum())


@pytest.mark.parametrize("loss", ["poisson", "nb"])
def test_count_losses_against_scipy(loss: Any) -> None:
    """Minus the log probability of the raw count, at a mean that the depth scales."""
    config = dataclasses.replace(VISIBLE, loss=loss, target_sum="median")
    counts = random_counts()
    batch = make_batch(counts)
    sums, said = sums_and_prediction(config)(batch)
    masked, own = mask_of(batch), batch.decoder_counts
    _, totals = visible_by_hand(counts, config)
    mean = np.exp(np.asarray(said["raw"], float)) * (totals[:, 0] / batch.target_sum)[:, None]
    if loss == "poisson":
        log_probability = stats.poisson.logpmf(own, mean)
    else:
        dispersion = np.exp(np.asarray(PARAMETERS["log_dispersion"], float))[
            np.maximum(batch.decoder_genes, 0)
        ]
        log_probability = stats.nbinom.logpmf(own, 1 / dispersion, 1 / (1 + dispersion * mean))
        np.testing.assert_allclose(
            stats.nbinom.var(1 / dispersion, 1 / (1 + dispersion * mean)), mean + dispersion * mean**2
        )
    np.testing.assert_allclose(sums["loss"], -log_probability[masked].sum(), rtol=1e-4)
    assert sums["weight"] == masked.sum()
    target = np.log1p(np.maximum(own, 0) / totals[:, :1] * batch.target_sum[:, None])
    value = np.log1p(np.exp(np.asarray(said["raw"], float)))
    zeros = masked & (own == 0)
    np.testing.assert_allclose(sums["zero_error"], ((value - target) ** 2)[zeros].sum(), rtol=1e-4)


def test_sums_add_over_parts_of_a_batch() -> None:
    batch = make_batch(random_counts())
    run = sums_and_prediction(VISIBLE)
    whole, _ = run(batch)
    parts = [run(jax.tree.map(lambda x, rows=rows: x[rows], batch))[0] for rows in (slice(0, 3), slice(3, 6))]
    for name, value in whole.items():
        np.testing.assert_allclose(parts[0][name] + parts[1][name], value, rtol=1e-5, err_msg=name)


def test_rows_of_weight_zero_count_for_nothing() -> None:
    batch = make_batch(random_counts())
    run = sums_and_prediction(VISIBLE)
    weight = np.array([1, 1, 1, 0, 0, 0], np.float32)
    half, _ = run(jax.tree.map(lambda x: x[:3], batch))
    filled, _ = run(batch.replace(weight=weight))
    for name, value in half.items():
        np.testing.assert_allclose(filled[name], value, rtol=1e-5, err_msg=name)
    nothing, _ = run(batch.replace(weight=0 * weight))
    assert all(value == 0 for value in nothing.values())


def test_no_token_of_the_changed_batches_is_cut_off() -> None:
    everything = np.zeros((1, CELLS, N_GENES), np.int32)
    everything[..., PANEL] = 1
    assert (make_batch(everything).cells >= 0).sum() == WIDTH
