"""Processes of this machine as the hosts of one run, started as a user would start them."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from scfm_jax.training.config import RunConfig
from scfm_jax.training.metrics import read_metrics

RECIPE = """
import json, pathlib
from scfm_jax.training.config import RunConfig, from_dict
def recipe():
    content = json.loads(pathlib.Path(__file__).with_suffix(".json").read_text())
    return from_dict(RunConfig, content, "recipe")
"""


class Pod:
    """The hosts of one run.

    Parameters
    ----------
    folder
        Where recipe, run directory and what the hosts say are kept.
    config
        Of the run.
    hosts
        Processes.
    flags
        Of the command.
    devices, cache
        Simulated devices of each host; where compilations are kept.
    odd
        Flags of the last host alone.
    """

    def __init__(
        self,
        folder: Path,
        config: RunConfig,
        hosts: int,
        *flags: str,
        cache: Path,
        devices: int = 1,
        odd: tuple[str, ...] = (),
    ) -> None:
        self.run = folder / "run"
        (folder / "recipe.py").write_text(RECIPE)
        (folder / "recipe.json").write_text(json.dumps(dataclasses.asdict(config)))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        command = [sys.executable, "-m", "scfm_jax.cli", "train", str(folder / "recipe.py"), str(self.run)]
        self._logs = [folder / f"host{number}.log" for number in range(hosts)]
        self.processes = []
        for number, log in enumerate(self._logs):
            join = ["--distributed", f"{address},{hosts},{number}"] if hosts > 1 else []
            own = (*flags, *odd) if number == hosts - 1 else flags
            with log.open("w") as file:
                self.processes.append(
                    subprocess.Popen([*command, *own, *join], env=environment, stdout=file, stderr=file)
                )

    def wait(self, timeout: float = 120.0) -> list[int]:
        """Exit statuses."""
        until = time.monotonic() + timeout
        return [process.wait(max(until - time.monotonic(), 0.1)) for process in self.processes]

    def reach(self, step: int) -> None:
        """Wait until the row of a step is written."""
        until = time.monotonic() + 120
        while not any(row["step"] >= step for row in read_metrics(self.run / "metrics.jsonl")):
            assert time.monotonic() < until and all(p.poll() is None for p in self.processes), self.said()
            time.sleep(0.05)

    def said(self) -> list[str]:
        """What each host printed."""
        return [log.read_text() for log in self._logs]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


StartPod = Callable[..., Pod]
