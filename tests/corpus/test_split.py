"""Splits against their rules in plain sets, with neighbours found by brute force."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from scfm_jax.corpus import Corpus, Source, build_corpus
from scfm_jax.corpus import split as split_module
from scfm_jax.corpus.split import SplitConfig, split_cells
from scfm_jax.errors import InputError

DATA = Path(os.environ.get("SCFM_DATA", Path(__file__).parents[3] / "shared" / "data"))
K = 6
CONFIG = SplitConfig(blocks=4, n_folds=4, margin=K, min_kept=0.0)


@pytest.fixture(scope="module")
def corpus(simulated) -> Corpus:
    return simulated


def fields(corpus: Corpus, k: int) -> list[set[int]]:
    """Each cell's k nearest neighbours, by comparing all pairs of cells of a slide."""
    near: list[set[int]] = []
    for slide in corpus.slides:
        if not slide.spatial:
            near += [set()] * slide.n_cells
            continue
        rows = np.arange(slide.start, slide.start + slide.n_cells)
        places = np.stack([corpus.column("x", rows), corpus.column("y", rows)], axis=1).astype(float)
        distance = cdist(places, places)
        np.fill_diagonal(distance, np.inf)
        near += [set((slide.start + order[:k]).tolist()) for order in distance.argsort(axis=1)]
    return near


@pytest.mark.parametrize("fold", [0, 3])
@pytest.mark.parametrize("k", [0, K, 12])
@pytest.mark.parametrize("context", ["separate", "shared"])
def test_training_cells_are_all_that_keep_the_rule(corpus, context, k, fold):
    split = split_cells(corpus, replace(CONFIG, context=context, margin=k, fold=fold))
    near, test = fields(corpus, k), set(split.test.tolist())
    beside_test = set().union(*(near[t] for t in test))
    reached = set().union(*({t} | near[t] for t in test))
    expected = set()
    for cell in set(range(corpus.n_cells)) - test:
        apart = not (near[cell] & test) and cell not in beside_test
        if context == "separate":
            apart = apart and not (({cell} | near[cell]) & reached)
        if apart:
            expected.add(cell)
    assert set(split.train.tolist()) == expected
    assert split.report["context"] == context
    if k == 0:
        assert len(expected) == corpus.n_cells - len(test)


def test_shared_context_keeps_more_and_a_wider_margin_fewer(corpus):
    sizes = {
        (context, k): len(split_cells(corpus, replace(CONFIG, context=context, margin=k)).train)
        for context in ("separate", "shared")
        for k in (K, 12)
    }
    assert sizes["separate", 12] < sizes["separate", K] < sizes["shared", K]
    assert sizes["separate", 12] < sizes["shared", 12] < sizes["shared", K]


def test_chunks_do_not_change_the_split(corpus, monkeypatch):
    whole = split_cells(corpus, CONFIG)
    monkeypatch.setattr(split_module, "CHUNK", 7)
    assert np.array_equal(split_cells(corpus, CONFIG).train, whole.train)


def test_folds_partition_every_slide(corpus):
    tests = [split_cells(corpus, replace(CONFIG, fold=fold)).test for fold in range(4)]
    assert np.array_equal(np.sort(np.concatenate(tests)), np.arange(corpus.n_cells))
    for test in tests:
        assert np.all(np.abs(np.bincount(corpus.slide_of(test), minlength=4) - 75) <= 4)


