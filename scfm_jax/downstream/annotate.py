"""Labels of cells from a model: probes and fine-tuning on an AnnData, in place.

Every labelled cell is answered for by a fit that has not learnt from it, and scored beside the same linear
model of expression. What is added, with ``key_added``, or the label and the way as ``region_probe``:

``obs[key]``
    The likeliest class; missing for cells of which the model knows no gene, and for labelled cells that no
    fold tests.
``obs[key + "_fold"]``
    The fold whose fit said it, "" for the fit on all labelled cells, which answers for cells without a label.
``obsm[key + "_probabilities"]``
    float32, a column for each of ``uns[key]["classes"]``, NaN where nothing is said.
``uns[key]``
    ``scores``, ``baseline`` and ``difference`` (each a value with its 95% interval over spatial blocks),
    ``folds``, ``classes``, ``left_out`` with ``left_out_cells``, ``split``, ``leaking``, ``neighbours``, the
    model with its hash, the settings, and the version.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import anndata
import numpy as np
from jaxtyping import Float32

from scfm_jax.corpus import Source
from scfm_jax.downstream.class_maps import ClassMap
from scfm_jax.downstream.cohort import Cohort
from scfm_jax.downstream.cross_fitting import (
    LabelConfig,
    LabelledCells,
    annotate,
    check_label,
    cross_fit,
    describe,
    labelled_cells,
)
from scfm_jax.downstream.embed import embed_cells
from scfm_jax.downstream.expression import beside_neighbours
from scfm_jax.downstream.finetune import finetune as train
from scfm_jax.downstream.finetuned import FinetuneConfig, FineTuned, Way
from scfm_jax.downstream.folds import FoldsConfig
from scfm_jax.downstream.in_memory import cohort_of, cohort_of_file
from scfm_jax.downstream.labels import MISSING
from scfm_jax.downstream.linear import constant_answer, linear_answer
from scfm_jax.downstream.model import TrainedModel
from scfm_jax.downstream.neighbourhood import NeighbourhoodConfig, neighbourhood_answer
from scfm_jax.downstream.question import Question
from scfm_jax.downstream.records import model_record
from scfm_jax.errors import InputError
from scfm_jax.models.functional import count_parameters

ProbeWay = Literal["probe", "mean", "neighbourhood"]
Progress = Callable[[int, int], None]
Report = Callable[[str], None]
_TABLES = ("gene_names", "aliases", "orthologs")


def probe(
    adata: anndata.AnnData,
    model: TrainedModel,
    label: str,
    *,
    species: str,
    technology: str,
    way: ProbeWay = "probe",
    neighbours: int | None = None,
    split: FoldsConfig | None = None,
    missing: Sequence[str] = MISSING,
    min_cells: int = 50,
    min_blocks: int = 5,
    class_map: ClassMap | None = None,
    key_added: str | None = None,
    seed: int = 0,
    progress: Progress = lambda done, total: None,
    report: Report = lambda line: None,
    **source: Any,
) -> None:
    """Predict a label from embeddings of a model that is left as it is; see the head of this module.

    Parameters
    ----------
    adata
        Raw counts, ``obsm["spatial"]``; annotated in place.
    model
        A trained run.
    label
        Column of ``obs``.
    species, technology, source
        How to read `adata`: what `Source` takes, and the tables `gene_names`, `aliases`, `orthologs`.
    way
        ``probe``: logistic regression on the embedding, made of a cell among its neighbours. ``mean``: on the
        embedding of the cell alone, beside the mean of its neighbours'. ``neighbourhood``: a small network
        over the embedding of the cell alone and those of its neighbours
        (`scfm_jax.downstream.neighbourhood`).
    neighbours
        k, of the model and of the baseline; the model's own number if not given.
    split
        The folds; those of `FoldsConfig` if not given, whose margin of 64 needs some thousand cells.
    missing, min_cells, min_blocks, class_map
        What counts as no label, and which classes are left out, as in `read_labels`.
    key_added
        In place of ``LABEL_WAY``.
    seed
        Of what is drawn.
    progress
        Called with the number of cells embedded and in all.
    report
        Told of every fold.

    Raises
    ------
    InputError
        A label that is not there, has one class, or none after the limits; a split with an empty fold; a
        number of neighbours that the model cannot read; a model that knows under a tenth of the genes.

    Warns
    -----
    DataWarning
        A split that leaks; scores of under 10 blocks; a model that knows under half of the genes.
    """
    key, k = key_added or f"{label}_{way}", neighbours_of(model, neighbours)
    config = LabelConfig(label, k, split or FoldsConfig(), tuple(missing), min_cells, min_blocks, class_map)
    with _opened(adata, config, key, {"species": species, "technology": technology, **source}) as cells:
        probe_cells(cells, model, key, way=way, seed=seed, progress=progress, report=report)


def finetune(
    adata: anndata.AnnData,
    model: TrainedModel,
    label: str,
    *,
    species: str,
    technology: str,
    way: Way = "lora",
    neighbours: int | None = None,
    settings: FinetuneConfig | None = None,
    fold: int | None = None,
    split: FoldsConfig | None = None,
    missing: Sequence[str] = MISSING,
    min_cells: int = 50,
    min_blocks: int = 5,
    class_map: ClassMap | None = None,
    key_added: str | None = None,
    seed: int = 0,
    progress: Callable[[int, int, str], None] = lambda done, total, note: None,
    report: Report = lambda line: None,
    **source: Any,
) -> FineTuned:
    """Predict a label by a model that is trained on it; see the head of this module.

    Parameters
    ----------
    adata, model, label, species, technology, source
        As in `probe`; the model's parameters stay as they are.
    way, neighbours
        What is trained (`FinetuneConfig`), and k; in place of those of `settings`.
    settings
        How it is trained.
    fold
        One fold alone, by number: one training in place of one a fold and one on all. Its fit answers for
        the fold's test cells and for cells without a label.
    split, missing, min_cells, min_blocks, class_map, key_added, seed
        As in `probe`.
    progress
        Called with the steps done and planned of a training, and its newest scores.
    report
        Told of every fold.

    Returns
    -------
    The model trained on all labelled cells, or in `fold`.

    Raises
    ------
    InputError
        As `probe`, and as `scfm_jax.downstream.finetune.finetune`.

    Warns
    -----
    DataWarning
        As `probe`.
    """
    key, k = key_added or f"{label}_{way}", neighbours_of(model, neighbours)
    config = LabelConfig(label, k, split or FoldsConfig(), tuple(missing), min_cells, min_blocks, class_map)
    settings = replace(settings or FinetuneConfig(), way=way)
    with _opened(adata, config, key, {"species": species, "technology": technology, **source}) as cells:
        tuned, _ = finetune_cells(
            cells, model, key, settings, fold=fold, seed=seed, progress=progress, report=report
        )
    return tuned


def neighbours_of(model: TrainedModel, asked: int | None) -> int:
    """k as asked for, or the model's own."""
    return model.neighbours if asked is None else asked


