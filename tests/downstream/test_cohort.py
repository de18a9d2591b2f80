"""Two files of different panels opened together, and seen through the vocabulary of a model."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace

import anndata
import numpy as np
import pandas as pd
import pytest

from scfm_jax.corpus import Corpus, Source, build_corpus
from scfm_jax.downstream.cohort import open_cohort
from scfm_jax.errors import DataWarning, InputError

PANELS = {"one": range(12), "two": range(2, 14)}  # 2 to 11 are shared
UNSEEN = {"one": [3, 70], "two": [0, 1, 41]}  # rows that have none of the genes 0 to 5


def write(path: Path, genes, counts, spatial=True):
    data = anndata.AnnData(
        counts.astype(np.float32),
        obs=pd.DataFrame({"kind": np.where(np.arange(len(counts)) % 3, "x", "y")}).set_axis(
            [f"cell{cell}" for cell in range(len(counts))]
        ),
        var=pd.DataFrame(index=[f"GENE{gene}" for gene in genes]),
    )
    if spatial:
        data.obsm["spatial"] = np.random.default_rng(len(counts)).random((len(counts), 2)) * 50
    data.write_h5ad(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("cohort"), np.random.default_rng(0)
    for name, n in (("one", 90), ("two", 60)):
        counts = rng.poisson(2.0, (n, 12)) + (np.arange(12) == 11)
        counts[np.ix_(UNSEEN[name], np.array(PANELS[name]) < 6)] = 0
        write(folder / f"{name}.h5ad", PANELS[name], counts)
    return folder


@pytest.fixture(scope="module")
def sources(folder):
    return [
        Source(str(folder / "one.h5ad"), "human", "x", labels=("kind",), um_per_unit=0.5),
        Source(str(folder / "two.h5ad"), "human", "y", labels=("kind",)),
    ]


@pytest.fixture(scope="module")
def cohort(folder, sources):
    return open_cohort(folder / "cohort", sources)


def in_corpus_order(corpus, folder):
    """Each cell's counts by name of gene, NaN where its file did not measure it."""
    read = {name: anndata.read_h5ad(folder / f"{name}.h5ad").to_df() for name in PANELS}
    rows = corpus.column("source_row")
    names = [corpus.slides[slide].name for slide in corpus.slide_of(np.arange(corpus.n_cells))]
    return pd.DataFrame([read[name].iloc[row] for name, row in zip(names, rows)])


def test_log_counts_are_of_the_genes_that_all_files_measured(cohort, folder):
    counts = in_corpus_order(cohort.corpus, folder)[[f"GENE{gene}" for gene in range(2, 12)]].to_numpy()
    depth = counts.sum(1)
    expected = np.log1p(counts / depth[:, None] * np.median(depth))
    found = cohort.log_counts.toarray()
    order = np.argsort([int(name[4:]) for name in np.array(cohort.corpus.vocabulary.symbols)[shared(cohort)]])
    assert found.dtype == np.float32 and found[:, order] == pytest.approx(expected, rel=1e-5)


def shared(cohort):
    return np.intersect1d(*(slide.panel for slide in cohort.corpus.slides))


def test_places_slides_and_neighbours(cohort, folder):
    corpus, rows = cohort.corpus, cohort.corpus.column("source_row")
    assert corpus.n_cells == 150 and np.bincount(cohort.slide).tolist() == [90, 60]
    for slide, (name, um) in enumerate((("one", 0.5), ("two", 1.0))):
        own = cohort.slide == slide
        xy = anndata.read_h5ad(folder / f"{name}.h5ad").obsm["spatial"][rows[own]] * um
        assert cohort.xy[own] == pytest.approx(xy, rel=1e-5)
        distance = np.linalg.norm(xy[:, None] - xy, axis=-1)
        nearest = np.argsort(distance, axis=1)[:, 1:6]
        assert np.array_equal(cohort.neighbours(5)[own] - np.flatnonzero(own)[0], nearest)
    assert (cohort.neighbours(256)[:, 100:] < 0).all()


def model(tmp_path, genes):
    """All that a cohort asks of a model: a vocabulary and a name."""
    write(tmp_path / "genes.h5ad", genes, np.ones((4, len(genes)), int), spatial=False)
    source = Source(str(tmp_path / "genes.h5ad"), "human", "x", spatial=False)
    build_corpus(tmp_path / "genes", [source], n_neighbours=1)
    vocabulary = Corpus.open(tmp_path / "genes").vocabulary
    return SimpleNamespace(vocabulary=vocabulary, config=SimpleNamespace(name="small"))


def test_a_model_sees_the_same_cells_by_its_own_genes(cohort, folder, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # 6 of 12 genes are half
        corpus, number = cohort.seen_by(model(tmp_path, [*range(6), 20, 21, 12, 13]))
    unseen = [
        (cohort.corpus.slides[slide].name, row)
        for slide, row, to in zip(cohort.slide, cohort.corpus.column("source_row"), number)
        if to < 0
    ]
    assert sorted(unseen) == [(name, row) for name, rows in UNSEEN.items() for row in rows if name == "one"]
    there = np.flatnonzero(number >= 0)
    assert np.array_equal(np.sort(number[there]), np.arange(corpus.n_cells))
    theirs = corpus.cells(number[there])
    symbols = np.array(corpus.vocabulary.symbols)
    counts = in_corpus_order(cohort.corpus, folder)
    for place in (0, 50, 100, len(there) - 1):
        cell = slice(theirs.offsets[place], theirs.offsets[place + 1])
        own = counts.iloc[there[place]].reindex(symbols).fillna(0)
        own = own[own > 0].astype(int)
        assert dict(zip(symbols[theirs.genes[cell]], theirs.counts[cell])) == own.to_dict()


def test_few_shared_genes_are_told_and_too_few_refused(cohort, tmp_path):
    (tmp_path / "few").mkdir()
    few = model(tmp_path / "few", range(7, 12))
    with (
        pytest.warns(DataWarning, match=r"one.h5ad: small knows 5 of its 12 genes"),
        pytest.warns(DataWarning, match=r"two.h5ad: small knows 5 of its 12 genes"),
    ):
        cohort.seen_by(few)
    with pytest.raises(InputError, match=r"one.h5ad: small knows 1 of its 12 genes.*--gene-names"):
        cohort.seen_by(model(tmp_path, [11, *range(20, 30)]))


def test_its_own_vocabulary_needs_no_second_corpus(cohort):
    same = SimpleNamespace(vocabulary=cohort.corpus.vocabulary, config=SimpleNamespace(name="own"))
    corpus, number = cohort.seen_by(same)
    assert corpus is cohort.corpus and np.array_equal(number, np.arange(150))


def test_files_without_common_genes_have_no_log_counts(folder, tmp_path):
    write(tmp_path / "far.h5ad", range(11, 23), np.ones((30, 12), int))
    sources = [Source(str(path), "human", "x") for path in (folder / "one.h5ad", tmp_path / "far.h5ad")]
    with pytest.raises(InputError, match="its files have 1 measured genes in common"):
        _ = open_cohort(tmp_path / "cohort", sources).log_counts
