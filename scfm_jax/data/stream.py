"""In which order cells are drawn: endless block-shuffled streams, one for each virtual shard.

Blocks of 64 neighbouring cells are dealt to the shards once, by the seed. In every epoch a shard permutes its
blocks, takes them in pools, and permutes the cells of a pool; its next epoch follows without a gap, so no
remainder is ever dropped. Where a position in the stream leads is a pure function of (seed, shard, position):
nothing is carried from draw to draw. Cells are kept as one bit each, so that a hundred million fit anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
from jaxtyping import Bool, Int64, Shaped, UInt64

from scfm_jax.corpus import BLOCK, Corpus
from scfm_jax.errors import InputError

_DEAL, _BLOCKS, _CELLS = range(3)  # what a random stream is for; part of its seed


@dataclass(frozen=True)
class CellBlocks:
    """Chosen cells of a corpus, a bit each, by the blocks that they are stored in.

    Attributes
    ----------
    first
        Number of the first cell of each block that has a chosen one, ascending.
    bits
        The chosen cells of each; the lowest bit is the first cell.
    """

    first: Int64[np.ndarray, " blocks"]
    bits: UInt64[np.ndarray, " blocks"]

    @classmethod
    def of(cls, corpus: Corpus, cells: Shaped[np.ndarray, " n"]) -> CellBlocks:
        """Choose cells by their numbers, ascending, or by a Boolean for each cell of the corpus."""
        starts = ends = corpus.slide_starts.tolist()
        if cells.dtype != bool:
            if (cells[1:] <= cells[:-1]).any() or (cells[:1] < 0).any() or (cells[-1:] >= starts[-1]).any():
                raise ValueError("the cells do not ascend, or lie outside the corpus")
            ends = np.searchsorted(cells, corpus.slide_starts).tolist()
        first, bits = [], []
        for (start, stop), (begin, end) in zip(pairwise(starts), pairwise(ends), strict=True):
            of_slide = np.zeros(-(-(stop - start) // BLOCK) * BLOCK, bool)
            if cells.dtype == bool:
                of_slide[: stop - start] = cells[begin:end]
            else:
                of_slide[cells[begin:end] - start] = True
            words = np.packbits(of_slide, bitorder="little").view("<u8")
            there = np.flatnonzero(words)
            first.append(start + there * BLOCK)
            bits.append(words[there].astype(np.uint64))
        return cls(np.concatenate(first), np.concatenate(bits))

    def __len__(self) -> int:
        """How many cells."""
        return int(np.bitwise_count(self.bits).sum(dtype=np.int64))

    def only(self, blocks: Bool[np.ndarray, " blocks"]) -> CellBlocks:
        """Those of some blocks."""
        return CellBlocks(self.first[blocks], self.bits[blocks])

    def numbers(self, blocks: Shaped[np.ndarray, " n"] | slice = slice(None)) -> Int64[np.ndarray, " m"]:
        """Numbers of the cells of `blocks`, block after block."""
        block, place = np.nonzero(self._unpacked(blocks))
        return self.first[blocks][block] + place

    def at(self, places: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """Numbers of the cells at some places among the chosen."""
        sizes = np.bitwise_count(self.bits)
        ends = np.cumsum(sizes, dtype=np.int64)
        block = np.searchsorted(ends, places, side="right")
        within = places - (ends[block] - sizes[block])
        up_to = np.cumsum(self._unpacked(block), axis=1)
        return self.first[block] + (up_to > within[:, None]).argmax(axis=1)

    def _unpacked(self, blocks: Shaped[np.ndarray, " n"] | slice) -> Shaped[np.ndarray, "n 64"]:
        octets = self.bits[blocks].astype("<u8")[:, None].view(np.uint8)
        return np.unpackbits(octets, axis=1, bitorder="little")


class ShardStreams:
    """The streams of all virtual shards.

    Parameters
    ----------
    cells
        Cells to draw.
    n_shards
        Virtual shards V.
    seed
        Of the experiment.
    pool_blocks
        Blocks shuffled together: more mix better, fewer read less at once.

    Raises
    ------
    InputError
        Fewer blocks than shards.
    """

    def __init__(self, cells: CellBlocks, *, n_shards: int, seed: int, pool_blocks: int) -> None:
        n_blocks = len(cells.first)
        if n_blocks < n_shards:
            raise InputError(
                "data.virtual_shards",
                f"{n_shards} shards but the training cells lie in {n_blocks} blocks of 64",
                f"set it to {max(n_blocks, 1)} or less, or train on more cells",
            )
        self._seed, self._pool_blocks, self._cells = seed, pool_blocks, cells
        self._sizes = np.bitwise_count(cells.bits)
        dealt = self._random(_DEAL).permutation(n_blocks).astype(np.uint32)
        self._blocks = [dealt[shard::n_shards] for shard in range(n_shards)]
        self.sizes = [int(self._sizes[blocks].sum(dtype=np.int64)) for blocks in self._blocks]
        self._epoch = lru_cache(maxsize=2 * n_shards)(self._permute_blocks)
        self._pool = lru_cache(maxsize=2 * n_shards)(self._permute_cells)

    def draw(self, shard: int, start: int, stop: int) -> Int64[np.ndarray, " m"]:
        """Cells at positions `start` to `stop` of a shard's stream."""
        drawn = []
        while start < stop:
            cells, first = self.pool(shard, self.pool_number(shard, start))
            drawn.append(cells[start - first : stop - first])
            start += len(drawn[-1])
        return np.concatenate(drawn) if drawn else np.empty(0, np.int64)

    def pool_number(self, shard: int, position: int) -> int:
        """The pool, counted over all epochs, that a position of a shard's stream lies in."""
        epoch, within = divmod(position, self.sizes[shard])
        _, pool_starts = self._epoch(shard, epoch)
        pool = int(np.searchsorted(pool_starts, within, side="right")) - 1
        return epoch * self._pools_of_epoch(shard) + pool

    def pool(self, shard: int, number: int) -> tuple[Int64[np.ndarray, " m"], int]:
        """Cells of a pool of a shard's stream, and the position of the first."""
        epoch, pool = divmod(number, self._pools_of_epoch(shard))
        _, pool_starts = self._epoch(shard, epoch)
        return self._pool(shard, epoch, pool), epoch * self.sizes[shard] + int(pool_starts[pool])

    def _pools_of_epoch(self, shard: int) -> int:
        return -(-len(self._blocks[shard]) // self._pool_blocks)

    def _random(self, *purpose: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, *purpose])

    def _permute_blocks(self, shard: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        order = self._random(_BLOCKS, shard, epoch).permutation(self._blocks[shard])
        sizes = self._sizes[order]
        pools = np.add.reduceat(sizes, np.arange(0, len(order), self._pool_blocks), dtype=np.int64)
        return order, np.concatenate([[0], np.cumsum(pools)])

    def _permute_cells(self, shard: int, epoch: int, pool: int) -> np.ndarray:
        order, _ = self._epoch(shard, epoch)
        blocks = order[pool * self._pool_blocks : (pool + 1) * self._pool_blocks]
        return self._random(_CELLS, shard, epoch, pool).permutation(self._cells.numbers(blocks))
