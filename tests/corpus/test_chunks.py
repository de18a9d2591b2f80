"""Blocks decoded here are what TensorStore decodes, and their memory is used again only when it is free."""

from __future__ import annotations

import gc

import google_crc32c
import numpy as np
import pytest

from scfm_jax.corpus import Corpus, build_corpus, store
from scfm_jax.corpus.chunks import Buffers, decode
from scfm_jax.corpus.store import StoreOptions


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
@pytest.mark.parametrize("shard_entries", [1 << 25, 2_000])
@pytest.mark.parametrize("largest", [9, 70_000])
def test_blocks_are_what_tensorstore_reads(
    tissue, write, tmp_path, monkeypatch, codec, shard_entries, largest
):
    tissue.X.data[::7] = largest
    layout = store.LAYOUTS["entries"]
    monkeypatch.setitem(
        store.LAYOUTS, "entries", store.ArrayLayout(layout.dtype, layout.chunk, shard_entries)
    )
    build_corpus(tmp_path / "out", [write(tissue)], options=StoreOptions(codec))
    files = list((tmp_path / "out" / "slides").glob("*/entries/c/*/*"))
    assert (len(files) > 2) == (shard_entries == 2_000)
    corpus = Corpus.open(tmp_path / "out")
    reader = corpus._blocks
    blocks = reader.read(np.arange(reader.first_block[-1]))
    for slide, arrays in reader.arrays(range(len(corpus.slides))).items():
        whole = arrays["entries"].read().result()
        for row, number in zip(whole, range(*reader.first_block[slide : slide + 2])):
            entries = blocks.entries[number]
            np.testing.assert_array_equal(entries, row[: len(entries)])
            assert entries.dtype == row.dtype and not row[len(entries) :].any()


def test_many_blocks_are_decoded_as_few_are(tissue, write, tmp_path, monkeypatch):
    build_corpus(tmp_path / "out", [write(tissue)])
    monkeypatch.setattr("scfm_jax.corpus.chunks._PART", 1)
    monkeypatch.setattr("scfm_jax.corpus.chunks.n_cores", lambda: 3)
    expected = Corpus.open(tmp_path / "out").cells(np.arange(300))
    monkeypatch.undo()
    found = Corpus.open(tmp_path / "out").cells(np.arange(300))
    np.testing.assert_array_equal(found.entries, expected.entries)
    decode([])


def test_a_pool_keeps_its_cells_while_others_are_read(tissue, write, tmp_path):
    build_corpus(tmp_path / "out", [write(tissue)])
    corpus = Corpus.open(tmp_path / "out")
    expected = [corpus.cells(np.arange(start, start + 30)).entries for start in range(0, 300, 30)]
    pools = [corpus.pool(np.arange(start, start + 30)) for start in range(0, 300, 30)]
    memory = {pool._read.entries[0].__array_interface__["data"][0] for pool in pools}
    assert len(memory) == len(pools)
    for pool, entries in zip(pools, expected, strict=True):
        np.testing.assert_array_equal(pool.cells(0, 30).entries, entries)
    del pools, pool
    gc.collect()
    again = corpus.pool(np.arange(30))
    assert again._read.entries[0].__array_interface__["data"][0] in memory
    np.testing.assert_array_equal(again.cells(0, 30).entries, expected[0])
    # As many cells as have so many entries, one at least.
    ends = np.cumsum(np.diff(again.cells(0, 30).offsets))
    for start, entries in ((0, 0), (0, int(ends[4])), (3, int(ends[9] - ends[2])), (29, 1 << 20)):
        stop = again.reach(start, entries)
        before = ends[start - 1] if start else 0
        assert stop == max(int((ends - before <= entries).sum()), start + 1)


def test_buffers_are_handed_out_again_up_to_a_size():
    buffers = Buffers(np.dtype(np.uint32), most_bytes=4_000)
    small, large = buffers.take(100), buffers.take(500)
    assert len(small) >= 100 and len(large) >= 500 and small.dtype == np.uint32
    buffers.give(large)
    buffers.give(small)
    assert buffers.take(50) is small and buffers.take(50) is large
    assert buffers.take(50) is not large
    buffers.give(large)
    buffers.give(np.empty(900, np.uint32))  # together more than is kept: the older one goes
    assert len(buffers.take(1)) == 900 and buffers.take(1) is not large
    buffers.give(np.empty(1_001, np.uint32))
    assert len(buffers.take(1)) < 1_001


def test_whatever_ends_in_its_own_checksum_has_one_checksum():
    for size in (0, 1, 90_001):
        data = np.random.default_rng(size).bytes(size)
        whole = data + google_crc32c.value(data).to_bytes(4, "little")
        assert google_crc32c.value(whole) == store._CRC_OF_WHOLE
