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
from scfm_jax.corpus.subset import growing_order, nearest_prefix
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
    cut
        Patterns on names of the slides that are cut into blocks, and so hold test cells; the others are for
        training as a whole. Empty: all slides.
    together
        Patterns on names of slides that overlie each other (planes of one section): those that match one
        pattern are cut by one grid over all their cells, and a place is held out in all of them.
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
    train_cells
        Train on about so many of these only: whole blocks, of every slide about the same share; 0 is all. A
        smaller subset is part of every larger one.
    seed
        Decides the folds, the random groups and the subset; the split of a slide does not depend on the other
        slides.
    """

    held_out: tuple[str, ...] = ()
    blocks: int = 8
    cut: tuple[str, ...] = ()
    together: tuple[str, ...] = ()
    n_folds: int = 5
    fold: int = 0
    margin: int = 64
    context: Literal["separate", "shared"] = "separate"
    min_kept: float = 0.3
    train_cells: int = 0
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Split:
    """Cells by role; cells that are in neither list are the margin, or left unused by ``train_cells``.

    Attributes
    ----------
    is_train, is_test
        Of every cell of the corpus: a byte each, where numbers would take eight.
    report
        ``held_out`` (names of slides), ``n_folds`` and ``fold`` (``None`` with held-out slides),
        ``margin``, ``context``, ``cells`` (numbers of ``train``, ``test``, ``margin`` and ``unused``, and
        ``kept``, the share that the margin leaves: ``(train + unused) / (train + unused + margin)``), and
        ``classes``: the same five by label and class. JSON can hold it.
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
        An open corpus. Memory is 2 bytes a cell (with ``train_cells`` 3), and some more for those of the
        slides that are being split; neighbours are read `CHUNK` cells at a time.
    config
        The split.
    labels
        Label columns by whose classes the report counts.

    Raises
    ------
    InputError
        A field out of its range, K over what the corpus stored, a pattern that matches no slide, patterns
        that match all, no test cells, fewer training cells kept than ``min_kept``, or a subset of more than
        these or of less than half a block.
    """
    _check(corpus, config)
    if config.held_out:  # without a look at any cell
        is_test = np.repeat(_held_out_slides(corpus, config), np.diff(corpus.slide_starts))
        is_train = ~is_test
    else:
        is_test, is_train = _split_by_blocks(corpus, config)
    if not is_test.any():
        raise InputError(corpus.path, f"fold {config.fold} holds no cell", "lower n_folds or raise blocks")

    counts = _counts(int(is_train.sum()), int(is_test.sum()), 0, corpus.n_cells)
    kept = counts["kept"]
    if kept < config.min_kept or not counts["train"]:
        problem = f"margin {config.margin} ({config.context}) keeps {kept:.0%} of the cells to train on"
        mend = "lower margin or blocks, allow context 'shared', hold out whole slides"
        raise InputError(corpus.path, problem, f"{mend}, or lower min_kept = {config.min_kept:.0%}")
    unused: Bool[np.ndarray, " cells"] | slice = slice(0)
    if config.train_cells:
        unused = _outside_subset(corpus, config, is_train)
        is_train ^= unused
        counts = _counts(int(is_train.sum()), counts["test"], int(unused.sum()), corpus.n_cells)

    held_out = {slide.name for slide, rows in zip(corpus.slides, _slides(corpus)) if is_test[rows].any()}
    report: dict[str, Any] = {
        "held_out": sorted(held_out) if config.held_out else [],
        "n_folds": None if config.held_out else config.n_folds,
        "fold": None if config.held_out else config.fold,
        "margin": config.margin,
        "context": config.context,
        "cells": counts,
        "classes": {name: _count_classes(corpus, name, is_train, is_test, unused) for name in labels},
    }
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
        "train_cells": (config.train_cells >= 0, "give a number of cells, or 0 for all"),
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


def _pieces(corpus: Corpus, config: SplitConfig) -> list[tuple[str, list[int]]]:
    """Slides that are cut as one, each with the name that draws its folds, in the order of the slides."""
    pieces: dict[str, list[int]] = {}
    for number, slide in enumerate(corpus.slides):
        shared = (pattern for pattern in config.together if fnmatchcase(slide.name, pattern))
        pieces.setdefault(next(shared, slide.name), []).append(number)
    return list(pieces.items())


def _split_by_blocks(
    corpus: Corpus, config: SplitConfig
) -> tuple[Bool[np.ndarray, " cells"], Bool[np.ndarray, " cells"]]:
    """Which cells are test cells, and which are for training."""
    is_test, is_train = np.zeros((2, corpus.n_cells), bool)
    is_cut = _matching(corpus, config.cut, "cut") if config.cut else np.ones(len(corpus.slides), bool)
    if config.together:
        _matching(corpus, config.together, "together")

    def split_piece(piece: tuple[str, list[int]]) -> None:
        name, slides = piece
        dealt = np.arange(config.blocks**2) % config.n_folds
        fold = _random(config, name, "folds").permutation(dealt)
        for number, rows, block in _cut_piece(corpus, config, slides):
            is_test[rows] = (fold == config.fold)[block] & is_cut[number]
            is_train[rows] = ~(is_test[rows] | _margin(corpus, config, rows.start, is_test[rows]))

    # Pieces know nothing of each other; from a bucket, each waits for its coordinates and its neighbours.
    with ThreadPoolExecutor(_SLIDES_AT_ONCE) as pool:
        for _ in pool.map(split_piece, _pieces(corpus, config)):
            pass
    return is_test, is_train


def _outside_subset(
    corpus: Corpus, config: SplitConfig, is_train: Bool[np.ndarray, " cells"]
) -> Bool[np.ndarray, " cells"]:
    """Training cells of the blocks that ``train_cells`` leaves unused."""
    pieces, n_blocks = _pieces(corpus, config), config.blocks**2
    unused = np.zeros(corpus.n_cells, bool)

    def count(piece: tuple[str, list[int]]) -> Int64[np.ndarray, " blocks"]:
        sizes = np.zeros(n_blocks, np.int64)
        for _, rows, block in _cut_piece(corpus, config, piece[1]):
            sizes += np.bincount(block[is_train[rows]], minlength=n_blocks)
        return sizes

    def leave(piece: tuple[str, list[int]], taken: Bool[np.ndarray, " blocks"]) -> None:
        for _, rows, block in _cut_piece(corpus, config, piece[1]):
            unused[rows] = is_train[rows] & ~taken[block]

    # Cut twice: blocks of all cells would take more memory than all else.
    with ThreadPoolExecutor(_SLIDES_AT_ONCE) as pool:
        sizes = np.concatenate(list(pool.map(count, pieces)))
        draw = np.concatenate([_random(config, name, "subset").random(n_blocks) for name, _ in pieces])
        order = growing_order(sizes, np.repeat(np.arange(len(pieces)), n_blocks), draw)
        _check_train_cells(corpus, config.train_cells, int(sizes.sum()), int(sizes[order[0]]))
        taken = np.zeros(len(sizes), bool)
        taken[order[: nearest_prefix(sizes[order], config.train_cells)]] = True
        for _ in pool.map(leave, pieces, np.split(taken, len(pieces))):
            pass
    return unused


def _check_train_cells(corpus: Corpus, wanted: int, there: int, first: int) -> None:
    if wanted > there:
        problem, mend = f"there are {there} training cells", f"give {there} or fewer, or 0 for all"
    elif 2 * wanted < first:
        problem, mend = (
            f"the first block has {first}",
            f"give {-(-first // 2)} or more, or raise split.blocks",
        )
    else:
        return
    raise InputError(corpus.path, f"split.train_cells is {wanted}, {problem}", mend)


def _cut_blocks(corpus: Corpus, config: SplitConfig) -> Int32[np.ndarray, " cells"]:
    block = np.empty(corpus.n_cells, np.int32)
    for first, (_, slides) in enumerate(_pieces(corpus, config)):
        for _, rows, of_slide in _cut_piece(corpus, config, slides):
            block[rows] = of_slide + first * config.blocks**2
    return block


def _cut_piece(
    corpus: Corpus, config: SplitConfig, slides: list[int]
) -> Iterator[tuple[int, slice, Int64[np.ndarray, " of_slide"]]]:
    """Each slide, its rows and the block of each of its cells."""
    rows = [slice(*corpus.slide_starts[number : number + 2].tolist()) for number in slides]
    return zip(slides, rows, _blocks_of(corpus, config, slides), strict=True)


def _blocks_of(
    corpus: Corpus, config: SplitConfig, slides: list[int]
) -> list[Int64[np.ndarray, " of_slide"]]:
    """Block of each cell of each slide."""
    ends = np.cumsum([corpus.slides[number].n_cells for number in slides])[:-1]
    if all(corpus.slides[number].spatial for number in slides):
        index = np.concatenate([np.arange(*corpus.slide_starts[number : number + 2]) for number in slides])
        block = _grid(corpus.column("x", index), corpus.column("y", index), config.blocks)
        return np.split(block, ends)
    cut = []
    for number in slides:
        slide = corpus.slides[number]
        order = _random(config, slide.name, "groups").permutation(slide.n_cells)
        cut.append(order * config.blocks**2 // slide.n_cells)
    return cut


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


def _matching(corpus: Corpus, patterns: tuple[str, ...], field: str) -> Bool[np.ndarray, " slides"]:
    """Slides that one of the patterns of a field matches; each must match some."""
    names = [slide.name for slide in corpus.slides]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            mend = f"the slides are {', '.join(names)}"
            raise InputError(corpus.path, f"split.{field} {pattern!r} matches no slide", mend)
    return np.array([any(fnmatchcase(name, pattern) for pattern in patterns) for name in names])


def _held_out_slides(corpus: Corpus, config: SplitConfig) -> Bool[np.ndarray, " slides"]:
    held_out = _matching(corpus, config.held_out, "held_out")
    if held_out.all():
        mend = f"leave some to train on; the slides are {', '.join(slide.name for slide in corpus.slides)}"
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


def _counts(train: int, test: int, unused: int, cells: int) -> dict[str, Any]:
    outside, learnable = cells - test, train + unused
    kept = learnable / outside if outside else 0.0
    margin = outside - learnable
    return {"train": train, "test": test, "margin": margin, "unused": unused, "kept": kept}


def _count_classes(
    corpus: Corpus, name: str, *roles: Bool[np.ndarray, " cells"] | slice
) -> dict[str, dict[str, Any]]:
    """Counts of the cells to train on, to test on and unused, by class of a label."""
    codes, classes = corpus.labels(name)
    of_code = [
        np.bincount(codes[among] + 1, minlength=len(classes) + 1).tolist() for among in (*roles, slice(None))
    ]
    unlabelled, *counts = (_counts(*numbers) for numbers in zip(*of_code, strict=True))
    named = dict(zip(classes, counts, strict=True))
    return named | ({UNLABELLED: unlabelled} if (codes < 0).any() else {})
