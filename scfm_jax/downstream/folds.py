"""Folds that do not leak: by slides (donors, sections), by spatial blocks with a margin, by technology."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal

import numpy as np
from jaxtyping import Int, Int32, Int64
from sklearn.model_selection import KFold

from scfm_jax.corpus import Corpus
from scfm_jax.corpus.split import SplitConfig, split_cells
from scfm_jax.errors import InputError


@dataclass(frozen=True)
class FoldsConfig:
    """How the cells of a task become folds.

    Attributes
    ----------
    by
        ``blocks``: spatial blocks, each fold its share of them, with a margin. ``slides``: whole slides, a
        fold for each of `groups`, or for each slide. ``column``: a fold for each class of `column`, as a
        donor. ``technology``: one technology at a time. ``random``: cells at random; neighbours of test cells
        are trained on then, so results are marked as leaking.
    groups
        With ``slides``: patterns on names of slides, one fold each, as ``*/animal1.*`` for the sections of an
        animal. With ``column`` and ``technology``: the values to hold out, all if empty.
    column
        A label column, constant within each slide.
    blocks, n_folds, margin, context, together, min_kept, seed
        See `scfm_jax.corpus.split.SplitConfig`.
    """

    by: Literal["blocks", "slides", "column", "technology", "random"] = "blocks"
    groups: tuple[str, ...] = ()
    column: str = ""
    blocks: int = 8
    n_folds: int = 5
    margin: int = 64
    context: Literal["separate", "shared"] = "separate"
    together: tuple[str, ...] = ()
    min_kept: float = 0.2
    seed: int = 0

    @property
    def description(self) -> str:
        """In a few words."""
        if self.by == "blocks":
            return (
                f"{self.blocks} x {self.blocks} spatial blocks in {self.n_folds} folds, margin {self.margin}"
            )
        if self.by == "random":
            return f"{self.n_folds} folds of cells drawn at random: leaking"
        held = {"slides": "slides", "column": self.column, "technology": "technology"}[self.by]
        return f"one of {held} held out at a time" + (f" ({', '.join(self.groups)})" if self.groups else "")


@dataclass(frozen=True, eq=False)
class Fold:
    """Cells to learn from, and cells to be judged by."""

    name: str
    train: Int64[np.ndarray, " n"]
    test: Int64[np.ndarray, " m"]

    def labelled(self, codes: Int[np.ndarray, " cells"]) -> Fold:
        """The cells of the fold whose code is not negative.

        Raises
        ------
        InputError
            No training or no test cell is left, or training cells of one class alone.
        """
        fold = Fold(self.name, *(cells[codes[cells] >= 0] for cells in (self.train, self.test)))
        for role, cells in (("training", fold.train), ("test", fold.test)):
            if len(cells) == 0:
                raise InputError(
                    f"fold {self.name}", f"has no labelled {role} cell", "use fewer folds or another split"
                )
        if len(np.unique(codes[fold.train])) < 2:
            raise InputError(
                f"fold {self.name}", "its training cells have one class", "use fewer folds or another split"
            )
        return fold


@dataclass(frozen=True, eq=False)
class Folds:
    """Folds of one task, and the spatial block of every cell, which a bootstrap resamples."""

    folds: tuple[Fold, ...]
    block: Int32[np.ndarray, " cells"]
    leaking: bool
    description: str


def all_cells(corpus: Corpus, blocks: int) -> Folds:
    """One fold of everything, without a name, for scores that nothing is learnt for."""
    block = split_cells(corpus, SplitConfig(blocks=blocks, n_folds=2, margin=0)).block
    everyone = np.arange(corpus.n_cells)
    return Folds((Fold("", everyone, everyone),), block, False, "none, all cells are scored")


def make_folds(corpus: Corpus, config: FoldsConfig) -> Folds:
    """Folds over all cells of a corpus.

    Raises
    ------
    InputError
        A field out of its range, a group that matches nothing or everything, a column that divides a slide,
        or an empty fold.
    """
    blocks = SplitConfig(
        blocks=config.blocks,
        n_folds=config.n_folds,
        margin=config.margin,
        context=config.context,
        together=config.together,
        min_kept=config.min_kept,
        seed=config.seed,
    )
    if config.by == "random":
        # No margin lies around random cells, and none can leave too few to learn from.
        block = split_cells(corpus, replace(blocks, margin=0)).block
        draws = KFold(config.n_folds, shuffle=True, random_state=config.seed).split(np.arange(corpus.n_cells))
        folds = [Fold(str(number), *cells) for number, cells in enumerate(draws)]
        return Folds(tuple(folds), block, True, config.description)
    if config.by == "blocks":
        # Under two folds there is still one split, which refuses their number.
        splits = {
            str(number): split_cells(corpus, replace(blocks, fold=number))
            for number in range(max(config.n_folds, 1))
        }
    else:
        groups = _groups(corpus, config)
        if len(groups) < 2 and not config.groups:
            raise InputError(
                corpus.path,
                f"split.by {config.by} finds one group, {next(iter(groups))!r}",
                "split by blocks",
            )
        splits = {
            name: split_cells(corpus, replace(blocks, held_out=slides)) for name, slides in groups.items()
        }
    folds = [Fold(name, split.train, split.test) for name, split in splits.items()]
    return Folds(tuple(folds), next(iter(splits.values())).block, False, config.description)


def _groups(corpus: Corpus, config: FoldsConfig) -> dict[str, tuple[str, ...]]:
    """Name of each fold, and the slides that it holds out."""
    names = [slide.name for slide in corpus.slides]
    if config.by == "slides":
        wanted = config.groups or tuple(map(_literal, names))
        matched = {
            pattern: tuple(_literal(name) for name in names if fnmatchcase(name, pattern))
            for pattern in wanted
        }
        # What matches nothing is refused by the split, in its own words.
        return {pattern: found or (pattern,) for pattern, found in matched.items()}
    if config.by == "technology":
        value = [slide.technology for slide in corpus.slides]
    else:
        value = _of_slides(corpus, config.column)
    for group in config.groups:
        if group not in value:
            there = ", ".join(sorted(set(value)))
            raise InputError(corpus.path, f"split.groups {group!r} is not there", f"use some of {there}")
    return {
        group: tuple(_literal(name) for name, own in zip(names, value, strict=True) if own == group)
        for group in config.groups or sorted(set(value))
    }


def _literal(name: str) -> str:
    """A pattern that matches `name` and nothing else."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _of_slides(corpus: Corpus, column: str) -> list[str]:
    codes, classes = corpus.labels(column)
    values = []
    for slide in corpus.slides:
        found = np.unique(codes[slide.start : slide.start + slide.n_cells])
        if len(found) != 1 or found[0] < 0:
            raise InputError(
                corpus.path,
                f"split.column {column!r} is not one value in slide {slide.name!r}",
                "make its pieces slides of their own (section), or split by blocks",
            )
        values.append(classes[found[0]])
    return values
