"""Compilations that outlive the process."""

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