def test_blocks_are_compact_equal_and_unique_over_the_corpus(corpus):
    split = split_cells(corpus, CONFIG)
    assert split.block.dtype == np.int32 and np.array_equal(np.unique(split.block), np.arange(4 * 16))
    assert set(np.bincount(split.block)) <= {18, 19}
    slide = corpus.slide_of(np.arange(corpus.n_cells))
    assert np.array_equal(split.block // 16, slide)
    x, y = corpus.column("x"), corpus.column("y")
    for number in np.flatnonzero([s.spatial for s in corpus.slides]):
        here = slide == number
        column, row = np.divmod(split.block[here] - 16 * number, 4)
        for a in range(3):
            assert x[here][column == a].max() <= x[here][column == a + 1].min()
            for c in range(4):
                lower, upper = ((column == c) & (row == r) for r in (a, a + 1))
                assert y[here][lower].max() <= y[here][upper].min()
    # Test cells are whole blocks.
    assert not set(split.block[split.test]) & set(np.delete(split.block, split.test))


def test_dissociated_cells_are_grouped_at_random_and_have_no_margin(corpus):
    split = split_cells(corpus, CONFIG)
    loose = np.flatnonzero(
        ~np.array([s.spatial for s in corpus.slides])[corpus.slide_of(np.arange(corpus.n_cells))]
    )
    assert np.isin(loose, split.train).sum() + np.isin(loose, split.test).sum() == len(loose) == 300
    assert np.mean(np.diff(split.block[loose]) == 0) < 0.3


def test_whole_slides_need_no_margin(corpus):
    split = split_cells(
        corpus, replace(CONFIG, held_out=("slide1", "lo*"), margin=64, n_folds=99, min_kept=1.0)
    )
    names = np.array([slide.name for slide in corpus.slides])
    assert set(names[corpus.slide_of(split.test)]) == {"slide1", "loose"}
    assert set(names[corpus.slide_of(split.train)]) == {"slide0", "slide2"}
    assert len(split.train) == len(split.test) == 600
    assert split.report["held_out"] == ["loose", "slide1"] and split.report["fold"] is None


def test_seed_decides_and_other_slides_do_not(corpus, tmp_path):
    first, again, other = (split_cells(corpus, replace(CONFIG, seed=seed)) for seed in (0, 0, 1))
    assert np.array_equal(first.train, again.train) and np.array_equal(first.test, again.test)
    assert not np.array_equal(first.test, other.test)
    file = Path(corpus.path).parent / "slide1.h5ad"
    build_corpus(tmp_path / "alone", [Source(str(file), "human", "simscope")], n_neighbours=12)
    alone = split_cells(Corpus.open(tmp_path / "alone"), CONFIG)
    here = first.test[corpus.slide_of(first.test) == 1] - corpus.slide_starts[1]
    assert np.array_equal(alone.test, here)


def test_report_counts_cells_by_role_and_class(corpus):
    split = split_cells(corpus, CONFIG, labels=("domain", "half_known"))
    report = json.loads(json.dumps(split.report))
    cells = report["cells"]
    assert (cells["train"], cells["test"]) == (len(split.train), len(split.test))
    assert cells["train"] + cells["test"] + cells["margin"] == corpus.n_cells and cells["unused"] == 0
    assert cells["kept"] == pytest.approx(len(split.train) / (corpus.n_cells - len(split.test)))
    codes, classes = corpus.labels("domain")
    for code, name in enumerate(classes):
        counts = report["classes"]["domain"][name]
        assert counts["train"] == np.sum(codes[split.train] == code)
        assert counts["test"] == np.sum(codes[split.test] == code)
        rest = np.sum(codes == code) - counts["test"]
        assert counts["margin"] == rest - counts["train"]
        assert counts["kept"] == pytest.approx(counts["train"] / rest)
    unknown = report["classes"]["half_known"]["(unlabelled)"]
    assert unknown["train"] + unknown["test"] + unknown["margin"] == 150 * 3 + 300


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"held_out": ("slide9",)},
            "'slide9' matches no slide; the slides are slide0, slide1, slide2, loose",
        ),
        ({"held_out": ("slide0", "nothing*")}, r"'nothing\*' matches no slide"),
        ({"held_out": ("*",)}, "matches all slides; leave some to train on"),
        (
            {"margin": 13},
            "split.margin is 13, out of range; give 0 to 12, the neighbours that the corpus stored",
        ),
        ({"fold": 4}, "split.fold is 4, out of range; give 0 to n_folds - 1 = 3"),
        ({"n_folds": 17}, "split.n_folds is 17, out of range; give 2 to blocks x blocks = 16"),
        ({"context": "both"}, "split.context is 'both'"),
        (
            {"margin": 12, "min_kept": 0.9},
            r"margin 12 \(separate\) keeps [0-9]+% of the cells.*; lower margin",
        ),
    ],
)
def test_bad_settings_name_the_field_and_the_mend(corpus, change, message):
    with pytest.raises(InputError, match=message):
        split_cells(corpus, replace(CONFIG, **change))


def test_cosmx_keeps_the_shares_measured_for_it(tmp_path):
    """8 x 8 blocks and 64 neighbours on real tissue: about three quarters, and half, of the cells stay."""
    file = DATA / "cosmx_human_nsclc_lung5_rep3.h5ad"
    if not file.exists():
        pytest.skip(f"{file} is not there")
    build_corpus(tmp_path / "corpus", [Source(str(file), "human", "cosmx", labels=("region",))])
    cosmx = Corpus.open(tmp_path / "corpus")
    for context, share in (("shared", 0.76), ("separate", 0.52)):
        splits = [split_cells(cosmx, SplitConfig(fold=fold, context=context)) for fold in range(5)]
        assert np.mean([split.report["cells"]["kept"] for split in splits]) == pytest.approx(share, abs=0.03)


def test_slides_that_are_not_cut_are_for_training_as_a_whole(corpus):
    split = split_cells(corpus, replace(CONFIG, cut=("slide1",)))
    everything = split_cells(corpus, CONFIG)
    slide = corpus.slide_of(np.arange(corpus.n_cells))
    assert np.array_equal(split.is_test, everything.is_test & (slide == 1))
    assert np.array_equal(split.is_train, everything.is_train | (slide != 1))
    with pytest.raises(InputError, match=r"split\.cut 'slide9' matches no slide"):
        split_cells(corpus, replace(CONFIG, cut=("slide9",)))


def test_slides_that_overlie_each_other_are_held_out_at_the_same_places(corpus):
    split = split_cells(corpus, replace(CONFIG, together=("slide[01]",), margin=0))
    slide = corpus.slide_of(np.arange(corpus.n_cells))
    both = np.flatnonzero(slide < 2)
    x = corpus.column("x", both)
    column = np.argsort(np.argsort(x, kind="stable")) * 4 // len(both)
    assert np.array_equal(split.block[both] // 4, column)
    for number in range(16):
        rows = split.block[both] == number
        assert len(set(split.is_test[both][rows])) == 1
    assert set(split.block[both]) == set(range(16)) and not set(split.block[slide >= 2]) & set(range(16))
