"""Masked expression: the model and the baselines are asked about the same entries in the same units."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from scfm_jax.corpus import Corpus
from scfm_jax.downstream.imputation import masked_expression, panel_counts, predict_masked
from scfm_jax.downstream.model import open_model


@pytest.mark.parametrize("normalise", ["visible", "published"])
def test_mask_and_target_are_the_models(finished, corpus_path, normalise):
    corpus, model = Corpus.open(corpus_path), open_model(finished)
    objective = dataclasses.replace(model.config.objective, normalise=normalise)
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, objective=objective))
    cells = np.arange(corpus.slide_starts[1], corpus.slide_starts[1] + 30)
    held = masked_expression(corpus, cells, objective, seed=5, neighbours=4)
    value, target, mask = predict_masked(model, corpus, cells, held.panel, seed=5)
    np.testing.assert_array_equal(mask, held.mask)
    np.testing.assert_allclose(target[mask], held.values[mask], rtol=1e-5, atol=1e-5)
    assert np.isfinite(value[mask]).all()
    assert not value[~mask].any()
    np.testing.assert_allclose(held.targets[mask], held.values[mask], rtol=1e-6)
    total = np.where(held.mask, 0, held.counts).sum(1) if normalise == "visible" else held.counts.sum(1)
    stated = np.log1p(held.counts / total[:, None] * corpus.slides[1].median_total)
    np.testing.assert_allclose(held.values, stated, rtol=1e-5)


def test_counts_of_a_panel(corpus_path):
    corpus = Corpus.open(corpus_path)
    cells = np.array([3, 170, 3])
    panel = corpus.slides[0].panel[::-1][:5]
    rows = corpus.cells(cells)
    for row, cell in enumerate(panel_counts(corpus, cells, panel)):
        span = slice(rows.offsets[row], rows.offsets[row + 1])
        known = dict(zip(rows.genes[span].tolist(), rows.counts[span].tolist(), strict=True))
        assert cell.tolist() == [known.get(gene, 0) for gene in panel.tolist()]
