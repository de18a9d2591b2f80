"""A small tissue made with NumPy and SciPy alone, for the tests of the corpus."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from scfm_jax.corpus import Corpus, Source, build_corpus
from scfm_jax.corpus import build as build_module


def make_tissue(n_cells: int = 300, n_genes: int = 40, seed: int = 0) -> ad.AnnData:
    """Random counts and places; two sections; no empty cell; labels with all the ways to be missing."""
    rng = np.random.default_rng(seed)
    dense = rng.poisson(0.6, (n_cells, n_genes)).astype(np.float32)
    dense[:, 0] += 1
    types = np.array(["T", "B", "nan", "None", "NA", "NK"], object)[rng.integers(0, 6, n_cells)]
    types[:3] = np.nan
    obs = pd.DataFrame(
        {"type": types, "section": rng.choice(["s1", "s2"], n_cells), "px": rng.random(n_cells), "py": 1.0},
        index=[f"cell{i}" for i in range(n_cells)],
    )
    var = pd.DataFrame(index=[f"GENE{i}" for i in range(n_genes)])
    return ad.AnnData(sparse.csr_matrix(dense), obs, var, obsm={"spatial": rng.random((n_cells, 2)) * 100})


@pytest.fixture
def tissue() -> ad.AnnData:
    return make_tissue()


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Source]:
    """Write an AnnData and say how to read it."""

    def write(data: ad.AnnData, name: str = "tissue", **fields: object) -> Source:
        path = tmp_path / f"{name}.h5ad"
        data.write_h5ad(path)
        return Source(
            **{"path": str(path), "species": "human", "technology": "sim", "section": "section", **fields}
        )

    return write


@pytest.fixture
def expected(sources, tmp_path) -> str:
    """Hash of the corpus of a module's `sources`, built in one process and without a stop."""
    build_corpus(tmp_path / "expected", sources)
    return Corpus.open(tmp_path / "expected").hash


@pytest.fixture
def small_jobs(monkeypatch) -> None:
    monkeypatch.setattr(build_module, "_ENTRIES_OF_A_JOB", 1)
