"""The results folder of a suite, read and checked: tasks, rows, and the predictions of all folds together."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, Num

from scfm_jax import json_files
from scfm_jax.downstream.scores import HIGHER_IS_BETTER, PRIMARY
from scfm_jax.errors import InputError

# Of the kinds whose predictions of cells are scored; mixing has scores of embeddings alone.
_PRIMARY = {str(kind): name for kind, name in PRIMARY.items()}
KINDS = (*_PRIMARY, "mixing")
GROUPS = ("baseline", "control", "model")
_NUMBER = (int, float)
_ROW_FIELDS: dict[str, tuple[type, ...]] = {
    "task": (str,),
    "kind": (str,),
    "method": (str,),
    "group": (str,),
    "k": (int, type(None)),
    "fold": (str,),
    "seed": (int,),
    "leaking": (bool,),
    "transductive": (bool,),
    "scores": (dict,),
    "seconds": _NUMBER,
    "peak_mib": (*_NUMBER, type(None)),
    "stored_bytes": (int, type(None)),
    "n_train": (int,),
    "n_test": (int,),
}
_TASK_FIELDS: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "file": (str,),
    "kind": (str,),
    "label": (str, type(None)),
    "classes": (list, type(None)),
    "left_out": (dict, type(None)),
    "split": (str,),
    "unit": (str, type(None)),
}
_MEND = "let the suite write it anew, or give the results of one that ran to its end"


class Predicted(NamedTuple):
    """Predictions of test cells: `truth` and `predicted` as `scores` has them for the task's kind."""

    cells: Int[np.ndarray, " m"]
    block: Int[np.ndarray, " m"]
    truth: Num[np.ndarray, "m ..."]
    predicted: Num[np.ndarray, "m ..."]


class Pooled(NamedTuple):
    """Predictions of several folds together, the same cells in the same order for every seed."""

    cells: Int[np.ndarray, " m"]
    block: Int[np.ndarray, " m"]
    truth: Num[np.ndarray, "m ..."]
    by_seed: list[Num[np.ndarray, "m ..."]]


class Tissue(NamedTuple):
    """Places of all cells of a task, in the order of their numbers, and what is true of each."""

    xy: Float[np.ndarray, "n 2"]
    slide: Int[np.ndarray, " n"]
    truth: Num[np.ndarray, "n ..."]


@dataclass(frozen=True, eq=False)
class Method:
    """All runs of one method at one k: a row of the table.

    Attributes
    ----------
    name, group, k
        As in the results; k is None for a method that has none.
    leaking, transductive
        Whether a run was trained on what it is tested on, or has seen its tissue without labels.
    rows
        The runs, one for each fold and seed.
    folds
        Of the whole task: every fold that a method of it, or the task, names.
    """

    name: str
    group: str
    k: int | None
    rows: Sequence[Mapping[str, Any]]
    folds: Sequence[str]

    @property
    def family(self) -> str:
        """The name without its k, if that is in it: what is one curve over k."""
        return self.name if self.k is None else re.sub(rf"\b{self.k}\b", "k", self.name)

    @property
    def label(self) -> str:
        if self.k is None or self.family != self.name:
            return self.name
        return f"{self.name}, k\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}{self.k}"

    @property
    def marks(self) -> list[str]:
        """What the reader must know of the row."""
        marks = [mark for mark in ("leaking", "transductive") if any(row[mark] for row in self.rows)]
        return marks + (["incomplete"] if self.missing else [])

    @property
    def leaking(self) -> bool:
        return "leaking" in self.marks

    @property
    def clean(self) -> bool:
        """Complete, and neither leaking nor transductive."""
        return not self.marks

    @cached_property
    def by_seed(self) -> dict[int, dict[str, Mapping[str, Any]]]:
        """Runs by seed, then by fold in the task's order."""
        found: dict[int, dict[str, Mapping[str, Any]]] = {}
        for row in sorted(self.rows, key=lambda row: (row["seed"], self.folds.index(row["fold"]))):
            found.setdefault(row["seed"], {})[row["fold"]] = row
        return found

    @property
    def missing(self) -> list[str]:
        """Folds that a seed lacks."""
        return [fold for fold in self.folds if any(fold not in of_seed for of_seed in self.by_seed.values())]

    @property
    def pooled_folds(self) -> list[str]:
        """Folds whose predictions are pooled: those of the seed that has most."""
        return max(map(list, self.by_seed.values()), key=len)

    def over_folds(self, score: str) -> Float[np.ndarray, " f"]:
        """Mean of a score over the seeds of each fold; over one fold alone, the score of each seed."""
        values: dict[str, list[float]] = {}
        for row in self.rows:
            if score in row["scores"]:
                values.setdefault(row["fold"], []).append(float(row["scores"][score]))
        if len(values) == 1:
            return np.array(next(iter(values.values())))
        return np.array([np.mean(values[fold]) for fold in self.folds if fold in values])


