"""The baselines that every table of a suite has, by kind of task."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from scfm_jax.downstream.composition import composition_by_type, composition_of_predicted
from scfm_jax.downstream.density import density_from_distance
from scfm_jax.downstream.expression import beside_neighbours, coordinates_answer
from scfm_jax.downstream.folds import Fold
from scfm_jax.downstream.linear import constant_answer, linear_answer
from scfm_jax.downstream.suite_answers import Answer, Method
from scfm_jax.downstream.suite_mixing import mixing_answer
from scfm_jax.downstream.suite_tasks import FoldData, Task

_CONSTANTS = {"classes": "majority", "value": "training median", "composition": "mean composition"}


def predicting_baselines(task: Task) -> Iterator[Method]:
    """Of labels, values and compositions."""

    def baseline(name: str, k: int | None, answer: Callable[[FoldData], np.ndarray]) -> Method:
        return Method(name, "baseline", k, 0, lambda data: Answer(answer(data)))

    yield baseline(_CONSTANTS[task.kind], None, lambda data: constant_answer(data.question))
    for name, k, sizes in _expressions(task):
        linear = baseline(name, k, functools.partial(_linear, sizes))
        yield replace(linear, prepare=lambda data: data.expression_cost)
    if task.kind == "value":
        yield baseline("training mean", None, _mean)
    if task.config.coordinates:
        yield baseline("coordinates alone", None, lambda data: coordinates_answer(task.cohort, data.question))
    if task.config.kind == "density":
        k = max((10, *task.config.neighbours))
        yield baseline(f"distance to neighbour {k}", None, functools.partial(_by_distance, k))
    if task.config.kind == "composition":
        yield baseline("composition by own type", None, _by_type)
        predicted = baseline("predicted types of the cells around", None, _of_predicted)
        yield replace(predicted, prepare=lambda data: data.expression_cost)


def mixing_baselines(task: Task) -> Iterator[Method]:
    """Components of expression, as they are."""
    for name, k, sizes in _expressions(task):
        yield Method(
            name,
            "baseline",
            k,
            0,
            lambda data, sizes=sizes: mixing_answer(  # type: ignore[misc]
                data, beside_neighbours(data.expression, task.near, sizes), 0
            ),
            lambda data: data.expression_cost,
        )


def _expressions(task: Task) -> Iterator[tuple[str, int | None, tuple[int, ...]]]:
    """Name and k of each baseline on expression, and the neighbourhoods whose means it reads."""
    for k in sorted({0, *task.config.neighbours}):
        yield f"own expression + mean of {k}" if k else "own expression", k, (k,)
    if sizes := task.config.means:
        yield f"own expression + means of {', '.join(map(str, sizes))}", None, sizes


def _linear(sizes: Sequence[int], data: FoldData) -> np.ndarray:
    return linear_answer(beside_neighbours(data.expression, data.task.near, sizes), data.question)[0]


def _mean(data: FoldData) -> np.ndarray:
    return np.full(len(data.fold.test), data.question.to_learn.mean(), np.float32)


def _by_distance(k: int, data: FoldData) -> np.ndarray:
    task, fold = data.task, data.fold
    assert task.target is not None
    return density_from_distance(task.cohort.corpus, task.target, fold.train, fold.test, k=k)


def _by_type(data: FoldData) -> np.ndarray:
    task, fold = data.task, data.fold
    assert task.types is not None and task.target is not None
    return composition_by_type(task.target, task.types, fold.train, fold.test)


def _of_predicted(data: FoldData) -> np.ndarray:
    """Types of all cells by own expression, from the training cells' types."""
    task, fold = data.task, data.fold
    assert task.types is not None
    typed = fold.train[task.types[fold.train] >= 0]
    everyone = Fold(fold.name, typed, np.arange(len(task.types)))
    question = replace(data.question, kind="classes", target=task.types, fold=everyone)
    said, _ = linear_answer(data.expression, question)
    return composition_of_predicted(
        task.cohort.corpus, said, fold.test, task.config.radius, unit=task.config.unit
    )
