"""The methods of a suite's task: the baselines of its kind, and what the suite names of models."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float32, Int64

from scfm_jax.corpus import Corpus
from scfm_jax.downstream.cost import Cost, Meter
from scfm_jax.downstream.expression import beside_neighbours
from scfm_jax.downstream.finetune import finetune
from scfm_jax.downstream.finetuned import FinetuneConfig, FineTuned
from scfm_jax.downstream.linear import constant_answer, linear_answer
from scfm_jax.downstream.neighbourhood import neighbourhood_answer
from scfm_jax.downstream.suite_answers import Answer, Group, Method
from scfm_jax.downstream.suite_baselines import mixing_baselines, predicting_baselines
from scfm_jax.downstream.suite_config import EXPRESSION, UNTRAINED, MethodConfig, Suite
from scfm_jax.downstream.suite_imputation import imputation_answer, imputation_baselines
from scfm_jax.downstream.suite_mixing import mixing_answer
from scfm_jax.downstream.suite_models import Models
from scfm_jax.downstream.suite_tasks import FoldData, Task
from scfm_jax.errors import InputError


def methods_of(suite: Suite, task: Task, fold: int, models: Models) -> Iterator[Method]:
    """Baselines first, then what the suite names; nothing is computed yet.

    Raises
    ------
    InputError
        A task of imputation that no model is for.
    """
    if task.kind == "mixing":
        yield from mixing_baselines(task)
    elif task.kind == "imputation":
        yield from imputation_baselines(models, suite.first_model(task.name))
    else:
        yield from predicting_baselines(task)
    for name, config in suite.methods.items():
        if not config.fits(task.config) or (config.tasks and task.name not in config.tasks):
            continue
        if config.folds and fold not in config.folds:
            continue
        for model in config.of:
            if (own := suite.models.get(model)) and own.tasks and task.name not in own.tasks:
                continue
            group: Group = "control" if model in (EXPRESSION, UNTRAINED) else "model"
            weights = suite.first_model(task.name) if model == UNTRAINED else model
            for k in config.neighbours or task.config.neighbours:
                for seed in config.seeds:
                    way = _Way(config, models, model, k, seed)
                    yield Method(
                        f"{name} of {model}",
                        group,
                        k,
                        seed,
                        functools.partial(_ANSWERS[config.way], way),
                        way.prepare,
                        weights if weights in suite.models else "",
                        config.of_one_answer,
                    )


@dataclass(frozen=True)
class _Way:
    """How a model of the suite, or expression, answers with k neighbours."""

    config: MethodConfig
    models: Models
    model: str
    k: int
    seed: int

    def prepare(self, data: FoldData) -> Cost:
        """Pretrain, open and embed, where it is not done."""
        self._check_density(data)
        if self.config.way in ("finetune", "imputation"):
            self.models.open(self.model, data.task.name, data.number, self.seed)
            return Cost()
        cost = self.alone(data)[1]
        return cost.then(data.expression_cost) if self.config.beside_expression else cost

    def _check_density(self, data: FoldData) -> None:
        """Distances to neighbours are density itself: of such a task no model may read them."""
        attends = self.k and (self.config.attend or self.config.way == "finetune")
        if data.task.config.kind != "density" or not attends:
            return
        if self.models.open(self.model, data.task.name, data.number, self.seed).coordinates:
            raise InputError(
                f"task {data.task.name}",
                f"{self.model} reads the coordinates of its {self.k} neighbours, which are the answer",
                "ask it with 0 neighbours, or embed cells alone (a suite's attend = false, a function's "
                "way 'mean'), or use a model of ranks",
            )

    def alone(self, data: FoldData) -> tuple[Float32[np.ndarray, "n d"], Cost]:
        """Features of every cell, made of it alone or (`attend`) among its neighbours, and their cost."""
        if self.model == EXPRESSION:
            return data.expression, data.expression_cost
        if self.config.tuned:
            return _tuned_features(self.models, self.model, self.config.finetune, self.seed, data)
        attend = self.config.attend and self.config.way != "neighbourhood"
        features, cost = self.models.embedding(
            self.model,
            data.number,
            data.task,
            k=self.k if attend else 0,
            pooling=self.config.pooling,
            seed=self.seed,
        )
        known = np.isfinite(features).all(1)
        if not known.any():
            raise InputError(
                f"task {data.task.name}", f"{self.model} knows no gene of any cell", "use another model"
            )
        # A cell of which the model knows no gene says nothing, as a neighbour either.
        return np.where(known[:, None], features, features[known].mean(0)), cost

    def features(self, data: FoldData) -> Float32[np.ndarray, "n d"]:
        """What a linear model reads."""
        features, near = self.alone(data)[0], data.task.near
        if not self.config.attend:
            features = beside_neighbours(features, near, (self.k,))
        if self.config.beside_expression:
            features = np.hstack([features, beside_neighbours(data.expression, near, (self.k,))])
        return features


def _probe(way: _Way, data: FoldData) -> Answer:
    features, outputs = way.features(data), len(data.question.classes) or 1
    said = linear_answer(features, data.question, seed=way.seed)[0]
    return Answer(said, stored_bytes=4 * outputs * (features.shape[1] + 1))


def _neighbourhood(way: _Way, data: FoldData) -> Answer:
    features = way.alone(data)[0]
    if way.config.beside_expression:
        features = np.hstack([features, data.expression])
    head = replace(way.config.neighbourhood, neighbours=way.k)
    said, history, weights = neighbourhood_answer(features, data.question, head, seed=way.seed)
    return Answer(said, stored_bytes=4 * weights, history=tuple(history))


def _tuned(
    models: Models, model: str, config: FinetuneConfig, seed: int, data: FoldData
) -> tuple[FineTuned, Corpus, Int64[np.ndarray, " n"]]:
    """A model trained on the fold, its corpus, and every cell's number there (-1: none)."""
    question = data.question
    base = models.open(model, data.task.name, data.number, seed)
    corpus, number = data.task.cohort.seen_by(base)
    train = question.fold.train[number[question.fold.train] >= 0]
    tuned = finetune(
        base,
        corpus,
        number[train],
        question.target[train],
        question.block[train],
        config,
        kind=question.kind,
        n_classes=len(question.classes) or None,
        margin=question.margin,
        seed=seed,
    )
    return tuned, corpus, number


