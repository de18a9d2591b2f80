"""Devices as a mesh, and the two tables that say what lies where."""

from __future__ import annotations

from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from scfm_jax.errors import InputError
from scfm_jax.models.sharding import Split
from scfm_jax.training.config import MeshConfig, RunConfig

MESH_AXES = ("data", "fsdp", "tensor")
# Logical axis of a parameter -> mesh axis that splits it.
PARAMETER_AXES: dict[str | None, str | None] = {
    "layers": None,
    "vocabulary": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "mlp": "tensor",
    None: None,
}
# Logical axis of a batch or an activation -> mesh axes.
ACTIVATION_AXES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "vocabulary": ("tensor",),
}


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh of all devices, axes ``data``, ``fsdp``, ``tensor``.

    Raises
    ------
    InputError
        The axes do not multiply to the number of devices.
    """
    devices = devices or jax.devices()
    shape = mesh_shape(config, len(devices))
    # As jax.make_mesh does, but for axes of a torus that no size of ours equals, as 8 on 4 x 4 x 4.
    placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(placed, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def mesh_shape(config: MeshConfig, devices: int) -> tuple[int, int, int]:
    """Devices along `MESH_AXES`.

    Raises
    ------
    InputError
        The axes do not multiply to the number of devices.
    """
    data = config.data or devices // (config.fsdp * config.tensor)
    if data * config.fsdp * config.tensor != devices:
        raise InputError(
            "mesh",
            f"data x fsdp x tensor = {data} x {config.fsdp} x {config.tensor} is not {devices} devices",
            "set mesh.data to 0 and the others to divisors",
        )
    return data, config.fsdp, config.tensor


def parameter_shardings(mesh: Mesh, shapes: Any, names: Any) -> Any:
    """Where each parameter lies: by its logical names, on axes that divide it.

    Parameters
    ----------
    shapes
        Tree of arrays or `jax.ShapeDtypeStruct`.
    names
        Tree of tuples of logical names, as `models.functional.abstract` gives them.
    """

    def place(leaf: jax.ShapeDtypeStruct, logical: tuple[str | None, ...]) -> NamedSharding:
        axes = [PARAMETER_AXES[name] for name in logical]
        divides = [
            axis if axis and size % mesh.shape[axis] == 0 else None
            for axis, size in zip(axes, leaf.shape, strict=True)
        ]
        return NamedSharding(mesh, PartitionSpec(*divides))

    return jax.tree.map(place, shapes, names)


def activation_split(mesh: Mesh) -> Split:
    """Where activations lie, for `models.sharding.split_by`."""
    return Split(mesh, ACTIVATION_AXES)


def check_batch(config: RunConfig, mesh: Mesh) -> None:
    """Every microbatch must give each data x fsdp shard the same number of samples.

    Raises
    ------
    InputError
        It does not, and some devices would hold every sample.
    """
    shards, parts = mesh.shape["data"] * mesh.shape["fsdp"], config.optimiser.accumulation
    if config.data.batch_size % (shards * parts):
        raise InputError(
            "data.batch_size",
            f"{config.data.batch_size} is not a multiple of data x fsdp x accumulation = "
            f"{mesh.shape['data']} x {mesh.shape['fsdp']} x {parts}",
            f"set it to a multiple of {shards * parts}, or split less",
        )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Samples are split over the data and fsdp axes."""
    return NamedSharding(mesh, PartitionSpec(ACTIVATION_AXES["batch"]))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())
