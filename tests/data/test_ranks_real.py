"""Sentences of real cells in the published vocabulary, against the rule stated plainly from the file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest

from scfm_jax.corpus import Corpus, Source, build_corpus
from scfm_jax.data.ranks import RankConfig, RankReader
from scfm_jax.errors import DataWarning
from scfm_jax.genes import Vocabulary, align, read_gene_names, read_orthologs

DATA = Path(os.environ.get("SCFM_DATA", Path(__file__).parents[3] / "shared" / "data"))
MAPS = DATA.parent / "gene_maps"
# File, species, technology as Nicheformer names it, published means.
FILES = {
    "merfish": ("merfish_mouse_hypothalamus", "mouse", "merfish", "merfish"),
    "xenium": ("xenium_human_breast_10k", "human", "xenium", "xenium"),
    "pbmc": ("chromium_human_pbmc_6k", "human", "10x 3' v2", "dissociated"),
}

pytestmark = pytest.mark.skipif(not DATA.is_dir() or not MAPS.is_dir(), reason=f"no real files in {DATA}")


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary.read(
        MAPS / "nicheformer_model_vocab.h5ad",
        gene_names=read_gene_names(MAPS / "GENCODEv44_Gene_id2name.csv"),
    )


@pytest.fixture(scope="module", params=FILES)
def case(request: pytest.FixtureRequest, vocabulary: Vocabulary, tmp_path_factory: Any) -> Any:
    """A corpus of one file, its counts over the vocabulary as a plain matrix, and its published means."""
    file, species, technology, means = FILES[request.param]
    tables = {
        "gene_names": read_gene_names(MAPS / "GENCODEv44_Gene_id2name.csv"),
        "orthologs": read_orthologs(MAPS / "Ensembl105_Human2Mouse_Genes.csv"),
    }
    folder = tmp_path_factory.mktemp(request.param)
    data = anndata.read_h5ad(DATA / f"{file}.h5ad")
    data = data[np.sort(np.random.default_rng(0).choice(data.n_obs, 300, replace=False))].copy()
    data.write_h5ad(folder / "cells.h5ad")
    source = Source(str(folder / "cells.h5ad"), species, technology, spatial=False)
    build_corpus(folder / "corpus", [source], vocabulary=vocabulary, **tables)
    target = align(list(data.var_names), vocabulary, species=species, **tables).target
    counts = np.zeros((data.n_obs, len(vocabulary)))
    for column, gene in enumerate(target):
        if gene >= 0:
            counts[:, gene] += data.X[:, [column]].toarray()[:, 0]
    return Corpus.open(folder / "corpus"), counts, MAPS / f"{means}_mean_script.npy", technology


def test_the_published_vocabulary(vocabulary: Vocabulary) -> None:
    assert len(vocabulary) == 20_310
    assert vocabulary.species.count("human") == 20_159 and vocabulary.species.count("mouse") == 151


def test_every_published_file_of_means_is_of_the_vocabulary(vocabulary: Vocabulary) -> None:
    from scfm_jax.data.technology_means import read_means, usable_means

    files = sorted(MAPS.glob("*_mean_script.npy"))
    assert len(files) == 5
    for file in files:
        means = read_means(file, len(vocabulary))
        assert (usable_means(means, "exact") > 0).all()
        assert (usable_means(means, "published") != 0).all()
    merfish = read_means(MAPS / "merfish_mean_script.npy", len(vocabulary))
    assert np.isnan(merfish).sum() == 14_505 and (merfish < 0).sum() == 48


@pytest.mark.parametrize("kind", ["exact", "published"])
def test_sentences_with_published_means(case: Any, kind: Any) -> None:
    """Negative means rank last under `published`, as a descending sort puts them."""
    corpus, counts, path, technology = case
    sample = RankConfig(length=400, means=kind, mean_files=(f"{technology}={path}",))
    expressed = counts.any(0)
    if np.isnan(np.load(path)[expressed]).any() or (np.load(path)[expressed] < 0).any():
        with pytest.warns(DataWarning, match="have no mean"):
            read = RankReader(corpus, sample).read(np.arange(corpus.n_cells))
    else:
        read = RankReader(corpus, sample).read(np.arange(corpus.n_cells))
    means = np.load(path)
    if kind == "published":
        means = np.nan_to_num(means)
        means = np.where(means % 1 >= 0.5, np.ceil(means), np.floor(means))
        means[means == 0] = 1
    else:
        means[~(means > 0)] = 1
    modality, species = 3, {"human": 5, "mouse": 6}[corpus.slides[0].species]
    assay = {"merfish": 7, "xenium": 9, "10x 3' v2": 12}[technology]
    cut = 0
    for cell, row in enumerate(corpus.column("source_row")):
        values = (counts[row] / means).astype(np.float32)
        expressed = np.flatnonzero(counts[row])
        genes = sorted(expressed.tolist(), key=lambda gene: (-values[gene], gene))
        stated = [species, assay, modality, *(30 + gene for gene in genes)]
        start, length = read.tokens.starts[cell], read.tokens.lengths[cell]
        assert read.tokens.columns["tokens"][start : start + length].tolist() == stated[:400]
        assert read.cut[cell].tolist() == [max(len(stated) - 400, 0), 0]
        cut += int(read.cut[cell, 0])
    assert (cut > 0) == (technology == "10x 3' v2")


def test_means_of_the_corpus(case: Any) -> None:
    corpus, counts, _, technology = case
    there = counts[counts.sum(1) > 0]
    scaled = there / there.sum(1, keepdims=True) * 10_000
    with np.errstate(invalid="ignore"):
        stated = scaled.sum(0) / (scaled > 0).sum(0)
    np.testing.assert_allclose(corpus.technology_means(technology), stated, rtol=1e-9)
