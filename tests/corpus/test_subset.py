"""Subsets of blocks against a plain greedy choice, those of a split against their rules, and D by sets."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest

from scfm_jax.corpus import subset as subset_module
from scfm_jax.corpus.context import Context
from scfm_jax.corpus.split import SplitConfig, split_cells
from scfm_jax.corpus.subset import growing_order, nearest_prefix, unique_cells
from scfm_jax.errors import InputError

CONFIG = SplitConfig(blocks=4, n_folds=4, margin=2, min_kept=0.0)
BY_BLOCKS = CONFIG
HELD_OUT = replace(CONFIG, held_out=("slide1",))
TOGETHER = replace(CONFIG, together=("slide[01]",))
WAYS = pytest.mark.parametrize("way", [BY_BLOCKS, HELD_OUT, TOGETHER], ids=["blocks", "slides", "together"])


@pytest.fixture
def blocks() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Slides of 1 to 30 blocks, one of them without any cell; some blocks of others are empty."""
    rng = np.random.default_rng(0)
    slide = rng.permutation(np.repeat(np.arange(6), [1, 30, 12, 5, 20, 8]))
    sizes = rng.integers(0, 40, len(slide)) * rng.integers(0, 2, len(slide)) + (slide == 1)
    sizes[slide == 3] = 0
    sizes[slide == 0] = 500
    return sizes, slide, rng.random(len(slide))


def test_the_next_block_is_of_the_slide_of_which_least_is_taken(blocks):
    sizes, slide, draw = blocks
    left = [sorted(np.flatnonzero((slide == s) & (sizes > 0)), key=lambda b: draw[b]) for s in range(6)]
    total = [int(sizes[slide == s].sum()) for s in range(6)]
    taken, expected = [0] * 6, []
    while any(left):
        following = min(
            (s for s in range(6) if left[s]), key=lambda s: (Fraction(taken[s], total[s]), draw[left[s][0]])
        )
        expected.append(left[following].pop(0))
        taken[following] += int(sizes[expected[-1]])
    assert growing_order(sizes, slide, draw).tolist() == expected


def test_every_slide_is_there_in_about_its_share_at_every_size(blocks):
    sizes, slide, draw = blocks
    order = growing_order(sizes, slide, draw)
    share = np.zeros((len(order), 6))
    share[np.arange(len(order)), slide[order]] = sizes[order]
    total = np.bincount(slide, sizes)
    there = total > 0
    share = share.cumsum(0)[:, there] / total[there]
    assert (share[there.sum() - 1 :] > 0).all() and (share[-1] == 1).all()
    block = np.array([sizes[slide == s].max() / total[s] for s in np.flatnonzero(there)])
    assert (share[:, :, None] - share[:, None, :] <= block[:, None] + 1e-12).all()


def test_the_nearest_prefix_is_found_and_grows(blocks):
    sizes = blocks[0][blocks[0] > 0]
    sums = [int(sizes[:n].sum()) for n in range(1, len(sizes) + 1)]
    found = [nearest_prefix(sizes, wanted) for wanted in range(sums[-1] + 50)]
    assert found == sorted(found) and found[-1] == len(sizes)
    for wanted, n in enumerate(found):
        assert abs(sums[n - 1] - wanted) == min(abs(total - wanted) for total in sums)


def subsets(corpus, way: SplitConfig, sizes) -> list:
    return [split_cells(corpus, replace(way, train_cells=n), labels=("domain",)) for n in sizes]


@WAYS
def test_subsets_are_nested_whole_blocks_of_about_the_size(simulated, way):
    sizes = (60, 100, 250, 0)
    splits = subsets(simulated, way, sizes)
    everything = splits[-1]
    learnable = np.bincount(everything.block[everything.train], minlength=everything.block.max() + 1)
    for small, large in pairwise(splits):
        assert not (small.is_train & ~large.is_train).any() and len(small.train) < len(large.train)
    for wanted, split in zip(sizes[:-1], splits):
        assert np.array_equal(split.is_test, everything.is_test)
        assert np.array_equal(split.block, everything.block)
        chosen = np.bincount(split.block[split.train], minlength=len(learnable))
        assert set(chosen[chosen > 0] - learnable[chosen > 0]) == {0}
        assert abs(len(split.train) - wanted) <= learnable.max() / 2


