"""Work in parts on the machine's cores: NumPy lets other threads run while it computes."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import TypeVar

import numpy as np
from jaxtyping import Int64

from scfm_jax.corpus.workers import n_cores

Part = TypeVar("Part")
Result = TypeVar("Result")

CORES: int = n_cores()
# Values of a part: little more than a core's cache holds, and enough that threads seldom wait for one another
# between two steps of NumPy.
_PART = 2**18
_this_thread = threading.local()


def in_parts(function: Callable[[Part], Result], parts: Sequence[Part]) -> list[Result]:
    """What `function` returns for each of `parts`, in their order; it may call this function itself."""
    # A worker that waited for others could wait for itself.
    if CORES == 1 or len(parts) == 1 or getattr(_this_thread, "is_worker", False):
        return [function(part) for part in parts]
    return list(_pool().map(function, parts))


def equal_parts(sizes: Int64[np.ndarray, " n"]) -> list[slice]:
    """Runs of things of these sizes, of about equal size in all; many are whole turns of the cores."""
    ends = np.cumsum(sizes)
    total = int(ends[-1]) if len(ends) else 0
    turns = -(-total // (_PART * CORES)) * CORES
    # Less than an eighth of a part is not worth a thread.
    number = max(min(turns, -(-8 * total // _PART)), 1)
    cuts = np.searchsorted(ends, np.linspace(0, total, number + 1)[1:-1]).tolist()
    return [slice(start, stop) for start, stop in pairwise([0, *cuts, len(ends)]) if start < stop]


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(CORES, "part", lambda: setattr(_this_thread, "is_worker", True))


# Threads do not survive a fork, the pool object would.
os.register_at_fork(after_in_child=_pool.cache_clear)
