"""The methods of a suite: baselines that every table has, and the models' ways to answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32

from scfm_jax.downstream.composition import composition_by_type, composition_of_predicted
from scfm_jax.downstream.density import density_from_distance
from scfm_jax.downstream.expression import beside_neighbours, coordinates_answer
from scfm_jax.downstream.finetune import finetune
from scfm_jax.downstream.folds import Fold
from scfm_jax.downstream.linear import constant_answer, linear_answer
from scfm_jax.downstream.neighbourhood import neighbourhood_answer
from scfm_jax.downstream.suite_config import EXPRESSION, UNTRAINED, MethodConfig, Suite
from scfm_jax.downstream.suite_models import Models
from scfm_jax.downstream.suite_tasks import FoldData, Task

Group = Literal["baseline", "model", "control"]


@dataclass(frozen=True, eq=False)
class Answer:
    """What a method says of the test cells, and what it took.

    Attributes
    ----------
    predicted
        See `scores`.
    stored_bytes
        Of what it learnt, where it keeps anything that is worth counting.
    history
        Rows of its training.
    """

    predicted: Float32[np.ndarray, "m ..."]
    stored_bytes: int | None = None
    history: tuple[dict[str, float], ...] = ()


@dataclass(frozen=True)
class Method:
    """One row of a task's table in one fold.

    Attributes
    ----------
    name, group, k, seed
        As the table has them; k is None where no neighbours are read in a number that is varied.
    model
        Of the suite, or "".
    asked
        Everything that its answer depends on, beside the task, the fold and the seed.
    answer
        The fold to the answer.
    """

    name: str
    group: Group
    k: int | None
    seed: int
    model: str
    asked: dict[str, Any]
    answer: Callable[[FoldData], Answer]


def methods_of(suite: Suite, task: Task, fold: int, models: Models) -> Iterator[Method]:
    """Baselines first, then what the suite names."""
    yield from _baselines(task)
    for name, config in suite.methods.items():
        if (config.tasks and task.name not in config.tasks) or (config.folds and fold not in config.folds):
            continue
        for model in config.of:
            if (own := suite.models.get(model)) and own.tasks and task.name not in own.tasks:
                continue
            group: Group = "control" if model in (EXPRESSION, UNTRAINED) else "model"
            for k in config.neighbours or task.config.neighbours:
                for seed in config.seeds:
                    yield Method(
                        f"{name} of {model}",
                        group,
                        k,
                        seed,
                        model if group == "model" else "",
                        {"method": asdict(config), "k": k},
                        _WAYS[config.way](config, models, model, fold, k, seed),
                    )


def _baselines(task: Task) -> Iterator[Method]:
    def baseline(name: str, k: int | None, answer: Callable[[FoldData], np.ndarray]) -> Method:
        return Method(name, "baseline", k, 0, "", {}, lambda data: Answer(answer(data)))

    constants = {"classes": "majority", "value": "training median", "composition": "mean composition"}
    yield baseline(constants[task.kind], None, lambda data: constant_answer(data.question))

    def linear(sizes: tuple[int, ...]) -> Callable[[FoldData], np.ndarray]:
        return lambda data: linear_answer(
            beside_neighbours(data.expression, data.question.near, sizes), data.question
        )[0]

    for k in sorted({0, *task.config.neighbours}):
        yield baseline(f"own expression + mean of {k}" if k else "own expression", k, linear((k,)))
    if sizes := task.config.means:
        yield baseline(f"own expression + means of {', '.join(map(str, sizes))}", None, linear(sizes))
    if task.config.coordinates:
        yield baseline(
            "coordinates alone", None, lambda data: coordinates_answer(data.task.cohort, data.question)
        )
    if task.config.kind == "density":
        k = max(task.config.neighbours)
        yield baseline(
            f"distance to neighbour {k}",
            None,
            lambda data: density_from_distance(
                task.cohort.corpus, task.target, data.question.fold.train, data.question.fold.test, k=k
            ),
        )
    if task.config.kind == "composition":
        yield baseline("composition by own type", None, _by_type)
        yield baseline("predicted types of the cells around", None, _of_predicted)


def _by_type(data: FoldData) -> np.ndarray:
    task, fold = data.task, data.question.fold
    assert task.types is not None
    return composition_by_type(task.target, task.types, fold.train, fold.test)


def _of_predicted(data: FoldData) -> np.ndarray:
    """Types of all cells by own expression, from the training cells' types."""
    task, fold = data.task, data.question.fold
    assert task.types is not None
    typed = fold.train[task.types[fold.train] >= 0]
    everyone = Fold(fold.name, typed, np.arange(len(task.types)))
    question = replace(data.question, kind="classes", target=task.types, fold=everyone)
    said, _ = linear_answer(data.expression, question)
    return composition_of_predicted(
        task.cohort.corpus, said, fold.test, task.config.radius, unit=task.config.unit
    )


def _features(
    config: MethodConfig, models: Models, model: str, fold: int, k: int, seed: int, data: FoldData
) -> Float32[np.ndarray, "n d"]:
    """Of every cell, made of it alone, or (`attend`) of it among its neighbours."""
    if model == EXPRESSION:
        return data.expression
    seen = k if config.attend else 0
    return models.embedding(model, fold, data.task, k=seen, pooling=config.pooling, seed=seed)


def _probe(
    config: MethodConfig, models: Models, model: str, fold: int, k: int, seed: int
) -> Callable[[FoldData], Answer]:
    def answer(data: FoldData) -> Answer:
        features = _features(config, models, model, fold, k, seed, data)
        near = data.question.near
        if not config.attend:
            # A cell of which the model knows no gene says nothing as a neighbour either.
            known = np.isfinite(features).all(1)
            features = beside_neighbours(
                np.where(known[:, None], features, features[known].mean(0)), near, (k,)
            )
        if config.beside_expression:
            features = np.hstack([features, beside_neighbours(data.expression, near, (k,))])
        return Answer(linear_answer(features, data.question, seed=seed)[0])

    return answer


def _neighbourhood(
    config: MethodConfig, models: Models, model: str, fold: int, k: int, seed: int
) -> Callable[[FoldData], Answer]:
    def answer(data: FoldData) -> Answer:
        features = _features(replace(config, attend=False), models, model, fold, k, seed, data)
        if config.beside_expression:
            features = np.hstack([features, data.expression])
        head = replace(config.neighbourhood, neighbours=k)
        said, history, weights = neighbourhood_answer(features, data.question, head, seed=seed)
        return Answer(said, 4 * weights, tuple(history))

    return answer


def _finetune(
    config: MethodConfig, models: Models, model: str, fold: int, k: int, seed: int
) -> Callable[[FoldData], Answer]:
    def answer(data: FoldData) -> Answer:
        question = data.question
        base = models.open(model, fold, seed)
        corpus, number = data.task.cohort.seen_by(base)
        train = question.fold.train[number[question.fold.train] >= 0]
        tuned = finetune(
            base,
            corpus,
            number[train],
            question.target[train],
            question.block[train],
            replace(config.finetune, neighbours=k),
            kind=question.kind,
            n_classes=len(question.classes) or None,
            seed=seed,
        )
        predicted = constant_answer(question)
        seen = number[question.fold.test] >= 0
        predicted[seen] = tuned.predict(corpus, number[question.fold.test[seen]])
        return Answer(predicted, tuned.stored_bytes, tuned.history)

    return answer


_WAYS = {"probe": _probe, "neighbourhood": _neighbourhood, "finetune": _finetune}
