"""The tasks of a suite on their cells: targets, folds, and what the report needs to know of them."""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float32, Int64, Num

from scfm_jax import genes
from scfm_jax.corpus import Corpus
from scfm_jax.downstream.class_maps import ClassMap, read_class_map, shared_classes
from scfm_jax.downstream.cohort import STORED_NEIGHBOURS, Cohort, open_cohort
from scfm_jax.downstream.composition import composition
from scfm_jax.downstream.cost import Cost, Meter
from scfm_jax.downstream.density import UNIT, local_density
from scfm_jax.downstream.expression import components
from scfm_jax.downstream.folds import Fold, Folds, all_cells, make_folds
from scfm_jax.downstream.labels import Labels, read_labels
from scfm_jax.downstream.question import Question
from scfm_jax.downstream.scores import PRIMARY
from scfm_jax.downstream.spatial_labels import sum_around
from scfm_jax.downstream.suite_config import Suite, TaskConfig
from scfm_jax.errors import DataWarning, InputError

# How each kind of task is scored (`suite_results.KINDS`).
_SCORED_AS = {
    "classes": "classes",
    "density": "value",
    "composition": "composition",
    "mixing": "mixing",
    "imputation": "imputation",
}
# What a line of progress says.
MAIN_SCORES = {"mixing": "overall", **{str(kind): name for kind, name in PRIMARY.items()}}


@dataclass(frozen=True, eq=False)
class Task:
    """A task of a suite.

    Attributes
    ----------
    name, config
        As the suite has them.
    cohort
        Its cells.
    kind
        How it is scored: of ``classes``, ``value`` and ``composition`` predictions are, of ``mixing``
        embeddings, of ``imputation`` masked genes.
    target, classes
        See `Question`; a target is missing where a code is negative, or a value NaN. Of ``mixing`` codes, of
        ``imputation`` there is none.
    folds
        Over all cells, labelled or not.
    facts
        What the report says of it.
    types
        Of ``composition``: the label's codes, which its baselines read.
    batch
        Of ``mixing``: codes of batches, negative where missing.
    """

    name: str
    config: TaskConfig
    cohort: Cohort
    kind: str
    target: Num[np.ndarray, "n ..."] | None
    classes: tuple[str, ...]
    folds: Folds
    facts: dict[str, Any]
    types: Int64[np.ndarray, " n"] | None = None
    batch: Int64[np.ndarray, " n"] | None = None

    def in_folds(self) -> Iterator[FoldData]:
        """The folds that the suite asks for, each of the cells that have a target.

        Raises
        ------
        InputError
            A fold without such cells to learn from or to test, or with one class to learn.
        """
        for number, fold in enumerate(self.folds.folds):
            if not self.config.folds or number in self.config.folds:
                asked = fold if self.target is None else fold.labelled(self.codes)
                yield FoldData(self, number, asked)

    @functools.cached_property
    def near(self) -> Int64[np.ndarray, "n k"]:
        """The nearest neighbours of every cell."""
        return self.cohort.neighbours(STORED_NEIGHBOURS)

    @functools.cached_property
    def codes(self) -> Int64[np.ndarray, " n"]:
        """Classes as they are; of other targets every cell's own number stands for a value that is there.

        Negative where the target is missing.
        """
        assert self.target is not None
        if self.target.dtype.kind == "i":
            return self.target
        there = np.isfinite(self.target.reshape(len(self.target), -1)).all(1)
        return np.where(there, np.arange(len(there)), -1)


@dataclass(frozen=True, eq=False)
class FoldData:
    """A task in a fold, with what its methods share."""

    task: Task
    number: int
    fold: Fold

    @functools.cached_property
    def question(self) -> Question:
        """Of a task whose predictions are scored."""
        task = self.task
        assert task.target is not None and task.kind in PRIMARY
        block, margin = task.folds.block, task.config.choosing_margin
        return Question(task.kind, task.target, task.classes, self.fold, block, task.near, margin)

    @property
    def expression(self) -> Float32[np.ndarray, "n d"]:
        """Principal components, fitted on the fold's training cells."""
        return self._expression[0]

    @property
    def expression_cost(self) -> Cost:
        """Of the components."""
        return self._expression[1]

    @functools.cached_property
    def _expression(self) -> tuple[Float32[np.ndarray, "n d"], Cost]:
        with Meter() as meter:
            found = components(self.task.cohort, self.fold.train)
        return found, meter.cost


def make_task(suite: Suite, name: str, folder: Path) -> Task:
    """Open a task's files and read its target; corpora go to `folder`.

    Raises, Warns
    -------------
    InputError, DataWarning
        As `task_of`, and as what reads the files says.
    """
    files = suite.tasks[name].files
    sources = [suite.files[file] for file in files]
    return task_of(suite, name, open_cohort(folder / "-".join(files), sources, **read_tables(suite)))


