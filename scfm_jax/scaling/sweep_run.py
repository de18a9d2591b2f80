"""The runs of a sweep, trained one by one and judged alike: a row of the results file each."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int64

from scfm_jax.compilations import release_compilations
from scfm_jax.corpus import Corpus
from scfm_jax.corpus.split import split_cells
from scfm_jax.downstream.model import open_model
from scfm_jax.downstream.outputs import claimed, writing, written_whole
from scfm_jax.errors import InputError
from scfm_jax.json_files import read_json
from scfm_jax.scaling.held_out import HeldOutErrors, held_out_errors, loss_and_error, loss_by_source
from scfm_jax.scaling.sweep import Sweep, test_of
from scfm_jax.scaling.sweep_plan import PlannedRun
from scfm_jax.training.config import MeshConfig, RunConfig
from scfm_jax.training.hosts import is_primary, meet
from scfm_jax.training.metrics import read_metrics
from scfm_jax.training.run import read_run
from scfm_jax.training.train import select_cells, train

RESULTS, ROWS, RUNS, ERRORS, JUDGED = "results.jsonl", "rows", "runs", "errors", "judged.json"
LOCKS, _PAUSE = "locks", 2.0  # seconds between looks at what others are at
_BEGUN = "digest.txt"  # in a run directory: of what its weights depend on
_OVERHEAD = ("compile", "start")


class Stopped(Exception):
    """Training was asked to stop, and saved first."""


@dataclass(frozen=True)
class SweepFolder:
    """Where a sweep's runs and rows lie.

    Attributes
    ----------
    path
        ``results.jsonl`` (all rows so far), ``rows/NAME.json``, ``errors/NAME.npz`` (`HeldOutErrors`), the
        run directories ``runs/NAME``, by what all are judged, ``judged.json``, and ``locks/NAME`` of runs
        that a process is at.
    """

    path: Path

    def make(self, *names: str) -> None:
        """Make the folder and some within it.

        Raises
        ------
        InputError
            That cannot be.
        """
        with writing(self.path):
            for name in names:
                (self.path / name).mkdir(parents=True, exist_ok=True)

    def run(self, name: str) -> Path:
        """A run directory."""
        return self.path / RUNS / name

    def errors(self, name: str) -> Path:
        """What a run's errors come to in each held-out cell."""
        return self.path / ERRORS / f"{name}.npz"

    def names(self) -> list[str]:
        """Of the runs that are done."""
        return sorted(path.stem for path in (self.path / ROWS).glob("*.json"))

    def row(self, name: str) -> dict[str, Any] | None:
        """The row of a run that is done.

        Raises
        ------
        InputError
            The file is damaged.
        """
        path, mend = self.path / ROWS / f"{name}.json", "remove it, and the run is judged again"
        if not path.exists():
            return None
        row = read_json(path, mend)
        for field, kind in (("name", str), ("digest", str), ("flops", int | float), ("tokens", int | float)):
            if not isinstance(row, dict) or not isinstance(row.get(field), kind):
                raise InputError(path, f"has no {field} of a run", mend)
        return row

    def write(self, row: dict[str, Any]) -> None:
        """Keep a row, and gather all into the results file; jobs of an array may do so at once."""
        _replace(self.path / ROWS / f"{row['name']}.json", json.dumps(row) + "\n")
        self.gather()

    def gather(self) -> Path:
        """Write the results file anew, from all rows, in the order of their FLOPs."""
        gathered, results = None, self.path / RESULTS
        # Another job that gathered less may write last; it then sees the rows that it lacked.
        while gathered != (names := self.names()):
            rows = [row for name in names if (row := self.row(name))]
            rows.sort(key=lambda row: (row["flops"], row["name"]))
            _replace(results, "".join(json.dumps(row) + "\n" for row in rows))
            gathered = names
        return results

    def judge_by(self, measure: dict[str, Any]) -> None:
        """Let all rows of the folder be judged by the same.

        Raises
        ------
        InputError
            They are judged by something else.
        """
        path = self.path / JUDGED
        if not path.exists():
            _replace(path, json.dumps(measure, indent=2) + "\n")
        there = read_json(path, "remove it")
        for name, value in measure.items():
            if not isinstance(there, dict) or there.get(name) != value:
                problem = f"holds runs that are judged by another {name}, so that losses do not compare"
                mend = f"name another folder, or remove {ROWS}/ and {JUDGED}, and all are judged again"
                raise InputError(self.path, problem, mend)


