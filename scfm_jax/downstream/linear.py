"""Linear models of a task: the probe of an embedding, and the baselines on expression.

Both are one function of features, so that an embedding and expression get the same penalty grid, the same
choice and the same regression.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Float32, Num
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from scfm_jax.downstream.choosing import blocks_in_turn, neighbour_rows
from scfm_jax.downstream.question import Question
from scfm_jax.downstream.scores import HIGHER_IS_BETTER, PRIMARY, Kind, score
from scfm_jax.errors import InputError

# Inverse penalties, the strongest first.
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


def linear_answer(
    features: Float[np.ndarray, "n d"],
    question: Question,
    *,
    strengths: Sequence[float] = STRENGTHS,
    seed: int = 0,
) -> tuple[Float32[np.ndarray, "m ..."], float]:
    """Fit standardised features of the training cells, and answer for the test cells.

    Classes by multinomial logistic regression, values by ridge regression, compositions by ridge regression
    whose answers are cut off at 0 and divided by their sum. The penalty is the best by the task's primary
    score over training blocks held out in turn (`choosing`).

    Parameters
    ----------
    features
        One row for every cell of the cohort; a row of NaN (a cell that a model cannot see) gets the training
        cells' mean.
    question
        The task in a fold.
    strengths
        Inverse penalties C to choose from, the strongest penalty first.
    seed
        Of the blocks held out.

    Returns
    -------
    The answers (see `scores` for their shapes), and the chosen strength.

    Raises
    ------
    InputError
        Training cells in one block, or features that are missing in all training cells.
    """
    features = _filled(features, question)
    train, test = question.fold.train, question.fold.test
    x, y = features[train], question.to_learn
    best = strengths[0]
    if len(strengths) > 1:
        held, answers = _answers_of_held_out(x, question, strengths, seed)
        name = PRIMARY[question.kind]
        sign = 1 if HIGHER_IS_BETTER[name] else -1
        scores = [sign * score(question.kind, y[held], answer[held])[name] for answer in answers]
        best = strengths[int(np.argmax(scores))]
    (answer,) = _answers(question.kind, x, y, features[test], [best], len(question.classes))
    return answer, best


def constant_answer(question: Question) -> Float32[np.ndarray, "m ..."]:
    """What says nothing of a cell: shares of the training classes, the training median, the mean composition.

    The likeliest class of it is the majority's.
    """
    y, m = question.to_learn, len(question.fold.test)
    if question.kind == "value":
        return np.full(m, np.median(y), np.float32)
    if question.kind == "classes":
        shares = np.bincount(y, minlength=len(question.classes)) / len(y)
    else:
        shares = y.mean(0, dtype=np.float64)
    return np.tile(shares.astype(np.float32), (m, 1))


def _filled(features: Float[np.ndarray, "n d"], question: Question) -> Float[np.ndarray, "n d"]:
    missing = ~np.isfinite(features).all(1)
    if not missing.any():
        return features
    seen = np.setdiff1d(question.fold.train, np.flatnonzero(missing))
    if not len(seen):
        raise InputError(
            f"fold {question.fold.name}",
            "the features of all training cells are missing",
            "use another model",
        )
    return np.where(missing[:, None], features[seen].mean(0), features)


def _answers_of_held_out(
    x: Float[np.ndarray, "t d"], question: Question, strengths: Sequence[float], seed: int
) -> tuple[Bool[np.ndarray, " t"], list[Float32[np.ndarray, "t ..."]]]:
    """Which training cells were held out in turn, and what each strength answers for them."""
    y = question.to_learn
    shape = (len(y), len(question.classes)) if question.kind == "classes" else y.shape
    answers = [np.zeros(shape, np.float32) for _ in strengths]
    done = np.zeros(len(y), bool)
    train = question.fold.train
    near = neighbour_rows(train, question.near[train, : question.margin])
    for fit, held in blocks_in_turn(question.block[train], near, seed):
        if not len(fit) or (question.kind == "classes" and len(np.unique(y[fit])) < 2):
            continue
        said = _answers(question.kind, x[fit], y[fit], x[held], strengths, len(question.classes))
        for answer, of_strength in zip(answers, said, strict=True):
            answer[held] = of_strength
        done[held] = True
    if not done.any():
        raise InputError(
            f"fold {question.fold.name}",
            "its training cells leave nothing to choose a penalty on",
            "give more blocks, or a smaller margin",
        )
    return done, answers


def _answers(
    kind: Kind,
    x: Float[np.ndarray, "t d"],
    y: Num[np.ndarray, "t ..."],
    x_asked: Float[np.ndarray, "m d"],
    strengths: Sequence[float],
    n_classes: int,
) -> list[Float32[np.ndarray, "m ..."]]:
    """Fit at each strength, and answer."""
    scaler = StandardScaler().fit(x)
    x, x_asked = scaler.transform(x), scaler.transform(x_asked)
    if kind != "classes":
        return [_shares(kind, Ridge(1 / c).fit(x, y).predict(x_asked), y) for c in strengths]
    # Each strength starts from the weights of the one before: a third of the iterations.
    model, answers = LogisticRegression(max_iter=2000, warm_start=True), []
    # The products are small: beside other work, BLAS's threads wait for each other ten times longer.
    with threadpool_limits(1, "blas"):
        for c in strengths:
            model.set_params(C=c).fit(x, y)
            probabilities = np.zeros((len(x_asked), n_classes), np.float32)
            probabilities[:, model.classes_] = model.predict_proba(x_asked)
            answers.append(probabilities)
    return answers


def _shares(
    kind: Kind, answer: Float[np.ndarray, "m ..."], y: Num[np.ndarray, "t ..."]
) -> Float32[np.ndarray, "m ..."]:
    """Answers of a composition as shares; where nothing is left above zero, the training cells' mean."""
    if kind == "composition":
        answer = np.maximum(answer, 0)
        total = answer.sum(1, keepdims=True)
        answer = np.where(total > 0, answer / np.maximum(total, 1e-9), y.mean(0))
    return answer.astype(np.float32)
