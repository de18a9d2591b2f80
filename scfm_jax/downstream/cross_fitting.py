"""A label of every cell by a fit that has not learnt from it, scored beside a baseline.

A labelled cell is answered for in the fold whose test cell it is; a cell without a label by a fit on all
labelled cells.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import anndata
import numpy as np
import pandas as pd
from jaxtyping import Bool, Float32, Int64

from scfm_jax import __version__
from scfm_jax.downstream.class_maps import ClassMap
from scfm_jax.downstream.cohort import STORED_NEIGHBOURS, Cohort
from scfm_jax.downstream.expression import beside_neighbours, components
from scfm_jax.downstream.folds import Fold, Folds, FoldsConfig, make_folds
from scfm_jax.downstream.labels import MISSING, Labels, read_labels
from scfm_jax.downstream.linear import linear_answer
from scfm_jax.downstream.question import Question
from scfm_jax.downstream.records import (
    check_blocks,
    check_key,
    plain,
    storable,
    warn_of_few_blocks,
    warn_of_leaking,
)
from scfm_jax.downstream.scores import interval, macro_f1, paired_difference
from scfm_jax.errors import DataWarning, InputError

SCORES = ("accuracy", "macro_f1", "ece")
ON_ALL = ""
_NONE = -1
Answer = Callable[[Question], Float32[np.ndarray, "m c"]]


@dataclass(frozen=True)
class LabelConfig:
    """A label, what counts as one, and how its cells are split.

    Attributes
    ----------
    label
        Column of ``obs``.
    neighbours
        k, of the method and of the baseline.
    split
        The folds.
    missing, min_cells, min_blocks, class_map
        As in `read_labels`.
    """

    label: str
    neighbours: int
    split: FoldsConfig = field(default_factory=FoldsConfig)
    missing: tuple[str, ...] = MISSING
    min_cells: int = 50
    min_blocks: int = 5
    class_map: ClassMap | None = None


@dataclass(frozen=True, eq=False)
class LabelledCells:
    """The cells of an AnnData with their labels, their folds and their neighbours.

    Attributes
    ----------
    where
        What messages name: the file, or ``adata``.
    adata
        Whose rows they are.
    cohort
        Its cells; all else counts in them.
    config, labels, folds
        The label, of every cell.
    near
        Nearest neighbours of every cell: k, or as many as the split's margin, which also lies around cells
        held out to choose a penalty or an epoch.
    """

    where: str
    adata: anndata.AnnData
    cohort: Cohort
    config: LabelConfig
    labels: Labels
    folds: Folds
    near: Int64[np.ndarray, "n k"]

    def question(self, fold: Fold) -> Question:
        """The label, asked in a fold over all cells.

        Raises
        ------
        InputError
            No labelled training or test cell, or training cells of one class.
        """
        with self.named():
            return self.ask(fold.labelled(self.labels.codes))

    @contextmanager
    def named(self) -> Iterator[None]:
        """Errors that name a fold or a setting alone name the cells too."""
        try:
            yield
        except InputError as error:
            raise InputError(f"{self.where}, {error.where}", error.problem, error.mend) from error

    def ask(self, fold: Fold) -> Question:
        """The label, asked of cells that need not have one."""
        classes, margin = tuple(self.labels.classes), self.config.split.margin
        return Question("classes", self.labels.codes, classes, fold, self.folds.block, self.near, margin)

    @property
    def everyone(self) -> Fold:
        """Learn from all labelled cells, answer for those without a label."""
        labelled = self.labels.codes >= 0
        return Fold(ON_ALL, np.flatnonzero(labelled), np.flatnonzero(~labelled))

    @property
    def rows(self) -> Int64[np.ndarray, " n"]:
        """Row of every cell in `adata`."""
        return self.cohort.corpus.column("source_row")


def check_label(adata: anndata.AnnData, config: LabelConfig, key: str, where: str) -> None:
    """Find what is wrong with a label, or with the key for its predictions, before anything is computed.

    Raises
    ------
    InputError
        As `read_labels`, more neighbours than are stored, no such column to split by, or a key that cannot
        be one.
    """
    for name, number in (("neighbours", config.neighbours), ("split.margin", config.split.margin)):
        if not 0 <= number <= STORED_NEIGHBOURS:
            raise InputError(where, f"{name} is {number}, out of range", f"give 0 to {STORED_NEIGHBOURS}")
    read_labels(adata, config.label, missing=config.missing, class_map=config.class_map, where=where)
    if config.split.by == "column" and config.split.column not in adata.obs:
        there = ", ".join(map(str, adata.obs.columns))
        raise InputError(where, f"split.column {config.split.column!r} is no column", f"use one of {there}")
    check_key(key, (config.label,), where)


def labelled_cells(
    adata: anndata.AnnData, cohort: Cohort, config: LabelConfig, where: str = "adata"
) -> LabelledCells:
    """Read the label of every cell of a cohort, and split them.

    Raises
    ------
    InputError
        As `read_labels` and `make_folds`.

    Warns
    -----
    DataWarning
        A split that leaks.
    """
    folds = make_folds(cohort.corpus, config.split)
    labels = read_labels(
        adata.obs.iloc[cohort.corpus.column("source_row")],
        config.label,
        missing=config.missing,
        min_cells=config.min_cells,
        min_blocks=config.min_blocks,
        block=folds.block,
        class_map=config.class_map,
        where=where,
    )
    warn_of_leaking(folds.leaking, where)
    near = cohort.neighbours(max(config.neighbours, config.split.margin))
    return LabelledCells(where, adata, cohort, config, labels, folds, near)


@dataclass(frozen=True, eq=False)
class CrossFitted:
    """What is said of every cell.

    Attributes
    ----------
    probabilities
        NaN where nothing is.
    baseline
        Of the cells that are scored, by the baseline.
    fold
        Place in `names` of the fit that says it, -1 for none.
    names
        Of the folds, and `ON_ALL`.
    scored
        Labelled cells that a fold tested.
    sizes
        Training and test cells of each fold.
    """

    probabilities: Float32[np.ndarray, "n c"]
    baseline: Float32[np.ndarray, "n c"]
    fold: Int64[np.ndarray, " n"]
    names: tuple[str, ...]
    scored: Bool[np.ndarray, " n"]
    sizes: tuple[tuple[int, int], ...]


def cross_fit(
    cells: LabelledCells,
    answer: Answer,
    *,
    fold: int | None = None,
    seed: int = 0,
    report: Callable[[str], None] = lambda line: None,
) -> CrossFitted:
    """Ask for the label of every cell, fold by fold, and ask the baseline the same.

    Parameters
    ----------
    cells
        The cells.
    answer
        The method: a question to probabilities of its test cells.
    fold
        One fold alone, by number: its fit also answers for the cells without a label.
    seed
        Of the baseline.
    report
        Told of every fold.

    Raises
    ------
    InputError
        A fold that is not there, or that lacks labelled cells; test cells of one block; what `answer` raises.
    """
    folds, codes, k = cells.folds.folds, cells.labels.codes, cells.config.neighbours
    if fold is not None and not 0 <= fold < len(folds):
        raise InputError(cells.where, f"has no fold {fold}", f"give one from 0 to {len(folds) - 1}")
    # All are asked before one is answered: a fold without cells is found at once.
    questions = [cells.question(each) for each in (folds if fold is None else folds[fold : fold + 1])]
    check_blocks(np.concatenate([cells.folds.block[each.fold.test] for each in questions]), cells.where)
    names = tuple(question.fold.name for question in questions)
    probabilities, baseline = np.full((2, len(codes), len(cells.labels.classes)), np.nan, np.float32)
    by, scored, unlabelled = np.full(len(codes), _NONE), np.zeros(len(codes), bool), cells.everyone.test
    for number, question in enumerate(questions):
        train, test = question.fold.train, question.fold.test
        asked = test if fold is None else np.concatenate([test, unlabelled])
        with cells.named():
            # The cheaper first: it finds what is wrong with a fold sooner.
            expression = beside_neighbours(components(cells.cohort, train), cells.near, (k,))
            baseline[test], _ = linear_answer(expression, question, seed=seed)
            probabilities[asked] = answer(cells.ask(Fold(question.fold.name, train, asked)))
        by[asked], scored[test] = number, True
        own, base = (macro_f1(codes[test], said[test].argmax(1)) for said in (probabilities, baseline))
        report(f"fold {question.fold.name}: macro-F1 {own:.3f}, {baseline_name(k)} {base:.3f}")
    if fold is None and len(unlabelled):
        with cells.named():
            probabilities[unlabelled], by[unlabelled] = answer(cells.ask(cells.everyone)), len(names)
    sizes = tuple((len(question.fold.train), len(question.fold.test)) for question in questions)
    return CrossFitted(probabilities, baseline, by, (*names, ON_ALL), scored, sizes)


def baseline_name(k: int) -> str:
    """As the suite's tables have it."""
    return f"own expression + mean of {k}" if k else "own expression"


