"""The tasks of a suite on their cells: targets, folds, and what the report needs to know of them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float32, Int64, Num

from scfm_jax import genes
from scfm_jax.downstream.class_maps import ClassMap, read_class_map, shared_classes
from scfm_jax.downstream.cohort import STORED_NEIGHBOURS, Cohort, open_cohort
from scfm_jax.downstream.composition import composition
from scfm_jax.downstream.density import UNIT, local_density
from scfm_jax.downstream.expression import components
from scfm_jax.downstream.folds import Folds, make_folds
from scfm_jax.downstream.labels import Labels, read_labels
from scfm_jax.downstream.question import Question
from scfm_jax.downstream.scores import Kind
from scfm_jax.downstream.suite_config import Suite, TaskConfig
from scfm_jax.errors import InputError

_KINDS: dict[str, Kind] = {"classes": "classes", "density": "value", "composition": "composition"}


@dataclass(frozen=True, eq=False)
class Task:
    """A task of a suite.

    Attributes
    ----------
    name, config
        As the suite has them.
    cohort
        Its cells.
    kind, target, classes
        See `Question`; a target is missing where a code is negative, or a value NaN.
    types
        Of ``composition``: the label's codes, which its baselines read.
    folds
        Over all cells, labelled or not.
    facts
        What the report says of it.
    """

    name: str
    config: TaskConfig
    cohort: Cohort
    kind: Kind
    target: Num[np.ndarray, "n ..."]
    classes: tuple[str, ...]
    types: Int64[np.ndarray, " n"] | None
    folds: Folds
    facts: dict[str, Any]

    def questions(self) -> Iterator[tuple[int, FoldData]]:
        """The folds that the suite asks for, by number."""
        for number, fold in enumerate(self.folds.folds):
            if self.config.folds and number not in self.config.folds:
                continue
            there = np.isfinite(self.target.reshape(len(self.target), -1)).all(1) & self._has_code()
            asked = fold.labelled(np.where(there, self.target if self.kind == "classes" else 0, -1))
            question = Question(self.kind, self.target, self.classes, asked, self.folds.block, self._near)
            yield number, FoldData(self, question)

    def _has_code(self) -> np.ndarray:
        return self.target >= 0 if self.kind == "classes" else np.ones(len(self.target), bool)

    @functools.cached_property
    def _near(self) -> Int64[np.ndarray, "n k"]:
        return self.cohort.neighbours(STORED_NEIGHBOURS)


@dataclass(frozen=True, eq=False)
class FoldData:
    """A task in a fold, with what its methods share."""

    task: Task
    question: Question

    @functools.cached_property
    def expression(self) -> Float32[np.ndarray, "n d"]:
        """Principal components, fitted on the fold's training cells."""
        return components(self.task.cohort, self.question.fold.train)


def make_task(suite: Suite, name: str, folder: Path) -> Task:
    """Open a task's files and read its target; corpora go to `folder`.

    Raises
    ------
    InputError
        Bad input, as what reads it says.
    """
    config = suite.tasks[name]
    sources = [suite.files[file] for file in config.files]
    cohort = open_cohort(folder / "-".join(config.files), sources, **read_tables(suite))
    folds = make_folds(cohort.corpus, config.split)
    facts = {
        "name": name,
        "file": ", ".join(config.files),
        "kind": _KINDS[config.kind],
        "label": ", ".join(config.labels),
        "split": folds.description,
        "leaking": folds.leaking,
        "cells": cohort.corpus.n_cells,
        "left_out": {},
        "unit": "",
        "classes": [],
    }
    if config.kind == "density":
        if config.unit != "um":
            raise InputError(f"{suite.path} [tasks.{name}]", "density is per um^2, unit is file", "use um")
        value, report = local_density(cohort.corpus, config.radius)
        facts |= {"unit": UNIT, "target": report}
        return Task(name, config, cohort, "value", value, (), None, folds, facts)
    labels = _labels(suite, config, cohort, folds)
    codes, classes = labels.codes, tuple(labels.classes)
    facts |= {"classes": labels.classes, "left_out": labels.left_out, "missing": labels.missing}
    if config.kind == "classes":
        return Task(name, config, cohort, "classes", codes, classes, None, folds, facts)
    shares, report = composition(cohort.corpus, codes, len(classes), config.radius, unit=config.unit)
    facts |= {"unit": f"shares within {config.radius:g} {'µm' if config.unit == 'um' else 'units'}"}
    facts |= {"target": report}
    return Task(name, config, cohort, "composition", shares, classes, codes, folds, facts)


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


def _labels(suite: Suite, config: TaskConfig, cohort: Cohort, folds: Folds) -> Labels:
    """One label of all files, in the classes that all of them have where a map says what these are."""
    columns = config.labels * (len(config.files) // len(config.labels))
    maps: list[ClassMap | None] = [None] * len(columns)
    if config.class_map:
        read = [read_class_map(suite.resolve(config.class_map), file) for file in config.files]
        maps = [*read]
    parts = []
    for file, column, class_map in zip(config.files, columns, maps, strict=True):
        of_file = [slide.name.split("/")[0] == file for slide in cohort.corpus.slides]
        rows = np.array(of_file)[cohort.slide]
        codes, names = cohort.corpus.labels(column)
        obs = pd.DataFrame({column: pd.Categorical.from_codes(codes[rows], pd.Index(names))})
        parts.append((rows, read_labels(obs, column, missing=config.missing, class_map=class_map)))
    if config.class_map and len(parts) > 1:
        classes = shared_classes(*read)
    else:
        classes = sorted({name for _, part in parts for name in part.classes})
    codes = np.full(cohort.corpus.n_cells, -1)
    left_out: dict[str, int] = {}
    for rows, part in parts:
        shared = part.among(classes)
        codes[rows] = shared.codes
        left_out |= shared.left_out
    joined = pd.DataFrame({"label": pd.Categorical.from_codes(codes, pd.Index(classes))})
    limited = read_labels(
        joined, "label", min_cells=config.min_cells, min_blocks=config.min_blocks, block=folds.block
    )
    missing = sum(part.missing for _, part in parts)
    return Labels(limited.codes, limited.classes, left_out | limited.left_out, missing)
