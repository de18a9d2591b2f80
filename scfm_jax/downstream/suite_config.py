"""A suite: which files, tasks, models and methods are to be compared, read from one TOML file."""

from __future__ import annotations

import os
import tomllib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from scfm_jax.corpus import Source
from scfm_jax.corpus.sources import source_from_table
from scfm_jax.downstream.cohort import STORED_NEIGHBOURS
from scfm_jax.downstream.finetuned import FinetuneConfig
from scfm_jax.downstream.folds import FoldsConfig
from scfm_jax.downstream.labels import MISSING
from scfm_jax.downstream.neighbourhood import NeighbourhoodConfig
from scfm_jax.errors import InputError, check_least
from scfm_jax.training.config import from_dict

T = TypeVar("T")
EXPRESSION, UNTRAINED = "expression", "untrained"
_SECTIONS = ("files", "genes", "tasks", "models", "methods")
_PREDICTED = ("classes", "density", "composition")
_WAYS_TO_PREDICT = ("probe", "neighbourhood", "finetune")
_KINDS_OF_THEIR_OWN = (("embedding", "mixing"), ("imputation", "imputation"))


@dataclass(frozen=True)
class TaskConfig:
    """What is asked of which cells.

    Attributes
    ----------
    files
        Names of files of the suite; several are one cohort, of the genes that all of them measured.
    kind
        ``classes``: a label. ``density``: log1p of the cells around per area. ``composition``: shares of the
        label's classes among the cells around. ``mixing``: how embeddings mix batches and keep the label
        apart. ``imputation``: masked genes of unseen cells.
    labels
        The label's column: one for all files, or one for each.
    batch
        Of ``mixing``: ``technology``, or a label column.
    missing, min_cells, min_blocks
        Names that count as no label, and the smallest class (`read_labels`).
    class_map, sides
        A file of class maps, and its sides in the order of `files` (empty: those of the files' names); only
        classes that all files have are kept.
    radius
        Of ``density`` and ``composition``, in `unit`.
    unit
        ``um``, or ``file`` for the files' own units, where their length is not known.
    neighbours
        The k of baselines with neighbours, and of methods that name none.
    means
        The k whose means one more baseline reads together; empty: leave it out.
    coordinates
        Whether coordinates alone are a baseline; it needs folds within slides.
    test_cells, train_cells
        Of ``imputation``: most cells of a fold that are scored, and that its baselines learn from.
    choosing_margin
        Neighbours of cells held out to choose a setting (a penalty, an epoch) that are not learnt from
        meanwhile; at most 256.
    folds
        Some of the folds, by number; empty: all.
    split
        The folds.
    """

    files: tuple[str, ...]
    kind: Literal["classes", "density", "composition", "mixing", "imputation"] = "classes"
    labels: tuple[str, ...] = ()
    batch: str = "technology"
    missing: tuple[str, ...] = MISSING
    min_cells: int = 50
    min_blocks: int = 5
    class_map: str = ""
    sides: tuple[str, ...] = ()
    radius: float = 50.0
    unit: Literal["um", "file"] = "um"
    neighbours: tuple[int, ...] = (10,)
    means: tuple[int, ...] = (10, 64, 256)
    coordinates: bool = False
    test_cells: int = 1024
    train_cells: int = 4096
    choosing_margin: int = 64
    folds: tuple[int, ...] = ()
    split: FoldsConfig = field(default_factory=FoldsConfig)

    def __post_init__(self) -> None:
        check_least(self, 1, "test_cells", "train_cells")
        check_least(self, 0, "choosing_margin", "min_cells", "min_blocks")
        _check_stored(*self.neighbours, *self.means, self.choosing_margin)


def _check_stored(*neighbours: int) -> None:
    for k in neighbours:
        if not 0 <= k <= STORED_NEIGHBOURS:
            raise ValueError(f"{k} neighbours are asked for, and 0 to {STORED_NEIGHBOURS} are stored")


@dataclass(frozen=True)
class Pretraining:
    """How a run that is not there yet is made.

    Attributes
    ----------
    recipe
        A recipe's file.
    files
        Of the suite, which become one corpus over all their genes; empty: all.
    flags
        As of `scfm train`; ``{fold}`` is the fold's number, ``{group}`` the group of slides that it holds
        out. A split with the task's settings holds out what the fold does.
    """

    recipe: str
    files: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelConfig:
    """A run directory, or one for each fold.

    Attributes
    ----------
    run
        Its folder; ``{fold}`` is the fold's number. Where it lies in the suite's results, it begins with
        ``{out}``.
    unseen
        Say that it has not learnt from the task's cells, where its corpus cannot be opened to see. Rows whose
        model learnt from test cells, or may have, are marked transductive.
    tasks
        Those that it is for; empty: all.
    checkpoint
        The best by held-out loss, or the last.
    pretraining
        How the run is made where it is missing.
    """

    run: str
    unseen: bool = False
    tasks: tuple[str, ...] = ()
    checkpoint: Literal["best", "last"] = "last"
    pretraining: Pretraining | None = None


