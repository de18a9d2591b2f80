"""For the tests of the corpus: a small tissue by NumPy and SciPy alone, and a corpus of simulated slides."""

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
from scfm_jax.simulate import SimulationConfig, simulate


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


@pytest.fixture(scope="session")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Three spatial slides of one tissue, and the third again without its coordinates."""
    folder = tmp_path_factory.mktemp("simulated")
    slides = simulate(SimulationConfig(n_slides=3, cells_per_slide=300))
    sources = []
    for number, slide in enumerate(slides):
        slide.obs["half_known"] = np.where(np.arange(300) < 150, slide.obs["domain"].astype(str), np.nan)
        slide.write_h5ad(folder / f"slide{number}.h5ad")
        labels = ("domain", "half_known")
        sources.append(Source(str(folder / f"slide{number}.h5ad"), "human", "simscope", labels=labels))
    ad.AnnData(slides[2].X, obs=slides[2].obs, var=slides[2].var).write_h5ad(folder / "loose.h5ad")
    sources.append(Source(str(folder / "loose.h5ad"), "human", "simseq", spatial=False, labels=("domain",)))
    build_corpus(folder / "corpus", sources, n_neighbours=12)
    return Corpus.open(folder / "corpus")
