"""Corpora of cells at places that a test chooses."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import anndata
import numpy as np
import pandas as pd
import pytest

from scfm_jax.corpus import Corpus, Source, build_corpus


@pytest.fixture(scope="module")
def place_cells(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Corpus]:
    """Build a corpus with a slide for each array of places; `None` stands for 20 dissociated cells."""

    def place_cells(
        places: Sequence[np.ndarray | None], um: float | Sequence[float] | None, n_neighbours: int = 12
    ) -> Corpus:
        folder, rng, sources = tmp_path_factory.mktemp("placed"), np.random.default_rng(0), []
        for number, xy in enumerate(places):
            n = 20 if xy is None else len(xy)
            data = anndata.AnnData(
                rng.integers(1, 5, size=(n, 6)).astype(np.float32),
                obs=pd.DataFrame(index=[f"cell{cell}" for cell in range(n)]),
                var=pd.DataFrame(index=[f"GENE{gene}" for gene in range(6)]),
            )
            spatial = xy is not None
            if spatial:
                data.obsm["spatial"] = xy
            path = folder / f"slide{number}.h5ad"
            data.write_h5ad(path)
            unit = um[number] if isinstance(um, Sequence) else um
            sources.append(
                Source(str(path), "human", "sim", spatial=spatial, um_per_unit=unit if spatial else None)
            )
        build_corpus(folder / "corpus", sources, n_neighbours=n_neighbours)
        return Corpus.open(folder / "corpus")

    return place_cells