@dataclass(frozen=True, eq=False)
class Task:
    """A task of a suite with its methods; `primary` is the score that it is judged by."""

    folder: Path
    name: str
    file: str
    kind: str
    label: str | None
    classes: list[str]
    left_out: Mapping[str, int]
    split: str
    unit: str
    methods: list[Method]
    _cache: dict[str, Predicted] = field(default_factory=dict, repr=False)

    @property
    def primary(self) -> str | None:
        """None where no predictions of cells are scored."""
        return _PRIMARY.get(self.kind)

    @property
    def what(self) -> str:
        """What is predicted."""
        return self.label or self.name

    @property
    def scale(self) -> str:
        """What is predicted, with its unit."""
        return f"{self.what}, {self.unit}" if self.unit else self.what

    @property
    def higher_is_better(self) -> bool:
        return self.primary is None or HIGHER_IS_BETTER[self.primary]

    def pooled(self, method: Method, folds: Iterable[str] | None = None) -> Pooled:
        """Predictions of a method over folds, by default its own; seeds that lack one of them are left out.

        Raises
        ------
        InputError
            A file that is missing or is not what the results say, or seeds that tested other cells.
        """
        folds = method.pooled_folds if folds is None else list(folds)
        seeds = [
            [self._predicted(of_seed[fold]) for fold in folds]
            for of_seed in method.by_seed.values()
            if all(fold in of_seed for fold in folds)
        ]
        parts = [Predicted(*map(np.concatenate, zip(*seed))) for seed in seeds]
        self.check_same_cells(parts[0], parts[1:], method.rows[0])
        return Pooled(*parts[0][:3], [part.predicted for part in parts])

    def release(self) -> None:
        """Forget the predictions that were read: those of a large suite do not fit memory together."""
        self._cache.clear()

    def check_same_cells(
        self, one: Predicted | Pooled, others: Iterable[Predicted | Pooled], row: Mapping[str, Any]
    ) -> None:
        """Raise where predictions are of other cells, blocks or truths: they cannot be compared."""
        for other in others:
            for name, a, b in zip(("cells", "block", "truth"), one[:3], other[:3]):
                if not np.array_equal(a, b):
                    where = self.folder / row["predictions"]
                    problem = f"{name!r} differs between the methods or seeds of task {self.name!r}"
                    raise InputError(where, problem, "score all of them with the same split")

    def tissue(self) -> Tissue | None:
        """Places of the cells, None where the suite wrote none."""
        path = self.folder / "tissue" / f"{self.name}.npz"
        if not path.exists():
            return None
        held = read_arrays(path, ("xy", "slide", "truth"))
        if held["xy"].ndim != 2 or held["xy"].shape[1] != 2:
            raise InputError(path, f"'xy' is of shape {held['xy'].shape}, not [cells, 2]", _MEND)
        return Tissue(held["xy"], held["slide"], held["truth"])

    def _predicted(self, row: Mapping[str, Any]) -> Predicted:
        name = row["predictions"]
        if name not in self._cache:
            path = self.folder / name
            held = read_arrays(path, Predicted._fields)
            width = (len(self.classes),) if self.kind in ("classes", "composition") else ()
            shape = held["predicted"].shape
            if shape != (len(held["cells"]), *width):
                wanted = ", ".join(map(str, (len(held["cells"]), *width)))
                problem = f"'predicted' is of shape {shape}, not [{wanted}] of cells and classes"
                raise InputError(path, problem, _MEND)
            order = np.argsort(held["cells"], kind="stable")
            self._cache[name] = Predicted(*(held[part][order] for part in Predicted._fields))
        return self._cache[name]