@contextmanager
def open_file(
    source: Source, tables: dict[str, Any], config: LabelConfig, key: str
) -> Iterator[LabelledCells]:
    """The cells of an ``.h5ad`` file, for `probe_cells` and `finetune_cells`, which annotate its AnnData.

    Raises
    ------
    InputError
        What is wrong with the file, with the label or with the split.
    """
    path = Path(source.path)
    if path.exists() and path.suffix != ".h5ad":
        raise InputError(path, "predictions go into a copy of an .h5ad file", "write it as .h5ad first")
    if not path.exists():
        raise InputError(path, "there is no such file", "give the path of an .h5ad file")
    try:
        adata = anndata.read_h5ad(path)
    except Exception as error:  # h5py and anndata raise many kinds for what is no whole AnnData
        raise InputError(path, f"it cannot be read ({error})", "give a whole AnnData .h5ad") from error
    check_label(adata, config, key, source.path)
    source = replace(source, labels=_carried(source.labels, config))
    with cohort_of_file(source, tables) as cohort:
        yield labelled_cells(adata, cohort, config, source.path)


def probe_cells(
    cells: LabelledCells,
    model: TrainedModel,
    key: str,
    *,
    way: ProbeWay = "probe",
    seed: int = 0,
    progress: Progress = lambda done, total: None,
    report: Report = lambda line: None,
) -> dict[str, Any]:
    """`probe` of cells that are open already.

    Returns
    -------
    What goes to ``uns``, as plain data.
    """
    k = cells.config.neighbours
    for fold in cells.folds.folds:  # one without cells is found before all are embedded
        cells.question(fold)
    features = _embedded(cells.cohort, model.with_neighbours(k if way == "probe" else 0), progress)
    known = np.isfinite(features).all(1)
    if not known.any():
        raise InputError(cells.where, f"{model.config.name} knows no gene of any cell", "use another model")
    if way != "probe":
        # A cell of which the model knows no gene says nothing as a neighbour either.
        features = np.where(known[:, None], features, features[known].mean(0))
    if way == "mean":
        features = beside_neighbours(features, cells.near, (k,))

    def answer(question: Question) -> Float32[np.ndarray, "m c"]:
        if way == "neighbourhood":
            return neighbourhood_answer(features, question, NeighbourhoodConfig(neighbours=k), seed=seed)[0]
        return linear_answer(features, question, seed=seed)[0]

    found = cross_fit(cells, answer, seed=seed, report=report)
    record = describe(cells, found, known, **model_record(model), way=way, seed=seed)
    annotate(cells, found, known, record, key)
    return record


