"""Perturbation of a gene in the neighbours: exact zeros where nothing changes, and files changed by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import anndata
import jax
import numpy as np
import pandas as pd
import pytest
from flax import nnx
from scipy.spatial.distance import cosine

from scfm_jax.corpus import Corpus
from scfm_jax.data.tokens import SampleConfig
from scfm_jax.downstream.model import TrainedModel, open_model
from scfm_jax.downstream.perturb import (
    Change,
    Perturbed,
    change_neighbours,
    perturb,
    perturb_neighbours,
    perturbation_table,
)
from scfm_jax.errors import DataWarning, InputError

CELLS = np.arange(160, 200)
WIDTH = 80


@pytest.fixture(scope="module")
def model(finished) -> TrainedModel:
    return open_model(finished)


@pytest.fixture(scope="module")
def corpus(corpus_path) -> Corpus:
    return Corpus.open(corpus_path)


@pytest.fixture(scope="module")
def dense(corpus: Corpus) -> np.ndarray:
    read = corpus.cells(np.arange(corpus.n_cells))
    counts = np.zeros((corpus.n_cells, len(corpus.vocabulary)), int)
    counts[np.repeat(np.arange(corpus.n_cells), np.diff(read.offsets)), read.genes] = read.counts
    return counts


@pytest.fixture(scope="module")
def gene(corpus: Corpus, dense: np.ndarray) -> int:
    """Expressed by some neighbours of some cells, and by no neighbour of others."""
    around = (dense[corpus.neighbours(CELLS, 2)] > 0).any(1).mean(0)
    return int(np.abs(around - 0.6).argmin())


@pytest.fixture(scope="module")
def found(model: TrainedModel, corpus: Corpus, gene: int) -> Perturbed:
    return perturb_neighbours(model, corpus, CELLS, Change(name(corpus, gene)))


def name(corpus: Corpus, gene: int) -> str:
    return corpus.vocabulary.ids[gene]


def test_where_no_neighbour_expresses_it_nothing_moves_at_all(found, corpus, dense, gene):
    expressing = (dense[corpus.neighbours(CELLS, 2), gene] > 0).sum(1)
    np.testing.assert_array_equal(found.changed, expressing)
    still = expressing == 0
    assert 5 < still.sum() < 35
    assert not np.nan_to_num(found.delta[still]).any()
    assert not found.norm[still].any()
    assert (np.abs(found.delta[~still]).max(1) > 1e-5).all()
    assert (found.norm[~still] > 1e-5).all()
    np.testing.assert_allclose(found.cosine[still], 1, rtol=1e-6)
    panel = corpus.slides[1].panel
    np.testing.assert_array_equal(found.genes, panel[panel != gene])
    assert not np.isnan(found.delta).any()


@pytest.mark.parametrize("what", ["times one", "no neighbours"])
def test_a_change_that_changes_nothing(model, corpus, gene, what):
    change = Change(name(corpus, gene), factor=1.0 if what == "times one" else 0.0)
    if what == "no neighbours":
        data = dataclasses.replace(model.config.data, sample=SampleConfig(neighbours=0))
        model = dataclasses.replace(model, config=dataclasses.replace(model.config, data=data))
    same = perturb_neighbours(model, corpus, CELLS[:16], change)
    assert not same.delta.any() and not same.changed.any() and not same.norm.any()


def by_hand(batch: Any, row: int) -> set[tuple[int, int, float, int]]:
    real = np.asarray(batch.cells[row]) >= 0
    columns = (batch.cells, batch.genes, batch.counts, batch.slots)
    return set(zip(*(np.asarray(column[row])[real].tolist() for column in columns), strict=True))


@pytest.mark.parametrize("settings", [{"factor": 0.0}, {"factor": 2.5}, {"count": 7.0}, {"count": 0.0}])
def test_only_the_genes_tokens_change_and_only_in_neighbours(model, corpus, dense, gene, settings):
    change = Change(name(corpus, gene), **settings)
    rows, batch = next(iter(model.batches(corpus, CELLS, rates=None)))
    slot = (batch.decoder_genes == gene).argmax(1)
    before, after, changed = change_neighbours(batch, gene, slot, change)
    assert jax.tree.map(np.shape, before) == jax.tree.map(np.shape, after)
    np.testing.assert_array_equal(after.totals, batch.totals)
    for row, cell in enumerate(CELLS[rows]):
        tokens = by_hand(batch, row)
        assert by_hand(before, row) == tokens
        expected, moved = {token for token in tokens if token[0] == 0 or token[1] != gene}, 0
        for rank, near in enumerate(corpus.neighbours(np.array([cell]), 2)[0], 1):
            old = dense[near, gene]
            new = settings["count"] if "count" in settings else old * settings["factor"]
            moved += new != old
            if new:
                expected.add((rank, gene, new, int(slot[row])))
        assert by_hand(after, row) == expected
        assert changed[row] == moved


def tokens_by_hand(
    corpus: Corpus, dense: np.ndarray, cell: int, masked: np.ndarray, without: int | None
) -> tuple[np.ndarray, ...]:
    """A sample's genes, values, cells and number, listed token by token and padded to `WIDTH`."""
    n_genes, listed = dense.shape[1], []
    for rank, member in enumerate([cell, *corpus.neighbours(np.array([cell]), 2)[0]]):
        counts = np.where(masked, 0, dense[member])
        total = counts.sum()
        for gene in np.flatnonzero(counts):
            if rank == 0 or gene != without:
                listed.append((gene, np.log1p(counts[gene] / total * corpus.slides[1].median_total), rank))
        listed += [(n_genes, np.log10(total), rank), (n_genes + 1, np.log10(total), rank)]
    columns = (np.pad(column, (0, WIDTH - len(listed))) for column in np.array(listed).T)
    genes, values, cells = columns
    cells[len(listed) :] = -1
    return genes.astype(int), values.astype(np.float32), cells.astype(int), np.array([len(listed)])