def describe(
    cells: LabelledCells, found: CrossFitted, known: Bool[np.ndarray, " n"], **more: Any
) -> dict[str, Any]:
    """Scores of what was said, with intervals, and what they are of: plain data, as JSON holds it.

    Parameters
    ----------
    cells, found
        The cells, and what was said of them.
    known
        Cells of which the model knows a gene.
    more
        What else is to be kept.

    Warns
    -----
    DataWarning
        Below 10 blocks, where intervals are too narrow.
    """
    rows = np.flatnonzero(found.scored)
    truth, block = cells.labels.codes[rows], cells.folds.block[rows]
    own, base = found.probabilities[rows], found.baseline[rows]
    warn_of_few_blocks(block, cells.where)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)  # said once
        scores, of_baseline = (
            {name: plain(interval("classes", truth, said, block, name=name)) for name in SCORES}
            for said in (own, base)
        )
        differences = {
            name: plain(paired_difference("classes", truth, own, base, block, name=name)) for name in SCORES
        }
    by_fold = [
        {
            "name": name,
            "training_cells": train,
            "test_cells": test,
            "macro_f1": macro_f1(truth[of], own[of].argmax(1)),
            "baseline_macro_f1": macro_f1(truth[of], base[of].argmax(1)),
        }
        for number, (name, (train, test)) in enumerate(zip(found.names, found.sizes))
        if (of := found.fold[rows] == number).any()
    ]
    return {
        "label": cells.config.label,
        "classes": list(cells.labels.classes),
        "left_out": list(cells.labels.left_out),
        "left_out_cells": list(cells.labels.left_out.values()),
        "split": cells.folds.description,
        "leaking": cells.folds.leaking,
        "neighbours": cells.config.neighbours,
        **more,
        "cells_scored": len(rows),
        "cells_without_label": int((cells.labels.codes < 0).sum()),
        "cells_unknown": cells.adata.n_obs - int(known.sum()),
        "scores": scores,
        "baseline": {"name": baseline_name(cells.config.neighbours), "scores": of_baseline},
        "difference": differences,
        "folds": by_fold,
        "scfm_jax": __version__,
    }


