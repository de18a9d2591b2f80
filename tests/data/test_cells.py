"""Raw counts in batches: whole epochs of the right counts, resumed at any step, whatever reads ahead."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from scfm_jax.data.cells import CellBatches
from scfm_jax.errors import InputError


def same(one, other) -> bool:
    fields = ("genes", "counts", "offsets")
    return np.array_equal(one.index, other.index) and all(
        np.array_equal(getattr(one.cells, field), getattr(other.cells, field)) for field in fields
    )


@pytest.mark.parametrize("pools", [1, 3])
@pytest.mark.parametrize("batch_size", [7, 64, 150])
def test_iterating_gives_the_batch_of_each_step(known, batch_size, pools):
    centres = np.arange(known.corpus.n_cells)[::2]

    def make(n: int) -> CellBatches:
        return CellBatches(known.corpus, centres, batch_size=batch_size, seed=3, pool_blocks=2, pools=n)

    plain = [make(1).batch(step) for step in range(40)]
    for start in (0, 5, 39):
        found = list(make(pools).iterate(start, 40))
        assert len(found) == 40 - start and all(map(same, found, plain[start:]))
    endless = itertools.islice(make(pools).iterate(33), 7)
    assert all(map(same, endless, plain[33:]))


def test_an_epoch_holds_every_cell_once_with_its_counts(known):
    n_cells = known.corpus.n_cells
    seen = []
    for batch in CellBatches(known.corpus, np.arange(n_cells), batch_size=1, pool_blocks=3).iterate(
        0, n_cells
    ):
        (cell,) = batch.index
        seen.append(cell)
        measured = np.maximum(known.counts[cell], 0)
        assert np.array_equal(batch.cells.genes, np.flatnonzero(measured))
        assert np.array_equal(
            batch.cells.counts, measured[batch.cells.genes]
        ) and batch.cells.offsets.tolist() == [
            0,
            len(batch.cells.genes),
        ]
    assert sorted(seen) == list(range(n_cells))


def test_shards_have_cells_of_their_own(known):
    everything = np.arange(known.corpus.n_cells)
    parts = [
        CellBatches(known.corpus, everything, batch_size=1, pool_blocks=2, shard=(number, 3))
        for number in range(3)
    ]
    sizes = [part._streams.sizes[number] for number, part in enumerate(parts)]
    drawn = [int(b.index[0]) for part, size in zip(parts, sizes) for b in part.iterate(0, size)]
    assert sorted(drawn) == everything.tolist()


def test_an_empty_batch_is_an_error(known):
    with pytest.raises(InputError, match="give 1 or more"):
        CellBatches(known.corpus, np.arange(10), batch_size=0)
