"""Hosts that are processes of their own tell each other their lengths, and make the batch of one host."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from scfm_jax.corpus import Source, build_corpus
from scfm_jax.simulate import SimulationConfig, simulate

HOST = """
import pathlib, sys
import jax, numpy as np
address, host, hosts, path, out = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
if hosts > 1:
    jax.distributed.initialize(address, hosts, host)
from scfm_jax.corpus import Corpus
from scfm_jax.data.loader import DataConfig, Loader
from scfm_jax.data.masks import MaskRates
from scfm_jax.data.tokens import SampleConfig
from scfm_jax.training.hosts import greatest_of_hosts

corpus = Corpus.open(path)
config = DataConfig(SampleConfig(3), batch_size=8, virtual_shards=4, window=2, rungs=3, pool_blocks=2)
exchange = greatest_of_hosts()
assert (exchange is None) == (hosts == 1)
cells, rates = np.arange(corpus.n_cells), MaskRates(0.3, 0.05)
loader = Loader(corpus, cells, config, seed=1, rates=rates, host=(host, hosts), exchange=exchange)
for step, batch in enumerate(loader.iterate(0, 9)):
    np.savez(f"{out}/{step}-{host}.npz", *jax.tree.leaves(batch))
"""


def run_hosts(hosts: int, corpus: Path, out: Path) -> list[list[np.ndarray]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    out.mkdir()
    command = [sys.executable, "-c", HOST, address]
    processes = [
        subprocess.Popen([*command, str(host), str(hosts), str(corpus), str(out)]) for host in range(hosts)
    ]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0] * hosts
    finally:
        for process in processes:
            process.kill()
    batches = []
    for step in range(9):
        parts = [list(np.load(out / f"{step}-{host}.npz").values()) for host in range(hosts)]
        batches.append([np.concatenate(rows) for rows in zip(*parts, strict=True)])
    return batches


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hosts")
    (slide,) = simulate(
        SimulationConfig(
            n_slides=1, cells_per_slide=700, n_genes=40, n_triples=2, depth=40.0, technologies=(("sim", 35),)
        )
    )
    slide.write_h5ad(folder / "slide.h5ad")
    build_corpus(folder / "corpus", [Source(str(folder / "slide.h5ad"), "human", "sim")], n_neighbours=4)
    return folder / "corpus"


def test_two_processes_make_the_batches_of_one(corpus, tmp_path):
    one, two = (run_hosts(hosts, corpus, tmp_path / str(hosts)) for hosts in (1, 2))
    for batch, other in zip(one, two, strict=True):
        for rows, others in zip(batch, other, strict=True):
            assert rows.dtype == others.dtype
            np.testing.assert_array_equal(rows, others)
