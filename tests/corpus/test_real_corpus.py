"""The six real files in one corpus."""

from __future__ import annotations

import os
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
from scipy import sparse
from scipy.spatial import cKDTree

from scfm_jax.corpus import Corpus, Source, build_corpus, verify_corpus
from scfm_jax.errors import DataWarning
from scfm_jax.genes import Vocabulary, read_gene_names, read_orthologs

DATA = Path(os.environ.get("SCFM_DATA", Path(__file__).parents[3] / "shared" / "data"))
MAPS = DATA.parent / "gene_maps"
FILES = {
    "merfish_mouse_hypothalamus": {
        "species": "mouse",
        "section": "section",
        "labels": ("cell_type",),
        "um_per_unit": 1.0,
    },
    "cosmx_human_nsclc_lung5_rep3": {"species": "human", "labels": ("region",), "um_per_unit": 0.18},
    "xenium_human_breast_10k": {"species": "human", "labels": ("cell_type",), "spatial": False},
    "extra_xenium_human_breast_34k_unlabelled": {"species": "human", "section": "part", "um_per_unit": 1.0},
    "seqfish_mouse_embryo2": {"species": "mouse", "section": "z", "labels": ("cell_type",)},
    "chromium_human_pbmc_6k": {"species": "human", "spatial": False},
}

pytestmark = pytest.mark.skipif(not DATA.is_dir() or not MAPS.is_dir(), reason=f"no real files in {DATA}")


def source(name: str) -> Source:
    return Source(str(DATA / f"{name}.h5ad"), technology=name.split("_")[0], **FILES[name])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    out = tmp_path_factory.mktemp("real") / "out"
    with pytest.warns(DataWarning) as caught:
        build_corpus(
            out,
            [source(name) for name in FILES],
            gene_names=read_gene_names(MAPS / "GENCODEv44_Gene_id2name.csv"),
            orthologs=read_orthologs(MAPS / "Ensembl105_Human2Mouse_Genes.csv"),
        )
    assert all("extra_xenium" in str(warning.message) for warning in caught)
    return Corpus.open(out)


def test_slides_species_and_wholeness(corpus):
    assert verify_corpus(corpus.path) == []
    n_slides = {name: sum(s.source == f"{name}.h5ad" for s in corpus.slides) for name in FILES}
    assert list(n_slides.values()) == [5, 1, 1, 4, 2, 1]
    assert {slide.species for slide in corpus.slides} == {"human", "mouse"}
    empty = corpus.report["files"][3]["dropped"]["no counts"]
    assert empty == 369 and corpus.n_cells == 27306 + 13463 + 10000 + (34451 - 369) + 14185 + 6565
    codes, classes = corpus.labels("cell_type")
    assert len(classes) > 30 and (codes[corpus.column("x") > -np.inf] >= -1).all()


@pytest.mark.parametrize("name", FILES)
def test_counts_and_neighbours_are_those_of_the_file(corpus, name):
    data = ad.read_h5ad(DATA / f"{name}.h5ad")
    numbers = np.flatnonzero([slide.source == f"{name}.h5ad" for slide in corpus.slides])
    slide = corpus.slides[numbers[-1]]
    index = np.arange(slide.start, slide.start + slide.n_cells)
    rows = corpus.column("source_row", index)
    cells = corpus.cells(index)
    np.testing.assert_array_equal(corpus.column("total_raw", index), np.asarray(data.X[rows].sum(1)).ravel())
    np.testing.assert_array_equal(
        np.add.reduceat(cells.counts, cells.offsets[:-1]), corpus.column("total_matched", index)
    )
    # No gene was merged in these files, so that a cell keeps its counts as a multiset, and a gene its total.
    got = sparse.csr_matrix((cells.counts, cells.genes, cells.offsets), (len(index), len(corpus.vocabulary)))
    np.testing.assert_array_equal(np.diff(cells.offsets), data.X[rows].getnnz(1))
    genes = sorted(np.asarray(data.X[rows].sum(0)).ravel().tolist())
    assert sorted(np.asarray(got.sum(0)).ravel()[slide.panel].tolist()) == genes
    if slide.spatial:
        xy = data.obsm["spatial"][rows]
        expected = cKDTree(xy).query(xy, 9)[0][:, 1:]
        np.testing.assert_allclose(corpus.distances(index, 8), expected, rtol=1e-5)
        found = corpus.neighbours(index, 8) - slide.start
        np.testing.assert_allclose(np.linalg.norm(xy[found] - xy[:, None], axis=2), expected, rtol=1e-12)


def test_cosmx_loses_counts_to_the_19264_genes_and_says_so(tmp_path):
    genes = Vocabulary.read(MAPS / "OS_scRNA_gene_index.19264.tsv", species="human")
    with pytest.warns(DataWarning, match=r"12\.\d% of counts are lost"):
        report = build_corpus(tmp_path / "out", [source("cosmx_human_nsclc_lung5_rep3")], vocabulary=genes)
    assert report["n_genes"] == 19264 and report["files"][0]["genes"]["n_unmatched"] > 0
