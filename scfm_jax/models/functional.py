"""Modules as values: a graph that holds no arrays, and parameters as a plain dict of arrays.

Everything outside `models` (jit, optax, Orbax) sees the dict only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import numpy as np
from flax import nnx

Parameters: TypeAlias = dict[str, Any]


def initialise(build: Callable[[nnx.Rngs], nnx.Module], key: jax.Array) -> Parameters:
    """Parameters of a fresh module, a nested dict of float32 arrays."""
    return nnx.to_pure_dict(nnx.split(build(nnx.Rngs(key)))[1])


def abstract(build: Callable[[nnx.Rngs], nnx.Module]) -> tuple[nnx.GraphDef, Parameters, Parameters]:
    """The graph of a module, its parameters as shapes, and the logical name of every axis.

    Returns
    -------
    The graph for `nnx.merge`; a dict of `jax.ShapeDtypeStruct`; a dict of tuples of names, one name an axis,
    where stacked layers have ``layers`` in front.
    """
    graph, state = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))))

    def names(variable: nnx.Variable) -> tuple[str | None, ...]:
        own = tuple(variable.get_metadata()["logical"])
        stacked = ("layers",) * (len(variable.shape) - len(own))
        return stacked + own

    is_variable = lambda node: isinstance(node, nnx.Variable)  # noqa: E731
    logical = jax.tree.map(names, state, is_leaf=is_variable)
    return graph, nnx.to_pure_dict(state), nnx.to_pure_dict(logical)


def parameters_hash(parameters: Parameters) -> str:
    """SHA-256 over the arrays, in the order of their names."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(parameters):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def count_parameters(parameters: Parameters) -> int:
    """Number of scalars in a tree of arrays or shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(parameters))
