"""Hosts that are processes of their own train as one, stop as one, and end as one."""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pod import StartPod

from scfm_jax.training.config import RunConfig
from scfm_jax.training.metrics import CLOCKED, read_metrics
from scfm_jax.training.train import train


@pytest.fixture(scope="session")
def twenty(pod_config: RunConfig) -> RunConfig:
    optimiser = dataclasses.replace(pod_config.optimiser, steps=20, warmup_steps=5)
    return dataclasses.replace(pod_config, optimiser=optimiser, evaluate_every=5)


@pytest.fixture(scope="session")
def alone(twenty: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Rows of the same run on one host, never stopped."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert train(dataclasses.replace(twenty, checkpoint_every=20), folder) == 20
    return read_metrics(folder / "metrics.jsonl")


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
    assert train(dataclasses.replace(twenty, checkpoint_every=20), pod.run, resume=True) == 20
    assert_same_rows(pod.run, alone)


def test_a_host_that_is_killed_ends_the_others(start_pod: StartPod, twenty: RunConfig) -> None:
    pod = start_pod(twenty, 2, "--optimiser.steps", "100000", "--checkpoint_every", "100000")
    pod.reach(7)
    pod.processes[1].kill()
    assert pod.wait(60) == [1, -signal.SIGKILL]
    line = pod.said()[0].strip().splitlines()[-1]
    assert line.startswith("scfm: host 1 of 2 gave no sign of life for") and "--resume" in line
