"""Hosts that are processes of their own train as one, stop as one, and end as one."""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pod import Pod, StartPod

from scfm_jax.training.config import MeshConfig, RunConfig
from scfm_jax.training.metrics import CLOCKED, read_metrics


@pytest.fixture(scope="session")
def twenty(pod_config: RunConfig) -> RunConfig:
    optimiser = dataclasses.replace(pod_config.optimiser, steps=20, warmup_steps=5)
    return dataclasses.replace(pod_config, optimiser=optimiser, evaluate_every=5)


@pytest.fixture(scope="session")
def alone(twenty: RunConfig, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Rows of the same run on one host, never stopped."""
    folder = tmp_path_factory.mktemp("alone")
    pod = Pod(folder, dataclasses.replace(twenty, checkpoint_every=20), 1, cache=cache)
    assert pod.wait() == [0], pod.said()
    return read_metrics(pod.run / "metrics.jsonl")


def assert_same_rows(folder: Path, alone: list[dict[str, Any]]) -> None:
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [row["step"] for row in alone]
    for row, other in zip(rows, alone, strict=True):
        assert row.keys() == other.keys()
        assert row.get("drawn") == other.get("drawn")
        for name in row.keys() - CLOCKED - {"drawn"}:
            np.testing.assert_allclose(row[name], other[name], rtol=1e-5, err_msg=f"{name} {row['step']}")


def test_sigterm_on_one_host_saves_on_all_and_another_number_goes_on(
    start_pod: StartPod, twenty: RunConfig, alone: list[dict[str, Any]]
) -> None:
    pod = start_pod(twenty, 2)
    pod.reach(3)
    pod.processes[1].send_signal(signal.SIGTERM)
    assert pod.wait() == [0, 0], pod.said()
    steps = [row["step"] for row in read_metrics(pod.run / "metrics.jsonl")]
    assert 3 <= steps[-1] < 20
    assert max(int(path.name) for path in (pod.run / "checkpoints").iterdir()) == steps[-1]
    first, second = pod.said()
    assert f"stopped and saved at step {steps[-1]}" in first and "stopped" not in second
    one = start_pod(dataclasses.replace(twenty, checkpoint_every=20), 1, "--resume")
    assert one.wait() == [0], one.said()
    assert_same_rows(pod.run, alone)


def test_a_host_that_is_killed_ends_the_others(start_pod: StartPod, twenty: RunConfig) -> None:
    pod = start_pod(twenty, 2, "--optimiser.steps", "100000", "--checkpoint_every", "100000")
    pod.reach(7)
    pod.processes[1].kill()
    assert pod.wait(60) == [1, -signal.SIGKILL]
    line = pod.said()[0].strip().splitlines()[-1]
    assert line.startswith("scfm: host 1 of 2 gave no sign of life for") and "--resume" in line


MESHES = {
    "data=2": (2, 1, MeshConfig()),
    "fsdp=4 over hosts": (4, 1, MeshConfig(fsdp=4)),
    "tensor over hosts": (2, 1, MeshConfig(tensor=2)),
    "data=2 fsdp=2 tensor=2": (4, 2, MeshConfig(data=2, fsdp=2, tensor=2)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_hosts_train_like_one(
    start_pod: StartPod, twenty: RunConfig, alone: list[dict[str, Any]], name: str
) -> None:
    hosts, devices, mesh = MESHES[name]
    run = dataclasses.replace(twenty, mesh=mesh, checkpoint_every=20)
    pod = start_pod(run, hosts, devices=devices)
    assert pod.wait() == [0] * hosts, pod.said()
    assert_same_rows(pod.run, alone)


@pytest.mark.slow
def test_sentences_too(
    start_pod: StartPod,
    ranks: RunConfig,
    twenty: RunConfig,
    cache: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    run = dataclasses.replace(
        ranks,
        corpus=twenty.corpus,
        data=dataclasses.replace(ranks.data, virtual_shards=4),
        optimiser=twenty.optimiser,
        checkpoint_every=20,
    )
    one = Pod(tmp_path_factory.mktemp("alone"), run, 1, cache=cache)
    assert one.wait() == [0], one.said()
    pod = start_pod(run, 2)
    assert pod.wait() == [0, 0], pod.said()
    assert_same_rows(pod.run, read_metrics(one.run / "metrics.jsonl"))


# Hosts, devices of each, mesh, and the step after which they are stopped.
JOURNEYS = {
    "4, 1 and 2 hosts": ((4, 1, MeshConfig(), 3), (1, 1, MeshConfig(), 9), (2, 1, MeshConfig(), 20)),
    "1 device, fsdp=8, tensor=2 x fsdp=4": (
        (1, 1, MeshConfig(), 3),
        (1, 8, MeshConfig(fsdp=8), 9),
        (1, 8, MeshConfig(fsdp=4, tensor=2), 20),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", JOURNEYS)
def test_a_run_moves_on(
    start_pod: StartPod, twenty: RunConfig, alone: list[dict[str, Any]], name: str
) -> None:
    flags: tuple[str, ...] = ()
    for hosts, devices, mesh, step in JOURNEYS[name]:
        pod = start_pod(dataclasses.replace(twenty, mesh=mesh), hosts, *flags, devices=devices)
        pod.reach(step)
        if step < 20:
            pod.processes[-1].send_signal(signal.SIGTERM)
        assert pod.wait() == [0] * hosts, pod.said()
        flags = ("--resume",)
    assert_same_rows(pod.run, alone)


@pytest.mark.slow
@pytest.mark.parametrize("dead", [0, 3])
def test_one_of_four_dies(start_pod: StartPod, twenty: RunConfig, dead: int) -> None:
    """With a checkpoint at every step, most likely while one is written."""
    rarely = dataclasses.replace(twenty, evaluate_every=1_000)
    pod = start_pod(rarely, 4, "--optimiser.steps", "100000")
    pod.reach(5)
    pod.processes[dead].kill()
    statuses = pod.wait(60)
    assert statuses[dead] == -signal.SIGKILL and 0 not in statuses, statuses
    for host, said in enumerate(pod.said()):
        # JAX itself aborts at once where host 0, which keeps its service, is gone.
        assert host == dead or f"host {dead} of 4" in said or "leader task" in said, said
    resumed = start_pod(rarely, 1, "--resume")
    assert resumed.wait() == [0], resumed.said()


@pytest.mark.slow
def test_one_that_stands_still_in_the_loader_is_found(start_pod: StartPod, twenty: RunConfig) -> None:
    """A stopped process is alive to the machine, and closes no connection: only its silence tells."""
    pod = start_pod(twenty, 2, "--optimiser.steps", "100000", "--checkpoint_every", "100000")
    pod.reach(7)
    pod.processes[1].send_signal(signal.SIGSTOP)
    assert pod.processes[0].wait(60) == 1
    assert "scfm: host 1 of 2 gave no sign of life for 3" in pod.said()[0]


@pytest.mark.slow
def test_bad_input_on_one_host_ends_all(start_pod: StartPod, twenty: RunConfig) -> None:
    pod = start_pod(twenty, 2, odd=("--seed", "5"))
    assert pod.wait(60) == [1, 2], pod.said()
    first, second = pod.said()
    assert "host 0 writes a run of another config or corpus than this host was given" in second
    assert "scfm: host 1 of 2 failed (" in first and "than this host was given" in first
    assert "Traceback" not in first + second
