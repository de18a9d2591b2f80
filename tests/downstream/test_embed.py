"""Embeddings: of every cell, in the file's order, and of nothing but the cell's own tissue."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest

from scfm_jax.corpus import Source
from scfm_jax.downstream.embed import EmbeddingConfig, embed_file
from scfm_jax.downstream.model import TrainedModel, open_model
from scfm_jax.errors import InputError


@pytest.fixture(scope="module")
def model(finished: Path) -> TrainedModel:
    return open_model(finished)


@pytest.fixture(scope="module")
def slide(corpus_path: Path) -> Path:
    return corpus_path.parent / "slide1.h5ad"


def embed(model: TrainedModel, path: Path, folder: Path, **settings: Any) -> anndata.AnnData:
    out = folder / "out.h5ad"
    out.unlink(missing_ok=True)
    embed_file(model, Source(str(path), "human", "simseq", um_per_unit=1.0), out, **settings)
    return anndata.read_h5ad(out)


@pytest.fixture(scope="module")
def embedded(model: TrainedModel, slide: Path, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    return embed(model, slide, tmp_path_factory.mktemp("embedded")).obsm["X_tissue"]


def test_every_cell_has_one_and_the_record_says_how(model, slide, tmp_path):
    out = embed(model, slide, tmp_path, key_added="X_here")
    original = anndata.read_h5ad(slide)
    assert out.obs_names.equals(original.obs_names)
    assert (out.X != original.X).nnz == 0
    assert out.obsm["X_here"].shape == (original.n_obs, 16)
    assert np.isfinite(out.obsm["X_here"]).all()
    assert np.unique(out.obsm["X_here"], axis=0).shape[0] == original.n_obs
    record = out.uns["X_here"]
    assert record["model_hash"] == model.hash
    assert record["neighbours"] == 2
    assert record["pooling"] == "mean"


@pytest.mark.parametrize(
    "data", [{"batch_size": 5}, {"window": 1}, {"length_multiple": 32}, {"batch_size": 3, "window": 7}]
)
def test_neither_batch_nor_chunk_changes_it(model, slide, embedded, tmp_path, data):
    config = dataclasses.replace(model.config, data=dataclasses.replace(model.config.data, **data))
    again = embed(dataclasses.replace(model, config=config), slide, tmp_path).obsm["X_tissue"]
    np.testing.assert_allclose(again, embedded, rtol=1e-5, atol=1e-5)


def test_the_order_of_rows_does_not_change_it(model, slide, embedded, tmp_path):
    order = np.random.default_rng(0).permutation(len(embedded))
    anndata.read_h5ad(slide)[order].copy().write_h5ad(tmp_path / "shuffled.h5ad")
    shuffled = embed(model, tmp_path / "shuffled.h5ad", tmp_path).obsm["X_tissue"]
    np.testing.assert_allclose(shuffled, embedded[order], rtol=1e-5, atol=1e-5)


def test_a_far_cell_does_not_change_it_and_a_neighbour_does(model, slide, embedded, tmp_path):
    data = anndata.read_h5ad(slide)
    distance = np.linalg.norm(data.obsm["spatial"] - data.obsm["spatial"][0], axis=1)
    counts = data.X.tolil()
    neighbour = np.argsort(distance)[1]
    # Swapping two genes keeps the cell's total, and with it the slide's median.
    counts[neighbour, [0, 1]] = counts[neighbour, [1, 0]].toarray() + np.array([[0, 0]])
    counts[neighbour, :] = counts[neighbour, ::-1].toarray()
    data.X = counts.tocsr()
    data.write_h5ad(tmp_path / "changed.h5ad")
    changed = embed(model, tmp_path / "changed.h5ad", tmp_path).obsm["X_tissue"]
    moved = np.abs(changed - embedded).max(1) > 1e-5
    assert moved[0]
    assert not moved[np.argsort(distance)[-20:]].any()


def test_other_numbers_of_neighbours(model, slide, embedded, tmp_path):
    alone = embed(model.with_neighbours(0), slide, tmp_path)
    assert alone.uns["X_tissue"]["neighbours"] == 0
    assert np.abs(alone.obsm["X_tissue"] - embedded).max() > 1e-3
    again = embed(model.with_neighbours(0).with_neighbours(2), slide, tmp_path).obsm["X_tissue"]
    np.testing.assert_array_equal(again, embedded)
    with pytest.raises(InputError, match="cannot read -1 neighbours"):
        model.with_neighbours(-1)


def test_a_model_of_exchanged_neighbours_reads_exchanged_neighbours(model, slide, embedded, tmp_path):
    sample = dataclasses.replace(model.config.data.sample, skip_nearest=1, exchanged_within=("cell_type",))
    data = dataclasses.replace(model.config.data, sample=sample)
    control = dataclasses.replace(model, config=dataclasses.replace(model.config, data=data))
    source = Source(str(slide), "human", "simseq", um_per_unit=1.0, labels=("cell_type",))
    embed_file(control, source, tmp_path / "control.h5ad")
    found = anndata.read_h5ad(tmp_path / "control.h5ad")
    assert found.uns["X_tissue"]["neighbours"] == 2
    assert (np.abs(found.obsm["X_tissue"] - embedded).max(1) > 1e-3).mean() > 0.9
    with pytest.raises(InputError, match="exchanged_within names 'cell_type', no label of the corpus"):
        embed(control, slide, tmp_path)
    # Of cells alone, no label is asked.
    alone = [embed(each.with_neighbours(0), slide, tmp_path).obsm["X_tissue"] for each in (control, model)]
    np.testing.assert_array_equal(*alone)


def test_cells_without_counts_are_nan_and_counted(model, slide, tmp_path):
    data = anndata.read_h5ad(slide)
    counts = data.X.tolil()
    counts[7] = 0
    data.X = counts.tocsr()
    data.write_h5ad(tmp_path / "empty_cell.h5ad")
    out = embed(model, tmp_path / "empty_cell.h5ad", tmp_path)
    assert np.isnan(out.obsm["X_tissue"][7]).all()
    assert np.isfinite(np.delete(out.obsm["X_tissue"], 7, axis=0)).all()
    assert out.uns["X_tissue"]["cells_without_counts"] == 1


def test_the_maximum_is_another_pooling(model, slide, embedded, tmp_path):
    highest = embed(model, slide, tmp_path, config=EmbeddingConfig("max")).obsm["X_tissue"]
    assert (highest >= embedded - 1e-5).all()
    assert (highest > embedded + 1e-3).any()


def test_an_existing_output_stays(model, slide, tmp_path):
    (tmp_path / "out.h5ad").write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        embed_file(model, Source(str(slide), "human", "simseq"), tmp_path / "out.h5ad")
    assert (tmp_path / "out.h5ad").read_text() == "mine"


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(InputError, match="no run directory"):
        open_model(tmp_path)