def task_of(suite: Suite, name: str, cohort: Cohort) -> Task:
    """A task of a suite on the cells of its files.

    Raises
    ------
    InputError
        Bad input, as what reads it says.

    Warns
    -----
    DataWarning
        Of a radius: discs of test cells that hold training cells.
    """
    config = suite.tasks[name]
    if config.kind == "mixing":
        folds = all_cells(cohort.corpus, config.split.blocks)
    else:
        folds = make_folds(cohort.corpus, config.split)
    _check_folds(suite, name, len(folds.folds))
    kind = _SCORED_AS[config.kind]
    facts = {
        "name": name,
        "file": ", ".join(config.files),
        "kind": kind,
        "label": ", ".join(config.labels),
        "split": folds.description,
        "leaking": folds.leaking,
        "cells": cohort.corpus.n_cells,
        "left_out": {},
        "unit": "",
        "classes": [],
    }
    if config.kind == "imputation":
        facts |= {"unit": "log1p of scaled counts"}
        return Task(name, config, cohort, kind, None, (), folds, facts)
    if config.kind == "density":
        if config.unit != "um":
            raise InputError(suite.where(name), "density is per um^2, unit is file", "use um")
        value, report = local_density(cohort.corpus, config.radius)
        facts |= {"unit": UNIT, "target": report}
        task = Task(name, config, cohort, kind, value, (), folds, facts)
        report["shared_discs"] = _shared_discs(task, suite.where(name))
        return task
    labels = _labels(suite, name, cohort, folds)
    codes, classes = labels.codes, tuple(labels.classes)
    facts |= {"classes": labels.classes, "left_out": labels.left_out, "missing": labels.missing}
    if config.kind == "mixing":
        batch = _batches(cohort.corpus, config.batch)
        facts |= {"label": f"{config.batch} against {facts['label']}"}
        return Task(name, config, cohort, kind, codes, classes, folds, facts, batch=batch)
    if config.kind == "classes":
        return Task(name, config, cohort, kind, codes, classes, folds, facts)
    shares, report = composition(cohort.corpus, codes, len(classes), config.radius, unit=config.unit)
    facts |= {"unit": f"shares within {config.radius:g} {'µm' if config.unit == 'um' else 'units'}"}
    facts |= {"target": report}
    task = Task(name, config, cohort, kind, shares, classes, folds, facts, types=codes)
    report["shared_discs"] = _shared_discs(task, suite.where(name))
    return task


def read_tables(suite: Suite) -> dict[str, Any]:
    """The suite's gene tables, as `build_corpus` takes them."""
    readers = {
        "gene_names": genes.read_gene_names,
        "orthologs": genes.read_orthologs,
        "aliases": genes.read_aliases,
    }
    return {
        name: read(suite.resolve(path))
        for name, read in readers.items()
        if (path := getattr(suite.genes, name))
    }


def _check_folds(suite: Suite, name: str, number: int) -> None:
    """Every fold that is asked for by number is there."""
    asked = {f"tasks.{name}": suite.tasks[name].folds}
    asked |= {
        f"methods.{method}": config.folds
        for method, config in suite.methods.items()
        if name in config.tasks and len(config.tasks) == 1
    }
    for where, folds in asked.items():
        if unknown := [fold for fold in folds if not 0 <= fold < number]:
            raise InputError(
                f"{suite.path} [{where}]",
                f"task {name!r} has no fold {unknown[0]}",
                f"use 0 to {number - 1}",
            )


def _shared_discs(task: Task, where: str) -> float:
    """Share of the test cells within the task's radius of a training cell: their targets count it too."""
    config, folds = task.config, [data.fold for data in task.in_folds()]
    learnt = np.zeros((task.cohort.corpus.n_cells, len(folds)))
    for column, fold in enumerate(folds):
        learnt[fold.train, column] = 1
    around, _ = sum_around(task.cohort.corpus, learnt, config.radius, config.unit)
    shared = np.concatenate([around[fold.test, column] > 0 for column, fold in enumerate(folds)])
    if shared.any():
        text = (
            f"{where}: the discs of {shared.sum()} of {len(shared)} test cells ({shared.mean():.1%}) hold "
            f"training cells: radius {config.radius:g} reaches over the split's margin of "
            f"{config.split.margin} neighbours; raise split.margin, or lower radius"
        )
        warnings.warn(text, DataWarning, stacklevel=4)
    return float(shared.mean())


def _batches(corpus: Corpus, batch: str) -> Int64[np.ndarray, " n"]:
    """Technology, or the codes of a label, of every cell."""
    if batch != "technology":
        return corpus.labels(batch)[0].astype(np.int64)
    names = [slide.technology for slide in corpus.slides]
    code = np.unique(names, return_inverse=True)[1]
    return code[corpus.slide_of(np.arange(corpus.n_cells))]


def _labels(suite: Suite, name: str, cohort: Cohort, folds: Folds) -> Labels:
    """One label of all files, in the classes that all of them have where a map says what these are."""
    config = suite.tasks[name]
    columns = config.labels * (len(config.files) // len(config.labels))
    maps: list[ClassMap | None] = [None] * len(columns)
    if config.class_map:
        path = suite.resolve(config.class_map)
        read = [read_class_map(path, side) for side in config.sides or config.files]
        maps = [*read]
    parts = []
    for file, column, class_map in zip(config.files, columns, maps, strict=True):
        of_file = [slide.name.split("/")[0] == file for slide in cohort.corpus.slides]
        rows = np.array(of_file)[cohort.slide]
        codes, names = cohort.corpus.labels(column)
        obs = pd.DataFrame({column: pd.Categorical.from_codes(codes[rows], pd.Index(names))})
        where = suite.files[file].path
        part = read_labels(obs, column, missing=config.missing, class_map=class_map, where=where)
        parts.append((rows, part))
    if config.class_map and len(parts) > 1:
        classes = shared_classes(*read)
    else:
        classes = sorted({name for _, part in parts for name in part.classes})
    codes = np.full(cohort.corpus.n_cells, -1)
    left_out: Counter[str] = Counter()
    for rows, part in parts:
        shared = part.among(classes)
        codes[rows] = shared.codes
        left_out.update(shared.left_out)
    label = ", ".join(config.labels)
    limited = read_labels(
        pd.DataFrame({label: pd.Categorical.from_codes(codes, pd.Index(classes))}),
        label,
        min_cells=config.min_cells,
        min_blocks=config.min_blocks,
        block=folds.block,
        where=suite.where(name),
    )
    left_out.update(limited.left_out)
    missing = sum(part.missing for _, part in parts)
    return Labels(limited.codes, limited.classes, dict(left_out), missing)
