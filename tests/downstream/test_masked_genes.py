"""Masked genes: the model and the baselines are asked about the same places, and score as stated plainly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scfm_jax.corpus import Corpus
from scfm_jax.data.tokens import EVALUATION_STEP
from scfm_jax.downstream.masked_genes import (
    MaskedGenes,
    RankFrequencies,
    masked_genes,
    score_linear,
    score_model,
    score_uniform,
)
from scfm_jax.downstream.model import TrainedModel, open_model


@pytest.fixture(scope="module")
def model(run_with_niche: Path) -> TrainedModel:
    return open_model(run_with_niche)


@pytest.fixture(scope="module")
def held(model: TrainedModel, corpus_path: Path) -> MaskedGenes:
    _, sample, objective = model.config.nicheformer()
    return masked_genes(Corpus.open(corpus_path), np.arange(0, 320, 3), sample, objective, seed=4)


def test_each_token_is_masked_or_seen(model: TrainedModel, held: MaskedGenes, corpus_path: Path) -> None:
    _, sample, objective = model.config.nicheformer()
    corpus = Corpus.open(corpus_path)
    read = sample.reader(corpus).read(held.cells, draw=EVALUATION_STEP, seed=4, rates=objective.rates)
    for row in range(len(held.cells)):
        span = slice(read.tokens.starts[row], read.tokens.starts[row] + read.tokens.lengths[row])
        tokens, segments = (read.tokens.columns[name][span] for name in ("tokens", "segments"))
        own = {}
        for kind in ("", "seen_"):
            at = getattr(held, f"{kind}row") == row
            own |= dict(zip(getattr(held, f"{kind}rank")[at], getattr(held, f"{kind}gene")[at], strict=True))
        assert [own[rank] + 30 for rank in range(len(own))] == tokens[segments == 0][3:].tolist()
        assert (held.niche_gene[held.niche_row == row] + 30).tolist() == tokens[segments == 1].tolist()
        assert (held.row == row).sum() == read.places.lengths[row]


def test_the_model_s_scores_sum_to_its_loss(
    model: TrainedModel, held: MaskedGenes, corpus_path: Path
) -> None:
    """A model that says the same of every token has the uniform loss."""
    import dataclasses

    import jax

    corpus = Corpus.open(corpus_path)
    scores = score_model(model, corpus, held, seed=4)
    assert np.isfinite(scores.loss.total).all() and (scores.missed.total <= scores.missed.weight).all()
    n_genes = len(corpus.vocabulary)
    uniform = score_uniform(held, n_genes)
    head = jax.tree.map(np.zeros_like, model.parameters["head"])
    flat = dataclasses.replace(model, parameters={**model.parameters, "head": head})
    np.testing.assert_allclose(
        score_model(flat, corpus, held, seed=4).loss.total, uniform.loss.total, rtol=1e-5
    )
    assert uniform.loss.mean == pytest.approx(np.log(n_genes + 30))


def made_up(cells: int, seed: int) -> MaskedGenes:
    """Cells of two technologies and ten ranks: a gene for each rank, and another one in a tenth of them."""
    random = np.random.default_rng(seed)
    genes = np.tile(np.arange(10), (cells, 1))
    genes[random.random((cells, 10)) < 0.1] += 10
    technology = np.arange(cells) % 2
    genes = genes + 20 * technology[:, None]
    masked = random.random((cells, 10)) < 0.3
    row, rank = np.nonzero(masked)
    seen_row, seen_rank = np.nonzero(~masked)
    nothing = np.zeros(0, np.int64)
    return MaskedGenes(
        cells=np.arange(cells),
        row=row,
        rank=rank,
        gene=genes[row, rank],
        seen_row=seen_row,
        seen_rank=seen_rank,
        seen_gene=genes[seen_row, seen_rank],
        niche_row=nothing,
        niche_rank=nothing,
        niche_gene=nothing,
        technology=technology,
        technologies=("a", "b"),
    )


def test_the_table_of_ranks_against_what_is_known() -> None:
    """Its best loss is the entropy of a rank; a gene that nobody saw costs more, and is finite."""
    entropy = -(0.9 * np.log(0.9) + 0.1 * np.log(0.1))
    table, held = RankFrequencies(made_up(4_000, 0), 50), made_up(4_000, 1)
    for exclude in (False, True):
        scores = table.score(held, exclude=exclude)
        assert scores.loss.mean == pytest.approx(entropy, abs=0.03)
        assert scores.missed.mean == pytest.approx(0.1, abs=0.01)
    strange = made_up(40, 2)
    strange.gene[:] = 45
    scores = table.score(strange, exclude=True)
    assert scores.missed.mean == 1 and 10 < scores.loss.mean < 20


def test_a_gene_that_is_seen_is_ruled_out() -> None:
    """Ranks drawn from one bag without replacement: what is seen cannot be what is masked."""
    random = np.random.default_rng(3)

    def bag(cells: int) -> MaskedGenes:
        genes = np.argsort(random.random((cells, 8)), axis=1)
        fields: dict[str, Any] = {}
        for kind, places in (("", slice(0, 1)), ("seen_", slice(1, 8))):
            row, rank = np.nonzero(np.ones_like(genes[:, places]))
            fields |= {
                f"{kind}row": row,
                f"{kind}rank": rank + (places.start or 0),
                f"{kind}gene": genes[:, places].ravel(),
            }
        nothing = np.zeros(0, np.int64)
        return MaskedGenes(
            cells=np.arange(cells),
            technology=np.zeros(cells, np.int64),
            technologies=("a",),
            niche_row=nothing,
            niche_rank=nothing,
            niche_gene=nothing,
            **fields,
        )

    table, held = RankFrequencies(bag(2_000), 50), bag(500)
    assert table.score(held, exclude=False).missed.mean > 0.8
    assert table.score(held, exclude=True).missed.mean == 0


def test_the_line_learns_what_depends_on_a_seen_gene() -> None:
    """A masked gene that its seen neighbour gives away, which no table by rank knows."""
    random = np.random.default_rng(5)

    def pairs(cells: int) -> MaskedGenes:
        state = random.integers(0, 5, cells)
        row, nothing = np.arange(cells), np.zeros(0, np.int64)
        return MaskedGenes(
            cells=row,
            row=row,
            rank=np.zeros(cells, np.int64),
            gene=10 + state,
            seen_row=row,
            seen_rank=np.ones(cells, np.int64),
            seen_gene=state,
            niche_row=nothing,
            niche_rank=nothing,
            niche_gene=nothing,
            technology=np.zeros(cells, np.int64),
            technologies=("a",),
        )

    train, held = pairs(500), pairs(100)
    assert score_linear(train, held, 50, niche=True).missed.mean == 0
    assert RankFrequencies(train, 50).score(held, exclude=True).missed.mean > 0.6
