"""Raw counts in batches, block-shuffled: for models of one's own, and the measure of what the disk gives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import grain
import numpy as np
from jaxtyping import Int64

from scfm_jax.corpus import Cells, Corpus
from scfm_jax.corpus.reader import Pool
from scfm_jax.corpus.store import widened
from scfm_jax.data.stream import CellBlocks, ShardStreams
from scfm_jax.errors import InputError

_WITHOUT_END = 1 << 40
_GATHERED = 512  # cells that are copied out of a pool together


@dataclass(frozen=True)
class CellBatch:
    """Raw counts of some cells.

    Attributes
    ----------
    index
        The cells' numbers in the corpus.
    cells
        Their genes and counts.
    """

    index: Int64[np.ndarray, " b"]
    cells: Cells


class CellBatches:
    """Batches of raw counts, without end; that of step t is a function of (seed, t).

    Parameters
    ----------
    corpus
        Open corpus.
    centres
        Cells to draw: their numbers, ascending, or what holds them in a bit each.
    batch_size
        Cells of a batch.
    seed
        Of the order (see `ShardStreams`).
    pool_blocks
        Blocks of 64 cells that are shuffled together; each pool is read at once.
    shard
        Number of this stream and how many there are; each has cells of its own.
    pools
        Pools that are read at the same time, a thread each, ahead of the step.

    Raises
    ------
    InputError
        A size below 1, or fewer blocks than shards.
    """

    def __init__(
        self,
        corpus: Corpus,
        centres: Int64[np.ndarray, " n"] | CellBlocks,
        *,
        batch_size: int,
        seed: int = 0,
        pool_blocks: int = 256,
        shard: tuple[int, int] = (0, 1),
        pools: int = 2,
    ) -> None:
        if min(batch_size, pool_blocks, pools) < 1:
            raise InputError(corpus.path, "a batch, a pool or the number of pools is empty", "give 1 or more")
        self._corpus, self._batch_size, self._pools = corpus, batch_size, pools
        self._shard, n_shards = shard
        cells = centres if isinstance(centres, CellBlocks) else CellBlocks.of(corpus, centres)
        self._streams = ShardStreams(cells, n_shards=n_shards, seed=seed, pool_blocks=pool_blocks)

    def batch(self, step: int) -> CellBatch:
        """The batch of `step`."""
        start = step * self._batch_size
        index = self._streams.draw(self._shard, start, start + self._batch_size)
        return CellBatch(index, self._corpus.cells(index))

    def iterate(self, start: int = 0, stop: int = _WITHOUT_END) -> Iterator[CellBatch]:
        """Batches of steps `start` to `stop`, from pools that are read ahead (Grain: an element a pool)."""
        if stop <= start:
            return
        begin, end = start * self._batch_size, stop * self._batch_size
        numbers = (self._streams.pool_number(self._shard, position) for position in (begin, end - 1))
        options = grain.ReadOptions(num_threads=self._pools, prefetch_buffer_size=self._pools)
        first, last = numbers
        pools = grain.MapDataset.range(first, last + 1).map(self._read_pool).to_iter_dataset(options)
        parts: list[CellBatch] = []  # of the batch that the last pool did not fill
        missing = self._batch_size
        for pool, position in pools:
            at, until = max(begin - position, 0), min(end - position, len(pool.index))
            for first in range(at, until, _GATHERED):
                # Some batches at once: every step of NumPy has to wait for the threads that read.
                cells = pool.cells(first, min(first + _GATHERED, until))
                within, n_cells = 0, min(_GATHERED, until - first)
                while within < n_cells:
                    stop = min(within + missing, n_cells)
                    index = pool.index[first + within : first + stop]
                    parts.append(CellBatch(index, cells.rows(within, stop)))
                    within, missing = stop, missing - len(index)
                    if not missing:
                        yield _join(parts)
                        parts, missing = [], self._batch_size

    def _read_pool(self, number: int) -> tuple[Pool, int]:
        cells, first = self._streams.pool(self._shard, number)
        return self._corpus.pool(cells), first


def _join(parts: list[CellBatch]) -> CellBatch:
    if len(parts) == 1:
        return parts[0]
    ends = np.cumsum([0, *(part.cells.offsets[-1] for part in parts)])
    offsets = [part.cells.offsets[:-1] + end for part, end in zip(parts, ends)]
    # Entries are wide where counts are large: the others become so, gene and count apart.
    dtype = np.result_type(*(part.cells.entries for part in parts))
    entries = [widened(part.cells.entries, dtype) for part in parts]
    cells = Cells(np.concatenate(entries), np.concatenate([*offsets, ends[-1:]]))
    return CellBatch(np.concatenate([part.index for part in parts]), cells)
