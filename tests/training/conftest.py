"""What the tests of training share beside the tiny run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from compiled_once import compiled_once

from scfm_jax.training.config import RunConfig
from scfm_jax.training.train import train


@pytest.fixture(scope="session", autouse=True)
def compile_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with compiled_once(tmp_path_factory.mktemp("compiled")):
        yield


@pytest.fixture(scope="session")
def finished(compile_once: None, config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that was never stopped, compiled with the settings of the runs that are compared with it."""
    folder = tmp_path_factory.mktemp("runs") / "finished_here"
    assert train(config, folder) == config.optimiser.steps
    return folder


@pytest.fixture(scope="session")
def run_with_niche(compile_once: None, ranks: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of Nicheformer."""
    folder = tmp_path_factory.mktemp("runs") / "ranks_here"
    assert train(ranks, folder) == ranks.optimiser.steps
    return folder