def _replace(path: Path, text: str) -> None:
    """Write a file, whole or not at all, whoever else does so at the same time."""
    with written_whole(path) as partial:
        partial.write_text(text)


def run_planned(
    sweep: Sweep,
    planned: list[PlannedRun],
    corpus: Corpus,
    folder: SweepFolder,
    *,
    report: Callable[[PlannedRun, dict[str, Any]], None] = lambda run, row: None,
    wait_for: Callable[[list[str]], None] = lambda names: None,
) -> Path:
    """Train and judge planned runs in their order; those that have a row are left alone.

    Several processes may share a folder: each takes the first run that no other is at, and all return when
    the last is done. On several hosts, all call it alike within `hosts.joined`; one writes and reports.

    Parameters
    ----------
    sweep
        By which the runs are judged.
    planned
        All of `plan_sweep`, or some; those that they come after must be done or among them.
    corpus
        Of the sweep.
    folder
        Of the sweep.
    report
        Told of every row of training, and of the row of every run that is done.
    wait_for
        Told the names of the runs that are left, where other processes are at them.

    Returns
    -------
    The results file.

    Raises
    ------
    InputError
        A run that was begun with another config or corpus, or one that comes after a run that is not done; a
        folder that cannot be written, or whose runs are judged by something else.
    Stopped
        Ctrl-C or SIGTERM asked training to stop; the next call goes on.
    """
    names = {each.run.name for each in planned}
    for each in planned:  # before anything is made
        if each.run.after not in names:
            _before(each, folder)
    if is_primary():
        folder.make(ROWS, RUNS, ERRORS, LOCKS)
        folder.judge_by(judgement(sweep, corpus))
    meet("folder of the sweep")
    judged = judged_cells(sweep, corpus)
    left, said = list(planned), list[str]()
    while left:
        others = dict[str, PlannedRun]()
        for each in left:
            name = each.run.name
            if each.run.after in others:
                others[name] = each
                continue
            if done_row(sweep, each, corpus, folder) is None:
                with _claim(folder, name) as mine:
                    if not mine:
                        others[name] = each
                        continue
                    if done_row(sweep, each, corpus, folder) is None:  # another may have ended meanwhile
                        _train_and_judge(sweep, each, corpus, folder, judged, report)
            if is_primary() and (row := folder.row(name)):
                report(each, row)
        if len(others) == len(left):
            if said != (said := list(others)):
                wait_for(said)
            time.sleep(_PAUSE)
        left = list(others.values())
    return folder.gather() if is_primary() else folder.path / RESULTS


@contextlib.contextmanager
def _claim(folder: SweepFolder, name: str) -> Iterator[bool]:
    """Whether a run is for this process, within; on several hosts the first claims it for all."""
    if not is_primary():
        yield True
        return
    with claimed(folder.path / LOCKS / name) as mine:
        if not mine and jax.process_count() > 1:
            raise InputError(folder.run(name), "another process is at it", "wait until that ends")
        yield mine


