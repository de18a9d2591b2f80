"""What accelerators can do: the denominators of utilisation and of every plan.

All figures are of one JAX device. Sources: cloud.google.com/tpu/docs (v5e, v5p, v6e, v4) for TPUs, whose
interconnect is given there as the sum of both directions over all links of a chip; NVIDIA's data sheets (A100
80GB SXM4, H100 SXM5, H200 SXM5, HGX B200) for GPUs, whose bf16 figure is halved where it counts sparsity.
Memory is what a program can have: the limit of TPU's compiler, and of GPUs what CUDA leaves.
"""

from __future__ import annotations

from dataclasses import dataclass

_GIB = 1 << 30


@dataclass(frozen=True)
class Accelerator:
    """One kind of device.

    Attributes
    ----------
    name
        As `scfm plan --topology` writes it.
    kinds
        What `jax.Device.device_kind` calls it, as versions differ.
    peak_flops
        Dense bf16 operations a second.
    memory
        Bytes that a program can have.
    memory_bandwidth
        Bytes a second from and to that memory.
    axes
        Of the torus; 0 for devices behind a switch.
    link
        Bytes a second that a device sends one way: over one link of a torus, which has two an axis; or to its
        host's switch.
    wraps
        An axis of the torus closes to a ring where its length is a multiple of this.
    network
        Bytes a second and device that leave a host's switch; 0 for a torus.
    per_host
        Devices behind one switch; 0 for a torus.
    chip_config
        How libtpu is to take a chip's cores, where it would not take them for one device as TPU VMs do.
    """

    name: str
    kinds: tuple[str, ...]
    peak_flops: float
    memory: int
    memory_bandwidth: float
    link: float
    axes: int = 0
    wraps: int = 1
    network: float = 0.0
    per_host: int = 0
    chip_config: str = ""

    @property
    def platform(self) -> str:
        """As JAX calls it."""
        return "tpu" if self.axes else "gpu"


_TABLE = (
    Accelerator(
        "v4", ("TPU v4",), 275e12, 32 * _GIB, 1.200e12, axes=3, link=50e9, wraps=4, chip_config="megacore"
    ),
    Accelerator(
        "v5e", ("TPU v5 lite", "TPU v5e"), 197e12, int(15.75 * _GIB), 0.819e12, axes=2, link=50e9, wraps=16
    ),
    Accelerator(
        "v5p", ("TPU v5", "TPU v5p"), 459e12, int(95.74 * _GIB), 2.765e12, axes=3, link=100e9, wraps=4
    ),
    Accelerator(
        "v6e", ("TPU v6 lite", "TPU v6e"), 918e12, int(31.25 * _GIB), 1.640e12, axes=2, link=100e9, wraps=16
    ),
    Accelerator(
        "a100", ("NVIDIA A100-SXM4-80GB",), 312e12, 78 * _GIB, 2.039e12, link=300e9, network=25e9, per_host=8
    ),
    Accelerator(
        "h100", ("NVIDIA H100 80GB HBM3",), 989e12, 78 * _GIB, 3.35e12, link=450e9, network=50e9, per_host=8
    ),
    Accelerator("h200", ("NVIDIA H200",), 989e12, 139 * _GIB, 4.8e12, link=450e9, network=50e9, per_host=8),
    Accelerator("b200", ("NVIDIA B200",), 2_250e12, 178 * _GIB, 8.0e12, link=900e9, network=50e9, per_host=8),
)

# By the name in a topology.
ACCELERATORS = {accelerator.name: accelerator for accelerator in _TABLE}
_BY_KIND = {kind: accelerator for accelerator in _TABLE for kind in accelerator.kinds}


def accelerator_of(device_kind: str) -> Accelerator | None:
    """The accelerator that a `jax.Device.device_kind` names; None for a CPU, and for what is not listed."""
    return _BY_KIND.get(device_kind)
