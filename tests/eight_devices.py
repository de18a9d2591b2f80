"""Programs on eight simulated devices, in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys


def on_eight_devices(program: str, *arguments: str) -> list[str]:
    """The lines that a Python program prints."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        # A collective holds a thread for each device until all have come: with fewer it waits for ever.
        env={
            **os.environ,
            "XLA_FLAGS": flags,
            "NPROC": "32",
            "JAX_PLATFORMS": "cpu",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    # What the partitioner says where it has to make an array whole that should be in parts.
    assert "full rematerialization" not in done.stderr, done.stderr[-2000:]
    return done.stdout.splitlines()