def read_results(folder: Path) -> list[Task]:
    """Tasks of a results folder in the order of `tasks.json`, each with its runs of `results.jsonl`.

    Raises
    ------
    InputError
        A file that is missing or broken, a field that is missing or of another kind, a run of an unknown
        task, a run that stands there twice, no runs at all.
    """
    tasks_path, rows_path = folder / "tasks.json", folder / "results.jsonl"
    records = read_json(tasks_path)
    if not isinstance(records, list) or not records:
        raise InputError(tasks_path, "is no list of tasks", _MEND)
    for number, record in enumerate(records):
        _check_fields(tasks_path, f"task {number + 1}", record, _TASK_FIELDS)
        _check_choice(tasks_path, f"task {number + 1}", "kind", record["kind"], KINDS)
    names = [record["name"] for record in records]
    if len(set(names)) < len(names):
        raise InputError(tasks_path, "two tasks have the same 'name'", "give each its own")
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for row in _rows(rows_path, {record["name"]: record["kind"] for record in records}):
        rows[row["task"]].append(row)
    if not any(rows.values()):
        raise InputError(rows_path, "holds no results", "run the suite first: scfm evaluate")
    return [_task(folder, record, rows[record["name"]]) for record in records]


def read_arrays(path: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Arrays of an npz file; of those that have a row a cell, the numbers of rows must agree."""
    if not path.is_file():
        raise InputError(
            path, "is missing", "put it back, or remove its rows from results.jsonl and run the suite"
        )
    try:
        with np.load(path, allow_pickle=False) as file:
            held = {name: file[name] for name in names if name in file.files}
    except (OSError, ValueError) as error:
        raise InputError(path, f"cannot be read ({error})", _MEND) from error
    for name in names:
        if name not in held:
            raise InputError(path, f"has no field {name!r}", _MEND)
    if len(rows := {len(array) for array in held.values()}) > 1:
        raise InputError(path, f"the fields {', '.join(held)} have {sorted(rows)} rows", _MEND)
    return held


def read_json(path: Path) -> Any:
    """Content of a JSON file."""
    _check_there(path)
    return json_files.read_json(path, _MEND)


def _task(folder: Path, record: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Task:
    folds = list(
        dict.fromkeys([*record.get("folds", ()), *sorted({row["fold"] for row in rows}, key=_in_order)])
    )
    found: dict[tuple[str, int | None], list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["method"], row["k"]), []).append(row)
    methods = [Method(name, runs[0]["group"], k, runs, folds) for (name, k), runs in found.items()]
    first = list(dict.fromkeys(method.name for method in methods))
    methods.sort(key=lambda m: (GROUPS.index(m.group), first.index(m.name), -1 if m.k is None else m.k))
    return Task(
        folder=folder,
        name=record["name"],
        file=record["file"],
        kind=record["kind"],
        label=record["label"],
        classes=record["classes"] or [],
        left_out=record["left_out"] or {},
        split=record["split"],
        unit=record["unit"] or "",
        methods=methods,
    )


def _rows(path: Path, kinds: Mapping[str, str]) -> list[dict[str, Any]]:
    _check_there(path)
    lines = path.read_text(encoding="utf-8").splitlines()
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for number, line in enumerate(lines, 1):
        where = f"line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break  # a crash cut it short: its fold is missing, and said to be
            raise InputError(path, f"{where} is no JSON ({error})", _MEND) from error
        _check_fields(path, where, row, _ROW_FIELDS)
        _check_choice(path, where, "group", row["group"], GROUPS)
        _check_choice(path, where, "task", row["task"], kinds)
        _check_choice(path, where, "kind", row["kind"], (kinds[row["task"]],))
        if primary := _PRIMARY.get(row["kind"]):
            _check_fields(path, where, row, {"predictions": (str,)})
            _check_fields(path, f"{where}, 'scores'", row["scores"], {primary: _NUMBER})
        key = tuple(row[name] for name in ("task", "method", "k", "fold", "seed"))
        if key in rows:
            raise InputError(path, f"{where} repeats a run: {key}", "keep one of the two lines")
        rows[key] = row
    return list(rows.values())


def _in_order(fold: str) -> tuple[int, str]:
    """So that fold 10 comes after fold 9."""
    return len(fold), fold


def _check_there(path: Path) -> None:
    if not path.is_file():
        raise InputError(
            path, "is missing", "name the results folder of a suite, or run it first: scfm evaluate"
        )


def _check_fields(path: Path, where: str, row: object, fields: Mapping[str, tuple[type, ...]]) -> None:
    if not isinstance(row, dict):
        raise InputError(path, f"{where} is no object", _MEND)
    for name, types in fields.items():
        if name not in row:
            raise InputError(path, f"{where} has no field {name!r}", _MEND)
        value = row[name]
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            kinds = " or ".join("null" if kind is type(None) else kind.__name__ for kind in types)
            raise InputError(path, f"{where}: field {name!r} is {value!r}, not {kinds}", _MEND)


def _check_choice(path: Path, where: str, name: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        problem = f"{where}: field {name!r} is {value!r}, none of {', '.join(choices)}"
        raise InputError(path, problem, _MEND)
