"""What a law says of runs that it was not fitted to: of one that is still to be run, and of the largest."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from scfm_jax.scaling.comparison import needed
from scfm_jax.scaling.forms import Design, Form, levels, predict
from scfm_jax.scaling.intervals import Interval, bootstrap, rank, tails
from scfm_jax.scaling.isoflop import budgets_of
from scfm_jax.scaling.least_squares import fit
from scfm_jax.scaling.runs import Runs

_NOISES = 25


@dataclass(frozen=True)
class Prediction:
    """A run that was left out, and what the others say of it; the interval holds a single run's noise."""

    run: str
    measured: float
    predicted: float
    interval: Interval


def single_runs(
    form: Form,
    asked: Design,
    estimate: Float64[np.ndarray, " p"],
    draws: Float64[np.ndarray, "r p"],
    deviation: float,
    ends: tuple[float, float],
    seed: int,
) -> list[tuple[float, Interval]]:
    """Loss of single runs at a design, and the 95% interval that one lies in.

    Parameters
    ----------
    form, estimate, draws
        A law's.
    asked
        N, D and k of the runs.
    deviation
        Of a run from the law.
    ends
        Quantiles of the draws between which a 95% interval lies.
    seed
        Of the noise.
    """
    # A draw with several noises, or the tails would be those of few numbers.
    values = np.repeat(predict(form, asked, draws), _NOISES, axis=0)
    values = values + np.random.default_rng(seed).normal(0, deviation, values.shape)
    middle, (low, high) = predict(form, asked, estimate[None])[0], np.quantile(values, ends, axis=0)
    return [(value, (a, b)) for value, a, b in zip(middle.tolist(), low.tolist(), high.tolist(), strict=True)]


def predict_largest(
    form: Form, design: Design, runs: Runs, *, budgets: int, draws: int, seed: int
) -> tuple[list[Prediction], str]:
    """Runs of the largest budgets of FLOPs, from a fit of the others; or why that cannot be."""
    if not budgets:
        return [], "none were asked for"
    budget = budgets_of(runs.flops)
    left_out = budget > budget.max() - budgets
    rest = design.take(~left_out)
    have = len(np.unique(design.configurations[~left_out]))
    same = rest.levels == design.levels and all(
        (levels(a) > 1) == (levels(b) > 1) for a, b in ((rest.size, design.size), (rest.data, design.data))
    )
    if not same or have < needed(form, rest):
        return [], "without the largest, too few runs are left for the form"
    loss = runs.loss[~left_out]
    best = fit(form, rest, loss)
    drawn = bootstrap(form, rest, loss, draws, seed)
    directions = rank(form, rest, best)
    deviation = float(np.sqrt(best.sse[0] / max(len(loss) - directions, 1)))
    said = single_runs(
        form,
        design.take(left_out),
        best.parameters[0],
        drawn.parameters,
        deviation,
        tails(len(loss), directions),
        seed,
    )
    return [
        Prediction(runs.name[place], float(runs.loss[place]), value, interval)
        for place, (value, interval) in zip(np.flatnonzero(left_out), said, strict=True)
    ], ""
