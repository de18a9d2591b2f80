"""The runs of a sweep, trained one by one and judged alike: a row of the results file each."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int64

from scfm_jax.corpus import Corpus
from scfm_jax.corpus.split import split_cells
from scfm_jax.downstream.model import open_model
from scfm_jax.downstream.outputs import written_whole
from scfm_jax.errors import InputError
from scfm_jax.scaling.held_out import HeldOutErrors, held_out_errors, loss_and_error, loss_by_source
from scfm_jax.scaling.sweep import Sweep, test_of
from scfm_jax.scaling.sweep_plan import PlannedRun
from scfm_jax.training.hosts import is_primary, meet
from scfm_jax.training.metrics import read_metrics
from scfm_jax.training.train import select_cells, train

RESULTS, ROWS, RUNS, ERRORS = "results.jsonl", "rows", "runs", "errors"
# What a row says that does not follow from the config: how long it took.
_OVERHEAD = ("compile", "start")


class Stopped(Exception):
    """Training was asked to stop, and saved first."""


@dataclass(frozen=True)
class SweepFolder:
    """Where a sweep's runs and rows lie.

    Attributes
    ----------
    path
        ``results.jsonl`` (all rows so far), ``rows/NAME.json``, ``errors/NAME.npz`` (`HeldOutErrors`), and
        the run directories ``runs/NAME``.
    """

    path: Path

    def run(self, name: str) -> Path:
        """A run directory."""
        return self.path / RUNS / name

    def errors(self, name: str) -> Path:
        """What a run's errors come to in each held-out cell."""
        return self.path / ERRORS / f"{name}.npz"

    def row(self, name: str) -> dict[str, Any] | None:
        """The row of a run that is done."""
        path = self.path / ROWS / f"{name}.json"
        try:
            return json.loads(path.read_text()) if path.exists() else None
        except ValueError as error:
            raise InputError(
                path, f"is no row of a run ({error})", "remove it, and the run is judged again"
            ) from error

    def write(self, row: dict[str, Any]) -> None:
        """Keep a row, and gather all into the results file; jobs of an array may do so at once."""
        path = self.path / ROWS / f"{row['name']}.json"
        with written_whole(path) as partial:
            partial.write_text(json.dumps(row) + "\n")
        self.gather()

    def gather(self) -> Path:
        """Write the results file anew, from all rows, in the order of their FLOPs."""
        rows = [json.loads(path.read_text()) for path in (self.path / ROWS).glob("*.json")]
        rows.sort(key=lambda row: (row["flops"], row["name"]))
        partial = self.path / f"{RESULTS}.{time.time_ns()}.partial"
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return partial.replace(self.path / RESULTS)


def run_planned(
    sweep: Sweep,
    planned: list[PlannedRun],
    corpus: Corpus,
    folder: SweepFolder,
    *,
    report: Callable[[PlannedRun, dict[str, Any]], None] = lambda run, row: None,
) -> Path:
    """Train and judge planned runs in their order; those that have a row are left alone.

    On several hosts, all call it alike within `hosts.joined`; one writes and reports.

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

    Returns
    -------
    The results file.

    Raises
    ------
    InputError
        A run that was begun with another config or corpus, or one that comes after a run that is not done.
    Stopped
        Ctrl-C or SIGTERM asked training to stop; the next call goes on.
    """
    if is_primary():
        for name in (ROWS, RUNS, ERRORS):
            (folder.path / name).mkdir(parents=True, exist_ok=True)
    meet("folder of the sweep")
    cells, block = judged_cells(sweep, corpus)
    for each in planned:
        name = each.run.name
        digest, row = digest_of(sweep, each, corpus, folder), folder.row(name)
        if row is None:
            row = _row(sweep, each, corpus, folder, cells, block, digest, report)
            if is_primary():
                folder.write(row)
            meet(f"row of {name}")
        elif row["digest"] != digest:
            problem = f"run {name} was made with another config, corpus or judgement"
            raise InputError(
                folder.path, problem, f"remove {RUNS}/{name} and {ROWS}/{name}.json, or rename it"
            )
        if is_primary():
            report(each, row)
    return folder.gather() if is_primary() else folder.path / RESULTS


