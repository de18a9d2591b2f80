"""Compilations that outlive the process, and those that it should let go."""

from __future__ import annotations

import os
from pathlib import Path


def cache_compilations(*, short: bool = False) -> None:
    """Keep compilations in the user's cache: the next run of the same shapes starts at once.

    Parameters
    ----------
    short
        Those of less than a second too, which add up where many small runs follow one another.
    """
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        base = os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))
        jax.config.update("jax_compilation_cache_dir", str(Path(base) / "scfm_jax" / "xla"))
    if short:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def release_compilations(*, share: float = 0.5) -> bool:
    """Forget what is compiled where the process nears the kernel's limit of memory maps; True if it did.

    XLA on a CPU maps every kernel by itself: a training of five static lengths took 7,600 maps, and at 65,530
    (Linux's usual limit) the process dies of "Unable to allocate section memory". Programs that are called
    again come from the cache on disk. Other systems than Linux have no such limit to read.

    Parameters
    ----------
    share
        Of the limit, from which on programs are let go.
    """
    import jax

    try:
        limit = int(Path("/proc/sys/vm/max_map_count").read_text())
        with Path("/proc/self/maps").open() as maps:
            used = sum(1 for _ in maps)
    except (OSError, ValueError):
        return False
    if used < share * limit:
        return False
    jax.clear_caches()
    return True
