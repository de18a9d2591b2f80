from __future__ import annotations

import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from scipy import sparse

from scfm_jax.corpus import BLOCK, Corpus, build_corpus, corpus_info
from scfm_jax.corpus.blocks import Recent
from scfm_jax.corpus.place import Place
from scfm_jax.corpus.store import SlideArrays
from scfm_jax.errors import InputError


@pytest.fixture
def built(tissue, write, tmp_path):
    """A corpus of four slides, and the counts that it should hold, in its order."""
    other = tissue[:130].copy()
    other.obs_names = [f"other{i}" for i in range(130)]
    build_corpus(tmp_path / "out", [write(tissue), write(other, "loose", spatial=False, labels=("type",))])
    corpus = Corpus.open(tmp_path / "out")
    rows = corpus.column("source_row")
    first = np.concatenate([np.arange(300), np.arange(130)])
    assert sorted(rows.tolist()) == sorted(first.tolist())
    return tmp_path / "out", tissue[:, list(corpus.vocabulary.ids)].X[rows]


def assert_rows(cells, expected: sparse.csr_matrix) -> None:
    expected = sparse.csr_matrix(expected)
    expected.sort_indices()
    np.testing.assert_array_equal(cells.offsets, expected.indptr)
    np.testing.assert_array_equal(cells.genes, expected.indices)
    np.testing.assert_array_equal(cells.counts, expected.data)
    assert (cells.genes.dtype, cells.counts.dtype, cells.offsets.dtype) == (np.int32, np.int32, np.int64)


# 0: nothing is kept. 6 kB: a block or two. 40 kB: the ring goes round. 1 MB: all is kept.
@pytest.mark.parametrize("cache_bytes", [0, 6_000, 40_000, 1 << 20])
def test_cells_come_in_the_order_asked_whatever_is_cached(built, cache_bytes):
    path, expected = built
    corpus = Corpus.open(path, cache_bytes=cache_bytes)
    rng = np.random.default_rng(0)
    for size in (1, 430, 7, 50, 50, 3, 900, 50, 20, 1, 0, 120, 64, 430):
        index = rng.integers(0, 430, size)
        assert_rows(corpus.cells(index), expected[index])
    for start in range(0, 430, 90):
        index = np.arange(start, min(start + 90, 430))
        assert_rows(corpus.cells(index), expected[index])