@WAYS
def test_every_slide_keeps_about_its_share(simulated, way):
    everything, *splits = subsets(simulated, way, (0, 80, 150, 300, 450))
    piece = simulated.slide_of(np.arange(simulated.n_cells))
    if way.together:
        piece = np.maximum(piece, 1)
    total = np.bincount(piece[everything.train], minlength=4)
    there = total > 0
    block = np.bincount(everything.block[everything.train]).max()
    for split in splits:
        here = np.bincount(piece[split.train], minlength=4)
        assert (here[there] > 0).all() and not here[~there].any()
        share = here[there] / total[there]
        assert share.max() - share.min() <= block / total[there].min()


def test_the_seed_draws_the_subset(simulated):
    held_out = [replace(HELD_OUT, seed=seed, train_cells=150) for seed in (0, 0, 1)]
    first, again, other = (split_cells(simulated, config) for config in held_out)
    assert np.array_equal(first.is_train, again.is_train)
    assert not np.array_equal(first.is_train, other.is_train)
    assert np.array_equal(first.is_test, other.is_test)


@WAYS
def test_the_report_says_what_is_unused(simulated, way):
    everything, split = subsets(simulated, way, (0, 120))
    whole, report = everything.report["cells"], json.loads(json.dumps(split.report))
    cells = report["cells"]
    assert cells["train"] == len(split.train) < len(everything.train) == cells["train"] + cells["unused"]
    assert {name: cells[name] for name in ("test", "margin", "kept")} == {
        name: whole[name] for name in ("test", "margin", "kept")
    }
    assert cells["train"] + cells["test"] + cells["margin"] + cells["unused"] == simulated.n_cells
    codes, classes = simulated.labels("domain")
    for code, name in enumerate(classes):
        counts, before = report["classes"]["domain"][name], everything.report["classes"]["domain"][name]
        assert counts["train"] == np.sum(codes[split.train] == code)
        assert counts["unused"] == np.sum(codes[everything.train] == code) - counts["train"]
        assert all(counts[role] == before[role] for role in ("test", "margin", "kept"))


def test_all_but_a_few_cells_are_all(simulated):
    everything = split_cells(simulated, CONFIG)
    n = len(everything.train)
    assert np.array_equal(
        split_cells(simulated, replace(CONFIG, train_cells=n)).is_train, everything.is_train
    )


def test_half_the_first_block_is_the_least(simulated):
    first = len(split_cells(simulated, replace(HELD_OUT, train_cells=18)).train)
    least = -(-first // 2)
    assert len(split_cells(simulated, replace(HELD_OUT, train_cells=least)).train) == first
    for wanted in (1, least - 1):
        message = (
            f"train_cells is {wanted}, the first block has {first}; give {least} or more, or raise split"
        )
        with pytest.raises(InputError, match=message):
            split_cells(simulated, replace(HELD_OUT, train_cells=wanted))


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (-1, "split.train_cells is -1, out of range; give a number of cells, or 0 for all"),
        (901, "split.train_cells is 901, there are 900 training cells; give 900 or fewer, or 0 for all"),
    ],
)
def test_bad_sizes_name_the_field_and_the_mend(simulated, wanted, message):
    with pytest.raises(InputError, match=message):
        split_cells(simulated, replace(HELD_OUT, train_cells=wanted))


@pytest.mark.parametrize("chunk", [7, 1 << 14])
@pytest.mark.parametrize("k", [0, 4])
def test_unique_cells_are_those_of_a_plain_set(simulated, monkeypatch, chunk, k):
    monkeypatch.setattr(subset_module, "CHUNK", chunk)
    cells = split_cells(simulated, replace(CONFIG, train_cells=150)).train
    near = simulated.neighbours(cells, 12)
    plain = set(cells.tolist()) | set(near[:, :k].ravel().tolist()) - {-1}
    assert unique_cells(cells, Context(simulated, k)) == len(plain)
    if k:
        assert len(cells) < len(plain) < simulated.n_cells
        later = set(cells.tolist()) | set(near[:, 3 : 3 + k].ravel().tolist()) - {-1}
        assert unique_cells(cells, Context(simulated, k, skip_nearest=3)) == len(later)
        context = Context(simulated, k, exchanged_within=("domain",))
        exchanged = set(context.members(cells)[1].ravel().tolist()) - {-1}
        assert unique_cells(cells, context) == len(exchanged) > len(plain)
