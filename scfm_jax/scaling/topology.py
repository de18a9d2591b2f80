"""Devices that are not there: a topology's name, and what JAX compiles for in its place."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from math import prod

import jax

from scfm_jax.errors import InputError
from scfm_jax.training.hardware import ACCELERATORS, Accelerator

# libtpu asks the machine what it is, and holds a lock on a chip that is not there.
_QUIET = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
_MOST = 1 << 15  # devices; every one of them has a place in a list


@dataclass(frozen=True)
class Topology:
    """A slice of TPUs, or hosts of GPUs.

    Attributes
    ----------
    name
        As given, ``v5p:8x8x8`` or ``h100:32x8``.
    accelerator
        Its kind of device.
    shape
        Chips along each axis of the torus; or hosts, and GPUs of each.
    """

    name: str
    accelerator: Accelerator
    shape: tuple[int, ...]

    @classmethod
    def parse(cls, name: str) -> Topology:
        """Read a name.

        Raises
        ------
        InputError
            Another kind of device, or another number of axes.
        """
        kind, _, sizes = name.partition(":")
        accelerator = ACCELERATORS.get(kind)
        mend = f"write KIND:SIZES, as v5p:8x8x8 or h100:32x8, with KIND of {', '.join(ACCELERATORS)}"
        if accelerator is None or not all(part.isdecimal() for part in sizes.split("x")):
            raise InputError("--topology", f"{name!r} is not known", mend)
        shape = tuple(int(part) for part in sizes.split("x"))
        axes = accelerator.axes or 2
        if len(shape) != axes or not all(shape):
            what = f"{axes} axes of a torus" if accelerator.axes else "hosts x GPUs a host"
            raise InputError("--topology", f"{name!r} does not give the {what} of a {kind}", mend)
        if shape[-1] > (accelerator.per_host or shape[-1]):
            raise InputError(
                "--topology",
                f"{name!r} has {shape[-1]} GPUs behind a switch that holds {accelerator.per_host}",
                f"write {kind}:HOSTSx{accelerator.per_host}",
            )
        if prod(shape) > _MOST:
            raise InputError(
                "--topology", f"{name!r} has {prod(shape):,} devices", f"ask for {_MOST:,} or fewer"
            )
        return cls(name, accelerator, shape)

    @property
    def chips(self) -> int:
        return prod(self.shape)

    @cached_property
    def devices(self) -> list[jax.Device]:
        """What the TPU's compiler compiles for, in its own order.

        Raises
        ------
        InputError
            No libtpu, a shape that no slice has, or devices that are parts of chips.
        """
        from jax.experimental import topologies

        for variable, value in _QUIET.items():
            os.environ.setdefault(variable, value)
        try:
            cores = self.accelerator.chip_config
            options = {"chip_config_name": cores} if cores else {}
            devices = list(topologies.get_topology_desc(self.name, "tpu", **options).devices)
        except jax.errors.JaxRuntimeError as error:
            reason = str(error).splitlines()[0]
            raise InputError(
                "--topology", f"{self.name!r} is refused by libtpu: {reason}", "give a shape that slices have"
            ) from error
        except RuntimeError as error:
            raise InputError(
                "--topology",
                f"{self.name!r} needs the compiler of TPUs (libtpu), which is not installed",
                "install the extra: pip install '.[tpu]'",
            ) from error
        if len(devices) != self.chips:
            raise InputError(
                "--topology",
                f"libtpu makes {len(devices)} devices of the {self.chips} chips of {self.name!r}, unlike a "
                "TPU VM",
                "plan for another kind of chip",
            )
        return devices

    @cached_property
    def hosts(self) -> int:
        """Machines that drive the chips."""
        if self.accelerator.axes:
            return len({device.process_index for device in self.devices})
        return self.shape[0]

    def ring(self, group: tuple[int, ...], positions: list[tuple[int, ...]]) -> float:
        """Bytes a second that each device of `group` can send to the others of it.

        On a torus, links along every axis that the group spreads over: both directions where it fills an axis
        that closes to a ring, one where it does not. Behind switches, the slower of two: the switch, and the
        share of the network that the group's devices in one host have together.

        Parameters
        ----------
        group
            Devices, by their place in `positions`.
        positions
            Coordinates of every device: on the torus, or (host, place behind its switch).
        """
        of_group = [positions[device] for device in group]
        accelerator = self.accelerator
        if accelerator.axes:
            links = 0
            for axis, length in enumerate(self.shape):
                spread = len({place[axis] for place in of_group})
                if spread > 1:
                    links += 2 if spread == length and length % accelerator.wraps == 0 else 1
            return accelerator.link * max(links, 1)
        hosts = len({host for host, _ in of_group})
        if hosts == 1:
            return accelerator.link
        return min(accelerator.link, accelerator.network * len(of_group) / hosts)