def test_a_ring_that_is_too_small_still_keeps_blocks(built):
    path, expected = built
    corpus = Corpus.open(path, cache_bytes=40_000)
    n_blocks = sum(-(-slide.n_cells // BLOCK) for slide in corpus.slides)
    rng = np.random.default_rng(1)
    kept = []
    for _ in range(200):
        index = rng.integers(0, 430, 2)
        assert_rows(corpus.cells(index), expected[index])
        kept.append(int((corpus._blocks._entries.find(np.arange(n_blocks)) >= 0).sum()))
    assert 1 < max(kept) < n_blocks and min(kept[10:]) >= 1


@pytest.mark.parametrize("cache_bytes", [20_000, 1 << 20])
def test_threads_read_what_one_reader_reads(built, cache_bytes):
    path, expected = built
    corpus = Corpus.open(path, cache_bytes=cache_bytes)
    requests = [np.random.default_rng(seed).integers(0, 430, 40) for seed in range(200)]
    with ThreadPoolExecutor(4) as pool:
        for index, cells in zip(requests, pool.map(corpus.cells, requests)):
            assert_rows(cells, expected[index])


def test_blocks_never_cross_slides(built):
    path, expected = built
    corpus = Corpus.open(path)
    assert any(slide.n_cells % BLOCK for slide in corpus.slides)
    for slide in corpus.slides:
        edge = np.array([slide.start, slide.start + slide.n_cells - 1])
        assert_rows(corpus.cells(edge), expected[edge])
        assert corpus.slide_of(edge).tolist() == [corpus.slides.index(slide)] * 2


def test_columns_and_neighbours_of_some_cells_are_those_of_all(built):
    path, _ = built
    corpus = Corpus.open(path)
    index = np.random.default_rng(2).integers(0, 430, 77)
    for name in ("x", "y", "total_raw", "total_matched", "n_genes", "source_row"):
        np.testing.assert_array_equal(corpus.column(name, index), corpus.column(name)[index])
    every = np.arange(430)
    np.testing.assert_array_equal(corpus.neighbours(index, 5), corpus.neighbours(every, 64)[index, :5])
    np.testing.assert_array_equal(corpus.distances(index, 5), corpus.distances(every, 64)[index, :5])
    assert corpus.neighbours(index, 0).shape == (77, 0)
    found = corpus.neighbours(every, 64)
    same = (
        corpus.slide_of(np.maximum(found, 0).ravel()).reshape(found.shape) == corpus.slide_of(every)[:, None]
    )
    assert same[found >= 0].all() and (found[300:] == -1).all() and (found[:300] >= 0).all()


def test_opening_reads_no_cell(built):
    path, _ = built
    shutil.rmtree(path / "slides")
    info = corpus_info(Corpus.open(path))
    assert info["n_cells"] == 430 and [slide["n_cells"] for slide in info["slides"][2:]] != [0, 0]
    assert {slide["technology"] for slide in info["slides"]} == {"sim"}
    assert info["labels"] == {"type": ["B", "NK", "T"]}
    assert [slide["panel_size"] for slide in info["slides"]] == [40] * 4


def test_a_corpus_can_be_pickled_moved_and_keeps_its_hash(built, tmp_path):
    path, expected = built
    corpus = Corpus.open(path, cache_bytes=1 << 16)
    corpus.cells(np.arange(5))
    twin = pickle.loads(pickle.dumps(corpus))
    assert twin.hash == corpus.hash
    assert_rows(twin.cells(np.arange(9)), expected[:9])
    path.rename(tmp_path / "moved")
    moved = Corpus.open(tmp_path / "moved")
    assert moved.hash == corpus.hash
    assert_rows(moved.cells(np.arange(9)), expected[:9])


@pytest.mark.parametrize("index", [[-1], [430], [0, 5, 1 << 40]])
def test_numbers_outside_the_corpus_are_errors(built, index):
    corpus = Corpus.open(built[0])
    with pytest.raises(IndexError, match="numbered 0 to 429"):
        corpus.cells(np.array(index))


@pytest.mark.parametrize(
    ("ask", "problem"),
    [
        (lambda corpus: corpus.neighbours(np.arange(3), 65), "k is 65, the corpus stores 64"),
        (lambda corpus: corpus.distances(np.arange(3), 100), "k is 100, the corpus stores 64"),
        (lambda corpus: corpus.column("area"), "no column 'area'"),
        (lambda corpus: corpus.labels("section"), "no label 'section'"),
    ],
)
def test_what_is_not_stored_is_an_error(built, ask, problem):
    with pytest.raises(InputError, match=problem) as error:
        ask(Corpus.open(built[0]))
    assert str(built[0]) in str(error.value) and error.value.mend


def test_labels_keep_their_values_in_whatever_order_they_are_named(tissue, write, tmp_path):
    tissue.obs["zone"] = np.where(np.arange(tissue.n_obs) % 2, "inner", "outer")
    build_corpus(tmp_path / "out", [write(tissue, labels=("zone", "type"))])
    corpus = Corpus.open(tmp_path / "out")
    source_row = corpus.column("source_row")
    for name in ("zone", "type"):
        codes, classes = corpus.labels(name)
        expected = tissue.obs[name].astype(str).to_numpy()[source_row]
        known = codes >= 0
        np.testing.assert_array_equal(np.array(classes)[codes[known]], expected[known])
        assert known.any()


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """What is asked for and what is waited for, in order: "ask x", "wait x"."""
    events: list[str] = []
    ask, wait = SlideArrays.__getitem__, SlideArrays.result
    ask_text, wait_text = Place._ask, Place._result
    monkeypatch.setattr(SlideArrays, "__getitem__", lambda s, n: events.append(f"ask {n}") or ask(s, n))
    monkeypatch.setattr(SlideArrays, "result", lambda s, n, r: events.append(f"wait {n}") or wait(s, n, r))
    monkeypatch.setattr(
        Place, "_ask", lambda s, n: events.append(f"ask {n.split('/')[-1]}") or ask_text(s, n)
    )
    monkeypatch.setattr(
        Place, "_result", lambda s, f, n: events.append(f"wait {n.split('/')[-1]}") or wait_text(s, f, n)
    )
    return events


@pytest.mark.parametrize(
    ("ask", "reads"),
    [
        (lambda corpus, some: corpus.column("x"), {"x": 2}),
        (lambda corpus, some: corpus.column("x", some), {"x": 2}),
        (lambda corpus, some: corpus.column("total_raw"), {"total_raw": 4}),
        (lambda corpus, some: corpus.column("source_row", some), {"source_row": 4}),
        (lambda corpus, some: corpus.labels("type", some), {"slide.json": 4, "label_0": 2}),
        (lambda corpus, some: corpus.neighbours(some, 3), {"neighbours": 2}),
    ],
)
def test_slides_are_asked_together_and_only_for_what_is_wanted(built, asked, ask, reads):
    corpus, some = Corpus.open(built[0]), np.random.default_rng(0).permutation(430)[:200]
    expected = ask(Corpus.open(built[0]), some)
    asked.clear()
    found = ask(corpus, some)
    np.testing.assert_array_equal(found[0], expected[0])
    assert asked == [
        f"{what} {name}" for name, n in reads.items() for what in ("ask", "wait") for _ in range(n)
    ]


def test_few_slides_are_asked_at_a_time(built, asked, monkeypatch):
    expected = Corpus.open(built[0]).column("total_raw")
    monkeypatch.setattr("scfm_jax.corpus.reader.SLIDES_AT_ONCE", 3)
    corpus = Corpus.open(built[0])
    asked.clear()
    np.testing.assert_array_equal(corpus.column("total_raw"), expected)
    assert [event.split()[0] for event in asked] == ["ask"] * 3 + ["wait"] * 3 + ["ask", "wait"]


def test_the_values_used_last_are_kept():
    kept: Recent[str] = Recent(100)
    kept.put(1, "a", 40)
    kept.put(2, "b", 40)
    assert kept.find([1, 3]) == {1: "a"}
    kept.put(3, "c", 40)  # 2 was used longest ago
    assert kept.find([1, 2, 3]) == {1: "a", 3: "c"}
    kept.put(3, "C", 60)
    kept.put(4, "d", 500)  # one at least
    assert kept.find([1, 3, 4]) == {4: "d"}
