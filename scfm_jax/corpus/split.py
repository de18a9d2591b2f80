"""Which cells a model may learn from and which judge it: held-out means held out in space.

A cell beside a test cell shares tissue, segmentation errors and neighbours with it, so random test cells
flatter a spatial model. Test cells here are whole slides, or spatial blocks with a margin of cells around
them that nobody uses. Every part of the package that holds cells out calls `split_cells`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int32, Int64

from scfm_jax.corpus.reader import Corpus
from scfm_jax.errors import InputError

CHUNK = 1 << 16
_SLIDES_AT_ONCE = 8
UNLABELLED = "(unlabelled)"


@dataclass(frozen=True)
class SplitConfig:
    """What is held out, and how far training cells stay from it.

    Attributes
    ----------
    held_out
        Patterns (``*``, ``?``, ``[...]``) on names of slides: the test cells are all cells of the slides
        that match (sections, donors, or planes that overlie each other, which must go together). Empty:
        spatial blocks.
    blocks
        Each spatial slide is cut into ``blocks`` columns of equal numbers of cells along x, each column into
        ``blocks`` blocks of equal numbers along y: equal counts, since tissue seldom fills its rectangle. A
        dissociated slide is cut into as many random groups.
    n_folds, fold
        The blocks of each slide are dealt to the folds at random; those of ``fold`` are the test cells. Not
        used with ``held_out``.
    margin
        K, the neighbours that count. Fix it for a whole study at the largest k compared, so that all models
        learn from the same cells. Not used with ``held_out``.
    context
        Whether a test cell and a training cell may have a neighbour in common, as unlabelled context.
    min_kept
        Smallest share of the cells outside the test set that must be left to train on.
    seed
        Decides the folds and the random groups; the split of a slide does not depend on the other slides.
    """

    held_out: tuple[str, ...] = ()
    blocks: int = 8
    n_folds: int = 5
    fold: int = 0
    margin: int = 64
    context: Literal["separate", "shared"] = "separate"
    min_kept: float = 0.3
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Split:
    """Cells by role; cells that are in neither list are the margin.

    Attributes
    ----------
    is_train, is_test
        Of every cell of the corpus: a byte each, where numbers would take eight.
    report
        ``held_out`` (names of slides), ``n_folds`` and ``fold`` (``None`` with held-out slides),
        ``margin``, ``context``, ``cells`` (numbers of ``train``, ``test`` and ``margin``, and ``kept``, the
        share ``train / (train + margin)``), and ``classes``: the same four by label and class. JSON can
        hold it.
    """

    is_train: Bool[np.ndarray, " cells"]
    is_test: Bool[np.ndarray, " cells"]
    report: dict[str, Any]
    _cut: Callable[[], Int32[np.ndarray, " cells"]]

    @property
    def train(self) -> Int64[np.ndarray, " n"]:
        """Global numbers of the training cells, ascending."""
        return np.flatnonzero(self.is_train)

    @property
    def test(self) -> Int64[np.ndarray, " m"]:
        """Global numbers of the test cells, ascending."""
        return np.flatnonzero(self.is_test)

    @functools.cached_property
    def block(self) -> Int32[np.ndarray, " cells"]:
        """Spatial block of every cell, numbered over all slides: what a bootstrap resamples."""
        return self._cut()


def split_cells(corpus: Corpus, config: SplitConfig, *, labels: Sequence[str] = ()) -> Split:
    """Split the cells of a corpus into training, test and margin.

    A cell outside the test set leaves training if a test cell is among its K neighbours, or if it is among
    a test cell's K. With ``context="separate"`` it leaves as well if its receptive field (the cell and its
    K neighbours) shares any cell with that of a test cell. Neighbours never cross slides, so whole held-out
    slides need no margin.

    Parameters
    ----------
    corpus
        An open corpus. Memory is 2 bytes a cell, and some more for those of the slides that are being split;
        neighbours are read `CHUNK` cells at a time.
    config
        The split.
    labels
        Label columns by whose classes the report counts.

    Raises
    ------
    InputError
        A field out of its range, K over what the corpus stored, a pattern that matches no slide, patterns
        that match all, no test cells, or fewer training cells kept than ``min_kept``.
    """
    _check(corpus, config)
    if config.held_out:  # without a look at any cell
        is_test = np.repeat(_held_out_slides(corpus, config), np.diff(corpus.slide_starts))
        is_train = ~is_test
    else:
        is_test, is_train = _split_by_blocks(corpus, config)
    if not is_test.any():
        raise InputError(corpus.path, f"fold {config.fold} holds no cell", "lower n_folds or raise blocks")

    held_out = {slide.name for slide, rows in zip(corpus.slides, _slides(corpus)) if is_test[rows].any()}
    report: dict[str, Any] = {
        "held_out": sorted(held_out) if config.held_out else [],
        "n_folds": None if config.held_out else config.n_folds,
        "fold": None if config.held_out else config.fold,
        "margin": config.margin,
        "context": config.context,
        "cells": _counts(int(is_train.sum()), int(is_test.sum()), corpus.n_cells),
        "classes": {name: _count_classes(corpus, name, is_train, is_test) for name in labels},
    }
    kept = report["cells"]["kept"]
    if kept < config.min_kept or not is_train.any():
        problem = f"margin {config.margin} ({config.context}) keeps {kept:.0%} of the cells to train on"
        mend = "lower margin or blocks, allow context 'shared', hold out whole slides"
        raise InputError(corpus.path, problem, f"{mend}, or lower min_kept = {config.min_kept:.0%}")
    return Split(is_train, is_test, report, lambda: _cut_blocks(corpus, config))


def _check(corpus: Corpus, config: SplitConfig) -> None:
    checks = {
        "blocks": (config.blocks >= 1, "give 1 or more"),
        "n_folds": (
            2 <= config.n_folds <= config.blocks**2,
            f"give 2 to blocks x blocks = {config.blocks**2}",
        ),
        "fold": (0 <= config.fold < config.n_folds, f"give 0 to n_folds - 1 = {config.n_folds - 1}"),
        "margin": (
            0 <= config.margin <= corpus.n_neighbours,
            f"give 0 to {corpus.n_neighbours}, the neighbours that the corpus stored, or build it with more",
        ),
        "context": (config.context in ("separate", "shared"), 'give "separate" or "shared"'),
        "min_kept": (0 <= config.min_kept <= 1, "give a share from 0 to 1"),
    }
    if config.held_out:
        del checks["n_folds"], checks["fold"], checks["margin"]
    for name, (valid, mend) in checks.items():
        if not valid:
            raise InputError(corpus.path, f"split.{name} is {getattr(config, name)!r}, out of range", mend)


def _slides(corpus: Corpus) -> Iterator[slice]:
    """Rows of each slide."""
    return map(slice, corpus.slide_starts[:-1].tolist(), corpus.slide_starts[1:].tolist())


def _random(config: SplitConfig, name: str, purpose: str) -> np.random.Generator:
    return np.random.default_rng([config.seed, *f"{purpose} {name}".encode()])


def _split_by_blocks(
    corpus: Corpus, config: SplitConfig
) -> tuple[Bool[np.ndarray, " cells"], Bool[np.ndarray, " cells"]]:
    """Which cells are test cells, and which are for training."""
    is_test, is_train = np.empty((2, corpus.n_cells), bool)

    def split_slide(number: int) -> None:
        rows = slice(*corpus.slide_starts[number : number + 2].tolist())
        dealt = np.arange(config.blocks**2) % config.n_folds
        fold = _random(config, corpus.slides[number].name, "folds").permutation(dealt)
        is_test[rows] = (fold == config.fold)[_cut_slide(corpus, config, number)]
        is_train[rows] = ~(is_test[rows] | _margin(corpus, config, rows.start, is_test[rows]))

    # Slides know nothing of each other; from a bucket, each waits for its coordinates and its neighbours.
    with ThreadPoolExecutor(_SLIDES_AT_ONCE) as pool:
        for _ in pool.map(split_slide, range(len(corpus.slides))):
            pass
    return is_test, is_train


def _cut_blocks(corpus: Corpus, config: SplitConfig) -> Int32[np.ndarray, " cells"]:
    block = np.empty(corpus.n_cells, np.int32)
    for number, rows in enumerate(_slides(corpus)):
        block[rows] = _cut_slide(corpus, config, number) + number * config.blocks**2
    return block


def _cut_slide(corpus: Corpus, config: SplitConfig, number: int) -> Int64[np.ndarray, " of_slide"]:
    """Block of each cell of a slide."""
    slide = corpus.slides[number]
    if slide.spatial:
        index = np.arange(slide.start, slide.start + slide.n_cells)
        return _grid(corpus.column("x", index), corpus.column("y", index), config.blocks)
    order = _random(config, slide.name, "groups").permutation(slide.n_cells)
    return order * config.blocks**2 // slide.n_cells


def _grid(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"], blocks: int) -> Int64[np.ndarray, " n"]:
    """Columns of equal counts along x, cut into blocks of equal counts along y."""
    n = len(x)
    column = np.empty(n, np.int64)
    column[np.argsort(x, kind="stable")] = np.arange(n) * blocks // n
    order = np.lexsort((y, column))
    size = np.bincount(column, minlength=blocks)
    start = np.cumsum(size) - size
    row = np.empty(n, np.int64)
    row[order] = (np.arange(n) - start[column[order]]) * blocks // size[column[order]]
    return column * blocks + row


def _held_out_slides(corpus: Corpus, config: SplitConfig) -> Bool[np.ndarray, " slides"]:
    names = [slide.name for slide in corpus.slides]
    for pattern in config.held_out:
        if not any(fnmatchcase(name, pattern) for name in names):
            mend = f"the slides are {', '.join(names)}"
            raise InputError(corpus.path, f"split.held_out {pattern!r} matches no slide", mend)
    held_out = np.array([any(fnmatchcase(name, pattern) for pattern in config.held_out) for name in names])
    if held_out.all():
        mend = f"leave some to train on; the slides are {', '.join(names)}"
        raise InputError(corpus.path, f"split.held_out {', '.join(config.held_out)} matches all slides", mend)
    return held_out


def _margin(
    corpus: Corpus, config: SplitConfig, start: int, is_test: Bool[np.ndarray, " of_slide"]
) -> Bool[np.ndarray, " of_slide"]:
    """Cells too near to the test cells of the slide that begins at cell `start`."""
    beside_test = np.zeros(len(is_test), bool)
    if is_test.all() or not is_test.any():
        return beside_test
    for _, near in _neighbours(corpus, config.margin, start, is_test):
        beside_test[near[near >= 0]] = True
    out_of_reach = is_test | beside_test if config.context == "separate" else is_test
    margin = beside_test & ~is_test
    for cells, near in _neighbours(corpus, config.margin, start, ~is_test):
        margin[cells] |= (out_of_reach[near] & (near >= 0)).any(axis=1)
    return margin


def _neighbours(
    corpus: Corpus, k: int, start: int, among: Bool[np.ndarray, " of_slide"]
) -> Iterator[tuple[Int64[np.ndarray, " chunk"], Int64[np.ndarray, "chunk k"]]]:
    """Some of a slide's cells and their neighbours, numbered within the slide; -1 where there is none."""
    cells = np.flatnonzero(among)
    for first in range(0, len(cells), CHUNK):
        chunk = cells[first : first + CHUNK]
        near = corpus.neighbours(start + chunk, k)
        yield chunk, np.where(near < 0, -1, near - start)


def _counts(train: int, test: int, cells: int) -> dict[str, Any]:
    outside = cells - test
    kept = train / outside if outside else 0.0
    return {"train": train, "test": test, "margin": outside - train, "kept": kept}


def _count_classes(
    corpus: Corpus, name: str, is_train: Bool[np.ndarray, " cells"], is_test: Bool[np.ndarray, " cells"]
) -> dict[str, dict[str, Any]]:
    codes, classes = corpus.labels(name)
    of_code = [
        np.bincount(codes[among] + 1, minlength=len(classes) + 1).tolist()
        for among in (is_train, is_test, slice(None))
    ]
    unlabelled, *counts = (_counts(*numbers) for numbers in zip(*of_code, strict=True))
    named = dict(zip(classes, counts, strict=True))
    return named | ({UNLABELLED: unlabelled} if (codes < 0).any() else {})
