"""Which methods of a task are best, and how sure that is: pooled scores and gains over the best baseline."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np

from scfm_jax.downstream.metrics import FEW_BLOCKS
from scfm_jax.downstream.scores import Interval, Kind, interval, paired_difference, score
from scfm_jax.downstream.suite_results import Method, Pooled, Task
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
        Over the best baseline at the method's k or without k; None for that baseline itself.
    best, best_baseline, best_model
        By pooled score, among methods that are complete and do not leak where there are any. None where there
        is no such method.
    verdict
        The gain of the best model over the best baseline at any k.
    n_blocks
        The fewest spatial blocks that a pooled score is of.
    """

    task: Task
    pooled: list[Interval]
    gains: list[Gain | None]
    best: Method | None
    best_baseline: Method | None
    best_model: Method | None
    verdict: Gain | None
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
    intervals = [_interval(task, of_method) for of_method in pooled]
    n_blocks = min((len(np.unique(of_method.block)) for of_method in pooled), default=0)
    values = {id(method): found.value for method, found in zip(task.methods, intervals)}

    def best(methods: Iterable[Method]) -> Method | None:
        sign = 1 if task.higher_is_better else -1
        defined = [method for method in methods if not math.isnan(values[id(method)])]
        for fits in (lambda m: m.clean, lambda m: not m.leaking, lambda m: True):
            if some := [method for method in defined if fits(method)]:
                return max(some, key=lambda method: sign * values[id(method)])
        return None

    def best_baseline(of: Method, k_fits: bool) -> Method | None:
        # One that leaks is no measure for a method that does not.
        return best(
            method
            for method in task.methods
            if method.group == "baseline"
            and (of.leaking or not method.leaking)
            and (not k_fits or method.k in (None, 0, of.k))
            and set(method.pooled_folds) & set(of.pooled_folds)
        )

    def gain(method: Method, against: Method | None) -> Gain | None:
        if against is None or against is method:
            return None
        return Gain(_difference(task, method, against), against)

    gains = [gain(method, best_baseline(method, k_fits=True)) for method in task.methods]
    model = best(method for method in task.methods if method.group == "model")
    overall = best_baseline(model, k_fits=False) if model else None
    if 2 <= n_blocks < FEW_BLOCKS:
        text = f"task {task.name!r}: {n_blocks} blocks of tissue, its intervals are too narrow"
        warnings.warn(text, DataWarning, stacklevel=2)
    return Comparison(
        task,
        intervals,
        gains,
        best(task.methods),
        overall or best(method for method in task.methods if method.group == "baseline"),
        model,
        gain(model, overall) if model else None,
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