def test_the_difference_is_that_of_samples_made_by_hand(found, model, corpus, dense, gene):
    module = nnx.merge(model.graph, model.parameters)
    encode, decode = jax.jit(module.encode), jax.jit(module.decode)
    row = int(np.abs(found.delta).max(1).argmax())
    n_genes = dense.shape[1]
    listed = np.array([*corpus.slides[1].panel, n_genes, n_genes + 1])
    dealt = np.random.default_rng(0).permutation(np.arange(len(found.genes)) % 4)
    group = dealt[np.abs(found.delta[row]).argmax()]
    masked = np.isin(np.arange(n_genes + 2), found.genes[dealt == group])
    said, embedded = [], []
    for without in (None, gene):
        for hidden_genes, out in ((masked[:n_genes], said), (np.zeros(n_genes, bool), embedded)):
            genes, values, cells, length = tokens_by_hand(
                corpus, dense, int(CELLS[row]), hidden_genes, without
            )
            places = np.stack([genes, np.maximum(cells, 0)], -1)[None].astype(np.float32)
            hidden = encode(genes[None], values[None], places, length)
            if out is embedded:
                out.append(np.asarray(hidden)[0, (cells == 0) & (genes < n_genes)].mean(0))
                continue
            slots = np.where(cells == 0, np.searchsorted(listed, genes), -1)
            places = np.stack([listed, 0 * listed], -1)[None].astype(np.float32)
            raw = decode(
                hidden, slots[None], listed[None], masked[listed][None], places, np.array([len(listed)])
            )
            out.append(np.asarray(raw)[0, masked[listed]])
    np.testing.assert_allclose(found.delta[row, dealt == group], said[1] - said[0], atol=2e-6)
    assert np.abs(said[1] - said[0]).max() > 2e-5
    np.testing.assert_allclose(1 - found.cosine[row], cosine(*embedded), atol=1e-6)
    norm = np.linalg.norm(embedded[1] - embedded[0]) / np.linalg.norm(embedded[0])
    np.testing.assert_allclose(found.norm[row], norm, rtol=1e-3)


def test_the_table_is_the_mean_over_cells_that_something_changed_around(found, corpus):
    block = np.arange(len(CELLS)) // 4
    table = perturbation_table(found, corpus, block).set_index("gene")
    there = found.changed > 0
    means = pd.DataFrame(found.delta[there], columns=[name(corpus, gene) for gene in found.genes])
    np.testing.assert_allclose(table["delta"], means.astype(float).mean()[table.index], rtol=1e-5)
    assert (table["cells"] == there.sum()).all()
    assert table["delta"].abs().is_monotonic_decreasing
    assert ((table["low"] <= table["delta"]) & (table["delta"] <= table["high"])).all()
    with pytest.warns(DataWarning, match="over 5 blocks: its intervals are too narrow"):
        perturbation_table(found, corpus, block // 2)


def test_the_interval_has_the_width_of_a_mean_over_blocks(corpus):
    """Cells of a block are copies of one another: the interval must be that of as many cells as blocks."""
    rng = np.random.default_rng(0)
    blocks, copies = 200, 9
    values = rng.normal(0.3, 1, (blocks, 1)).astype(np.float32)
    n = blocks * copies
    delta = np.repeat(values, copies, axis=0)
    one = np.ones(n)
    found = Perturbed(np.arange(n), np.array([0]), delta, one.astype(int), one, one)
    row = perturbation_table(found, corpus, np.repeat(np.arange(blocks), copies), n_draws=4000).iloc[0]
    error = values.std() / np.sqrt(blocks)
    np.testing.assert_allclose(
        [row["low"], row["high"]], values.mean() + np.array([-1.96, 1.96]) * error, atol=0.02
    )


def test_an_anndata_gets_the_table_in_place(model, corpus, corpus_path, found, gene, tmp_path):
    adata = anndata.read_h5ad(corpus_path.parent / "slide1.h5ad")
    change = Change(name(corpus, gene))
    perturb(adata, model, change, blocks=4, species="human", technology="simseq", um_per_unit=1.0)
    adata.write_h5ad(tmp_path / "out.h5ad")
    out = anndata.read_h5ad(tmp_path / "out.h5ad")
    assert list(out.uns["perturbation"]) == ["gene", "delta", "low", "high", "cells"]
    rows = corpus.column("source_row")[CELLS]
    np.testing.assert_array_equal(out.obs["perturbation_changed"].iloc[rows], found.changed)
    np.testing.assert_allclose(out.obs["perturbation_cosine"].iloc[rows], found.cosine, atol=1e-5)


def test_bad_input(model, corpus, found, gene):
    with pytest.raises(InputError, match="'TYPO' was not measured around the cells"):
        perturb_neighbours(model, corpus, CELLS, Change("TYPO"))
    with pytest.raises(InputError, match="passes: is 1; give 2 or more"):
        perturb_neighbours(model, corpus, CELLS, Change(name(corpus, gene)), passes=1)
    with pytest.raises(InputError, match="factor is -1"):
        Change("A", factor=-1)
    with pytest.raises(InputError, match="1 block has changed neighbours"):
        perturbation_table(found, corpus, np.zeros(len(CELLS), int))
    still = dataclasses.replace(found, changed=found.changed * 0)
    with pytest.raises(InputError, match="no neighbour of any cell changed"):
        perturbation_table(still, corpus, np.arange(len(CELLS)))