def judged_cells(sweep: Sweep, corpus: Corpus) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
    """Numbers of the held-out centres that every run is judged by, and the spatial block of each."""
    config = replace(sweep.runs[0].config, evaluate_cells=sweep.evaluate_cells)
    split = split_cells(corpus, test_of(config.split))
    _, cells = select_cells(corpus, split, config)
    return cells, split.block[cells].astype(np.int64)


def digest_of(sweep: Sweep, each: PlannedRun, corpus: Corpus, folder: SweepFolder) -> str:
    """Of all that a row depends on: the config, the runs before it, the corpus, and the judgement."""
    config = each.run.config
    # Where and how often, and what pads the batches, changes no result.
    free: dict[str, Any] = {"corpus": "", "initial_weights": "", "log_every": 1, "checkpoint_every": 1}
    data = replace(config.data, lengths=(), prefetch=2, cache_mib=1, readers=1)
    said: dict[str, Any] = {
        "config": asdict(replace(config, data=data, **free)),
        "corpus": corpus.hash,
        "judged": [asdict(sweep.objective) if sweep.objective else None, sweep.evaluate_cells, sweep.seed],
    }
    if each.run.after:
        before = folder.row(each.run.after)
        if before is None:
            raise InputError(
                folder.path,
                f"run {each.run.name} comes after run {each.run.after}, which is not done",
                "run that first",
            )
        said["after"] = before["digest"]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


def _row(
    sweep: Sweep,
    each: PlannedRun,
    corpus: Corpus,
    folder: SweepFolder,
    cells: Int64[np.ndarray, " n"],
    block: Int64[np.ndarray, " n"],
    digest: str,
    report: Callable[[PlannedRun, dict[str, Any]], None],
) -> dict[str, Any]:
    """Train a run, or go on with it, and judge it."""
    began, run, place = time.perf_counter(), each.run, folder.run(each.run.name)
    config = trained_config(each, folder)
    started = (place / "config.json").exists()

    def told(row: dict[str, Any]) -> None:
        report(each, row)

    if train(config, place, resume=started, report=told) < config.optimiser.steps:
        raise Stopped(run.name)
    errors = _judge(sweep, place, corpus, cells)
    if is_primary():
        folder.errors(run.name).unlink(missing_ok=True)
        errors.save(folder.errors(run.name))
    loss, error = loss_and_error(errors, block)
    before = folder.row(run.after) if run.after else None
    steps = [row for row in read_metrics(place / "metrics.jsonl") if "seconds" in row]
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
        "epochs": each.cells / each.training_cells,
        "flops": sum(row["flops"] for row in steps) + (before["flops"] if before else 0),
        "loss": _number(loss),
        "loss_se": _number(error),
        "loss_by_file": {
            name: [_number(of.loss), _number(of.error)]
            for name, of in loss_by_source(errors, corpus, block).items()
        },
        "after": run.after,
        "steps": config.optimiser.steps,
        "batch_size": config.data.batch_size,
        "peak_rate": config.optimiser.peak_rate,
        "seconds": time.perf_counter() - began,
        "seconds_of": seconds,
        "overhead": sum(seconds[name] for name in _OVERHEAD) / max(sum(seconds.values()), 1e-9),
        "device": jax.devices()[0].device_kind,
        "digest": digest,
    }


def trained_config(each: PlannedRun, folder: SweepFolder) -> Any:
    """What a run is trained with: it is judged once, at its end, so nothing is chosen on the way."""
    config = each.run.config
    initial = str(folder.run(each.run.after)) if each.run.after else config.initial_weights
    return dataclasses.replace(
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
