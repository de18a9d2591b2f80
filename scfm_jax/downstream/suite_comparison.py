"""Which methods of a task are best, and how sure that is: pooled scores and gains over the best baseline."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np

from scfm_jax.downstream.metrics import FEW_BLOCKS
from scfm_jax.downstream.scores import Interval, Kind, interval, paired_difference, score
from scfm_jax.downstream.suite_results import GROUPS, Method, Pooled, Task
from scfm_jax.errors import DataWarning


class Gain(NamedTuple):
    """How much better a method is than `against`, with its 95% interval; more is better, for errors too."""

    interval: Interval
    against: Method

    @property
    def above(self) -> bool:
        """Whether the whole interval is above zero; never where there is none."""
        return self.interval.low > 0

    @property
    def below(self) -> bool:
        return self.interval.high < 0


@dataclass(frozen=True)
class Comparison:
    """A task's methods, scored on the predictions of all folds together.

    Attributes
    ----------
    pooled
        The primary score of each method, in the order of the task's.
    gains
        Over the best baseline at the method's k or without k, on the folds that the method has; None for that
        baseline itself.
    gains_at_k
        Over the best baseline with the same number of neighbours; None without such a one, and for itself.
    best, best_model
        By pooled score, among methods that are complete, do not leak and are not transductive, where there
        are any. None where there is no method of the kind.
    best_baseline
        At any k, on the folds that the best model has.
    verdict
        The gain of the best model over the best baseline.
    over_control
        Its gain over the best control, at any k: how much of what it has is what was learnt in pretraining.
    n_blocks
        The fewest spatial blocks that a pooled score is of.
    """

    task: Task
    pooled: list[Interval]
    gains: list[Gain | None]
    gains_at_k: list[Gain | None]
    best: Method | None
    best_baseline: Method | None
    best_model: Method | None
    verdict: Gain | None
    over_control: Gain | None
    n_blocks: int


def compare(task: Task) -> Comparison:
    """Score every method of a task whose predictions are scored, and compare it with the baselines.

    Raises
    ------
    InputError
        As `Task.pooled`, and as the scores.

    Warns
    -----
    DataWarning
        Below 10 blocks, where intervals are too narrow.
    """
    pooled = [task.pooled(method) for method in task.methods]
    n_blocks = min((len(np.unique(of_method.block)) for of_method in pooled), default=0)
    sign = 1 if task.higher_is_better else -1

    @functools.cache
    def goodness(method: Method, folds: tuple[str, ...]) -> float:
        return sign * _score(task, task.pooled(method, folds))

    def best(methods: Iterable[Method], folds: Sequence[str] | None = None) -> Method | None:
        """On some folds alone, where they are given."""
        found = {
            method: goodness(method, tuple(f for f in method.pooled_folds if folds is None or f in folds))
            for method in methods
        }
        return max((m for m in found if not math.isnan(found[m])), key=lambda m: found[m], default=None)

    def foremost(methods: Sequence[Method]) -> Method | None:
        """Of those that nothing excuses or flatters, or else of those that do not leak, or else of all."""
        clean, honest = [m for m in methods if m.clean], [m for m in methods if not m.leaking]
        return best(clean) or best(honest) or best(methods)

    def best_rival(of: Method, ks: Iterable[int | None], among: Sequence[Method]) -> Method | None:
        """On the folds that the method has; one that leaks is no measure for a method that does not."""
        folds = set(of.pooled_folds)
        found = [m for m in among if m.k in ks and folds & set(m.pooled_folds)]
        found = [m for m in found if m.leaking == of.leaking] or (found if of.leaking else [])
        return best([m for m in found if folds <= set(m.pooled_folds)] or found, of.pooled_folds)

    def gain(method: Method, against: Method | None) -> Gain | None:
        if against is None or against is method:
            return None
        return Gain(_difference(task, method, against), against)

    baselines, controls, models = ([m for m in task.methods if m.group == group] for group in GROUPS)
    gains = [gain(method, best_rival(method, (None, 0, method.k), baselines)) for method in task.methods]
    gains_at_k = [
        gain(method, best_rival(method, (method.k,), baselines)) if method.k is not None else None
        for method in task.methods
    ]
    model = foremost(models)
    every_k = {m.k for m in task.methods}
    overall = best_rival(model, every_k, baselines) if model else foremost(baselines)
    if 2 <= n_blocks < FEW_BLOCKS:
        text = f"task {task.name!r}: {n_blocks} blocks of tissue, its intervals are too narrow"
        warnings.warn(text, DataWarning, stacklevel=2)
    return Comparison(
        task,
        [_interval(task, of_method) for of_method in pooled],
        gains,
        gains_at_k,
        foremost(task.methods),
        overall,
        model,
        gain(model, overall) if model else None,
        gain(model, best_rival(model, every_k, controls)) if model else None,
        n_blocks,
    )


def _interval(task: Task, pooled: Pooled) -> Interval:
    kind = cast(Kind, task.kind)
    if len(np.unique(pooled.block)) < 2:
        return Interval(_score(task, pooled), math.nan, math.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)  # said once for the task
        return interval(kind, pooled.truth, pooled.by_seed, pooled.block)


def _difference(task: Task, method: Method, against: Method) -> Interval:
    """On the folds that both have."""
    folds = [fold for fold in method.pooled_folds if fold in against.pooled_folds]
    a, b = task.pooled(method, folds), task.pooled(against, folds)
    task.check_same_cells(b, [a], method.rows[0])
    if len(np.unique(a.block)) < 2:
        found = Interval(_score(task, a) - _score(task, b), math.nan, math.nan)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DataWarning)
            found = paired_difference(cast(Kind, task.kind), a.truth, a.by_seed, b.by_seed, a.block)
    return found if task.higher_is_better else Interval(-found.value, -found.high, -found.low)


def _score(task: Task, pooled: Pooled) -> float:
    scores = [score(cast(Kind, task.kind), pooled.truth, of_seed) for of_seed in pooled.by_seed]
    return float(np.mean([found[task.primary or ""] for found in scores]))
