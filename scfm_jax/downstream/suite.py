"""A suite from end to end: every task, fold and method once, each kept as it is done; then the report."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from scfm_jax.downstream.scores import PRIMARY, score
from scfm_jax.downstream.suite_config import Suite, read_suite
from scfm_jax.downstream.suite_methods import Method, methods_of
from scfm_jax.downstream.suite_models import Models
from scfm_jax.downstream.suite_report import write_suite_report
from scfm_jax.downstream.suite_tasks import FoldData, Task, make_task
from scfm_jax.errors import InputError

RESULTS, TASKS, COPY = "results.jsonl", "tasks.json", "suite.toml"
_STATM = Path("/proc/self/statm")
_PAGE_KIB, _LOOK_SECONDS = 4, 0.02


def run_suite(path: Path, out: Path, *, report: Callable[[str], None] = lambda line: None) -> Path:
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
    for folder in ("predictions", "tissue", "history", "corpora"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, out / COPY)
    models, facts, wanted = Models(suite, out, report), [], set()
    done = _read_rows(out)
    for name in suite.tasks:
        task = make_task(suite, name, out / "corpora")
        facts.append(task.facts)
        _write_tissue(out, task)
        (out / TASKS).write_text(json.dumps(facts, indent=2) + "\n")
        for number, data in task.questions():
            for method in methods_of(suite, task, number, models):
                key = _key(suite, task, number, method)
                wanted.add(key)
                if key not in done:
                    done[key] = _ask(out, task, number, data, method, models, key)
                    _write_rows(out, done)
                    primary = PRIMARY[task.kind]
                    said = f"{primary} {done[key]['scores'][primary]:.3f}, {done[key]['seconds']:.0f} s"
                    report(f"{name}, fold {number}: {_title(method)}: {said}")
    # Rows of an older suite would stand in the tables beside those that this one asked for.
    _write_rows(out, {key: row for key, row in done.items() if key in wanted})
    return write_suite_report(out)


def _ask(
    out: Path, task: Task, fold: int, data: FoldData, method: Method, models: Models, key: str
) -> dict[str, Any]:
    """One method in one fold: its answer goes to a file, its scores into a row."""
    question, began = data.question, time.perf_counter()
    with PeakMemory() as memory:
        answer = method.answer(data)
    seconds = time.perf_counter() - began
    file = Path("predictions") / f"{key}.npz"
    cells = question.fold.test
    np.savez_compressed(
        out / file,
        cells=cells,
        block=question.block[cells],
        truth=question.truth,
        predicted=answer.predicted,
    )
    history = None
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
        "fold": question.fold.name,
        "seed": method.seed,
        "leaking": task.folds.leaking,
        "transductive": bool(method.model) and models.transductive(method.model, fold, task, question),
        "scores": score(task.kind, question.truth, answer.predicted, task.classes or None),
        "seconds": seconds,
        "peak_mib": memory.mib,
        "stored_bytes": answer.stored_bytes,
        "n_train": len(question.fold.train),
        "n_test": len(cells),
        "predictions": str(file),
        "history": history,
    }


class PeakMemory:
    """How far this process's resident memory grew within a block, in MiB; None where that is not known."""

    mib: float | None = None

    def __enter__(self) -> Self:
        if _STATM.exists():
            self._base = self._most = self._resident()
            self._stop = threading.Event()
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if _STATM.exists():
            self._stop.set()
            self._thread.join()
            self.mib = (self._most - self._base) * _PAGE_KIB / 1024

    def _watch(self) -> None:
        while not self._stop.wait(_LOOK_SECONDS):
            self._most = max(self._most, self._resident())

    @staticmethod
    def _resident() -> int:
        return int(_STATM.read_text().split()[1])


def _title(method: Method) -> str:
    said = [] if method.k is None else [f"k = {method.k}"]
    return ", ".join([method.name, *said, *([f"seed {method.seed}"] if method.seed else [])])


def _key(suite: Suite, task: Task, fold: int, method: Method) -> str:
    """A name of all that a row depends on."""
    asked = {
        "files": [asdict(suite.files[file]) for file in task.config.files],
        "genes": asdict(suite.genes),
        "task": asdict(task.config) | {"folds": None, "neighbours": None, "means": None},
        "model": asdict(suite.models[method.model]) if method.model else None,
        "method": method.asked,
    }
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()[:8]
    words = [task.name, method.name, f"k{method.k}", f"fold{fold}", f"seed{method.seed}", digest]
    return "-".join(words).replace(" ", "_").replace(",", "").replace("+", "and")


def _read_rows(out: Path) -> dict[str, dict[str, Any]]:
    path = out / RESULTS
    if not path.exists():
        return {}
    rows = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            if (out / row["predictions"]).exists():
                rows[row["key"]] = row
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path}:{number}", "is no row of a suite", "remove the line") from None
    return rows


def _write_rows(out: Path, rows: dict[str, dict[str, Any]]) -> None:
    partial = out / f"{RESULTS}.partial"
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows.values()))
    partial.replace(out / RESULTS)


def _write_tissue(out: Path, task: Task) -> None:
    np.savez_compressed(
        out / "tissue" / f"{task.name}.npz",
        xy=task.cohort.xy.astype(np.float32),
        slide=task.cohort.slide.astype(np.int32),
        truth=task.target,
    )
