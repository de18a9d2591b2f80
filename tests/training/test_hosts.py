"""Who is a host of a run, told from flags and from what clusters set."""

from __future__ import annotations

import socket
from typing import Any

import jax
import pytest

from scfm_jax.errors import InputError
from scfm_jax.training import hosts
from scfm_jax.training.config import MeshConfig
from scfm_jax.training.hosts import equal_share, joined, share_of_batch
from scfm_jax.training.mesh import make_mesh

# As SLURM's and GKE's manuals say.
STEP = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4"}
BATCH_SCRIPT = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}
TPU_SLICE = {"TPU_WORKER_HOSTNAMES": "tpu-0.job,tpu-1.job", "TPU_WORKER_ID": "1"}
ONE_TPU = {"TPU_WORKER_HOSTNAMES": "localhost"}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What JAX was asked to join, rather than joining it."""
    found: list[tuple[Any, ...]] = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *where, **more: found.append(where))
    monkeypatch.setattr(hosts, "_wait_for_host_0", lambda address, seconds: None)  # nobody is asked
    for name in STEP.keys() | TPU_SLICE.keys() | {"OMPI_COMM_WORLD_SIZE"}:
        monkeypatch.delenv(name, raising=False)
    return found


@pytest.mark.parametrize(
    ("environment", "flag", "expected"),
    [
        ({}, None, []),
        (BATCH_SCRIPT, None, []),
        ({**STEP, "SLURM_STEP_NUM_TASKS": "1"}, None, []),
        (ONE_TPU, None, []),
        (STEP, None, [()]),
        (TPU_SLICE, None, [()]),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, None, [()]),
        (STEP, "off", []),
        ({}, "auto", [()]),
        ({}, "10.0.0.1:1234,4,3", [("10.0.0.1:1234", 4, 3)]),
        ({}, "[::1]:1234,4,0", [("[::1]:1234", 4, 0)]),
    ],
)
def test_hosts_are_joined_where_a_flag_or_a_launcher_says_so(
    asked: list[tuple[Any, ...]],
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    flag: str | None,
    expected: list[tuple[Any, ...]],
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with joined(flag):
        assert asked == expected


@pytest.mark.parametrize(
    "text",
    [
        *("", "on", "10.0.0.1,4,0", "a:1,4", "a:1,4,4", "a:1,0,0", "a:b,4,0", "a:1,4,-1"),
        *(":1,4,0", "a:0,4,0", "a:65536,4,0"),
    ],
)
def test_hosts_that_cannot_be_read(asked: list[tuple[Any, ...]], text: str) -> None:
    with pytest.raises(InputError, match="--distributed: cannot read") as error, joined(text):
        pytest.fail("joined")
    assert "\n" not in str(error.value) and not asked


@pytest.mark.parametrize("flag", [None, "off"])
def test_a_part_of_a_slice_cannot_be_alone(
    asked: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch, flag: str | None
) -> None:
    """A TPU VM's process is one of several before it has joined them."""
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with (
        pytest.raises(InputError, match=r"one of the 4 of a TPU slice.*; give --distributed auto"),
        joined(flag),
    ):
        pytest.fail("alone")


def test_a_host_0_that_does_not_answer_is_one_line() -> None:
    with socket.socket() as closed:  # bound, and nobody listens
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        with pytest.raises(InputError, match=f"host 0 does not answer at {address} .*refused.*; start it"):
            hosts._wait_for_host_0(address, 0.0)
        closed.listen()
        hosts._wait_for_host_0(address, 0.0)


def test_nothing_to_join_is_one_line(asked: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    def initialize(*where: Any, **more: Any) -> None:
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with (
        pytest.raises(InputError, match="auto: no run of several hosts could be joined") as error,
        joined("auto"),
    ):
        pytest.fail("joined")
    assert "\n" not in str(error.value)


def test_hosts_share_a_batch_as_their_devices_do() -> None:
    runs = {0: {0, 1}, 1: {2, 3}, 2: {4, 5}, 3: {6, 7}}
    assert [equal_share(runs, host) for host in range(4)] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    # As where a torus is cut otherwise than into hosts.
    woven = {0: {0, 4}, 1: {1, 5}, 2: {2, 6}, 3: {3, 7}}
    assert [equal_share(woven, host) for host in range(4)] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    # A tensor axis over two hosts; over all.
    pairs = {0: {0, 1, 2, 3}, 1: {0, 1, 2, 3}, 2: {4, 5, 6, 7}, 3: {4, 5, 6, 7}}
    assert [equal_share(pairs, host) for host in range(4)] == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert [equal_share({0: {0, 1}, 1: {0, 1}}, host) for host in range(2)] == [(0, 1), (0, 1)]
    for bad in ({0: {0, 1}, 1: {1, 2}}, {0: {0, 1, 2}, 1: {3}}):
        with pytest.raises(InputError, match="mesh: hosts hold parts of a batch that overlap"):
            equal_share(bad, 0)


def test_a_host_alone_has_all_rows() -> None:
    assert share_of_batch(make_mesh(MeshConfig()), 8 * len(jax.devices())) == (0, 1)