@dataclass(frozen=True)
class MethodConfig:
    """How a model, or expression, answers.

    Attributes
    ----------
    way
        ``probe``: a linear model of features. ``neighbourhood``: a head over the cell's and its neighbours'
        features. ``finetune``: the model itself is trained, and attends to the neighbours. ``embedding``:
        features as they are, of tasks of ``mixing``. ``imputation``: what a tissue model says of masked
        genes, of tasks of this kind.
    of
        Models, ``untrained`` (the first model's geometry with weights of a seed), or ``expression``
        (principal components).
    neighbours
        Values of k; empty: those of the task.
    attend
        Of features: the encoder attends to the neighbours; else cells are embedded alone, and their mean over
        the neighbours stands beside the cell's own.
    pooling
        Of the cell's tokens.
    beside_expression
        Of features: the components of expression too, the cell's own and their mean.
    tuned
        Of features of cells alone: the encoder is fine-tuned (`finetune`, k = 0) on the fold's training cells
        first.
    seeds
        Of what is drawn; each gives a row.
    tasks, folds
        Those that it is for; empty: all that its way fits.
    finetune, neighbourhood
        Settings of the ways of these names; k comes from `neighbours`.
    """

    way: Literal["probe", "neighbourhood", "finetune", "embedding", "imputation"]
    of: tuple[str, ...]
    neighbours: tuple[int, ...] = ()
    attend: bool = False
    pooling: Literal["mean", "max"] = "mean"
    beside_expression: bool = False
    tuned: bool = False
    seeds: tuple[int, ...] = (0,)
    tasks: tuple[str, ...] = ()
    folds: tuple[int, ...] = ()
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    neighbourhood: NeighbourhoodConfig = field(default_factory=NeighbourhoodConfig)

    def __post_init__(self) -> None:
        _check_stored(*self.neighbours)
        if not self.seeds:
            raise ValueError("seeds is empty, so that nothing would be asked")
        # A table would say what the answer does not do.
        if self.attend and (self.way == "neighbourhood" or self.tuned):
            raise ValueError("attend is set where cells are embedded alone (way neighbourhood, tuned)")
        if self.tuned and self.way not in ("probe", "neighbourhood"):
            raise ValueError(f"tuned is of ways probe and neighbourhood, not of {self.way}")
        if EXPRESSION in self.of and (self.attend or self.tuned):
            raise ValueError("of names expression, which can neither attend nor be tuned")

    def fits(self, task: TaskConfig) -> bool:
        """Whether its way answers what the task asks."""
        return (self.way, task.kind) in _KINDS_OF_THEIR_OWN or (
            self.way in _WAYS_TO_PREDICT and task.kind in _PREDICTED
        )

    @property
    def of_one_answer(self) -> dict[str, Any]:
        """The settings that one answer depends on, beside model, k and seed."""
        tuned = ("tuned", "finetune") if self.tuned else ()
        read = {"probe": ("attend", "pooling", "beside_expression", *tuned), "finetune": ("finetune",)}
        read["neighbourhood"] = ("pooling", "beside_expression", "neighbourhood", *tuned)
        read["embedding"] = ("attend", "pooling", "beside_expression")
        settings = asdict(self)
        return {name: settings[name] for name in ("way", *read.get(self.way, ()))}


@dataclass(frozen=True)
class Genes:
    """Tables that let gene names meet (`scfm_jax.genes`); "" where there is none."""

    gene_names: str = ""
    orthologs: str = ""
    aliases: str = ""


@dataclass(frozen=True)
class Suite:
    """All of it, by name.

    Relative paths start from the suite's folder; ``$NAME`` in them is a variable of the environment.
    """

    path: Path
    files: dict[str, Source]
    genes: Genes
    tasks: dict[str, TaskConfig]
    models: dict[str, ModelConfig]
    methods: dict[str, MethodConfig]

    def resolve(self, path: str) -> Path:
        """A path of the suite."""
        return self.path.parent / os.path.expandvars(path)

    def where(self, task: str) -> str:
        """What messages call a task."""
        return f"{self.path} [tasks.{task}]"

    def first_model(self, task: str) -> str:
        """The first of the models that are for a task.

        Raises
        ------
        InputError
            None is.
        """
        for name, model in self.models.items():
            if not model.tasks or task in model.tasks:
                return name
        raise InputError(self.where(task), "no model is for it", "add a model")


