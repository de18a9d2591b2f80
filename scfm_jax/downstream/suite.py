"""A suite from end to end: every task, fold and method once, each kept as it is done; then the report."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from scfm_jax.downstream.cost import Meter
from scfm_jax.downstream.outputs import locked
from scfm_jax.downstream.suite_answers import Method
from scfm_jax.downstream.suite_config import Suite, read_suite
from scfm_jax.downstream.suite_methods import methods_of
from scfm_jax.downstream.suite_models import Models
from scfm_jax.downstream.suite_report import write_suite_report
from scfm_jax.downstream.suite_tasks import MAIN_SCORES, FoldData, Task, make_task
from scfm_jax.errors import InputError

RESULTS, TASKS, COPY, LOCK = "results.jsonl", "tasks.json", "suite.toml", ".lock"


def run_suite(
    path: Path,
    out: Path,
    *,
    tasks: Sequence[str] = (),
    report: Callable[[str], None] = lambda line: None,
) -> Path:
    """Run a suite into a folder, or go on where an earlier run stopped.

    A row stands in ``results.jsonl`` as soon as a method has answered in a fold, and is not asked for again
    while its task, method and files stay as the suite has them.

    Parameters
    ----------
    path
        The suite's TOML file.
    out
        The folder of results: ``results.jsonl``, ``tasks.json``, ``predictions/``, ``tissue/``, and what can
        be made again: ``corpora/``, ``embeddings/``.
    tasks
        Some of the suite's, by name; empty: all. Several processes may run different tasks into one folder at
        once; what the others have done stays, and stands in the report of the one that ends last.
    report
        Told of every row, and of what takes long.

    Returns
    -------
    The report's page.

    Raises
    ------
    InputError
        Bad input; rows that were done stay.
    """
    suite = read_suite(path)
    for name in tasks:
        if name not in suite.tasks:
            raise InputError(path, f"has no task {name!r}", f"name some of {', '.join(suite.tasks)}")
    for folder in ("predictions", "tissue", "history", "corpora"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, out / COPY)
    models, wanted = Models(suite, out, report), set()
    done = _read_rows(out)
    for name in tasks or suite.tasks:
        with _named(suite, name):
            task = make_task(suite, name, out / "corpora")
            _write_tissue(out, task)
            for data in task.in_folds():
                for method in methods_of(suite, task, data.number, models):
                    key = _key(suite, data, method)
                    wanted.add(key)
                    if key not in done:
                        row = _ask(out, data, method, models, key)
                        _keep(out, suite, task, {key: row})
                        report(_said(data, method, row))
            _keep(out, suite, task, {}, only=wanted)
    with locked(out / LOCK):
        return write_suite_report(out)


@contextmanager
def _named(suite: Suite, task: str) -> Iterator[None]:
    """Errors that name a fold, a setting or another file alone name the task too."""
    try:
        yield
    except InputError as error:
        if error.where.startswith(str(suite.path)):
            raise
        raise InputError(f"{suite.where(task)}, {error.where}", error.problem, error.mend) from error


def _ask(out: Path, data: FoldData, method: Method, models: Models, key: str) -> dict[str, Any]:
    """One method in one fold: its answer goes to a file, its scores into a row."""
    task = data.task
    before = method.prepare(data)
    with Meter() as meter:
        answer = method.answer(data)
    cost = before.then(meter.cost)
    cells, truth, scores = answer.judged(data)
    file, history = None, None
    if answer.predicted is not None and truth is not None:
        file = f"predictions/{key}.npz"
        block = task.folds.block[cells]
        np.savez_compressed(out / file, cells=cells, block=block, truth=truth, predicted=answer.predicted)
    if answer.history:
        history = f"history/{key}.json"
        rows = [
            {"epoch": row["epoch"], "loss": row["train_loss"], "validation": row.get("validation_score")}
            for row in answer.history
        ]
        (out / history).write_text(json.dumps(rows) + "\n")
    return {
        "key": key,
        "task": task.name,
        "kind": task.kind,
        "method": method.name,
        "group": method.group,
        "k": method.k,
        "fold": data.fold.name,
        "seed": method.seed,
        "leaking": task.folds.leaking,
        "transductive": method.group == "model"
        and models.transductive(method.model, data.number, task, cells),
        "scores": scores,
        "seconds": cost.seconds,
        "peak_mib": cost.peak_mib,
        "stored_bytes": answer.stored_bytes,
        "n_train": len(data.fold.train),
        "n_test": len(cells),
        "predictions": file,
        "history": history,
    }


def _said(data: FoldData, method: Method, row: dict[str, Any]) -> str:
    name = MAIN_SCORES[data.task.kind]
    fold = f", fold {data.fold.name}" if data.fold.name else ""
    return (
        f"{data.task.name}{fold}: {_title(method)}: {name} {row['scores'][name]:.3f}, {row['seconds']:.0f} s"
    )


def _title(method: Method) -> str:
    said = [] if method.k is None else [f"k = {method.k}"]
    return ", ".join([method.name, *said, *([f"seed {method.seed}"] if method.seed else [])])


def _key(suite: Suite, data: FoldData, method: Method) -> str:
    """A name of all that a row depends on."""
    task = data.task
    # Which folds and which k are asked for changes no answer.
    which = {"folds": None, "neighbours": None, "means": None}
    asked = {
        "files": [asdict(suite.files[file]) for file in task.config.files],
        "genes": asdict(suite.genes),
        "task": asdict(task.config) | which,
        "model": asdict(suite.models[method.model]) | {"tasks": None} if method.model else None,
        "method": method.asked,
    }
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()[:8]
    words = [task.name, method.name, f"k{method.k}", f"fold{data.number}", f"seed{method.seed}", digest]
    return "-".join(re.sub(r"[^\w.+]+", "_", word) for word in words).replace("+", "and")


def _read_rows(out: Path) -> dict[str, dict[str, Any]]:
    """Rows that are whole: those whose predictions lie where they say, and those that have none."""
    path = out / RESULTS
    if not path.exists():
        return {}
    rows = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            if row["task"] and (row["predictions"] is None or (out / row["predictions"]).exists()):
                rows[row["key"]] = row
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path}:{number}", "is no row of a suite", "remove the line") from None
    return rows


def _keep(
    out: Path, suite: Suite, task: Task, new: dict[str, dict[str, Any]], only: Container[str] | None = None
) -> None:
    """Add rows of a task to those on disk, and the task to the tasks; other processes may do so too.

    Rows of an older suite would stand in the tables beside those that this one asks for: of the task, those
    go that `only` does not hold, and all of tasks that the suite does not have.
    """
    with locked(out / LOCK):
        rows = {
            key: row
            for key, row in (_read_rows(out) | new).items()
            if row["task"] in suite.tasks and (only is None or row["task"] != task.name or key in only)
        }
        path = out / TASKS
        try:
            facts = {of["name"]: of for of in (json.loads(path.read_text()) if path.exists() else [])}
        except (ValueError, KeyError, TypeError):
            raise InputError(path, "holds no tasks of a suite", "remove it") from None
        facts[task.name] = task.facts
        for file, text in (
            (RESULTS, "".join(json.dumps(row) + "\n" for row in rows.values())),
            (TASKS, json.dumps([facts[name] for name in suite.tasks if name in facts], indent=2) + "\n"),
        ):
            partial = out / f"{file}.partial"
            partial.write_text(text)
            partial.replace(out / file)


def _write_tissue(out: Path, task: Task) -> None:
    if task.target is None:
        return
    np.savez_compressed(
        out / "tissue" / f"{task.name}.npz",
        xy=task.cohort.xy.astype(np.float32),
        slide=task.cohort.slide.astype(np.int32),
        truth=task.target,
    )
