"""What a recipe would do on a pod: memory, operations, bytes on the network, and the roofline over them.

For TPUs, the very step that `train` runs is compiled for the topology; for GPUs all is reckoned from shapes.
Operations are always counted from shapes: a compiler counts a loop once and a kernel not at all.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType

from scfm_jax.errors import InputError
from scfm_jax.models.flops import forward_flops, training_flops
from scfm_jax.models.functional import count_parameters
from scfm_jax.models.tissue import TissueConfig
from scfm_jax.scaling.estimate import (
    activation_bytes,
    bytes_of_shards,
    collectives,
    learning_of,
    memory_traffic,
    positions,
)
from scfm_jax.scaling.hlo import Collective, ProgramText
from scfm_jax.scaling.topology import Topology
from scfm_jax.scaling.workload import Cells, Workload, make_workload
from scfm_jax.training.config import RunConfig
from scfm_jax.training.mesh import MESH_AXES, make_mesh, mesh_shape
from scfm_jax.training.step import make_program
from scfm_jax.training.task import attention_of

# Passes over the pairs that an attention makes in a step, where the forward pass is 2 products: kernels
# compute the scores again in the backward pass, splash in each of its two backward kernels.
_ATTENTION_PRODUCTS = {"plain": 6, "chunked": 7, "cudnn": 7, "splash": 9}
# A product over fewer features than a TPU's matrix unit is wide leaves the rest of it idle.
_MATRIX_UNIT = {"v6e": 256, "v4": 128, "v5e": 128, "v5p": 128}


@dataclass(frozen=True)
class Traffic:
    """All collectives of one kind over the same axes of the mesh, in a step.

    Attributes
    ----------
    kind, over
        What they do, and the mesh axes that take part.
    count
        How many run.
    sent
        Bytes that a device sends.
    seconds
        What that takes at the links' full speed.
    """

    kind: str
    over: str
    count: int
    sent: float
    seconds: float


@dataclass(frozen=True)
class Plan:
    """What a step takes on every device; bytes and seconds are a device's, of one step.

    Attributes
    ----------
    changes
        Where the plan leaves the recipe, in words.
    flags
        What `scfm train` needs to do the same.
    compiled
        Whether memory and traffic are the compiler's, or reckoned from shapes.
    parameters
        Scalars of the whole model.
    parameter_bytes, optimiser_bytes, activation_bytes, total_bytes
        The rest of the total is gradients, activations and the program; the compiler does not tell them
        apart.
    flops, tokens
        Of a step over all devices, by padded lengths, recomputation excluded.
    compute_seconds, memory_seconds, network_seconds
        Each alone, at full speed; recomputation included. Without a program, because it does not fit, nobody
        knows the last two.
    share_of_peak, limit
        Model FLOPs over the peak in the longest of the three, and which that is: the most that can be reached
        where the three overlap whole.
    mends
        What to change where it does not fit.
    """

    recipe: str
    topology: str
    chips: int
    hosts: int
    mesh: dict[str, int]
    attention: str
    remat: str
    changes: tuple[str, ...]
    flags: tuple[str, ...]
    compiled: bool
    batch: int
    microbatches: int
    lengths: tuple[int, int]
    parameters: int
    parameter_bytes: int
    optimiser_bytes: int
    activation_bytes: float
    total_bytes: float
    memory: int
    flops: float
    tokens: int
    traffic: tuple[Traffic, ...]
    compute_seconds: float
    memory_seconds: float | None
    network_seconds: float | None
    share_of_peak: float | None
    limit: str | None
    mends: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return self.total_bytes <= self.memory


def make_plan(config: RunConfig, topology: Topology, cells: Cells, *, batch: int = 0) -> Plan:
    """Plan a step of `config` on `topology`.

    Parameters
    ----------
    cells
        What a corpus would say of its cells.
    batch
        Samples of a step in place of the recipe's; 0 takes the recipe's, raised to one for each data x fsdp
        shard and microbatch where it is too small.

    Raises
    ------
    InputError
        A mesh or a batch that does not divide, or a compiler that is not there or refuses.
    """
    accelerator = topology.accelerator
    shape = dict(zip(MESH_AXES, mesh_shape(config.mesh, topology.chips), strict=True))
    config, changes, flags = adapt(config, topology, shape["data"] * shape["fsdp"], batch)
    work = make_workload(config, cells)
    attention = attention_of(config, accelerator.platform)
    measured = _compile(config, topology, work) if accelerator.axes else _reckon(config, topology, work)
    traffic = _by_kind(measured.collectives, topology, measured.positions, shape)
    flops = training_flops(config.model, work.n_genes, work.load)
    compute = _executed_flops(config, topology, work, attention) / topology.chips / accelerator.peak_flops
    seconds, limit = {"compute": compute}, None
    if measured.moved is not None:
        seconds["memory"] = measured.moved / accelerator.memory_bandwidth
        seconds["network"] = sum(each.seconds for each in traffic)
        limit = max(seconds, key=lambda name: seconds[name])
    total = measured.total
    return Plan(
        recipe=config.name,
        topology=topology.name,
        chips=topology.chips,
        hosts=topology.hosts,
        mesh=shape,
        attention=attention,
        remat=config.model.remat,
        changes=changes,
        flags=flags,
        compiled=bool(accelerator.axes),
        batch=work.rows,
        microbatches=config.optimiser.accumulation,
        lengths=(work.first, work.second),
        parameters=measured.parameters,
        parameter_bytes=measured.parameter_bytes,
        optimiser_bytes=measured.optimiser_bytes,
        activation_bytes=total - measured.parameter_bytes - measured.optimiser_bytes,
        total_bytes=total,
        memory=accelerator.memory,
        flops=flops,
        tokens=work.rows * work.first,
        traffic=traffic,
        compute_seconds=compute,
        memory_seconds=seconds.get("memory"),
        network_seconds=seconds.get("network"),
        share_of_peak=flops / topology.chips / accelerator.peak_flops / seconds[limit] if limit else None,
        limit=limit,
        mends=_mends(config, topology, shape, work, measured),
    )


@dataclass(frozen=True)
class _Measured:
    parameters: int
    parameter_bytes: int
    optimiser_bytes: int
    total: float
    moved: float | None
    collectives: list[Collective]
    positions: list[tuple[int, ...]]


def adapt(
    config: RunConfig, topology: Topology, shards: int, batch: int
) -> tuple[RunConfig, tuple[str, ...], tuple[str, ...]]:
    """The recipe as the topology needs it, with what was changed in words and as flags."""
    changes, unit = {}, shards * config.optimiser.accumulation
    before = config.data
    rows = batch or -(-before.batch_size // unit) * unit
    if rows != before.batch_size:
        why = "" if batch else " (one sample for each data x fsdp shard and microbatch)"
        changes["data.batch_size"] = (before.batch_size, rows, why)
    streams, readers = before.virtual_shards, min(topology.hosts, shards)  # tensor may span hosts
    if streams % readers or rows % streams:
        streams = readers
        changes["data.virtual_shards"] = (before.virtual_shards, streams, " (each host reads its own)")
    if rows % streams:
        raise InputError(
            "--batch", f"{rows} is not a multiple of the {readers} hosts that read", "give a multiple of them"
        )
    config = replace(config, data=replace(before, batch_size=rows, virtual_shards=streams))
    if topology.accelerator.axes and before.length_multiple % 128:
        changes["data.length_multiple"] = (before.length_multiple, 128, " (the lanes of a TPU)")
        config = replace(config, data=replace(config.data, length_multiple=128))
    return (
        config,
        tuple(f"{name} {old} -> {new}{why}" for name, (old, new, why) in changes.items()),
        tuple(f"--{name} {new}" for name, (_, new, _) in changes.items()),
    )


def _compile(config: RunConfig, topology: Topology, work: Workload) -> _Measured:
    """Compile the step; where it does not fit, the compiler tells what it would take and no more."""
    mesh = make_mesh(config.mesh, topology.devices)
    program = make_program(config, mesh, learning_of(config, work.n_genes))
    lowered = program.step.lower(program.like, work.batch(type(config.model)), program.given(0))
    moved, found = None, []
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        total = _needed(str(error), config.name)
    else:
        text = ProgramText(compiled.as_text())
        moved, found = text.memory_traffic(), text.collectives()
        memory = compiled.memory_analysis()
        total = (
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
            + memory.temp_size_in_bytes
            + memory.generated_code_size_in_bytes
        )
    return _Measured(
        count_parameters(program.shapes),
        bytes_of_shards(program.like["parameters"]),
        bytes_of_shards(program.like["optimiser"]),
        total,
        moved,
        found,
        [tuple(device.coords) for device in mesh.devices.flat],
    )


def _needed(message: str, name: str) -> float:
    """Bytes that the compiler says the program would take."""
    found = re.search(r"(?:Used|required for [\w ]*?\()\s*([\d.]+)([KMG])", message)
    if "RESOURCE_EXHAUSTED" not in message or not found:
        raise InputError(name, f"the compiler of TPUs fails: {message.splitlines()[0]}", "change the recipe")
    return float(found[1]) * 2 ** {"K": 10, "M": 20, "G": 30}[found[2]]


def _reckon(config: RunConfig, topology: Topology, work: Workload) -> _Measured:
    """The same from shapes."""
    mesh: Any = AbstractMesh(
        mesh_shape(config.mesh, topology.chips), MESH_AXES, axis_types=(AxisType.Auto,) * 3
    )
    program = make_program(config, mesh, learning_of(config, work.n_genes))
    parameters = program.like["parameters"]
    rows = work.rows // config.optimiser.accumulation // (mesh.shape["data"] * mesh.shape["fsdp"])
    state = bytes_of_shards(parameters)
    gradients = 2 if config.optimiser.accumulation > 1 else 1  # their sum, and a microbatch's
    optimiser = bytes_of_shards(program.like["optimiser"])
    return _Measured(
        count_parameters(program.shapes),
        state,
        optimiser,
        gradients * state + state + optimiser + activation_bytes(config, work, rows),
        memory_traffic(config, work, rows, parameters),
        collectives(config, mesh, work, parameters),
        list(positions(*topology.shape)),
    )


def _by_kind(
    found: Sequence[Collective],
    topology: Topology,
    positions: list[tuple[int, ...]],
    shape: dict[str, int],
) -> tuple[Traffic, ...]:
    """Collectives together by what they do and the axes of the mesh that they go over."""
    sums: dict[tuple[str, str], list[float]] = {}
    for collective in found:
        if len(collective.group) < 2:
            continue
        places = np.array(np.unravel_index(collective.group, tuple(shape.values())))
        axes = [axis for axis, of_group in zip(MESH_AXES, places, strict=True) if len(set(of_group)) > 1]
        each = sums.setdefault((collective.kind, " x ".join(axes)), [0, 0.0, 0.0])
        each[0] += collective.times
        each[1] += collective.sent
        each[2] += collective.sent / topology.ring(collective.group, positions)
    return tuple(
        Traffic(kind, over, int(count), sent, seconds)
        for (kind, over), (count, sent, seconds) in sorted(sums.items(), key=lambda item: -item[1][1])
    )


def _executed_flops(config: RunConfig, topology: Topology, work: Workload, attention: str) -> float:
    """Operations that the devices do: with what is recomputed, and with idle parts of matrix units."""
    parts = forward_flops(config.model, work.n_genes, work.load)
    again = 1 if config.model.remat == "full" else 0
    # "dots" keeps what a fused kernel gives, and not products with batch dimensions.
    attended = 1 if config.model.remat == "dots" and attention in ("plain", "chunked") else again
    unit = _MATRIX_UNIT.get(topology.accelerator.name, 1)
    model, alone = config.model, replace(work.load, second_pairs=0)
    first = forward_flops(model, work.n_genes, alone)["attention"]
    stacks = [(model.encoder if isinstance(model, TissueConfig) else model, first)]
    if isinstance(model, TissueConfig):
        stacks.append((model.decoder, parts["attention"] - first))
    filled = sum(pairs / min(1.0, stack.head_size / unit) for stack, pairs in stacks)
    pairs = filled * (_ATTENTION_PRODUCTS[attention] / 2 + attended)
    return pairs + (3 + again) * parts["layers"] + 3 * (parts["embedding"] + parts["head"])


def _mends(
    config: RunConfig, topology: Topology, shape: dict[str, int], work: Workload, measured: _Measured
) -> tuple[str, ...]:
    """Flags that make it smaller, each by itself and the cheapest first; none where it fits."""
    memory = topology.accelerator.memory
    if measured.total <= memory:
        return ()
    free = "--mesh.data 0 " if config.mesh.data else ""  # the devices are as many as before
    state = measured.parameter_bytes + measured.optimiser_bytes
    rows = work.rows // (shape["data"] * shape["fsdp"] * config.optimiser.accumulation)
    mends = []
    if state > memory / 4 and shape["data"] > 1:
        more = shape["fsdp"] * _divisor(shape["data"], 4 * state / memory)
        mends.append(f"{free}--mesh.fsdp {more} (splits parameters and optimiser)")
    if rows > 1:
        room = max(memory - state, 1)
        parts = config.optimiser.accumulation * _divisor(rows, (measured.total - state) / room)
        mends.append(f"--optimiser.accumulation {parts} (fewer samples at a time)")
    if config.model.remat != "full":
        less = "full" if config.model.remat == "dots" else "dots"
        mends.append(f"--model.remat {less} (keeps less of a layer)")
    # Half as many shards for two that share a sample. Shapes alone see no activation split, only the state.
    taken = "data" if shape["data"] % 2 == 0 else "fsdp" if topology.accelerator.axes else ""
    if rows == 1 and taken and shape[taken] % 2 == 0:
        less = f"--mesh.fsdp {shape['fsdp'] // 2} " if taken == "fsdp" else ""
        mends.append(
            f"{free}{less}--mesh.tensor {shape['tensor'] * 2} --batch {work.rows // 2} "
            "(splits heads and feed-forward of a sample)"
        )
    return tuple(mends) or ("a --topology of more devices, or shorter samples",)


def _divisor(number: int, least: float) -> int:
    """The smallest divisor from `least` upwards, or the number itself."""
    return next(
        (divisor for divisor in range(2, number) if divisor >= least and not number % divisor), number
    )