def _train_and_judge(
    sweep: Sweep,
    each: PlannedRun,
    corpus: Corpus,
    folder: SweepFolder,
    judged: tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]],
    report: Callable[[PlannedRun, dict[str, Any]], None],
) -> None:
    name, (cells, block) = each.run.name, judged
    release_compilations()
    before = _before(each, folder)
    seconds = _train(each, corpus, folder, before, report)
    began = time.perf_counter()
    errors = _judge(sweep, folder.run(name), corpus, cells)
    if is_primary():
        folder.errors(name).unlink(missing_ok=True)
        errors.save(folder.errors(name))
        spent = {"seconds": seconds + time.perf_counter() - began}
        digest = {"digest": digest_of(sweep, each, corpus, folder)}
        folder.write(_trained(each, folder, before) | _judged(errors, corpus, block) | spent | digest)
    meet(f"row of {name}")


def done_row(sweep: Sweep, each: PlannedRun, corpus: Corpus, folder: SweepFolder) -> dict[str, Any] | None:
    """The row of a planned run, if it is done.

    Raises
    ------
    InputError
        It was made with another config, corpus or judgement, or after a run that is not done (any more).
    """
    name, row = each.run.name, folder.row(each.run.name)
    if row is not None and row["digest"] != digest_of(sweep, each, corpus, folder):
        problem = f"run {name} was made with another config, corpus or judgement"
        raise InputError(folder.path, problem, f"remove {RUNS}/{name} and {ROWS}/{name}.json, or rename it")
    return row


def judgement(sweep: Sweep, corpus: Corpus) -> dict[str, Any]:
    """All that losses of runs must have in common to compare."""
    first = sweep.runs[0].config
    measure = {
        "corpus": corpus.hash,
        "objective": asdict(sweep.objective or first.objective),
        "split": asdict(test_of(first.split)),
        "technologies": first.technologies,
        "evaluate_cells": sweep.evaluate_cells,
        "seed": sweep.seed,
    }
    return json.loads(json.dumps(measure))


def judged_cells(sweep: Sweep, corpus: Corpus) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
    """Numbers of the held-out centres that every run is judged by, and the spatial block of each."""
    config = replace(sweep.runs[0].config, evaluate_cells=sweep.evaluate_cells)
    split = split_cells(corpus, test_of(config.split))
    _, cells = select_cells(corpus, split, config)
    return cells, split.block[cells].astype(np.int64)


def digest_of(sweep: Sweep, each: PlannedRun, corpus: Corpus, folder: SweepFolder) -> str:
    """Of all that a row depends on: the config, the runs before it, the corpus, and the judgement."""
    judged = [asdict(sweep.objective) if sweep.objective else None, sweep.evaluate_cells, sweep.seed]
    return _digest(_said(each, corpus, folder) | {"judged": judged})


def _said(each: PlannedRun, corpus: Corpus, folder: SweepFolder) -> dict[str, Any]:
    """What the weights of a run depend on."""
    config, before = each.run.config, _before(each, folder)
    # Where and how often, and what pads the batches, changes no result.
    free: dict[str, Any] = {"corpus": "", "log_every": 1, "checkpoint_every": 1, "mesh": MeshConfig()}
    data = replace(config.data, lengths=(), prefetch=2, cache_mib=1, readers=1)
    said = {"config": asdict(replace(config, data=data, **free)), "corpus": corpus.hash}
    return said | {"after": before["digest"]} if before else said


