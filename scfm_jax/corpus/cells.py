"""What reading cells gives: ragged rows of genes and counts, and pools of which they are copied out."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64, UInt

from scfm_jax.corpus.block_reader import BlockReader
from scfm_jax.corpus.store import unpack_counts, unpack_genes


@dataclass(frozen=True)
class Cells:
    """Expressed genes of some cells: cell i has entries ``offsets[i]`` to ``offsets[i + 1]``.

    Attributes
    ----------
    entries
        Gene and count in one number, as they are stored (`scfm_jax.corpus.store`).
    offsets
        Where each cell begins, and the end.
    """

    entries: UInt[np.ndarray, " nnz"]
    offsets: Int64[np.ndarray, " n_and_end"]

    @functools.cached_property
    def genes(self) -> Int32[np.ndarray, " nnz"]:
        """Vocabulary indices, ascending within a cell."""
        return unpack_genes(self.entries)

    @functools.cached_property
    def counts(self) -> Int32[np.ndarray, " nnz"]:
        """Raw counts."""
        return unpack_counts(self.entries)

    def rows(self, start: int, stop: int) -> Cells:
        """Cells `start` to `stop` of these: views, unpacked with the others."""
        first, last = self.offsets[start], self.offsets[stop]
        part = Cells(self.entries[first:last], self.offsets[start : stop + 1] - first)
        part.__dict__.update(genes=self.genes[first:last], counts=self.counts[first:last])
        return part


class Pool:
    """Cells whose blocks are decoded in memory; they are copied out in parts."""

    def __init__(self, index: Int64[np.ndarray, " n"], blocks: BlockReader, located: tuple[Any, ...]) -> None:
        self.index, self._blocks = index, blocks
        self._block, self._place, self._slide = located
        self._read = blocks.read(np.unique(self._block))
        self._views = self._read.views(self._read.find(self._block), self._place)
        self._offsets = np.concatenate([[0], np.cumsum(list(map(len, self._views)), dtype=np.int64)])

    def reach(self, start: int, entries: int) -> int:
        """Where to stop so that the cells from `start` on, one at least, have so many entries at most."""
        last = np.searchsorted(self._offsets, self._offsets[start] + entries, side="right") - 1
        return max(int(last), start + 1)

    def cells(self, start: int, stop: int) -> Cells:
        """The cells ``index[start:stop]``."""
        part = slice(start, stop)
        entries, offsets = np.concatenate(self._views[part]), self._offsets[start : stop + 1]
        offsets = offsets - offsets[0]
        located = self._block[part], self._place[part], self._slide[part]
        return Cells(self._blocks.restored(entries, offsets, *located), offsets)
