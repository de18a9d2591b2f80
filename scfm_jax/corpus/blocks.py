"""Decoded blocks of cells in memory: a ring that overwrites the oldest when it is full."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int, Int32, Int64, UInt

from scfm_jax.corpus.store import BLOCK


@dataclass
class Blocks:
    """Whole blocks of cells, one after the other.

    ``starts`` holds, for each block, where each of its cells begins in ``genes`` and ``counts``, and where
    the last one ends; cells that a last block lacks are empty.
    """

    numbers: Int64[np.ndarray, " blocks"]
    starts: Int64[np.ndarray, "blocks cells_and_end"]
    genes: UInt[np.ndarray, " nnz"]
    counts: Int32[np.ndarray, " nnz"]


def gather(
    genes: UInt[np.ndarray, " m"],
    counts: Int32[np.ndarray, " m"],
    starts: Int64[np.ndarray, " n"],
    stops: Int64[np.ndarray, " n"],
) -> tuple[Int32[np.ndarray, " nnz"], Int32[np.ndarray, " nnz"], Int64[np.ndarray, " n_and_end"]]:
    """Copy the ranges ``starts`` to ``stops``, one after the other; return genes, counts and offsets."""
    lengths = stops - starts
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    at = np.repeat(starts - offsets[:-1], lengths)
    at += np.arange(offsets[-1])
    return genes.take(at).astype(np.int32), counts.take(at), offsets


class BlockRing:
    """Keeps the blocks read last, up to a number of bytes. The caller holds a lock around each call.

    Parameters
    ----------
    n_blocks, nnz
        Blocks and non-zeros of the whole corpus; the ring is never larger.
    gene_dtype
        dtype of gene indices.
    cache_bytes
        Greatest size.
    """

    def __init__(self, n_blocks: int, nnz: int, gene_dtype: np.dtype, cache_bytes: int) -> None:
        of_block, of_value = 8 * (BLOCK + 1), gene_dtype.itemsize + 4
        share = min(1.0, cache_bytes / max(1, n_blocks * of_block + nnz * of_value))
        # Memory is taken by the system only when it is touched.
        self._slots = np.zeros(n_blocks, np.int32)  # slot + 1; 0 where the block is not here
        self._starts = np.empty((int(n_blocks * share), BLOCK + 1), np.int64)
        self._genes = np.empty(int(nnz * share), gene_dtype)
        self._counts = np.empty(len(self._genes), np.int32)
        self._held: deque[tuple[Int[np.ndarray, " blocks"], int, int]] = deque()
        self._next_slot = self._next_value = 0

    def find(self, numbers: Int64[np.ndarray, " n"]) -> Int32[np.ndarray, " n"]:
        """Return the slot of each block, -1 where it is not here."""
        return self._slots[numbers] - 1

    def take(
        self, slots: Int32[np.ndarray, " n"], cells: Int64[np.ndarray, " n"]
    ) -> tuple[Int32[np.ndarray, " nnz"], Int32[np.ndarray, " nnz"], Int64[np.ndarray, " n_and_end"]]:
        """Copy out cells by slot and place within the block."""
        return gather(self._genes, self._counts, self._starts[slots, cells], self._starts[slots, cells + 1])

    def put(self, blocks: Blocks) -> None:
        """Add blocks that were read, unless another thread has; more than the ring holds is not kept."""
        new = self._slots[blocks.numbers] == 0
        if not new.all():
            blocks = _only(blocks, new)
        n, m = len(blocks.numbers), len(blocks.genes)
        if n == 0 or n > len(self._starts) or m > len(self._genes):
            return
        self._make_room(n, m)
        slot, value = self._next_slot, self._next_value
        self._starts[slot : slot + n] = blocks.starts + value
        self._genes[value : value + m] = blocks.genes
        self._counts[value : value + m] = blocks.counts
        self._slots[blocks.numbers] = np.arange(slot + 1, slot + n + 1)
        self._held.append((blocks.numbers, slot, value))
        self._next_slot, self._next_value = slot + n, value + m

    def _make_room(self, n: int, m: int) -> None:
        """Free the next ``n`` slots and ``m`` values."""
        if self._next_slot + n > len(self._starts) or self._next_value + m > len(self._genes):
            while self._held and self._held[0][1] >= self._next_slot:
                self._drop_oldest()
            self._next_slot = self._next_value = 0
        while self._held and self._held[0][1] >= self._next_slot:
            _, slot, value = self._held[0]
            if slot >= self._next_slot + n and value >= self._next_value + m:
                break
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        self._slots[self._held.popleft()[0]] = 0


def _only(blocks: Blocks, chosen: Bool[np.ndarray, " blocks"]) -> Blocks:
    sizes = blocks.starts[:, -1] - blocks.starts[:, 0]
    values = np.repeat(chosen, sizes)
    removed = np.cumsum(np.where(chosen, 0, sizes))[chosen]
    return Blocks(
        blocks.numbers[chosen],
        blocks.starts[chosen] - removed[:, None],
        blocks.genes[values],
        blocks.counts[values],
    )
