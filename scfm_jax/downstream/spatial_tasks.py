"""Tasks of tissue on an AnnData, in place: density, composition, masked genes, and mixing of batches.

Each is a suite's task (`docs/downstream.md`), with the suite's folds, baselines and figures: what holds of it
there holds here. What is added, with ``key_added``, or the task's name:

``density``
    ``obs[key]`` the truth, ``obs[key + "_predicted"]``, ``obs[key + "_fold"]``.
``composition``
    ``obsm[key]`` the truth, ``obsm[key + "_predicted"]``, each with a column for each of
    ``uns[key]["classes"]``; ``obs[key + "_fold"]``.
``imputation``
    ``obs[key + "_error"]``, the mean squared error over a test cell's masked genes; ``obs[key + "_fold"]``.
``mixing``
    ``uns[key]`` alone.

Truths and predictions are float32, NaN where a cell is left out. A cell is predicted by a fit that has not
learnt from it: in the fold that tests it, or, if it has no truth, by a fit on all cells that have one, whose
name is "". ``uns[key]`` holds ``scores`` (of ``mixing`` numbers, else each a value with its 95% interval over
spatial blocks), the same of each of the ``baselines``, ``differences`` from each (negative is better of an
error), the ``best_baseline``, ``folds``, a table of all scores, the ``target`` with the cells left out,
``split``, ``leaking``, the model with its hash, and the settings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import anndata
import numpy as np
import pandas as pd
from jaxtyping import Float, Float32

from scfm_jax.downstream.annotate import ProbeWay, neighbours_of
from scfm_jax.downstream.finetuned import FinetuneConfig, Way
from scfm_jax.downstream.folds import FoldsConfig
from scfm_jax.downstream.judging import about, describe
from scfm_jax.downstream.labels import MISSING
from scfm_jax.downstream.model import TrainedModel
from scfm_jax.downstream.records import storable
from scfm_jax.downstream.suite_answers import Method
from scfm_jax.downstream.suite_config import MethodConfig
from scfm_jax.downstream.suite_in_memory import (
    MODEL,
    OneTask,
    Progress,
    Report,
    answer_all,
    ask,
    categories,
    in_range,
    methods_by_way,
    opened,
)
from scfm_jax.downstream.suite_mixing import mixing_answer
from scfm_jax.errors import InputError

MEANS = (10, 64, 256)


def density(
    adata: anndata.AnnData,
    model: TrainedModel,
    *,
    species: str,
    technology: str,
    radius: float = 50.0,
    way: ProbeWay | Way = "probe",
    neighbours: int | None = None,
    means: Sequence[int] = MEANS,
    coordinates_alone: bool = False,
    split: FoldsConfig | None = None,
    settings: FinetuneConfig | None = None,
    key_added: str = "density",
    seed: int = 0,
    progress: Progress = lambda done, total: None,
    report: Report = lambda line: None,
    **source: Any,
) -> None:
    """Predict how crowded a cell's surroundings are (`local_density`); see the head of this module.

    Parameters
    ----------
    adata
        Raw counts, ``obsm["spatial"]`` of a known unit (``um_per_unit``); annotated in place.
    model
        A trained run. One that reads the coordinates of its neighbours is asked with ``way="mean"`` or
        ``"neighbourhood"``, or 0 neighbours: distances to neighbours are the answer.
    species, technology, source
        How to read `adata`: what `Source` takes, and the tables `gene_names`, `aliases`, `orthologs`.
    radius
        In µm. Cells as near to the border of their slide's hull are left out.
    way
        As in `scfm_jax.downstream.annotate.probe`, with ridge regression for logistic; or the model itself is
        trained, as by `scfm_jax.downstream.annotate.finetune`: ``lora``, ``full`` or ``head``.
    neighbours
        k, of the model and of a baseline; the model's own number if not given.
    means
        The k whose means one more baseline reads together; none: leave it out.
    coordinates_alone
        Whether the 5 nearest training cells are a baseline; it needs folds within slides.
    split
        The folds; those of `FoldsConfig` if not given, whose margin of 64 needs some thousand cells.
    settings
        How a model is trained.
    key_added
        Of what is added.
    seed
        Of what is drawn.
    progress
        Called with the number of cells embedded and in all.
    report
        Told of every answer in every fold.

    Raises
    ------
    InputError
        A unit that is not known, a radius that leaves no cell, a split with an empty fold, a number of
        neighbours that the model cannot read, a model that reads coordinates or that knows under a tenth of
        the genes. `adata` is as it was then.

    Warns
    -----
    DataWarning
        A split that leaks; test cells whose discs hold training cells; scores of under 10 blocks; a model
        that knows under half of the genes.
    """
    config = {"kind": "density", "radius": radius, "means": tuple(means), "coordinates": coordinates_alone}
    reading = {"species": species, "technology": technology, **source}
    with _predicted(
        adata, model, config, reading, way, neighbours, split, settings, key_added, seed, progress, report
    ) as (one, said, fold):
        adata.obs[key_added], adata.obs[f"{key_added}_predicted"] = one.truth, said
        adata.obs[f"{key_added}_fold"] = fold


def composition(
    adata: anndata.AnnData,
    model: TrainedModel,
    label: str,
    *,
    species: str,
    technology: str,
    radius: float = 50.0,
    unit: Literal["um", "file"] = "um",
    way: ProbeWay | Way = "probe",
    neighbours: int | None = None,
    means: Sequence[int] = MEANS,
    coordinates_alone: bool = False,
    split: FoldsConfig | None = None,
    settings: FinetuneConfig | None = None,
    missing: Sequence[str] = MISSING,
    min_cells: int = 50,
    min_blocks: int = 5,
    key_added: str = "composition",
    seed: int = 0,
    progress: Progress = lambda done, total: None,
    report: Report = lambda line: None,
    **source: Any,
) -> None:
    """Predict the shares of a label's classes around a cell; see the head of this module.

    The radius is the task's and stays when k changes; the cell itself does not count, and a cell with fewer
    than 5 labelled others within the radius is left out.

    Parameters
    ----------
    adata, model, species, technology, source
        As in `density`; the model may read coordinates.
    label
        Column of ``obs``.
    radius, unit
        In µm, or (``"file"``) in the units of the coordinates, where their length is not known.
    way, neighbours, means, coordinates_alone, split, settings
        As in `density`.
    missing, min_cells, min_blocks
        What counts as no label, and which classes are left out, as in `read_labels`.
    key_added, seed, progress, report
        As in `density`.

    Raises
    ------
    InputError
        As `density`; a label that is not there, has one class, or none after the limits.

    Warns
    -----
    DataWarning
        As `density`.
    """
    config = {"kind": "composition", "radius": radius, "unit": unit, "coordinates": coordinates_alone}
    config |= {"means": tuple(means), **_labelled(label, missing, min_cells, min_blocks)}
    reading = {"species": species, "technology": technology, **source}
    with _predicted(
        adata, model, config, reading, way, neighbours, split, settings, key_added, seed, progress, report
    ) as (one, said, fold):
        adata.obsm[key_added], adata.obsm[f"{key_added}_predicted"] = one.truth, said
        adata.obs[f"{key_added}_fold"] = fold


def imputation(
    adata: anndata.AnnData,
    model: TrainedModel,
    *,
    species: str,
    technology: str,
    neighbours: int | None = None,
    split: FoldsConfig | None = None,
    test_cells: int = 1024,
    train_cells: int = 4096,
    key_added: str = "imputation",
    report: Report = lambda line: None,
    **source: Any,
) -> None:
    """Say what the masked genes of unseen cells are, of a tissue model as it is; see the head of this module.

    Errors are of log1p of scaled counts. They are means over the masked entries of the test cells, all alike,
    as the model's own mask draws them (non-zeros more often than zeros); ``squared_error_inverse_rate``
    estimates the mean over all entries of the panel instead, ``squared_error_nonzero`` and ``_zero`` are of
    one kind. ``skill`` is 1 - error / error of the weighted gene mean.

    Parameters
    ----------
    adata, species, technology, split, source
        As in `density`; the split is of the baselines, which learn, and of the cells that are scored: what
        the model learnt from in pretraining only its user knows.
    model
        A run of AIDO.Tissue.
    neighbours
        k, of the model; its own number if not given.
    test_cells, train_cells
        Most cells of a fold that are scored, and that its baselines learn from, drawn at random.
    key_added, report
        As in `density`.

    Raises
    ------
    InputError
        A split with an empty fold, a model of another family, or one that knows under a tenth of the genes.

    Warns
    -----
    DataWarning
        A split that leaks; scores of under 10 blocks; a model that knows under half of the genes.
    """
    k = neighbours_of(model, neighbours)
    config = {"kind": "imputation", "split": split or FoldsConfig(), "neighbours": (k,)}
    config |= {"test_cells": test_cells, "train_cells": train_cells}
    with in_range():
        methods = {"imputation": MethodConfig("imputation", (MODEL,), (k,))}
    reading = {"species": species, "technology": technology, **source}
    with opened(adata, model, config, methods, key_added, reading) as one:
        asked = ask(one, report=report)
        _, _, mask = model.config.tissue()
        expectation = (
            f"over masked entries ({mask.nonzero_rate:g} of non-zeros, {mask.zero_rate:g} of zeros) alike; "
            "squared_error_inverse_rate: over all entries of the panel"
        )
        record = describe(one, asked, neighbours=k, expectation=expectation)
        own = asked.pooled[asked.own]
        error = np.full(one.task.cohort.corpus.n_cells, np.nan, np.float32)
        there = own.truth > 0
        error[own.cells[there]] = own.predicted[there] / own.truth[there]
        adata.obs[f"{key_added}_error"] = one.of_all(error)
        adata.obs[f"{key_added}_fold"] = categories(one, asked.fold, asked.names)
    adata.uns[key_added] = storable(record)


def mixing(
    adata: anndata.AnnData,
    model: TrainedModel | str,
    label: str,
    *,
    batch: str,
    species: str,
    technology: str,
    neighbours: int | None = None,
    means: Sequence[int] = MEANS,
    missing: Sequence[str] = MISSING,
    min_cells: int = 50,
    min_blocks: int = 5,
    key_added: str = "mixing",
    seed: int = 0,
    progress: Progress = lambda done, total: None,
    report: Report = lambda line: None,
    **source: Any,
) -> None:
    """Score how an embedding mixes batches and keeps a label apart; see `scfm_jax.downstream.mixing`.

    Nothing is learnt and no cell held out. The baselines are principal components of log counts. Cells
    without a label or a batch, or of which the model knows no gene, are left out.

    Parameters
    ----------
    adata, species, technology, source
        As in `density`; coordinates are needed only where neighbours are read.
    model
        A trained run, whose embedding of a cell among its neighbours is scored, or the key of one that is in
        ``obsm``.
    label, batch
        Columns of ``obs``: what should stay apart, and what should mix, as donors or technologies.
    neighbours
        k, of the model and of a baseline; if not given, the model's own number, and 0 beside a key.
    means, missing, min_cells, min_blocks, key_added, seed, progress, report
        As in `composition`.

    Raises
    ------
    InputError
        A column or a key that is not there, an embedding of another shape, fewer than two batches or classes,
        no class in two batches, or what the model cannot read.

    Warns
    -----
    DataWarning
        A model that knows under half of the genes.
    """
    trained = None if isinstance(model, str) else model
    k = neighbours_of(trained, neighbours) if trained else neighbours or 0
    config = {"kind": "mixing", "batch": batch, "neighbours": (0, k), "means": tuple(means)}
    config |= _labelled(label, missing, min_cells, min_blocks)
    with in_range():
        method = MethodConfig("embedding", (MODEL,), (k,), attend=True, seeds=(seed,))
    methods = {"embedding": method} if trained else {}
    given = _embedding(adata, model) if isinstance(model, str) else None
    reading = {"species": species, "technology": technology, **source}
    with opened(adata, trained, config, methods, key_added, reading, progress=progress) as one:
        # A column of this name is what was asked for, and not the technology of the file.
        codes = one.task.cohort.corpus.labels(batch)[0].astype(np.int64)
        one = replace(one, task=replace(one.task, batch=codes))
        more: tuple[Method, ...] = ()
        if given is not None:
            features = given[one.rows]
            more = (
                Method(str(model), "model", None, seed, lambda data: mixing_answer(data, features, seed)),
            )
        asked = ask(one, report=report, more=more)
        scores = {row["method"]: asked.scores_of(row) for row in asked.rows}
        record = about(one) | {
            "batch": batch,
            "embedding": asked.own,
            "neighbours": k,
            "seed": seed,
            "scores": scores.pop(asked.own),
            "baselines": scores,
        }
    adata.uns[key_added] = storable(record)


@contextmanager
def _predicted(
    adata: anndata.AnnData,
    model: TrainedModel,
    config: dict[str, Any],
    reading: dict[str, Any],
    way: ProbeWay | Way,
    neighbours: int | None,
    split: FoldsConfig | None,
    settings: FinetuneConfig | None,
    key: str,
    seed: int,
    progress: Progress,
    report: Report,
) -> Iterator[tuple[OneTask, Float32[np.ndarray, "n ..."], pd.Categorical]]:
    """A task whose target is predicted: what is said of the rows of `adata`, and in which fold.

    ``uns`` is written at the end.
    """
    k = neighbours_of(model, neighbours)
    config |= {"neighbours": (0, k), "split": split or FoldsConfig()}
    with in_range():
        methods, more = methods_by_way(way, k, seed, settings)
    with opened(adata, model, config, methods, key, reading, progress=progress) as one:
        asked = ask(one, report=report)
        said, fold, names = answer_all(one, asked)
        record = describe(one, asked, neighbours=k, way=way, seed=seed, **more)
        yield one, one.of_all(said), categories(one, fold, names)
    adata.uns[key] = storable(record)


def _labelled(label: str, missing: Sequence[str], min_cells: int, min_blocks: int) -> dict[str, Any]:
    limits = {"min_cells": min_cells, "min_blocks": min_blocks}
    return {"labels": (label,), "missing": tuple(missing), **limits}


def _embedding(adata: anndata.AnnData, key: str) -> Float[np.ndarray, "n d"]:
    if key not in adata.obsm:
        there = ", ".join(map(str, adata.obsm)) or "no key"
        raise InputError("adata", f"obsm has no {key!r}", f"use one of {there}, or give a model")
    found = np.asarray(adata.obsm[key])
    if found.ndim != 2 or found.dtype.kind not in "fiu":
        problem = f"obsm[{key!r}] is of shape {found.shape} and type {found.dtype}"
        raise InputError("adata", problem, "give a dense matrix of numbers")
    return found if found.dtype.kind == "f" else found.astype(np.float32)
