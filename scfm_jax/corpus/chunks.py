"""Blocks of entries, decoded into memory that is used again.

TensorStore finds and reads the bytes of a block; they are decoded here. Arrays of TensorStore's own, two for
each block and fresh every time, cost as much in page faults as decompression does (docs/benchmarks.md).
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from jaxtyping import UInt

from scfm_jax.corpus.store import SlideArrays
from scfm_jax.corpus.workers import n_cores

# Blocks that are worth a thread.
_PART = 16


class Buffers:
    """Memory for decoded blocks, handed out again when it was given back.

    Parameters
    ----------
    dtype
        Of entries.
    most_bytes
        What is kept for the next one; more is left to the system.
    """

    def __init__(self, dtype: np.dtype, most_bytes: int) -> None:
        self._dtype, self._most = dtype, most_bytes
        self._free: list[UInt[np.ndarray, " n"]] = []
        # The garbage collector may give a buffer back while one is taken.
        self._lock = threading.RLock()

    def take(self, size: int) -> UInt[np.ndarray, " size_or_more"]:
        """Memory for `size` entries or more."""
        with self._lock:
            fitting = [number for number, buffer in enumerate(self._free) if len(buffer) >= size]
            if fitting:
                return self._free.pop(min(fitting, key=lambda number: len(self._free[number])))
        # A little more, since the next ones will be about as large.
        return np.empty(size + size // 8, self._dtype)

    def give(self, buffer: UInt[np.ndarray, " n"]) -> None:
        """Give memory back that nothing looks at any longer."""
        with self._lock:
            self._free.append(buffer)
            while sum(free.nbytes for free in self._free) > self._most:
                self._free.pop(0)


def decode(blocks: Sequence[tuple[SlideArrays, Any, UInt[np.ndarray, " of_block"]]]) -> None:
    """Decode blocks into the memory given for each.

    Parameters
    ----------
    blocks
        The slide of each, what `SlideArrays.ask` gave, and where its entries go.

    Raises
    ------
    InputError
        A block is lost or damaged.
    """
    if len(blocks) < 2 * _PART or n_cores() == 1:
        _decode_part(blocks)
        return
    size = max(-(-len(blocks) // n_cores()), _PART)
    parts = [blocks[first : first + size] for first in range(0, len(blocks), size)]
    for _ in _threads().map(_decode_part, parts):
        pass


def _decode_part(blocks: Sequence[tuple[SlideArrays, Any, UInt[np.ndarray, " of_block"]]]) -> None:
    if not blocks:
        return
    scratch = np.empty(max(arrays.longest_block for arrays, *_ in blocks), blocks[0][2].dtype)
    for arrays, read, entries in blocks:
        arrays.decode(read, scratch)
        entries[:] = scratch[: len(entries)]


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n_cores(), "decode")


# Threads do not survive a fork, the pool object would.
os.register_at_fork(after_in_child=_threads.cache_clear)
