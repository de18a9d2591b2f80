"""A small corpus of simulated slides, and the same cells as plain matrices from the files themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import anndata
import numpy as np
import pytest
from jaxtyping import Float, Int
from scipy.spatial import KDTree

from scfm_jax.corpus import Corpus, Source, build_corpus
from scfm_jax.simulate import SimulationConfig, simulate

STORED_NEIGHBOURS = 8


@dataclass(frozen=True)
class Known:
    """What the loader must reproduce, by cell number; of the corpus only the order of cells went into it.

    Attributes
    ----------
    counts
        Raw counts over the vocabulary; -1 where the cell's slide did not measure the gene.
    places
        Coordinates in um; NaN without.
    nearest
        Cell numbers of the stored neighbours, nearest first, -1 where there are fewer.
    slide
        Slide of each cell.
    """

    corpus: Corpus
    counts: Int[np.ndarray, "cells genes"]
    places: Float[np.ndarray, "cells 2"]
    nearest: Int[np.ndarray, "cells k"]
    slide: Int[np.ndarray, " cells"]


@pytest.fixture(scope="session")
def known(tmp_path_factory: pytest.TempPathFactory) -> Known:
    """Two slides with different panels (one not in um), one without coordinates, one of three cells."""
    folder = tmp_path_factory.mktemp("loader")
    first, second = simulate(
        SimulationConfig(
            n_slides=2,
            cells_per_slide=330,
            n_genes=60,
            technologies=(("wide", 45), ("narrow", 40)),
            n_triples=3,
            depth=60.0,
        )
    )
    alone = first[::4].copy()
    few = first[:3].copy()
    labels = ("cell_type", "domain")
    files: dict[str, tuple[anndata.AnnData, dict[str, Any]]] = {
        "first": (first, {"um_per_unit": 1.0, "labels": labels}),
        "second": (second, {"um_per_unit": 0.5, "labels": labels}),
        "alone": (alone, {"spatial": False}),
        "few": (few, {}),
    }
    sources = []
    for name, (data, fields) in files.items():
        path = folder / f"{name}.h5ad"
        data.write_h5ad(path)
        sources.append(Source(path=str(path), species="human", technology="sim", **fields))
    build_corpus(folder / "corpus", sources, n_neighbours=STORED_NEIGHBOURS)
    corpus = Corpus.open(folder / "corpus")
    parts = [
        _plain(corpus, number, *files[slide.source.removesuffix(".h5ad")])
        for number, slide in enumerate(corpus.slides)
    ]
    counts, places, nearest = (np.concatenate(part) for part in zip(*parts))
    sizes = [slide.n_cells for slide in corpus.slides]
    return Known(corpus, counts, places, nearest, np.repeat(np.arange(len(sizes)), sizes))


def _plain(
    corpus: Corpus, number: int, data: anndata.AnnData, fields: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    slide = corpus.slides[number]
    rows = corpus.column("source_row", np.arange(slide.start, slide.start + slide.n_cells))
    counts = np.full((len(rows), len(corpus.vocabulary)), -1, np.int64)
    counts[:, [corpus.vocabulary.ids.index(name) for name in data.var_names]] = data.X.toarray()[rows]
    nearest = np.full((len(rows), STORED_NEIGHBOURS), -1, np.int64)
    if not fields.get("spatial", True):
        return counts, np.full((len(rows), 2), np.nan), nearest
    places = data.obsm["spatial"][rows]
    near = min(STORED_NEIGHBOURS, len(rows) - 1)
    nearest[:, :near] = slide.start + np.asarray(KDTree(places).query(places, near + 1)[1])[:, 1:]
    return counts, places * fields.get("um_per_unit", 1.0), nearest