def finetune_cells(
    cells: LabelledCells,
    model: TrainedModel,
    key: str,
    settings: FinetuneConfig,
    *,
    fold: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int, str], None] = lambda done, total, note: None,
    report: Report = lambda line: None,
) -> tuple[FineTuned, dict[str, Any]]:
    """`finetune` of cells that are open already.

    Returns
    -------
    The model, and what goes to ``uns``, as plain data.
    """
    settings = replace(settings, neighbours=cells.config.neighbours)
    model.with_neighbours(cells.config.neighbours)  # one that it cannot read is refused before it is trained
    corpus, number = cells.cohort.seen_by(model)
    newest: FineTuned | None = None

    def fit(question: Question) -> FineTuned:
        learnt = question.fold.train[number[question.fold.train] >= 0]
        return train(
            model,
            corpus,
            number[learnt],
            question.target[learnt],
            question.block[learnt],
            settings,
            n_classes=len(question.classes),
            margin=question.margin,
            seed=seed,
            progress=progress,
        )

    def answer(question: Question) -> Float32[np.ndarray, "m c"]:
        nonlocal newest
        newest, test = fit(question), question.fold.test
        said, seen = constant_answer(question), number[test] >= 0
        said[seen] = newest.predict(corpus, number[test[seen]])
        return said

    found = cross_fit(cells, answer, fold=fold, seed=seed, report=report)
    everyone = cells.ask(cells.everyone)
    # Where cells lack a label, the last fit was on all that have one.
    tuned = newest if newest and (fold is not None or len(everyone.fold.test)) else fit(everyone)
    record = describe(
        cells,
        found,
        number >= 0,
        **model_record(model),
        way=settings.way,
        seed=seed,
        settings=asdict(settings),
        trained_parameters=tuned.trained_parameters,
        model_parameters=count_parameters(model.parameters),
        stored_bytes=tuned.stored_bytes,
        optimiser_bytes=tuned.optimiser_bytes,
    )
    annotate(cells, found, number >= 0, record, key)
    return tuned, record


@contextmanager
def _opened(
    adata: anndata.AnnData, config: LabelConfig, key: str, reading: dict[str, Any]
) -> Iterator[LabelledCells]:
    check_label(adata, config, key, "adata")
    tables = {name: reading.pop(name) for name in _TABLES if name in reading}
    reading["labels"] = _carried(reading.get("labels", ()), config)
    with cohort_of(adata, tables, **reading) as cohort:
        yield labelled_cells(adata, cohort, config)


def _carried(labels: Sequence[str], config: LabelConfig) -> tuple[str, ...]:
    """Columns that the corpus must hold: what divides the slides is read there."""
    return (*labels, config.split.column) if config.split.by == "column" else tuple(labels)


def _embedded(cohort: Cohort, model: TrainedModel, progress: Progress) -> Float32[np.ndarray, "n d"]:
    """Of every cell; NaN where the model knows no gene."""
    corpus, number = cohort.seen_by(model)
    there = np.flatnonzero(number >= 0)
    embedded = np.full((len(number), model.width), np.nan, np.float32)
    embedded[there] = embed_cells(model, corpus, number[there], progress=progress)
    return embedded
