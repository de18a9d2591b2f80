"""Decoded blocks of cells in memory: rings that overwrite the oldest blocks when they are full.

The caller holds a lock around each call.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from jaxtyping import Bool, Int, Int32, Int64, Shaped, UInt

from scfm_jax.corpus.store import BLOCK

Value = TypeVar("Value")


@dataclass(frozen=True)
class Blocks:
    """Whole blocks of cells that were read, numbers ascending.

    ``starts`` holds where each cell of a block begins in its ``entries``, and where the last one ends; cells
    that a last block lacks are empty.
    """

    numbers: Int64[np.ndarray, " blocks"]
    starts: Int64[np.ndarray, "blocks cells_and_end"]
    entries: list[UInt[np.ndarray, " of_block"]]

    def find(self, numbers: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """Return the place of each block, -1 where it is not here."""
        at = np.minimum(np.searchsorted(self.numbers, numbers), len(self.numbers) - 1)
        return np.where(self.numbers[at] == numbers, at, -1)

    def views(
        self, at: Int64[np.ndarray, " n"], cells: Int64[np.ndarray, " n"]
    ) -> list[UInt[np.ndarray, " nnz"]]:
        """The entries of cells by place of the block and place within it, without a copy."""
        starts, stops = self.starts[at, cells].tolist(), self.starts[at, cells + 1].tolist()
        return [self.entries[block][a:b] for block, a, b in zip(at.tolist(), starts, stops)]


class EntryRing:
    """Keeps the entries of the blocks read last, up to a number of bytes.

    Parameters
    ----------
    n_blocks, nnz
        Blocks and non-zeros of the whole corpus; the ring is never larger.
    dtype
        Of entries.
    cache_bytes
        Greatest size.
    """

    def __init__(self, n_blocks: int, nnz: int, dtype: np.dtype, cache_bytes: int) -> None:
        share = min(1.0, cache_bytes / max(1, n_blocks * 8 * (BLOCK + 1) + nnz * dtype.itemsize))
        # Memory is taken by the system only when it is touched.
        self._slots = np.zeros(n_blocks, np.int32)  # slot + 1; 0 where the block is not here
        self._starts = np.empty((int(n_blocks * share), BLOCK + 1), np.int64)
        self._entries = np.empty(int(nnz * share), dtype)
        self._held: deque[tuple[Int[np.ndarray, " blocks"], int, int]] = deque()
        self._next_slot = self._next_value = 0

    def find(self, numbers: Int64[np.ndarray, " n"]) -> Int32[np.ndarray, " n"]:
        """Return the slot of each block, -1 where it is not here."""
        return self._slots[numbers] - 1

    def views(
        self, slots: Int32[np.ndarray, " n"], cells: Int64[np.ndarray, " n"]
    ) -> list[UInt[np.ndarray, " nnz"]]:
        """The entries of cells by slot and place within the block, good until the next `put`."""
        starts, stops = self._starts[slots, cells], self._starts[slots, cells + 1]
        return list(map(self._entries.__getitem__, map(slice, starts.tolist(), stops.tolist())))

    def put(self, blocks: Blocks) -> None:
        """Add blocks that were read, unless another thread has; more than the ring holds is not kept."""
        new = self._slots[blocks.numbers] == 0
        if not new.all():
            blocks = _only(blocks, new)
        ends = np.cumsum([0, *map(len, blocks.entries)])
        n, m = len(blocks.numbers), int(ends[-1])
        if n == 0 or n > len(self._starts) or m > len(self._entries):
            return
        self._make_room(n, m)
        slot, value = self._next_slot, self._next_value
        self._starts[slot : slot + n] = blocks.starts + (value + ends[:-1])[:, None]
        np.concatenate(blocks.entries, out=self._entries[value : value + m])
        self._slots[blocks.numbers] = np.arange(slot + 1, slot + n + 1)
        self._held.append((blocks.numbers, slot, value))
        self._next_slot, self._next_value = slot + n, value + m

    def _make_room(self, n: int, m: int) -> None:
        """Free the next ``n`` slots and ``m`` values."""
        if self._next_slot + n > len(self._starts) or self._next_value + m > len(self._entries):
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


class ColumnRing:
    """Keeps one column of the blocks read last, `BLOCK` rows a block.

    Parameters
    ----------
    n_blocks
        Blocks of the whole corpus; the ring is never larger.
    row
        Shape of a row.
    dtype
        Of values.
    cache_bytes
        Greatest size; one block at least.
    """

    def __init__(self, n_blocks: int, row: tuple[int, ...], dtype: np.dtype, cache_bytes: int) -> None:
        block_bytes = BLOCK * int(np.prod(row)) * dtype.itemsize
        size = max(1, min(n_blocks, cache_bytes // max(1, block_bytes)))
        self._slots = np.zeros(n_blocks, np.int32)
        self._values = np.empty((size, BLOCK, *row), dtype)
        self._block_of_slot = np.full(size, -1, np.int64)
        self._next = 0

    def find(self, numbers: Int64[np.ndarray, " n"]) -> Int32[np.ndarray, " n"]:
        """Return the slot of each block, -1 where it is not here."""
        return self._slots[numbers] - 1

    def take(
        self, slots: Int32[np.ndarray, " n"], cells: Int64[np.ndarray, " n"]
    ) -> Shaped[np.ndarray, "n ..."]:
        """Copy out rows by slot and place within the block."""
        return self._values[slots, cells]

    def put(self, numbers: Int64[np.ndarray, " blocks"], values: Shaped[np.ndarray, "blocks 64 ..."]) -> None:
        """Add blocks that were read; those that do not fit are not kept."""
        numbers, values = numbers[: len(self._values)], values[: len(self._values)]
        slots = (self._next + np.arange(len(numbers))) % len(self._values)
        before = self._block_of_slot[slots]
        self._slots[before[before >= 0]] = 0
        # A block that another thread has put here lies at two slots now: forget the first.
        again = self._slots[numbers]
        self._block_of_slot[again[again > 0] - 1] = -1
        self._values[slots], self._block_of_slot[slots] = values, numbers
        self._slots[numbers] = slots + 1
        self._next = int(slots[-1] + 1) % len(self._values) if len(slots) else self._next


class Recent(Generic[Value]):
    """Keeps the values used last, up to a number of bytes; one at least."""

    def __init__(self, most_bytes: int) -> None:
        self._most, self._bytes = most_bytes, 0
        self._kept: OrderedDict[int, tuple[Value, int]] = OrderedDict()

    def find(self, keys: Iterable[int]) -> dict[int, Value]:
        """The values of those keys that are here."""
        found = {key: self._kept[key][0] for key in keys if key in self._kept}
        for key in found:
            self._kept.move_to_end(key)
        return found

    def put(self, key: int, value: Value, n_bytes: int) -> None:
        """Add a value, in place of one that is here."""
        self._bytes += n_bytes - self._kept.pop(key, (value, 0))[1]
        self._kept[key] = value, n_bytes
        while self._bytes > self._most and len(self._kept) > 1:
            self._bytes -= self._kept.popitem(last=False)[1][1]


def _only(blocks: Blocks, chosen: Bool[np.ndarray, " blocks"]) -> Blocks:
    entries = [blocks.entries[number] for number in np.flatnonzero(chosen).tolist()]
    return Blocks(blocks.numbers[chosen], blocks.starts[chosen], entries)


def runs(*numbers: Sequence[int] | Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " runs_and_end"]:
    """Where runs begin in which the first of `numbers` rises by one and the others stay; and the end."""
    first, *same = map(np.asarray, numbers)
    new = np.diff(first, prepend=-2) != 1
    for other in same:
        new |= np.diff(other, prepend=-2) != 0
    return np.append(np.flatnonzero(new), len(first))