def annotate(
    cells: LabelledCells,
    found: CrossFitted,
    known: Bool[np.ndarray, " n"],
    record: Mapping[str, Any],
    key: str,
) -> None:
    """Put what was said into the AnnData, in its own order, in place.

    Parameters
    ----------
    cells, found, record
        The cells, what was said of them, and `describe`'s record of it.
    known
        Cells of which the model knows a gene; the others get nothing.
    key
        ``obs[key]`` (the likeliest class, missing where nothing is said), ``obs[key + "_fold"]`` (the fit
        that said it), ``obsm[key + "_probabilities"]``, ``uns[key]``.
    """
    adata, n = cells.adata, cells.adata.n_obs
    probabilities = np.full((n, len(cells.labels.classes)), np.nan, np.float32)
    fold, code = np.full((2, n), _NONE)
    said = np.flatnonzero(known & (found.fold >= 0))
    rows = cells.rows[said]
    probabilities[rows] = found.probabilities[said]
    code[rows], fold[rows] = found.probabilities[said].argmax(1), found.fold[said]
    adata.obs[key] = pd.Categorical.from_codes(code, pd.Index(cells.labels.classes))
    adata.obs[f"{key}_fold"] = pd.Categorical.from_codes(fold, pd.Index(found.names))
    adata.obsm[f"{key}_probabilities"] = probabilities
    adata.uns[key] = storable(record)
