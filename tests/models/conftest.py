"""Modules with every parameter moved away from where it starts, so that no zero bias hides a missing term."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from scfm_jax.models.functional import abstract

Build = Callable[[nnx.Rngs], nnx.Module]


@pytest.fixture(scope="session")
def randomised() -> Callable[..., tuple[Any, dict[str, Any]]]:
    def randomised(build: Build, *, seed: int = 0, std: float = 0.5) -> tuple[Any, dict[str, Any]]:
        """The graph of a module and random parameters of its shapes."""
        rng = np.random.default_rng(seed)
        graph, shapes, _ = abstract(build)
        return graph, jax.tree.map(lambda leaf: rng.normal(0, std, leaf.shape).astype(leaf.dtype), shapes)

    return randomised
