"""Held-out errors by cell: against plain NumPy, over k, sizes, seeds and batches, over blocks of tissue."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import scipy.stats
from flax import nnx

from scfm_jax.corpus import Corpus
from scfm_jax.data.ranks import RankConfig
from scfm_jax.data.tokens import SampleConfig
from scfm_jax.downstream.imputation import masked_expression, predict_masked
from scfm_jax.downstream.masked_genes import masked_genes, score_model
from scfm_jax.downstream.metrics import CellSums, squared_error
from scfm_jax.downstream.model import TrainedModel
from scfm_jax.errors import DataWarning, InputError
from scfm_jax.models.functional import abstract, initialise
from scfm_jax.scaling.held_out import (
    HeldOutErrors,
    check_comparable,
    held_out_errors,
    loss_and_error,
    loss_by_source,
    paired_loss,
)
from scfm_jax.training.config import RunConfig
from scfm_jax.training.task import make_task, model_builder

CELLS = np.arange(5, 320, 17)  # of both slides
SEED = 3
pytestmark = pytest.mark.usefixtures("compile_fast")


@pytest.fixture(scope="module")
def corpus(corpus_path: Path) -> Corpus:
    return Corpus.open(corpus_path)


def model_of(config: RunConfig, corpus: Corpus) -> TrainedModel:
    """A run's model before its first step."""
    build = model_builder(config, len(corpus.vocabulary))
    parameters = jax.jit(lambda key: initialise(build, key))(jax.random.key(config.seed))
    return TrainedModel(config, corpus.vocabulary, abstract(build)[0], parameters, 0)


@pytest.fixture(scope="module")
def tissue(config: RunConfig, corpus: Corpus) -> TrainedModel:
    """One layer, with weights so large that neighbours count."""
    model, _, _ = config.tissue()
    encoder = replace(model.encoder, layers=1)
    return model_of(replace(config, model=replace(model, encoder=encoder, init_std=0.5)), corpus)