def _digest(said: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


def _before(each: PlannedRun, folder: SweepFolder) -> dict[str, Any] | None:
    """The row of the run that a run comes after."""
    if not each.run.after:
        return None
    if before := folder.row(each.run.after):
        return before
    problem = f"run {each.run.name} comes after run {each.run.after}, which is not done"
    raise InputError(folder.path, problem, "run that first")


def _train(
    each: PlannedRun,
    corpus: Corpus,
    folder: SweepFolder,
    before: dict[str, Any] | None,
    report: Callable[[PlannedRun, dict[str, Any]], None],
) -> float:
    """Train a run, or go on with it; returns the seconds that it took, those before it was stopped too."""
    began, name, place = time.perf_counter(), each.run.name, folder.run(each.run.name)
    config, digest = trained_config(each, folder), _digest(_said(each, corpus, folder))
    started, marked = (place / "config.json").exists(), place / _BEGUN
    if started and marked.exists() and marked.read_text().strip() != digest:
        problem = "was begun with another config, corpus or run before it"
        raise InputError(place, problem, f"remove {RUNS}/{name}, and it is trained anew, or rename it")
    if started and each.run.after:  # the folder may be named otherwise now, or have been moved
        config = replace(config, initial_weights=read_run(place)[0].initial_weights)
    earlier = _seconds_so_far(place)
    meet(f"begin of {name}")  # before one host makes what all have looked for

    def told(row: dict[str, Any]) -> None:
        if "steps" in row:  # the run directory is made
            marked.write_text(digest + "\n")
        report(each, row)

    if train(config, place, resume=started, report=told) < config.optimiser.steps:
        raise Stopped(name)
    return earlier + time.perf_counter() - began


def _seconds_so_far(place: Path) -> float:
    """What earlier starts of a run spent on it."""
    path = place / "goodput.json"
    if not path.exists():
        return 0.0
    spent = json.loads(path.read_text())["seconds"]
    return sum(seconds for purpose, seconds in spent.items() if purpose != "down")


def _trained(each: PlannedRun, folder: SweepFolder, before: dict[str, Any] | None) -> dict[str, Any]:
    """What the row of a run says of its training."""
    run, config, path = each.run, each.run.config, folder.run(each.run.name) / "metrics.jsonl"
    steps = [row for row in read_metrics(path) if "seconds" in row]
    if len(steps) != config.optimiser.steps:
        problem = f"has rows of {len(steps)} steps, and {config.optimiser.steps} were trained"
        raise InputError(path, problem, f"remove {RUNS}/{run.name}, and it is trained anew")
    seconds = {name: sum(row["seconds"][name] for row in steps) for name in steps[0]["seconds"]}
    return {
        "name": run.name,
        "family": run.family,
        "seed": config.seed,
        "k": run.neighbours,
        "parameters": each.size.parameters,
        "parameters_without_embeddings": each.size.without_embeddings,
        "cells": each.cells,
        "tokens": sum(row["tokens"] for row in steps) + (before["tokens"] if before else 0),
        "unique_cells": each.unique_cells,
        "training_cells": each.training_cells,
        "epochs": each.epochs,
        "flops": sum(row["flops"] for row in steps) + (before["flops"] if before else 0),
        "after": run.after,
        "steps": config.optimiser.steps,
        "batch_size": config.data.batch_size,
        "peak_rate": config.optimiser.peak_rate,
        "seconds_of": seconds,
        "overhead": sum(seconds[name] for name in _OVERHEAD) / max(sum(seconds.values()), 1e-9),
        "device": jax.devices()[0].device_kind,
    }


def _judged(errors: HeldOutErrors, corpus: Corpus, block: Int64[np.ndarray, " n"]) -> dict[str, Any]:
    """What the row of a run says of its loss."""
    loss, error = loss_and_error(errors, block)
    by_file = loss_by_source(errors, corpus, block)
    return {
        "loss": _number(loss),
        "loss_se": _number(error),
        "loss_by_file": {name: [_number(of.loss), _number(of.error)] for name, of in by_file.items()},
    }


def trained_config(each: PlannedRun, folder: SweepFolder) -> RunConfig:
    """What a run is trained with: it is judged once, at its end, so nothing is chosen on the way."""
    config = each.run.config
    initial = str(folder.run(each.run.after)) if each.run.after else config.initial_weights
    return replace(
        config, initial_weights=initial, evaluate_every=config.optimiser.steps, keep_last=1, keep_best=0
    )


def _judge(sweep: Sweep, place: Path, corpus: Corpus, cells: Int64[np.ndarray, " n"]) -> HeldOutErrors:
    model = open_model(place, checkpoint="last")
    if sweep.objective is not None:
        model = replace(model, config=replace(model.config, objective=sweep.objective))
    return held_out_errors(model, corpus, cells, seed=sweep.seed)


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None
