from __future__ import annotations

from importlib.util import find_spec
from itertools import product

import pytest

from scfm_jax.errors import InputError
from scfm_jax.scaling.topology import Topology
from scfm_jax.training.hardware import ACCELERATORS, accelerator_of


def test_names_are_read() -> None:
    pod = Topology.parse("v5p:8x8x16")
    assert (pod.accelerator.name, pod.shape, pod.chips) == ("v5p", (8, 8, 16), 1_024)
    hosts = Topology.parse("h100:32x8")
    assert (hosts.accelerator.name, hosts.chips, hosts.hosts) == ("h100", 256, 32)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("v9:2x2", "'v9:2x2' is not known; write KIND:SIZES"),
        ("v5p", "'v5p' is not known"),
        ("v5p:8x8xa", "'v5p:8x8xa' is not known"),
        ("v5p:8x-8x8", "'v5p:8x-8x8' is not known"),
        ("v5p:8x8", "does not give the 3 axes of a torus of a v5p"),
        ("v5p:8x8x0", "does not give the 3 axes of a torus of a v5p"),
        ("h100:8", "does not give the hosts x GPUs a host of a h100"),
        ("h100:999999x8", "has 7,999,992 devices; ask for 32,768 or fewer"),
        ("h100:4x16", "has 16 GPUs behind a switch that holds 8; write h100:HOSTSx8"),
    ],
)
def test_a_wrong_name_is_one_line(name: str, told: str) -> None:
    with pytest.raises(InputError, match=told) as error:
        Topology.parse(name)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(find_spec("libtpu") is not None, reason="libtpu is installed")
def test_without_libtpu_tpus_are_refused() -> None:
    with pytest.raises(InputError, match=r"needs the compiler of TPUs \(libtpu\).*pip install"):
        _ = Topology.parse("v5p:4x4x4").devices


@pytest.mark.skipif(find_spec("libtpu") is None, reason="needs the compiler of TPUs: pip install '.[tpu]'")
@pytest.mark.parametrize("name", ["v4:2x2x2", "v5e:4x4", "v5p:4x4x4", "v6e:4x4"])
def test_a_chip_is_a_device(name: str) -> None:
    topology = Topology.parse(name)
    assert len(topology.devices) == topology.chips
    assert accelerator_of(topology.devices[0].device_kind) is topology.accelerator


def test_links_of_a_torus() -> None:
    """Both directions of a whole ring, one of a part of it, those of each axis that a group spreads over."""
    pod = Topology.parse("v5p:4x4x8")
    places = list(product(range(4), range(4), range(8)))
    link = ACCELERATORS["v5p"].link

    def links(*group: tuple[int, int, int]) -> float:
        return pod.ring(tuple(places.index(place) for place in group), places) / link

    assert links((0, 0, 0), (0, 0, 1)) == 1
    assert links(*((0, 0, z) for z in range(4))) == 1
    assert links(*((0, 0, z) for z in range(8))) == 2
    assert links(*((x, 0, z) for x in range(4) for z in range(2))) == 3
    assert links(*places) == 6
    # An axis that is no multiple of four is not closed.
    line = Topology.parse("v5p:2x2x2")
    corners = list(product(range(2), repeat=3))
    assert line.ring(tuple(range(8)), corners) / link == 3


def test_switches_and_the_network_between_them() -> None:
    hosts = Topology.parse("h100:4x8")
    places = list(product(range(4), range(8)))
    gpu = ACCELERATORS["h100"]
    assert hosts.ring(tuple(range(8)), places) == gpu.link
    assert hosts.ring((0, 8, 16, 24), places) == gpu.network
    assert hosts.ring(tuple(range(32)), places) == 8 * gpu.network


def test_devices_are_known_by_what_jax_calls_them() -> None:
    assert accelerator_of("TPU v5") is accelerator_of("TPU v5p") is ACCELERATORS["v5p"]
    assert accelerator_of("NVIDIA H200") is ACCELERATORS["h200"]
    assert accelerator_of("cpu") is None
    for name, accelerator in ACCELERATORS.items():
        assert accelerator.name == name
        # What a device computes while a byte comes: 100 to 600 operations on every one so far.
        assert 100 < accelerator.peak_flops / accelerator.memory_bandwidth < 600
        assert (accelerator.per_host > 0) == (accelerator.axes == 0) == (accelerator.network > 0)
