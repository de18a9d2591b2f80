"""The batch of a step is the same bytes on any number of hosts, from any start, with any threads."""

from __future__ import annotations

import dataclasses
import hashlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import pytest

from scfm_jax.corpus import Corpus
from scfm_jax.data.loader import DataConfig, Loader
from scfm_jax.data.masks import MaskRates
from scfm_jax.data.ranks import RankConfig, TokenMask
from scfm_jax.data.tokens import SampleConfig

STEPS = 21
BASE = DataConfig(batch_size=16, virtual_shards=8, window=4, rungs=3, pool_blocks=2)
FAMILIES: dict[str, tuple[DataConfig, Any]] = {
    "tissue": (dataclasses.replace(BASE, sample=SampleConfig(neighbours=3)), MaskRates(0.3, 0.05)),
    "ranks": (
        dataclasses.replace(BASE, sample=RankConfig(length=12, context=("modality",), niche_neighbours=2)),
        TokenMask(0.3),
    ),
}


class Board:
    """Where the hosts of a test leave their lengths for each other."""

    def __init__(self, hosts: int) -> None:
        self._hosts, self._said, self._changed = hosts, {}, threading.Condition()

    def exchange(self, name: str, lengths: np.ndarray) -> np.ndarray:
        with self._changed:
            self._said.setdefault(name, []).append(lengths)
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: len(self._said[name]) == self._hosts, timeout=60)
            return np.max(self._said[name], axis=0)


@pytest.fixture(scope="module")
def open_corpus(known) -> Callable[[], Corpus]:
    # One corpus a host: what another host has read is not in its memory.
    return lambda: Corpus.open(known.corpus.path, cache_bytes=200_000)


def rows(batch: Any) -> list[np.ndarray]:
    return [np.asarray(value) for value in jax.tree.leaves(batch)]


def digest(batches: list[list[np.ndarray]]) -> str:
    """The bytes of a batch whose rows come from several hosts."""
    whole = [np.concatenate(parts) for parts in zip(*batches, strict=True)]
    return hashlib.sha256(b"".join(str(a.shape).encode() + a.tobytes() for a in whole)).hexdigest()


def run_hosts(
    open_corpus: Callable[[], Corpus],
    family: str,
    hosts: int,
    *,
    exchange: bool,
    readers: int = 2,
    start: int = 0,
) -> list[str]:
    config, rates = FAMILIES[family]
    config = dataclasses.replace(config, readers=readers)
    board = Board(hosts)

    def run(host: int) -> list[list[np.ndarray]]:
        corpus = open_corpus()
        loader = Loader(
            corpus,
            np.arange(corpus.n_cells)[::2],
            config,
            seed=4,
            rates=rates,
            host=(host, hosts),
            exchange=board.exchange if exchange else None,
        )
        return [rows(batch) for batch in loader.iterate(start, STEPS)]

    with ThreadPoolExecutor(hosts) as pool:
        found = list(pool.map(run, range(hosts)))
    return [digest([of_host[step] for of_host in found]) for step in range(STEPS - start)]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def expected(open_corpus, family) -> list[str]:
    found = run_hosts(open_corpus, family, 1, exchange=False, readers=1)
    assert len(set(found)) == STEPS
    return found


@pytest.mark.parametrize("exchange", [False, True])
@pytest.mark.parametrize("hosts", [1, 2, 4, 8])
def test_any_number_of_hosts(open_corpus, family, expected, hosts, exchange):
    assert run_hosts(open_corpus, family, hosts, exchange=exchange) == expected


@pytest.mark.parametrize("start", [1, 4, 18])
@pytest.mark.parametrize("hosts", [1, 4])
def test_from_a_resume_on_another_number_of_hosts(open_corpus, family, expected, hosts, start):
    assert run_hosts(open_corpus, family, hosts, exchange=True, start=start) == expected[start:]


@pytest.mark.parametrize("readers", [1, 3, 8])
def test_any_number_of_reader_threads(open_corpus, family, expected, readers):
    for _ in range(3):
        assert run_hosts(open_corpus, family, 2, exchange=True, readers=readers) == expected


def test_a_host_with_an_exchange_reads_its_own_shards_alone(open_corpus, monkeypatch):
    config, rates = FAMILIES["tissue"]
    drawn: list[int] = []
    kept = Loader._read_part
    monkeypatch.setattr(
        Loader,
        "_read_part",
        lambda self, streams, seed, number, shard: (
            drawn.append(shard) or kept(self, streams, seed, number, shard)
        ),
    )
    corpus = open_corpus()
    cells = np.arange(corpus.n_cells)
    loader = Loader(corpus, cells, config, seed=4, rates=rates, host=(1, 4), exchange=Board(1).exchange)
    loader.batch(9)
    assert set(drawn) == {2, 3}
