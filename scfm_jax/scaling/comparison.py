"""Which form the runs speak for, how large the noise is, and which runs drive the fit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int64

from scfm_jax.scaling.forms import Design, Form, levels, make_form, predict
from scfm_jax.scaling.intervals import rank
from scfm_jax.scaling.least_squares import Fitted, fit

_ONE_BY_ONE = 40  # configurations that are left out singly; of more, tenths are
_FOLDS = 10
_ALONE = 1e-6  # a share of a run's terms
_LEVELS_OF_POWER, _NOISE_OF_POWER = 6, 10.0


@dataclass(frozen=True)
class Compared:
    """How well a form does.

    Attributes
    ----------
    form
        Its name.
    parameters
        Directions of them that the design tells apart.
    held_out_error
        Root mean square of log predicted / measured, over configurations left out; None where none could be.
    unpredictable
        Runs that no fit without them can predict, as those that are alone at their k.
    aic
        Akaike's, corrected for few runs; None where runs are too few.
    """

    form: str
    parameters: int
    held_out_error: float | None
    unpredictable: int
    aic: float | None


@dataclass(frozen=True)
class Noise:
    """Standard deviation of the loss between runs alike but for the seed.

    `freedom` is 0 where no configuration was run twice, and the deviation from the form with a floor for each
    k stands in.
    """

    deviation: float
    freedom: int


@dataclass(frozen=True)
class Influence:
    """What a run does to the fit: the parameter that moves most without it, in standard errors."""

    run: str
    parameter: str
    shift: float


def noise_of(
    loss: Float64[np.ndarray, " n"], configurations: Int64[np.ndarray, " n"], stand_in: float
) -> Noise:
    """Pooled over configurations; see `Noise`."""
    times = np.bincount(configurations)
    mean = np.bincount(configurations, loss) / times
    freedom = int((times - 1).sum())
    if not freedom:
        return Noise(stand_in, 0)
    return Noise(float(np.sqrt(((loss - mean[configurations]) ** 2).sum() / freedom)), freedom)


def no_power_law(design: Design, effect: float, noise: Noise) -> str:
    """Why a power law in k is not fitted; empty where it is.

    Parameters
    ----------
    effect
        The greatest difference between the floors of two k.
    """
    number = len(design.levels)
    if number < _LEVELS_OF_POWER:
        return f"{number} level{'s' if number > 1 else ''} of k, {_LEVELS_OF_POWER} are needed"
    if effect < _NOISE_OF_POWER * noise.deviation:
        return (
            f"the effect of k, {effect:.3g}, is {effect / noise.deviation:.1f} times the noise between runs, "
            f"{_NOISE_OF_POWER:.0f} are needed"
        )
    return ""


def needed(form: Form, design: Design) -> int:
    """Configurations that a form needs: one more than the parameters that could be told apart."""
    counted = {"alpha": levels(design.size) > 2, "beta": levels(design.data) > 2}
    return len(form.terms) + sum(counted.get(name, True) for name in form.exponents) + 1


def forms_for(design: Design, names: list[str]) -> list[Form]:
    """Forms of these names, without the terms of what does not vary."""
    size, data = levels(design.size) > 1, levels(design.data) > 1
    return [make_form(name, design.levels, size=size, data=data) for name in names]


def compare(form: Form, design: Design, loss: Float64[np.ndarray, " n"], seed: int) -> Compared:
    """Score a form by cross-validation over configurations, all seeds of one together, and by AIC."""
    whole = fit(form, design, loss)
    parameters, n = rank(form, design, whole), len(loss)
    configuration = design.configurations
    number = int(configuration.max()) + 1
    if number <= _ONE_BY_ONE:
        fold = configuration
    else:
        fold = (np.random.default_rng(seed).permutation(number) % _FOLDS)[configuration]
    weights = (fold[None, :] != np.arange(fold.max() + 1)[:, None]).astype(np.float64)
    fitted = fit(form, design, loss, weights)
    predicted = predict(form, design, fitted.parameters)[fold, np.arange(n)]
    possible = _predictable(form.columns(design, whole.theta)[0], fold)
    error = np.log(np.maximum(predicted, 1e-300) / loss)[possible]
    spare = n - parameters - 2
    aic = None
    if spare > 0:
        free = parameters + 1  # and the noise
        aic = float(
            n * np.log(max(float(whole.sse[0]), 1e-300) / n) + 2 * free + 2 * free * (free + 1) / spare
        )
    return Compared(
        form.name,
        parameters,
        float(np.sqrt(np.mean(error**2))) if len(error) else None,
        int((~possible).sum()),
        aic,
    )


def _predictable(
    columns: Float64[np.ndarray, "n p"], fold: Int64[np.ndarray, " n"]
) -> Bool[np.ndarray, " n"]:
    """Whether a run's terms are combinations of those of the runs in other folds."""
    scaled = columns / np.maximum(np.linalg.norm(columns, axis=0), 1e-300)
    possible = np.ones(len(fold), bool)
    for number in range(int(fold.max()) + 1):
        inside = fold == number
        _, singular, directions = np.linalg.svd(scaled[~inside], full_matrices=False)
        known = directions[singular > _ALONE * singular[0]]
        outside = scaled[inside] - scaled[inside] @ known.T @ known
        possible[inside] = np.linalg.norm(outside, axis=1) < _ALONE * np.linalg.norm(scaled[inside], axis=1)
    return possible


def influence(
    form: Form,
    design: Design,
    loss: Float64[np.ndarray, " n"],
    names: tuple[str, ...],
    best: Fitted,
    draws: Fitted,
    identified: list[int],
) -> list[Influence]:
    """Every run with what leaving it out does, those that drive the fit first.

    Parameters
    ----------
    draws
        A bootstrap: the standard errors.
    identified
        Places of the parameters to look at.
    """
    if not identified:
        return []
    without = fit(form, design, loss, 1 - np.eye(len(loss)))
    error = draws.parameters[:, identified].std(0, ddof=1)
    moved = (without.parameters - best.parameters)[:, identified] / np.where(error > 0, error, np.inf)
    most = np.abs(moved).argmax(1)
    found = [
        Influence(name, form.names[identified[place]], float(row[place]))
        for name, row, place in zip(names, moved, most, strict=True)
    ]
    return sorted(found, key=lambda each: -abs(each.shift))