def read_suite(path: str | Path) -> Suite:
    """Read a suite.

    Raises
    ------
    InputError
        It cannot be read, a field is unknown, missing or mistyped, or a name is used that is not there.
    """
    path = Path(path)
    try:
        content = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(path, f"cannot be read as TOML ({error})", "give a suite") from None
    if unknown := set(content) - set(_SECTIONS):
        raise InputError(path, f"has no section {min(unknown)!r}", f"there are {', '.join(_SECTIONS)}")
    for section in _SECTIONS:
        tables = content.get(section, {})
        if not isinstance(tables, dict):
            raise InputError(path, f"{section} is no table", f"write [{section}.NAME]")
        if section in ("files", "tasks") and not tables:
            raise InputError(path, f"names no {section}", f"add a table [{section}.NAME]")
        for name, table in tables.items() if section != "genes" else ():
            if not isinstance(table, dict):
                raise InputError(path, f"{section}.{name} is no table", f"write [{section}.{name}]")
            if not name.replace("_", "").replace("-", "").isalnum():
                raise InputError(
                    path, f"{section}.{name!r} cannot be a file's name", "use letters, digits, - and _"
                )

    def of(section: str, kind: type[T]) -> dict[str, T]:
        tables = content.get(section, {})
        return {name: from_dict(kind, table, f"{path} [{section}.{name}]") for name, table in tables.items()}

    files = {}
    for name, table in content["files"].items():
        if isinstance(table.get("path"), str):
            table["path"] = os.path.expandvars(table["path"])
        files[name] = source_from_table(f"{path} [files.{name}]", path.parent, {"name": name, **table})
    genes = from_dict(Genes, content.get("genes", {}), f"{path} [genes]")
    suite = Suite(
        path, files, genes, of("tasks", TaskConfig), of("models", ModelConfig), of("methods", MethodConfig)
    )
    _check_names(suite)
    return suite


def _check_names(suite: Suite) -> None:
    """Every name that is used is there, and every task has what its kind needs."""

    def check(where: str, used: tuple[str, ...], known: Any) -> None:
        for name in used:
            if name not in known:
                raise InputError(
                    f"{suite.path} [{where}]", f"{name!r} is not there", f"use some of {', '.join(known)}"
                )

    for name, task in suite.tasks.items():
        check(f"tasks.{name}", task.files, suite.files)
        needed = {"density": {0, 1}, "imputation": {0, 1}}.get(task.kind, {1, len(task.files)})
        if len(task.labels) not in needed or not task.files:
            raise InputError(
                f"{suite.path} [tasks.{name}]",
                f"has {len(task.files)} files and {len(task.labels)} labels for {task.kind}",
                "give files, and one label for all of them or one for each",
            )
        if len(task.sides) not in (0, len(task.files)):
            raise InputError(
                f"{suite.path} [tasks.{name}]",
                f"has {len(task.files)} files and {len(task.sides)} sides of a class map",
                "give a side for each file, or none where they are named like the files",
            )
    for name, model in suite.models.items():
        check(f"models.{name}", model.tasks, suite.tasks)
        if model.pretraining:
            check(f"models.{name}", model.pretraining.files, suite.files)
    for name, method in suite.methods.items():
        where = f"{suite.path} [methods.{name}]"
        check(f"methods.{name}", method.tasks, suite.tasks)
        check(f"methods.{name}", method.of, [*suite.models, UNTRAINED, EXPRESSION])
        for task_name in method.tasks:
            if not method.fits(suite.tasks[task_name]):
                kind = suite.tasks[task_name].kind
                raise InputError(
                    where,
                    f"way {method.way!r} does not answer task {task_name!r} of kind {kind!r}",
                    "leave the task out, or use another way",
                )
        if not method.of:
            raise InputError(where, "names nothing in of", "name models, untrained or expression")
        if method.way in ("finetune", "imputation") and EXPRESSION in method.of:
            done = {"finetune": "fine-tuned", "imputation": "asked for masked genes"}[method.way]
            raise InputError(where, f"expression cannot be {done}", "name models in of")
        if UNTRAINED in method.of:
            for task_name, task in suite.tasks.items():
                if method.fits(task) and (not method.tasks or task_name in method.tasks):
                    suite.first_model(task_name)  # whose geometry is left untrained
    for name, task in suite.tasks.items():
        if task.kind == "imputation":
            suite.first_model(name)
