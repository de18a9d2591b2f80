"""Tasks of imputation in a suite: masked genes of test cells, by baselines and by tissue models.

All methods of a task predict the same masked genes of the same cells, so its models must share vocabulary
and objective, and its test cells a panel. Training cells are those of the same panel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int64

from scfm_jax.corpus import Corpus
from scfm_jax.downstream import baselines, metrics
from scfm_jax.downstream.cost import Cost
from scfm_jax.downstream.imputation import (
    MaskedExpression,
    baseline_inputs,
    masked_expression,
    predict_masked,
)
from scfm_jax.downstream.model import TrainedModel
from scfm_jax.downstream.suite_answers import Answer, Method
from scfm_jax.downstream.suite_models import Models
from scfm_jax.downstream.suite_tasks import FoldData
from scfm_jax.errors import InputError
from scfm_jax.objectives.column_masking import ColumnMaskingConfig

_SEED_OF_TEST, _SEED_OF_TRAINING = 0, 1
_BASELINES: dict[str, Callable[..., np.ndarray]] = {
    "weighted gene mean": baselines.weighted_gene_mean,
    "calibrated mean of 10 neighbours (sees the masked genes)": baselines.calibrated_neighbours,
    "ridge on the cell's other genes": baselines.ridge,
}


@dataclass(frozen=True, eq=False)
class _Masked:
    """A fold's cells behind the mask, as the task's models see them."""

    corpus: Corpus
    cells: Int64[np.ndarray, " m"]
    test: MaskedExpression
    inputs: tuple[baselines.TrainingCells, baselines.MaskedCells]
    objective: ColumnMaskingConfig

    @property
    def rates(self) -> tuple[float, float]:
        """How often a non-zero and how often a zero is masked."""
        return self.objective.nonzero_rate, self.objective.zero_rate

    @functools.cached_property
    def mean(self) -> dict[str, metrics.CellSums]:
        """Errors of the reference of every skill."""
        return self.errors(baselines.weighted_gene_mean(*self.inputs, self.rates))

    def errors(self, predicted: Float32[np.ndarray, "m g"]) -> dict[str, metrics.CellSums]:
        """Squared errors by part."""
        test = self.test
        return metrics.squared_error(test.values, predicted, test.mask, test.counts > 0, self.rates)

    def answer(self, predicted: Float32[np.ndarray, "m g"]) -> Answer:
        """Scores of masked genes, and each cell's sums, which a bootstrap over blocks needs."""
        errors = self.errors(predicted)
        scores = {f"squared_error_{part}": of_part.mean for part, of_part in errors.items() if part != "all"}
        scores["gene_spearman"] = metrics.gene_spearman(self.test.values, predicted, self.test.mask).mean
        scores["skill"] = metrics.skill(errors, self.mean)["all"]
        total, masked = (part.astype(np.float32) for part in errors["all"])
        scores = {"squared_error": errors["all"].mean, **scores}
        return Answer(total, self.cells, masked, scores, errors)


def imputation_baselines(models: Models, model: str) -> Iterator[Method]:
    """Of masked genes; they see them as `model` does."""

    def answer(predict: Callable[..., np.ndarray], data: FoldData) -> Answer:
        masked = _masked(models, data, model)
        return masked.answer(predict(*masked.inputs, masked.rates))

    def prepare(data: FoldData) -> Cost:
        _masked(models, data, model)
        return Cost()

    for name, predict in _BASELINES.items():
        yield Method(name, "baseline", None, 0, functools.partial(answer, predict), prepare, model)


def imputation_answer(models: Models, data: FoldData, first: str, asked: TrainedModel, k: int) -> Answer:
    """What a tissue model says of the genes that are masked in the test cells, from k neighbours.

    Parameters
    ----------
    models, data
        The suite's, and the task in a fold.
    first
        The model whose vocabulary and objective the task has.
    asked
        The model that answers.
    k
        Neighbours.

    Raises
    ------
    InputError
        It has another vocabulary or objective, or is no tissue model.
    """
    masked = _masked(models, data, first)
    _, _, objective = asked.config.tissue()
    if asked.vocabulary.hash != masked.corpus.vocabulary.hash or objective != masked.objective:
        raise InputError(
            f"task {data.task.name}",
            f"{asked.config.name} has another vocabulary or objective than {first}, the first model",
            "give each its own task (tasks of the models)",
        )
    test = masked.test
    model = asked.with_neighbours(k)
    predicted, _, _ = predict_masked(model, masked.corpus, test.cells, test.panel, seed=_SEED_OF_TEST)
    return masked.answer(predicted)


def release() -> None:
    """Forget the cells that were masked last: they are dense, and large."""
    _masked.cache_clear()


@functools.lru_cache(maxsize=1)
def _masked(models: Models, data: FoldData, first: str) -> _Masked:
    task, fold = data.task, data.fold
    model = models.open(first, task.name, data.number)
    _, _, objective = model.config.tissue()
    corpus, number = task.cohort.seen_by(model)
    cells = _drawn(fold.test[number[fold.test] >= 0], task.config.test_cells)
    test = masked_expression(corpus, number[cells], objective, seed=_SEED_OF_TEST)
    same = [np.array_equal(slide.panel, test.panel) for slide in corpus.slides]
    learnt = fold.train[number[fold.train] >= 0]
    learnt = learnt[np.array(same)[corpus.slide_of(number[learnt])]]
    if not len(learnt):
        raise InputError(
            f"fold {fold.name}",
            "no training cell was measured with the panel of the test cells",
            "use another split",
        )
    learnt = _drawn(learnt, task.config.train_cells)
    seen = masked_expression(corpus, number[learnt], objective, seed=_SEED_OF_TRAINING)
    return _Masked(corpus, cells, test, baseline_inputs(seen, task.folds.block[learnt], test), objective)


def _drawn(cells: Int64[np.ndarray, " n"], most: int) -> Int64[np.ndarray, " m"]:
    if len(cells) <= most:
        return cells
    return np.sort(np.random.default_rng(_SEED_OF_TEST).choice(cells, most, replace=False))
