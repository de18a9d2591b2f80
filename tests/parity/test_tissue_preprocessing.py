"""From the same integer counts: tokens, positions and values against the authors' ``_process_input``."""

from __future__ import annotations

from pathlib import Path

import anndata
import jax
import numpy as np
import pandas as pd
import pytest
from conftest import authors_process

from scfm_jax.corpus import Corpus, Source, build_corpus
from scfm_jax.data.tokens import SampleConfig, SampleReader
from scfm_jax.objectives.column_masking import ColumnMaskingConfig, Visible, visible_tokens

N_GENES, N_CELLS = 50, 40


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder, random = tmp_path_factory.mktemp("counts"), np.random.default_rng(0)
    counts = random.poisson(random.gamma(0.3, 8, (N_CELLS, N_GENES))).astype(np.float32)
    counts[:, 0] += 1
    counts[3, 1] = 700  # over 256, where bfloat16 rounds counts
    slide = anndata.AnnData(counts, var=pd.DataFrame(index=[f"GENE{i}" for i in range(N_GENES)]))
    slide.obsm["spatial"] = random.uniform(0, 100, (N_CELLS, 2))
    slide.write_h5ad(folder / "slide.h5ad")
    source = Source(str(folder / "slide.h5ad"), "human", "simscope", um_per_unit=1.0)
    build_corpus(Path(folder) / "corpus", [source], n_neighbours=8)
    return Corpus.open(folder / "corpus")


def dense(corpus: Corpus, centres: np.ndarray, k: int) -> np.ndarray:
    """What the authors' code reads: a row of (k + 1) x genes counts a sample."""
    members = np.concatenate([centres[:, None], corpus.neighbours(centres, k)], axis=1)
    rows = corpus.cells(members.ravel())
    table = np.zeros((members.size, N_GENES), np.int64)
    table[np.repeat(np.arange(members.size), np.diff(rows.offsets)), rows.genes] = rows.counts
    return table.reshape(len(centres), -1)


@pytest.mark.parametrize("numerics", ["published", "ours"])
@pytest.mark.parametrize("k", [0, 8])
def test_tokens_positions_and_values(corpus: Corpus, k: int, numerics: str) -> None:
    # The authors divide by the sum of the batch, so only a batch of one compares with a total per cell.
    centres = np.array([3, 17, 29]) if numerics == "published" else np.array([17])
    theirs = authors_process(dense(corpus, centres, k), N_GENES)
    samples = SampleReader(corpus, SampleConfig(neighbours=k)).read(centres)
    length = -(-int(samples.tokens.lengths.max()) // 16) * 16  # as theirs pads
    decoded = int(samples.decoder.lengths.max())
    batch = samples.collate(np.arange(len(centres)), length, decoded, len(centres))
    config = ColumnMaskingConfig(published_numerics=numerics == "published")
    mine = Visible(**jax.jit(lambda batch: vars(visible_tokens(batch, None, config, N_GENES)))(batch))

    assert theirs.values.shape == mine.values.shape
    real = np.arange(length) < np.asarray(mine.lengths)[:, None]
    np.testing.assert_array_equal(real, theirs.attention_mask.numpy())
    positions = theirs.positions.numpy()
    np.testing.assert_array_equal(np.asarray(mine.genes)[real], positions[:, 0][real])
    np.testing.assert_array_equal(np.asarray(mine.cells)[real], positions[:, 1][real])
    values, stated = np.asarray(mine.values)[real], theirs.values.numpy()[real]
    if numerics == "published":
        np.testing.assert_array_equal(values, stated)
    else:
        np.testing.assert_allclose(values, stated, rtol=1e-2)
