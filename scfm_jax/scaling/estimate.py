"""What a step holds and moves, from shapes alone: for accelerators whose compiler is not at hand.

Sizes of the state are exact. The rest goes by what `jax.vjp` keeps for the backward pass and by what the two
tables of `training.mesh` make the partitioner gather and reduce.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh

from scfm_jax.models.functional import abstract
from scfm_jax.models.tissue import TissueConfig
from scfm_jax.scaling.hlo import Collective
from scfm_jax.scaling.workload import Workload
from scfm_jax.training.config import RunConfig
from scfm_jax.training.mesh import MESH_AXES
from scfm_jax.training.task import Learning, make_learning

# The weights of a layer are gathered for the forward pass and again for the backward pass.
_GATHERS = 2
# Read and written by AdamW, float32: a parameter, its two moments, and its gradient.
_UPDATE_BYTES = 8 * 4


def bytes_of_shards(tree: Any) -> int:
    """Bytes on one device of a tree of `jax.ShapeDtypeStruct` with shardings."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def learning_of(config: RunConfig, n_genes: int) -> Learning:
    """What a step computes, over a corpus of one slide."""
    return make_learning(config, n_genes, np.array([1 << 30]), np.array([0]))


def activation_bytes(config: RunConfig, work: Workload, rows: int) -> float:
    """Bytes that a microbatch of `rows` samples on one device keeps for its backward pass.

    Beside what the remat policy keeps, one layer's inner activations are there while it is worked on.
    Attention is taken to keep what a fused kernel keeps, and a tensor axis to split nothing.
    """
    layers = sum(stack.layers for stack in _stacks(config))
    kept, everything, inputs = (
        _kept_per_row(_with(config, remat), work) for remat in (config.model.remat, "none", "full")
    )
    mixed = 0.0
    if config.model.remat == "dots":  # a fused kernel's output is kept, that of attention in XLA is not
        width = jnp.dtype(config.model.dtype).itemsize
        lengths = (work.first, work.second)
        mixed = sum(
            stack.layers * length * stack.width * width
            for stack, length in zip(_stacks(config), lengths, strict=False)
        )
    return rows * (kept + mixed + (everything - inputs) / layers)


def collectives(config: RunConfig, mesh: AbstractMesh, work: Workload, parameters: Any) -> list[Collective]:
    """What the devices of `mesh` say to each other in a step.

    Parameters
    ----------
    parameters
        Tree of `jax.ShapeDtypeStruct` with shardings.
    """
    microbatches = config.optimiser.accumulation
    width = jnp.dtype(config.model.dtype).itemsize
    data, fsdp, tensor = (_group(mesh, axis) for axis in MESH_AXES)
    found: list[Collective] = []

    def add(kind: str, size: float, group: tuple[int, ...], times: int) -> None:
        if len(group) > 1 and size:
            found.append(Collective(kind, size, group, times))

    for leaf in jax.tree.leaves(parameters):
        shard = int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * width
        axes = {axis for axis in leaf.sharding.spec if axis}
        whole = shard * (len(fsdp) if "fsdp" in axes else 1)
        if "fsdp" in axes:
            add("all-gather", whole, fsdp, _GATHERS * microbatches)
            add("reduce-scatter", whole, fsdp, microbatches)
        else:
            add("all-reduce", whole, fsdp, microbatches)
        add("all-reduce", shard, data, microbatches)
    rows = work.rows // microbatches // (len(data) * len(fsdp))
    # After attention and after the feed-forward, and once each backwards; recomputing says it again.
    sums = 4 + (2 if config.model.remat == "full" else 0)
    for stack, length in zip(_stacks(config), (work.first, work.second), strict=False):
        add("all-reduce", rows * length * stack.width * width, tensor, sums * stack.layers * microbatches)
    return found


def memory_traffic(config: RunConfig, work: Workload, rows: int, parameters: Any) -> float:
    """Bytes that a device reads and writes in a step.

    Every activation is written once and read twice (by the next product, and by its gradient's); gathered
    weights are written once and read once for each product; the update sees all of the state.
    """
    width = jnp.dtype(config.model.dtype).itemsize
    state = sum(int(np.prod(leaf.sharding.shard_shape(leaf.shape))) for leaf in jax.tree.leaves(parameters))
    whole = sum(leaf.size for leaf in jax.tree.leaves(parameters)) * width
    activations = 3 * rows * _kept_per_row(_with(config, "none"), work)
    return _UPDATE_BYTES * state + config.optimiser.accumulation * (activations + 3 * 2 * whole)


def _stacks(config: RunConfig) -> list[Any]:
    """Whatever has layers and a width, the longest rows first."""
    model = config.model
    return [model.encoder, model.decoder] if isinstance(model, TissueConfig) else [model]


def _with(config: RunConfig, remat: Any) -> RunConfig:
    return replace(config, model=replace(config.model, remat=remat, attention="chunked"))


@functools.cache
def _kept_per_row(config: RunConfig, work: Workload) -> float:
    """Bytes that one more sample makes the backward pass keep."""
    learning = learning_of(config, work.n_genes)
    graph, shapes, _ = abstract(learning.build)
    key = jax.random.key(0)

    def residuals(parameters: Any, batch: Any) -> Any:
        loss = lambda parameters: learning.loss(nnx.merge(graph, parameters), batch, key)["loss"]  # noqa: E731
        return jax.vjp(loss, parameters)[1]

    one, two = (
        sum(
            leaf.size * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(
                jax.eval_shape(residuals, shapes, replace(work, rows=rows).batch(type(config.model)))
            )
        )
        for rows in (1, 2)
    )
    return two - one


def _group(mesh: AbstractMesh, axis: str) -> tuple[int, ...]:
    """The first group of devices along one axis of a mesh, by their place in it."""
    places = np.arange(mesh.size).reshape(tuple(mesh.shape.values()))
    return tuple(
        int(place)
        for place in np.moveaxis(places, MESH_AXES.index(axis), 0).reshape(mesh.shape[axis], -1)[:, 0]
    )


def positions(hosts: int, per_host: int) -> Iterator[tuple[int, int]]:
    """(host, place behind its switch) of each device, in the mesh's order."""
    return ((host, place) for host in range(hosts) for place in range(per_host))