@pytest.fixture(scope="module")
def niche(ranks: RunConfig, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    model, sample, _ = ranks.nicheformer()
    folder, files = tmp_path_factory.mktemp("means"), []
    for technology in ("simscope", "simseq"):
        np.save(folder / f"{technology}.npy", corpus.technology_means(technology))
        files.append(f"{technology}={folder / technology}.npy")
    data = replace(ranks.data, sample=replace(sample, mean_files=tuple(files)))
    return model_of(replace(ranks, model=replace(model, layers=1), data=data), corpus)


@pytest.fixture(scope="module")
def of_tissue(tissue: TrainedModel, corpus: Corpus) -> HeldOutErrors:
    return held_out_errors(tissue, corpus, CELLS, seed=SEED)


@pytest.fixture(scope="module")
def of_niche(niche: TrainedModel, corpus: Corpus) -> HeldOutErrors:
    return held_out_errors(niche, corpus, CELLS, seed=SEED)


def test_tissue_against_the_mask_and_the_errors_in_plain_numpy(
    tissue: TrainedModel, of_tissue: HeldOutErrors, corpus: Corpus
) -> None:
    """Which genes are masked comes from counts and the seed alone, the errors from dense arrays."""
    _, _, objective = tissue.config.tissue()
    for slide in (0, 1):
        at = np.flatnonzero(corpus.slide_of(CELLS) == slide)
        held = masked_expression(corpus, CELLS[at], objective, seed=SEED, neighbours=4)
        value, target, _ = predict_masked(tissue, corpus, CELLS[at], held.panel, seed=SEED)
        rates = objective.nonzero_rate, objective.zero_rate
        wanted = squared_error(target, value, held.mask, held.counts > 0, rates)
        for name, known in (("loss", "all"), ("nonzero", "nonzero"), ("zero", "zero")):
            found = of_tissue.take(at).parts[name]
            np.testing.assert_array_equal(found.weight, wanted[known].weight)
            np.testing.assert_allclose(found.total, wanted[known].total, rtol=1e-5, atol=1e-6)


def test_nicheformer_against_scores_of_each_masked_place(
    niche: TrainedModel, of_niche: HeldOutErrors, corpus: Corpus
) -> None:
    """Where every masked place holds the mask token, as there; with the objective's own it differs."""
    _, sample, objective = niche.config.nicheformer()
    plain = replace(objective, mask_share=1.0, random_share=0.0)
    same = replace(niche, config=replace(niche.config, objective=plain))
    found = held_out_errors(same, corpus, CELLS, seed=SEED)
    wanted = score_model(niche, corpus, masked_genes(corpus, CELLS, sample, plain, seed=SEED), seed=SEED)
    for part, known in ((found.loss, wanted.loss), (found.parts["top1"], wanted.missed)):
        np.testing.assert_array_equal(part.weight, known.weight)
        np.testing.assert_allclose(part.total, known.total, rtol=1e-5)
    np.testing.assert_array_equal(of_niche.loss.weight, found.loss.weight)
    assert not np.allclose(of_niche.loss.total, found.loss.total)


@pytest.mark.parametrize("family", ["tissue", "niche"])
def test_a_row_alone_has_the_loss_that_it_has_in_a_batch(
    family: str, corpus: Corpus, request: pytest.FixtureRequest
) -> None:
    """The training loss of batches of one row; the last batch has rows that only fill it."""
    model, errors = request.getfixturevalue(family), request.getfixturevalue(f"of_{family}")
    task, key = make_task(model.config, corpus), jax.random.key(SEED)
    loss = jax.jit(lambda parameters, batch: task.loss(nnx.merge(model.graph, parameters), batch, key))
    *_, (rows, batch) = model.batches(corpus, CELLS, rates=model.config.objective.rates, seed=SEED)
    assert len(rows) < len(batch.weight)
    for place, row in enumerate(rows):
        one = jax.tree.map(lambda values, place=place: values[place : place + 1], batch)
        sums = loss(model.parameters, one)
        assert float(sums["loss"]) == pytest.approx(errors.loss.total[row], rel=1e-5)
        assert float(sums["weight"]) == errors.loss.weight[row]


def unmixed(model: TrainedModel) -> TrainedModel:
    """No token of the encoder sees another: what attention says is multiplied with zero."""

    def cut(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        names = [key.key for key in path]
        return leaf * 0 if "output" in names and "decoder" not in names else leaf

    parameters = jax.tree.map_with_path(cut, model.parameters)
    zeros = [not leaf.any() for leaf in jax.tree.leaves(parameters)]
    assert sum(zeros) > sum(not leaf.any() for leaf in jax.tree.leaves(model.parameters))
    return replace(model, parameters=parameters)


@pytest.mark.parametrize(("family", "levels"), [("tissue", (0, 2, 4)), ("niche", (1, 3))])
def test_k_changes_the_loss_only_where_the_model_looks_at_neighbours(
    family: str, levels: tuple[int, ...], corpus: Corpus, request: pytest.FixtureRequest
) -> None:
    """The same entries at every k; with tokens kept apart, the same errors of each cell too."""
    model = request.getfixturevalue(family)
    looks, ignores = (
        [held_out_errors(which.with_neighbours(k), corpus, CELLS, seed=SEED) for k in levels]
        for which in (model, unmixed(model))
    )
    for found in (*looks, *ignores):
        for name in {"loss", "nonzero", "zero", "top1"} & found.parts.keys():
            np.testing.assert_array_equal(found.parts[name].weight, looks[0].parts[name].weight)
    for found in ignores[1:]:
        for name in {"loss", "nonzero", "zero"} & found.parts.keys():
            wanted = ignores[0].parts[name].total
            np.testing.assert_allclose(found.parts[name].total, wanted, rtol=2e-6, atol=1e-6)
    for found in looks[1:]:
        some = found.loss.weight > 0
        assert np.median(np.abs(found.loss.total[some] / looks[0].loss.total[some] - 1)) > 1e-3


def test_neither_size_seed_nor_what_is_decoded_changes_the_masked_genes(
    tissue: TrainedModel, of_tissue: HeldOutErrors, corpus: Corpus
) -> None:
    model, _, _ = tissue.config.tissue()
    wider = replace(model, encoder=replace(model.encoder, width=24, heads=1))
    other = model_of(replace(tissue.config, seed=7, model=wider), corpus)
    for sample in (
        SampleConfig(neighbours=0, decoder="vocabulary"),
        SampleConfig(neighbours=0, panel_limit=0),
    ):
        config = replace(other.config, data=replace(other.config.data, sample=sample))
        found = held_out_errors(replace(other, config=config), corpus, CELLS, seed=SEED)
        for name, part in of_tissue.parts.items():
            np.testing.assert_array_equal(found.parts[name].weight, part.weight)
        assert not np.allclose(found.loss.total, of_tissue.loss.total, rtol=0.01)
        check_comparable(tissue.config, config)
    other_mask = held_out_errors(tissue, corpus, CELLS, seed=SEED + 1)
    assert not np.array_equal(other_mask.loss.weight, of_tissue.loss.weight)


@pytest.mark.parametrize("family", ["tissue", "niche"])
def test_neither_batches_nor_order_nor_other_cells_change_a_cell_s_errors(
    family: str, corpus: Corpus, request: pytest.FixtureRequest
) -> None:
    model, errors = request.getfixturevalue(family), request.getfixturevalue(f"of_{family}")
    data = replace(model.config.data, batch_size=5, window=1, length_multiple=48)
    other = replace(model, config=replace(model.config, data=data))
    seen = []
    places = np.random.default_rng(0).permutation(len(CELLS))[:9]
    found = held_out_errors(other, corpus, CELLS[places], seed=SEED, progress=lambda *done: seen.append(done))
    wanted = errors.take(places)
    assert np.array_equal(found.cells, wanted.cells) and found.parts.keys() == wanted.parts.keys()
    for name, part in wanted.parts.items():
        np.testing.assert_array_equal(found.parts[name].weight, part.weight)
        np.testing.assert_allclose(found.parts[name].total, part.total, rtol=1e-5, atol=1e-6)
    assert seen == [(5, 9), (9, 9)]


def test_what_does_not_compare_is_named(tissue: TrainedModel, niche: TrainedModel) -> None:
    config, ranks = tissue.config, niche.config
    _, sample, _ = ranks.nicheformer()
    assert isinstance(sample, RankConfig)
    shorter = replace(ranks, data=replace(ranks.data, sample=replace(sample, length=12)))
    published = replace(config, objective=replace(config.objective, normalise="published"))
    for first, other, field in (
        (config, published, "objective.normalise"),
        (config, ranks, "model"),
        (ranks, config, "model"),
        (ranks, shorter, "data.sample.length"),
    ):
        with pytest.raises(InputError, match=f"^{other.name}: {field} is "):
            check_comparable(first, other)
    check_comparable(ranks, replace(ranks, seed=9, technologies=("simseq",)))


def test_no_cells_are_refused(tissue: TrainedModel, corpus: Corpus) -> None:
    with pytest.raises(InputError, match="no held-out cells"):
        held_out_errors(tissue, corpus, CELLS[:0])


def test_a_diverged_model_has_no_loss(tissue: TrainedModel, of_tissue: HeldOutErrors, corpus: Corpus) -> None:
    """And what is masked is still known."""
    lost = replace(tissue, parameters=jax.tree.map(lambda leaf: leaf * np.nan, tissue.parameters))
    found = held_out_errors(lost, corpus, CELLS, seed=SEED)
    assert np.isnan(found.loss.total[found.loss.weight > 0]).all()
    np.testing.assert_array_equal(found.loss.weight, of_tissue.loss.weight)
    assert np.isnan(loss_and_error(found, np.arange(len(CELLS)))).all()


def made_up(seed: int, *, blocks: int = 40, effect: float = 0.0) -> tuple[HeldOutErrors, np.ndarray]:
    """Blocks that differ, of cells that are alike within them."""
    random = np.random.default_rng(seed)
    block = np.repeat(np.arange(blocks), random.integers(2, 9, blocks))
    weight = random.integers(0, 12, len(block)).astype(np.float64)
    mean = 1 + effect + 0.3 * np.random.default_rng(5).normal(size=blocks)[block]
    loss = CellSums(weight * (mean + 0.1 * random.normal(size=len(block))), weight)
    return HeldOutErrors(np.arange(len(block)), {"loss": loss}, 0, "corpus", {"model": "made up"}), block


def test_the_error_over_blocks_against_scipy() -> None:
    """SciPy draws blocks of its own; 4,000 draws tell a standard error to about 1%."""
    errors, block = made_up(0)
    total, weight = (np.bincount(block, values) for values in errors.loss)
    wanted = scipy.stats.bootstrap(
        (total, weight),
        lambda total, weight, axis=-1: total.sum(axis) / weight.sum(axis),
        paired=True,
        n_resamples=4_000,
        method="percentile",
        rng=np.random.default_rng(1),
    )
    # Names of blocks are of no matter, and cells come in any order.
    mixed = np.random.default_rng(2).permutation(len(block))
    found = loss_and_error(errors.take(mixed), 7 * block[mixed] + 100, draws=4_000)
    assert found.loss == pytest.approx(total.sum() / weight.sum())
    assert found.error == pytest.approx(wanted.standard_error, rel=0.05)
    cell_by_cell = loss_and_error(errors, np.arange(len(block)), draws=4_000)
    assert cell_by_cell.error < 0.7 * found.error  # too sure of itself
    with pytest.warns(DataWarning, match="too narrow"):
        loss_and_error(errors, block % 4)
    assert np.isnan(loss_and_error(errors, block * 0).error)


def test_the_loss_of_each_file(of_tissue: HeldOutErrors, corpus: Corpus) -> None:
    block = np.arange(len(CELLS)) // 2 * 2 + corpus.slide_of(CELLS)
    with pytest.warns(DataWarning, match="too narrow"):
        found = loss_by_source(of_tissue, corpus, block)
    first = corpus.slides[0].n_cells > CELLS
    assert [*found] == ["slide0.h5ad", "slide1.h5ad"]
    for (loss, error), own in zip(found.values(), (first, ~first), strict=True):
        part = of_tissue.loss
        assert loss == pytest.approx(part.total[own].sum() / part.weight[own].sum())
        assert 0 < error < loss


def test_pairs_see_a_difference_that_blocks_hide() -> None:
    """The same cells and blocks, one run better by a hundredth; and what is no pair."""
    errors, block = made_up(0)
    better = replace(errors, parts={"loss": CellSums(0.99 * errors.loss.total, errors.loss.weight)})
    found = paired_loss(better, errors, block)
    assert found.ratio == pytest.approx(0.99) and found.ratio_high < 0.9901
    assert found.difference_high < 0 < loss_and_error(errors, block).error
    assert abs(found.difference) < loss_and_error(errors, block).error
    for other, field in (
        (replace(errors, seed=1), "seed is 0"),
        (replace(errors, corpus="another"), "corpus is 'corpus'"),
        (replace(errors, measure={"model": "other"}), "model is 'made up'"),
        (replace(errors, cells=errors.cells + 1), "cells: differ"),
    ):
        with pytest.raises(InputError, match=field):
            paired_loss(errors, other, block)


def test_what_is_saved_comes_back(of_niche: HeldOutErrors, tmp_path: Path) -> None:
    path = tmp_path / "errors.npz"
    of_niche.save(path)
    again = HeldOutErrors.load(path)
    assert [*again.parts] == [*of_niche.parts] and {*again.parts} == {"loss", "top1", "cut", "niche_cut"}
    for name, part in of_niche.parts.items():
        for found, wanted in zip(again.parts[name], part, strict=True):
            assert found.dtype == np.float64
            np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(again.cells, of_niche.cells)
    assert (again.seed, again.corpus, again.measure) == (SEED, of_niche.corpus, of_niche.measure)
    assert paired_loss(again, of_niche, np.arange(len(CELLS))).ratio == 1
    for content in (b"no archive", path.read_bytes()[:90]):
        path.write_bytes(content)
        with pytest.raises(InputError, match="holds no held-out errors"):
            HeldOutErrors.load(path)
    with pytest.raises(InputError, match="holds no held-out errors"):
        HeldOutErrors.load(tmp_path / "none.npz")
