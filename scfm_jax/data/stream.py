"""In which order cells are drawn: endless block-shuffled streams, one for each virtual shard.

Blocks of 64 neighbouring cells are dealt to the shards once, by the seed. In every epoch a shard permutes its
blocks, takes them in pools, and permutes the cells of a pool; its next epoch follows without a gap, so no
remainder is ever dropped. Where a position in the stream leads is a pure function of (seed, shard, position):
nothing is carried from draw to draw. Cells are kept as one bit each, so that a hundred million fit anywhere.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from jaxtyping import Int64

from scfm_jax.errors import InputError

_DEAL, _BLOCKS, _CELLS = range(3)  # what a random stream is for; part of its seed


class ShardStreams:
    """The streams of all virtual shards.

    Parameters
    ----------
    centres
        Cells to draw, ascending.
    blocks
        The block of each of them, ascending.
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

    def __init__(
        self,
        centres: Int64[np.ndarray, " n"],
        blocks: Int64[np.ndarray, " n"],
        *,
        n_shards: int,
        seed: int,
        pool_blocks: int,
    ) -> None:
        first = np.flatnonzero(np.diff(blocks, prepend=-1))
        if len(first) < n_shards:
            raise InputError(
                "data.virtual_shards",
                f"{n_shards} shards but the training cells lie in {len(first)} blocks of 64",
                f"set it to {max(len(first), 1)} or less, or train on more cells",
            )
        self._seed, self._pool_blocks = seed, pool_blocks
        self._base = centres[first]
        self._sizes = np.diff(np.append(first, len(centres)))
        bit = (centres - np.repeat(self._base, self._sizes)).astype(np.uint64)
        self._masks = np.bitwise_or.reduceat(np.uint64(1) << bit, first)
        dealt = self._random(_DEAL).permutation(len(first))
        self._blocks = [dealt[shard::n_shards] for shard in range(n_shards)]
        self.sizes = [int(self._sizes[blocks].sum()) for blocks in self._blocks]
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
        pools = np.add.reduceat(sizes, np.arange(0, len(order), self._pool_blocks))
        return order, np.concatenate([[0], np.cumsum(pools)])

    def _permute_cells(self, shard: int, epoch: int, pool: int) -> np.ndarray:
        order, _ = self._epoch(shard, epoch)
        blocks = order[pool * self._pool_blocks : (pool + 1) * self._pool_blocks]
        bits = np.unpackbits(
            self._masks[blocks].astype("<u8")[:, None].view(np.uint8), axis=1, bitorder="little"
        )
        block, place = np.nonzero(bits)
        cells = self._base[blocks][block] + place
        return self._random(_CELLS, shard, epoch, pool).permutation(cells)
