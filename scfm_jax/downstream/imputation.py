"""Masked expression of held-out cells: what the model says, and what the baselines need to say theirs.

Which expectation its scores are: over the masked entries of the test cells, as the mask draws them (non-zeros
more often than zeros), all pooled, so that a cell counts by its masked genes. The part ``inverse_rate`` of
`metrics.squared_error` and `metrics.poisson_deviance` estimates that over all entries of the panel, of all
test cells, instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float32, Int, Int32, Int64

from scfm_jax.corpus import Corpus
from scfm_jax.data.batch import TissueBatch
from scfm_jax.data.masks import column_mask, mask_bits, seed_words
from scfm_jax.data.tokens import EVALUATION_STEP
from scfm_jax.downstream.baselines import MaskedCells, TrainingCells, neighbour_mean
from scfm_jax.downstream.model import TrainedModel
from scfm_jax.errors import InputError
from scfm_jax.objectives.column_masking import MAX_VALUE, ColumnMaskingConfig, predict


@dataclass(frozen=True, eq=False)
class MaskedExpression:
    """Cells of one panel under the evaluation mask, dense.

    Attributes
    ----------
    cells
        Cell numbers.
    panel
        Vocabulary index of each column.
    counts
        Raw counts.
    mask
        Masked entries.
    values
        ``log1p(counts / total * target_sum)`` of all entries, masked ones too: target and, where visible,
        input.
    targets
        `values` as they would be if the entry were masked, which under ``normalise="visible"`` takes its own
        count out of the total.
    total, target_sum
        What counts were divided by (under ``normalise="visible"`` the unmasked total) and multiplied with.
    neighbour_mean
        Mean over the 10 nearest neighbours of their values, which they have from their whole totals.
    """

    cells: Int64[np.ndarray, " n"]
    panel: Int32[np.ndarray, " g"]
    counts: Int32[np.ndarray, "n g"]
    mask: Bool[np.ndarray, "n g"]
    values: Float32[np.ndarray, "n g"]
    targets: Float32[np.ndarray, "n g"]
    total: Float32[np.ndarray, " n"]
    target_sum: Float32[np.ndarray, " n"]
    neighbour_mean: Float32[np.ndarray, "n g"]


def panel_counts(
    corpus: Corpus, cells: Int64[np.ndarray, " n"], panel: Int32[np.ndarray, " g"]
) -> Int32[np.ndarray, "n g"]:
    """Raw counts of the genes of `panel`, dense."""
    rows = corpus.cells(cells)
    column = np.full(len(corpus.vocabulary), -1)
    column[panel] = np.arange(len(panel))
    counts = np.zeros((len(cells), len(panel)), np.int32)
    of_cell, place = np.repeat(np.arange(len(cells)), np.diff(rows.offsets)), column[rows.genes]
    counts[of_cell[place >= 0], place[place >= 0]] = rows.counts[place >= 0]
    return counts


def masked_expression(
    corpus: Corpus,
    cells: Int64[np.ndarray, " n"],
    config: ColumnMaskingConfig,
    *,
    seed: int,
    neighbours: int = 10,
) -> MaskedExpression:
    """What is masked in `cells` at evaluation, and what a baseline may see of them.

    Raises
    ------
    InputError
        The cells were measured with different panels.
    """
    slides = np.unique(corpus.slide_of(cells))
    panel = corpus.slides[slides[0]].panel
    if any(not np.array_equal(corpus.slides[slide].panel, panel) for slide in slides):
        raise InputError(
            corpus.path, "the cells were measured with different panels", "compare one panel at a time"
        )
    counts = panel_counts(corpus, cells, panel)
    bits = mask_bits(
        seed_words(seed),
        np.full(len(cells), EVALUATION_STEP, np.uint32),
        cells.astype(np.uint32),
        panel[None],
    )
    mask = column_mask(bits, counts, config.rates)
    medians = np.array([slide.median_total for slide in corpus.slides], np.float32)

    def scaled(cells: np.ndarray, counts: np.ndarray, total: np.ndarray) -> np.ndarray:
        """log1p values; `total` is one number a cell, or one an entry."""
        scale = _target_sum(config, medians[corpus.slide_of(cells)])[:, None] / np.maximum(total, 1)
        return np.minimum(np.log1p(counts * scale), MAX_VALUE).astype(np.float32)

    seen = np.where(mask, 0, counts) if config.normalise == "visible" else counts
    total = seen.sum(1, keepdims=True)
    without_own = total - seen if config.normalise == "visible" else total
    near = corpus.neighbours(cells, neighbours)
    there, inverse = np.unique(near[near >= 0], return_inverse=True)
    places = np.full(near.shape, -1)
    places[near >= 0] = inverse
    around = panel_counts(corpus, there, panel)
    return MaskedExpression(
        cells=cells,
        panel=panel,
        counts=counts,
        mask=mask,
        values=scaled(cells, counts, total),
        targets=scaled(cells, counts, without_own),
        total=np.maximum(total[:, 0], 1).astype(np.float32),
        target_sum=_target_sum(config, medians[corpus.slide_of(cells)]),
        neighbour_mean=neighbour_mean(scaled(there, around, around.sum(1, keepdims=True)), places),
    )


def _target_sum(config: ColumnMaskingConfig, medians: Float32[np.ndarray, " n"]) -> Float32[np.ndarray, " n"]:
    return medians if config.target_sum == "median" else np.full_like(medians, config.target_sum)


def baseline_inputs(
    train: MaskedExpression, train_block: Int[np.ndarray, " n"], test: MaskedExpression
) -> tuple[TrainingCells, MaskedCells]:
    """What the baselines learn from and predict; `train_block` is the spatial block of each training cell."""
    cells = TrainingCells(
        values=train.values,
        targets=train.targets,
        mask=train.mask,
        nonzero=train.counts > 0,
        neighbour_mean=train.neighbour_mean,
        depth=np.log(train.total),
        block=train_block,
    )
    return cells, MaskedCells(test.values, test.mask, test.neighbour_mean, np.log(test.total))


def predict_masked(
    model: TrainedModel,
    corpus: Corpus,
    cells: Int64[np.ndarray, " n"],
    panel: Int32[np.ndarray, " g"],
    *,
    seed: int,
) -> tuple[Float32[np.ndarray, "n g"], Float32[np.ndarray, "n g"], Bool[np.ndarray, "n g"]]:
    """The model's value of every masked gene of the panel, the target as the model sees it, and the mask.

    Entries that are not masked are zero.
    """
    n_genes, (_, _, objective) = len(model.vocabulary), model.config.tissue()
    key = jax.random.key(seed)

    @jax.jit
    def run(parameters: Any, batch: TissueBatch) -> tuple[jax.Array, jax.Array, jax.Array]:
        said = predict(
            nnx.merge(model.graph, parameters),
            batch,
            key,
            objective,
            n_genes=n_genes,
            coordinates=model.coordinates,
        )
        return said.value, said.target, said.masked

    column = np.full(n_genes + 2, -1)
    column[panel] = np.arange(len(panel))
    value, target = np.zeros((2, len(cells), len(panel)), np.float32)
    masked = np.zeros((len(cells), len(panel)), bool)
    for rows, batch in model.batches(corpus, cells, rates=objective.rates, seed=seed):
        assert isinstance(batch, TissueBatch)
        got = [np.asarray(part)[: len(rows)] for part in run(model.parameters, batch)]
        row, place = np.nonzero(got[2])
        where = rows[row], column[np.asarray(batch.decoder_genes)[row, place]]
        value[where], target[where], masked[where] = got[0][row, place], got[1][row, place], True
    return value, target, masked
