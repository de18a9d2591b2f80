"""What a method and the baselines said of a task, scored with intervals: the record that goes to ``uns``."""

from __future__ import annotations

import warnings
from typing import Any, cast

import numpy as np
from jaxtyping import Int, Num

from scfm_jax import __version__
from scfm_jax.downstream.metrics import paired_bootstrap
from scfm_jax.downstream.records import model_record, plain, warn_of_few_blocks
from scfm_jax.downstream.scores import HIGHER_IS_BETTER, PRIMARY, Kind, interval, paired_difference
from scfm_jax.downstream.suite_in_memory import Asked, OneTask, Pooled
from scfm_jax.errors import DataWarning

REFERENCE = "weighted gene mean"  # of the skill of imputation
# Those with intervals; the others stand in the table of folds.
SCORES: dict[Kind, tuple[str, ...]] = {
    "value": ("mae", "rmse", "pearson", "r2"),
    "composition": ("jensen_shannon", "mae", "pearson"),
}


def describe(one: OneTask, asked: Asked, **more: Any) -> dict[str, Any]:
    """Scores of the method and of the baselines, with intervals, and what they are of: plain data.

    Parameters
    ----------
    one, asked
        The task, whose predictions are scored (not ``mixing``), and what was said.
    more
        What else is to be kept.

    Warns
    -----
    DataWarning
        Below 10 blocks, where intervals are too narrow.
    """
    task, own, kind = one.task, asked.pooled[asked.own], cast(Kind, one.task.kind)
    others = {name: pooled for name, pooled in asked.pooled.items() if name != asked.own}
    block = task.folds.block[own.cells]
    warn_of_few_blocks(block)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)  # said once
        scores = {name: _scores(kind, pooled, asked, block) for name, pooled in asked.pooled.items()}
        differences = {name: _differences(kind, own, pooled, block) for name, pooled in others.items()}
    sign, primary = (1 if HIGHER_IS_BETTER[PRIMARY[kind]] else -1), PRIMARY[kind]
    return about(one) | {
        "target": task.facts.get("target"),
        "split": task.folds.description,
        "leaking": task.folds.leaking,
        **more,
        "cells_scored": len(own.cells),
        "scores": scores.pop(asked.own),
        "baselines": scores,
        "differences": differences,
        "best_baseline": max(others, key=lambda name: sign * scores[name][primary]["value"]),
        "folds": asked.rows,
    }


def about(one: OneTask) -> dict[str, Any]:
    """Which task, label and model it is of."""
    task = one.task
    record: dict[str, Any] = {"task": task.config.kind}
    if task.facts["unit"]:
        record["unit"] = task.facts["unit"]
    if task.config.labels:
        codes = task.target if task.types is None else task.types
        assert codes is not None
        record |= {
            "label": task.config.labels[0],
            "classes": list(task.classes),
            "left_out": list(task.facts["left_out"]),
            "left_out_cells": list(task.facts["left_out"].values()),
            "cells_without_label": int((codes < 0).sum()),
        }
    record["cells_unknown"] = one.adata.n_obs - int(one.known.sum())
    return record | (model_record(one.model) if one.model else {}) | {"scfm_jax": __version__}


def _scores(
    kind: Kind, pooled: Pooled, asked: Asked, block: Int[np.ndarray, " m"]
) -> dict[str, dict[str, float]]:
    found = {
        name: plain(interval(kind, truth, said, block, name=formula))
        for name, (formula, truth, said) in _parts(kind, pooled).items()
    }
    if kind == "imputation":
        against = paired_bootstrap(pooled.sums["all"], asked.pooled[REFERENCE].sums["all"], block)
        found["skill"] = {
            "value": 1 - against.ratio,
            "low": 1 - against.ratio_high,
            "high": 1 - against.ratio_low,
        }
    return found


def _differences(
    kind: Kind, own: Pooled, other: Pooled, block: Int[np.ndarray, " m"]
) -> dict[str, dict[str, float]]:
    theirs = _parts(kind, other)
    return {
        name: plain(paired_difference(kind, truth, said, theirs[name][2], block, name=formula))
        for name, (formula, truth, said) in _parts(kind, own).items()
    }


def _parts(
    kind: Kind, pooled: Pooled
) -> dict[str, tuple[str, Num[np.ndarray, "m ..."], Num[np.ndarray, "m ..."]]]:
    """Formula, truth and prediction of each score; of imputation the sums over each part of the genes."""
    if kind != "imputation":
        return {name: (name, pooled.truth, pooled.predicted) for name in SCORES[kind]}
    formula = PRIMARY[kind]
    parts = {
        f"{formula}_{part}": (formula, sums.weight, sums.total)
        for part, sums in pooled.sums.items()
        if part != "all"
    }
    return {formula: (formula, pooled.truth, pooled.predicted), **parts}