@functools.lru_cache(maxsize=4)
def _tuned_features(
    models: Models, model: str, config: FinetuneConfig, seed: int, data: FoldData
) -> tuple[Float32[np.ndarray, "n d"], Cost]:
    """Of every cell alone, which all values of k share; the mean where the model knows no gene of a cell."""
    with Meter() as meter:
        tuned, corpus, number = _tuned(models, model, replace(config, neighbours=0), seed, data)
        there = np.flatnonzero(number >= 0)
        known = tuned.embed(corpus, number[there])
    features = np.tile(known.mean(0), (len(number), 1))
    features[there] = known
    return features, meter.cost


def _finetune(way: _Way, data: FoldData) -> Answer:
    question, config = data.question, replace(way.config.finetune, neighbours=way.k)
    tuned, corpus, number = _tuned(way.models, way.model, config, way.seed, data)
    predicted = constant_answer(question)
    seen = number[question.fold.test] >= 0
    predicted[seen] = tuned.predict(corpus, number[question.fold.test[seen]])
    return Answer(predicted, stored_bytes=tuned.stored_bytes, history=tuned.history)


def _embedding(way: _Way, data: FoldData) -> Answer:
    return mixing_answer(data, way.features(data), way.seed)


def _imputation(way: _Way, data: FoldData) -> Answer:
    task = data.task.name
    asked = way.models.open(way.model, task, data.number, way.seed)
    return imputation_answer(way.models, data, way.models.first(task), asked, way.k)


_ANSWERS: dict[str, Callable[[_Way, FoldData], Answer]] = {
    "probe": _probe,
    "neighbourhood": _neighbourhood,
    "finetune": _finetune,
    "embedding": _embedding,
    "imputation": _imputation,
}
