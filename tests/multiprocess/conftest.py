"""A corpus with room for four hosts, and a way to start them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pod import Pod, StartPod

from scfm_jax.corpus import Source, build_corpus
from scfm_jax.data.loader import DataConfig
from scfm_jax.simulate import SimulationConfig, simulate
from scfm_jax.training.config import RunConfig


@pytest.fixture(scope="session")
def pod_config(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """The tiny run, over enough blocks of cells for four virtual shards."""
    folder = tmp_path_factory.mktemp("pod")
    slides = simulate(
        SimulationConfig(
            n_slides=2,
            cells_per_slide=320,
            n_genes=24,
            n_triples=2,
            depth=60,
            technologies=(("simscope", 22),),
        )
    )
    sources = []
    for number, slide in enumerate(slides):
        path = folder / f"slide{number}.h5ad"
        slide.write_h5ad(path)
        sources.append(Source(path=str(path), species="human", technology="simscope", um_per_unit=1.0))
    build_corpus(folder / "corpus", sources, n_neighbours=4)
    data: DataConfig = dataclasses.replace(config.data, virtual_shards=4)
    return dataclasses.replace(config, corpus=str(folder / "corpus"), data=data)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the hosts of all tests keep what they compile."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture
def start_pod(cache: Path, tmp_path: Path) -> Iterator[StartPod]:
    """Starts hosts over one run directory, and ends those that a test leaves behind."""
    pods: list[Pod] = []

    def start(config: RunConfig, hosts: int, *flags: str, **more: Any) -> Pod:
        pods.append(Pod(tmp_path, config, hosts, *flags, cache=cache, **more))
        return pods[-1]

    yield start
    for pod in pods:
        pod.kill()
