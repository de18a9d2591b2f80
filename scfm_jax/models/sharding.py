"""Where activations lie, said by name: models name axes, training says which axes of a mesh split them.

Without `split_by` around the trace, everything here does nothing, and a model is a function of one device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from math import prod
from typing import TypeAlias

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

Names: TypeAlias = tuple[str | None, ...]


@dataclass(frozen=True)
class Split:
    """A mesh, and the mesh axes that split each logical axis."""

    mesh: Mesh
    axes: Mapping[str, tuple[str, ...]]

    def spec(self, shape: tuple[int, ...], names: Names) -> PartitionSpec:
        """How an array of `shape` is split: what the mesh does not divide is not."""
        if len(shape) != len(names):
            raise ValueError(f"{names} names {len(names)} axes of an array of shape {shape}")
        parts = (self.axes[name] if name else () for name in names)
        divided = (
            axes if size % prod(self.mesh.shape[axis] for axis in axes) == 0 else ()
            for size, axes in zip(shape, parts, strict=True)
        )
        return PartitionSpec(*(axes or None for axes in divided))


_SPLIT: ContextVar[Split | None] = ContextVar("split", default=None)


@contextmanager
def split_by(split: Split) -> Iterator[None]:
    """Place activations so; to be entered inside of the function that is traced."""
    token = _SPLIT.set(split)
    try:
        yield
    finally:
        _SPLIT.reset(token)


def platform() -> str:
    """What is traced for: the mesh's platform, or JAX's default one: ``cpu``, ``gpu`` or ``tpu``."""
    split = _SPLIT.get()
    return jax.default_backend() if split is None else split.mesh.devices.flat[0].platform


def constrain(x: Array, *names: str | None) -> Array:
    """`x`, split as the logical `names` of its axes say.

    The names are those of the table that training holds: ``batch`` (and rows of tokens, batch first),
    ``heads``, ``mlp``, ``vocabulary``; None is not split.
    """
    split = _SPLIT.get()
    if split is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(split.mesh, split.spec(x.shape, names)))


def by_shard(
    function: Callable[..., Array], arguments: tuple[Array, ...], names: tuple[Names, ...], out: Names
) -> Array:
    """``function(*arguments)`` on each device's part by itself: for what a compiler cannot split.

    A kernel of one's own, or a loop over rows, is opaque to the partitioner, which would gather every row on
    every device. Rows and heads must not depend on each other.

    Parameters
    ----------
    names
        Logical axes of each argument.
    out
        Of the result, whose shape is that of the first argument.
    """
    split = _SPLIT.get()
    if split is None or split.mesh.size == 1:
        return function(*arguments)
    specs = tuple(split.spec(x.shape, of) for x, of in zip(arguments, names, strict=True))
    # The result's replication is by construction; kernels cannot state it.
    return jax.shard_map(
        function,
        mesh=split.mesh,
        in_specs=specs,
        out_specs=split.spec(arguments[0].shape, out),
        check_vma=False,
    )(*arguments)
