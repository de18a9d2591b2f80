"""A suite of one task, one model and one method, asked of an AnnData: no file, no folder of results.

Tasks, folds, baselines and answers are those of a suite (`suite_tasks`, `suite_methods`), and so are all
figures; what is added is an answer for cells without a target.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

import anndata
import numpy as np
import pandas as pd
from jaxtyping import Bool, Float32, Int64, Num

from scfm_jax.downstream.annotate import ProbeWay
from scfm_jax.downstream.finetuned import FinetuneConfig, Way
from scfm_jax.downstream.folds import Fold
from scfm_jax.downstream.in_memory import cohort_of
from scfm_jax.downstream.labels import read_labels
from scfm_jax.downstream.metrics import CellSums
from scfm_jax.downstream.model import TrainedModel
from scfm_jax.downstream.records import check_blocks, check_key, warn_of_leaking
from scfm_jax.downstream.suite_answers import Answer, Method
from scfm_jax.downstream.suite_config import Genes, MethodConfig, ModelConfig, Suite, TaskConfig
from scfm_jax.downstream.suite_imputation import release
from scfm_jax.downstream.suite_methods import methods_of
from scfm_jax.downstream.suite_models import Models, Progress
from scfm_jax.downstream.suite_tasks import MAIN_SCORES, FoldData, Task, task_of
from scfm_jax.errors import InputError

MODEL, WHERE = "model", "adata"
ON_ALL = ""
TABLES = ("gene_names", "aliases", "orthologs")
# What stands in a row before the scores.
_ROW = ("fold", "method", "training_cells", "test_cells")
Report = Callable[[str], None]


class Pooled(NamedTuple):
    """What a method says of the test cells of all folds."""

    cells: Int64[np.ndarray, " m"]
    truth: Num[np.ndarray, "m ..."]
    predicted: Num[np.ndarray, "m ..."]
    sums: Mapping[str, CellSums]


@dataclass(frozen=True, eq=False)
class Asked:
    """Answers of all methods in all folds.

    Attributes
    ----------
    own
        Name of the method; the others are baselines.
    pooled
        Of each method; empty of ``mixing``, which has scores alone.
    fold
        Of every cell of the cohort, the place in `names` of the fold that answered for it, -1 for none.
    names
        Of the folds.
    rows
        A suite's rows: a method in a fold, with its cells and scores.
    """

    own: str
    pooled: Mapping[str, Pooled]
    fold: Int64[np.ndarray, " n"]
    names: tuple[str, ...]
    rows: list[dict[str, Any]]

    def scores_of(self, row: Mapping[str, Any]) -> dict[str, float]:
        """The scores that stand in a row."""
        return {name: value for name, value in row.items() if name not in _ROW}


class _OneTask(Suite):
    def where(self, task: str) -> str:
        return WHERE


class _OneModel(Models):
    """A model that is open already."""

    def __init__(self, suite: Suite, out: Path, model: TrainedModel | None, progress: Progress) -> None:
        super().__init__(suite, out, lambda line: None, progress)
        self._model = model

    def _open(self, name: str, fold: int) -> TrainedModel:
        assert self._model is not None
        return self._model


@dataclass(frozen=True, eq=False)
class OneTask:
    """A task of an AnnData, open.

    Attributes
    ----------
    adata, task
        Whose rows its cells are, and the task.
    model
        None where an embedding is there already.
    suite, models
        A suite of this task.
    """

    adata: anndata.AnnData
    task: Task
    model: TrainedModel | None
    suite: Suite
    models: Models

    @property
    def rows(self) -> Int64[np.ndarray, " n"]:
        """Row of every cell in `adata`."""
        return self.task.cohort.corpus.column("source_row")

    @property
    def known(self) -> Bool[np.ndarray, " n"]:
        """Cells of which the model knows a gene."""
        if self.model is None:
            return np.ones(self.task.cohort.corpus.n_cells, bool)
        return self.task.cohort.seen_by(self.model)[1] >= 0

    @property
    def truth(self) -> Num[np.ndarray, "rows ..."]:
        """The target of every row of `adata`."""
        assert self.task.target is not None
        return self.of_all(self.task.target)

    def methods(self, fold: int) -> Iterator[Method]:
        """Baselines, then the method."""
        return methods_of(self.suite, self.task, fold, self.models)

    def of_all(self, values: Num[np.ndarray, "n ..."]) -> Num[np.ndarray, "rows ..."]:
        """What the cells have, as rows of `adata`: NaN, or -1 of whole numbers, for those left out."""
        missing = -1 if values.dtype.kind == "i" else np.nan
        whole = np.full((self.adata.n_obs, *values.shape[1:]), missing, values.dtype)
        whole[self.rows] = values
        return whole


def methods_by_way(
    way: ProbeWay | Way, k: int, seed: int, settings: FinetuneConfig | None
) -> tuple[dict[str, MethodConfig], dict[str, Any]]:
    """How a model answers, by the names that `probe` and `finetune` have for it, and what is kept of it.

    Raises
    ------
    InputError
        Another name.
    """
    asked: dict[str, Any] = {"of": (MODEL,), "neighbours": (k,), "seeds": (seed,)}
    if way == "probe" or way == "mean":
        return {way: MethodConfig("probe", attend=way == "probe", **asked)}, {}
    if way == "neighbourhood":
        return {way: MethodConfig("neighbourhood", **asked)}, {}
    if way not in get_args(Way):
        known = ", ".join((*get_args(ProbeWay), *get_args(Way)))
        raise InputError("way", f"{way!r} is none", f"use one of {known}")
    trained = replace(settings or FinetuneConfig(), way=way, neighbours=k)
    return {way: MethodConfig("finetune", finetune=trained, **asked)}, {"settings": asdict(trained)}


@contextmanager
def in_range() -> Iterator[None]:
    """Settings that cannot be are told of as the command does."""
    try:
        yield
    except InputError:
        raise
    except ValueError as error:
        raise InputError(WHERE, str(error), "give a number in range") from error


@contextmanager
def opened(
    adata: anndata.AnnData,
    model: TrainedModel | None,
    config: Mapping[str, Any],
    methods: Mapping[str, MethodConfig],
    key: str,
    reading: Mapping[str, Any],
    *,
    progress: Progress = lambda done, total: None,
) -> Iterator[OneTask]:
    """Check and open a task of an AnnData; nothing is written to it.

    Parameters
    ----------
    adata, model
        Raw counts, and the model that is asked, if one is.
    config
        Fields of `TaskConfig`, without the files.
    methods
        How the model answers, by the name of the way; `of` is `MODEL`.
    key
        Under which the answers will be kept.
    reading
        What `Source` takes, and gene tables.
    progress
        Called with the number of cells embedded and in all.

    Raises
    ------
    InputError
        Bad input, told of ``adata``, here and in the block.
    """
    reading = dict(reading)
    tables = {name: reading.pop(name) for name in TABLES if name in reading}
    task = _task_config(reading.get("name") or WHERE, config)
    columns = [*task.labels, *([task.batch] if task.kind == "mixing" else [])]
    if task.split.by == "column":
        columns.append(task.split.column)
    _check_columns(adata, task, columns)
    place = reading.get("coordinates", "spatial")
    check_key(key, [*columns, *([place] if isinstance(place, str) else place), reading.get("section") or ""])
    reading["labels"] = tuple(dict.fromkeys((*reading.get("labels", ()), *columns)))
    with _named(), cohort_of(adata, tables, **reading) as cohort:
        if model is not None:
            cohort.seen_by(model)  # one that knows too few genes is refused before all else is computed
        suite = _OneTask(
            Path(WHERE),
            {task.files[0]: cohort.sources[0]},
            Genes(),
            {task.kind: task},
            {MODEL: ModelConfig("")} if model else {},
            dict(methods),
        )
        models = _OneModel(suite, cohort.folder, model, progress)
        try:
            yield OneTask(adata, task_of(suite, task.kind, cohort), model, suite, models)
        finally:
            release()


def ask(one: OneTask, *, report: Report = lambda line: None, more: tuple[Method, ...] = ()) -> Asked:
    """Ask every method in every fold.

    Parameters
    ----------
    one
        The task.
    report
        Told of every answer.
    more
        Methods beside the task's own.

    Raises
    ------
    InputError
        A fold without cells that have a target, test cells of one block, and what the methods raise.

    Warns
    -----
    DataWarning
        A split that leaks.
    """
    task, rows, own = one.task, [], ""
    # All are looked at before one is answered: a fold without cells is found at once.
    tested = np.concatenate([data.fold.test for data in task.in_folds()])
    if task.kind != "mixing":
        check_blocks(task.folds.block[tested])
    warn_of_leaking(task.folds.leaking)
    answers: dict[str, list[tuple[Int64[np.ndarray, " m"], Any, Answer]]] = {}
    fold, names = np.full(task.cohort.corpus.n_cells, -1), list[str]()
    for data in task.in_folds():
        for method in (*one.methods(data.number), *more):
            method.prepare(data)
            answer = method.answer(data)
            cells, truth, scores = answer.judged(data)
            answers.setdefault(method.name, []).append((cells, truth, answer))
            if method.group == "model":
                own, fold[cells] = method.name, len(names)
            of_row = data.fold.name, method.name, len(data.fold.train), len(cells)
            rows.append({**dict(zip(_ROW, of_row, strict=True)), **scores})
            name = MAIN_SCORES[task.kind]
            of_fold = f"fold {data.fold.name}: " if data.fold.name else ""
            report(f"{of_fold}{method.name}: {name} {scores[name]:.3f}")
        names.append(data.fold.name)
    pooled = {} if task.kind == "mixing" else {name: _pooled(parts) for name, parts in answers.items()}
    return Asked(own, pooled, fold, tuple(names), rows)


def answer_all(
    one: OneTask, asked: Asked
) -> tuple[Float32[np.ndarray, "n ..."], Int64[np.ndarray, " n"], tuple[str, ...]]:
    """What the method says of every cell, by a fit that has not learnt from it.

    A test cell is answered for in its fold, a cell without a target by a fit on all that have one.

    Returns
    -------
    The answers, NaN where there is none (cells of which the model knows no gene, cells with a target that no
    fold tests); the place of each cell's fit among the names, -1 for none; and the names.
    """
    task, own, fold = one.task, asked.pooled[asked.own], asked.fold.copy()
    assert task.target is not None
    said = np.full(task.target.shape, np.nan, np.float32)
    said[own.cells] = own.predicted
    there = task.codes >= 0
    everyone = Fold(ON_ALL, np.flatnonzero(there), np.flatnonzero(~there))
    if len(everyone.test):
        number = len(task.folds.folds)
        data = FoldData(task, number, everyone)
        (method,) = (each for each in one.methods(number) if each.name == asked.own)
        method.prepare(data)
        predicted = method.answer(data).predicted
        assert predicted is not None
        said[everyone.test], fold[everyone.test] = predicted, len(asked.names)
    said[~one.known], fold[~one.known] = np.nan, -1
    return said, fold, (*asked.names, ON_ALL)


def categories(one: OneTask, place: Int64[np.ndarray, " n"], names: tuple[str, ...]) -> pd.Categorical[Any]:
    """Names of what the cells have, for ``obs``."""
    return pd.Categorical.from_codes(one.of_all(place), pd.Index(names))


def _pooled(parts: list[tuple[Int64[np.ndarray, " m"], Any, Answer]]) -> Pooled:
    cells, truth, answers = zip(*parts, strict=True)
    predicted = np.concatenate([answer.predicted for answer in answers])
    sums = {
        part: CellSums(*map(np.concatenate, zip(*(answer.sums[part] for answer in answers), strict=True)))
        for part in answers[0].sums
    }
    return Pooled(np.concatenate(cells), np.concatenate(truth), predicted, sums)


def _task_config(file: str, config: Mapping[str, Any]) -> TaskConfig:
    with in_range():
        task = TaskConfig(files=(file,), **config)
        # As `probe` does: what holds test cells apart also holds apart who chooses a penalty or an epoch.
        return replace(task, choosing_margin=task.split.margin)


def _check_columns(adata: anndata.AnnData, task: TaskConfig, columns: list[str]) -> None:
    for column in columns:
        if column not in adata.obs:
            there = ", ".join(map(str, adata.obs.columns)) or "no column"
            raise InputError(WHERE, f"obs has no column {column!r}", f"use one of {there}")
    for label in task.labels:
        read_labels(adata, label, missing=task.missing, where=WHERE)


@contextmanager
def _named() -> Iterator[None]:
    """Errors that name a fold, a setting or the model alone name ``adata`` too."""
    try:
        yield
    except InputError as error:
        if error.where.startswith(WHERE):
            raise
        raise InputError(f"{WHERE}, {error.where}", error.problem, error.mend) from error
