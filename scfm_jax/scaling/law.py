"""From runs to a law: the fit, its intervals, what it rests on, and what it refuses to say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Float64
from scipy.stats import f as f_distribution

from scfm_jax.errors import InputError
from scfm_jax.scaling.comparison import (
    Compared,
    Influence,
    Noise,
    compare,
    forms_for,
    influence,
    needed,
    no_power_law,
    noise_of,
)
from scfm_jax.scaling.forms import FORMS, Design, Form, binned, levels, predict
from scfm_jax.scaling.frontier import Cost, cost_of
from scfm_jax.scaling.huber import fit_huber
from scfm_jax.scaling.intervals import Interval, Parameter, bootstrap, parameters_of, rank, tails
from scfm_jax.scaling.isoflop import Parabola, Trend, envelope, parabolas
from scfm_jax.scaling.least_squares import fit
from scfm_jax.scaling.prediction import Prediction, predict_largest
from scfm_jax.scaling.repeats import Repeats, fit_repeats
from scfm_jax.scaling.runs import DataField, Runs, SizeField

_REPEATED = 1.001  # epochs, from which on data is seen again


@dataclass(frozen=True)
class LawConfig:
    """How a law is fitted.

    Attributes
    ----------
    size, data
        What N and D are.
    form
        Of `FORMS`; None takes ``offset``, or ``plain`` where there is one k.
    draws
        Of the bootstrap.
    held_out
        Largest budgets of FLOPs whose runs are predicted from the others; see `budgets_of`.
    repeats
        Fit the law to runs that repeat no data, and R* to those that do.
    delta
        Of the Huber estimator.
    seed
        Of everything drawn.
    """

    size: SizeField = "parameters_without_embeddings"
    data: DataField = "unique_cells"
    form: str | None = None
    draws: int = 1_000
    held_out: int = 1
    repeats: bool = False
    delta: float = 1e-3
    seed: int = 0


@dataclass(frozen=True)
class Effect:
    """Floor at k less that at the least k; identified even where the floors are not."""

    k: int
    difference: float
    interval: Interval


@dataclass(frozen=True, eq=False)
class Law:
    """A fitted law.

    Attributes
    ----------
    config, runs, dropped
        What it was made from; `dropped` are runs without a loss.
    form
        With its terms.
    parameters
        With intervals, or with why they have none.
    estimate, draws
        Exponents and coefficients in the order of `Form.names`, of all runs and of each bootstrap draw: for
        predictions. Those that are not identified mean nothing one by one.
    deviation
        Of the residuals.
    noise, huber, compared, power_law, effects, influence
        See the modules that make them; `power_law` says why there is none in k. Huber estimates are those of
        identified parameters.
    cost
        FLOPs of a training.
    parabolas, trends, envelopes
        From budgets; an envelope is exponent and intercept of log N* by k.
    predictions, predictions_why
        Of the largest runs, or why there are none.
    repeats
        Where it was asked for.
    refusals
        Why there is no frontier; empty where there is one.
    """

    config: LawConfig
    runs: Runs
    dropped: list[str]
    form: Form
    parameters: list[Parameter]
    estimate: Float64[np.ndarray, " p"]
    draws: Float64[np.ndarray, "r p"]
    deviation: float
    noise: Noise
    huber: dict[str, float]
    compared: list[Compared]
    power_law: str
    effects: list[Effect]
    influence: list[Influence]
    cost: Cost
    parabolas: list[Parabola]
    trends: list[Trend]
    envelopes: dict[int, tuple[float, float]]
    predictions: list[Prediction]
    predictions_why: str
    repeats: Repeats | None
    refusals: list[str]

    @cached_property
    def design(self) -> Design:
        return design_of(self.runs, self.config)

    @cached_property
    def fitted(self) -> Float64[np.ndarray, " n"]:
        """Loss that the law gives every run."""
        return predict(self.form, self.design, self.estimate[None])[0]

    @property
    def lack_of_fit(self) -> float | None:
        """Chance of residuals this large beside the noise between seeds, were the form the true one.

        The F test of lack of fit; None where no seed was repeated, or nothing is left to test by.
        """
        freedom = len(self.runs) - self.form.n_parameters
        seeds = self.noise.freedom
        if not 0 < seeds < freedom or self.noise.deviation == 0:
            return None
        lack = self.deviation**2 * freedom - self.noise.deviation**2 * seeds
        ratio = max(lack, 0.0) / (freedom - seeds) / self.noise.deviation**2
        return float(f_distribution.sf(ratio, freedom - seeds, seeds))

    def budgets(self, k: int) -> Interval:
        """Least and greatest FLOPs of the runs at k."""
        flops = self.runs.flops[self.runs.k == k]
        return float(flops.min()), float(flops.max())

    @property
    def tails(self) -> tuple[float, float]:
        """Quantiles of the draws between which a 95% interval lies."""
        return tails(len(self.runs), self.form.n_parameters)


def design_of(runs: Runs, config: LawConfig) -> Design:
    return Design(getattr(runs, config.size), getattr(runs, config.data), runs.k)


def fit_law(
    runs: Runs,
    config: LawConfig | None = None,
    *,
    dropped: list[str] | None = None,
    where: Path | str = "runs",
    progress: Callable[[int, int, str], None] = lambda done, total, note: None,
) -> Law:
    """Fit a law to runs.

    Parameters
    ----------
    runs
        Of one family.
    config
        How.
    dropped
        Names of runs without a loss, to be kept in the record.
    where
        What to call the runs in an error.
    progress
        Takes steps done, all steps, and a note.

    Raises
    ------
    InputError
        Too few runs for the form, a form that the runs do not allow, or no repeats where they were asked for.
    """
    config = config or LawConfig()
    steps = iter(range(1, 8))
    say = lambda note: progress(next(steps), 7, note)  # noqa: E731
    repeated = _repeated(runs, config, where)
    every, runs = runs, runs.take(~repeated)
    design, loss = design_of(runs, config), runs.loss
    say("the noise")
    form = _chosen(design, config, where)
    _check_enough(form, design, where)
    offset = forms_for(design, ["offset" if len(design.levels) > 1 else "plain"])[0]
    noise, effect = _noise_and_effect(offset, design, runs)
    power_law = no_power_law(design, effect, noise)
    if form.name.startswith("power") and power_law:
        raise InputError(where, f"a power law in k is not identified: {power_law}", "take --form offset")
    say("the fit")
    best = fit(form, design, loss)
    draws = bootstrap(form, design, loss, config.draws, config.seed)
    say("profiles")
    parameters = parameters_of(form, design, loss, best, draws)
    known = [form.names.index(p.name) for p in parameters if not p.why]
    say("Huber")
    huber = dict(
        zip(form.names, fit_huber(form, design, loss, best, delta=config.delta).tolist(), strict=True)
    )
    say("other forms")
    compared = _compare(design, loss, power_law, config.seed)
    say("runs left out")
    driving = influence(form, design, loss, runs.name, best, draws, known)
    predictions, predictions_why = predict_largest(
        form, design, runs, budgets=config.held_out, draws=config.draws, seed=config.seed
    )
    say("budgets")
    cost = cost_of(design, runs.cells, runs.flops)
    found, trends = parabolas(design, loss, runs.flops, draws=config.draws, seed=config.seed)
    envelopes = {
        k: line for k in design.levels if (line := envelope(design, loss, runs.flops, k)) is not None
    }
    directions = rank(form, design, best)
    freedom, ends = max(len(runs) - directions, 1), tails(len(runs), directions)
    law = Law(
        config=config,
        runs=runs,
        dropped=list(dropped or ()),
        form=form,
        parameters=parameters,
        estimate=best.parameters[0],
        # As they are written, so that a law read again says the same.
        draws=np.vectorize(lambda value: float(f"{value:.9g}"))(draws.parameters),
        deviation=float(np.sqrt(best.sse[0] / freedom)),
        noise=noise,
        huber={form.names[place]: huber[form.names[place]] for place in known},
        compared=compared,
        power_law=power_law,
        effects=_effects(form, best.parameters, draws.parameters, ends),
        influence=driving,
        cost=cost,
        parabolas=found,
        trends=trends,
        envelopes=envelopes,
        predictions=predictions,
        predictions_why=predictions_why,
        repeats=None,
        refusals=_refusals(parameters, cost),
    )
    return replace(law, repeats=_fit_repeats(law, every.take(repeated))) if config.repeats else law


def _repeated(runs: Runs, config: LawConfig, where: Path | str) -> np.ndarray:
    """Runs that are kept for R*: none where it was not asked for."""
    if not config.repeats:
        return np.zeros(len(runs), bool)
    repeated = runs.epochs > _REPEATED
    if not repeated.any():
        raise InputError(where, "no run has more than one epoch", "leave --repeats out")
    if repeated.all():
        raise InputError(
            where, "every run has more than one epoch", "add runs of fresh data, or leave --repeats out"
        )
    return repeated


def _chosen(design: Design, config: LawConfig, where: Path | str) -> Form:
    if levels(design.size) == levels(design.data) == 1:
        raise InputError(where, "neither N nor D varies", "add runs of other sizes or amounts of data")
    several = len(design.levels) > 1
    name = config.form or ("offset" if several else "plain")
    if name not in FORMS:
        raise InputError("--form", f"{name!r} is none of {', '.join(FORMS)}", "choose one of them")
    if not several and name != "plain":
        raise InputError(where, f"all runs have k = {design.levels[0]}: no form {name}", "take --form plain")
    if several and name == "plain":
        # Runs of different k are different curves: a pooled fit is a comparison and no law.
        raise InputError(where, "the form plain knows no k, and the runs have several", "take --form offset")
    return forms_for(design, [name])[0]


def _check_enough(form: Form, design: Design, where: Path | str) -> None:
    have, need = int(design.configurations.max()) + 1, needed(form, design)
    if have < need:
        raise InputError(
            where,
            f"{have} different (N, D, k) are too few for the form {form.name} ({form.equation})",
            f"it needs {need}, seeds counted once",
        )


def _compare(design: Design, loss: np.ndarray, power_law: str, seed: int) -> list[Compared]:
    """All forms that the runs allow; one that they cannot tell from `offset` is left out."""
    names = [name for name in FORMS if not (name.startswith("power") and power_law)]
    candidates = forms_for(design, names if len(design.levels) > 1 else ["plain"])
    configurations = int(design.configurations.max()) + 1
    found = {
        form.name: compare(form, design, loss, seed)
        for form in candidates
        if configurations >= needed(form, design)
    }
    least = found["offset"].parameters if "offset" in found else 0
    return [
        each for name, each in found.items() if not (name.startswith("offset_") and each.parameters == least)
    ]


def _noise_and_effect(offset: Form, design: Design, runs: Runs) -> tuple[Noise, float]:
    best, loss = fit(offset, design, runs.loss), runs.loss
    freedom = max(len(loss) - rank(offset, design, best), 1)
    # Runs that went on for longer are no repeats of those that did not, whatever D counts.
    both = np.stack([design.configurations, binned(runs.cells)])
    repeats = np.unique(both, axis=1, return_inverse=True)[1].reshape(-1)
    noise = noise_of(loss, repeats, float(np.sqrt(best.sse[0] / freedom)))
    floors = [
        value for term, value in zip(offset.terms, best.coefficients[0], strict=True) if term.name[0] == "E"
    ]
    return noise, float(np.ptp(floors))


def _effects(form: Form, best: np.ndarray, draws: np.ndarray, ends: tuple[float, float]) -> list[Effect]:
    places = [place for place, name in enumerate(form.names) if name.startswith("E[")]
    found = []
    for place in places[1:]:
        drawn = draws[:, place] - draws[:, places[0]]
        low, high = np.quantile(drawn, ends)
        level = form.terms[place - len(form.exponents)].level
        assert level is not None
        found.append(Effect(level, float(best[0, place] - best[0, places[0]]), (float(low), float(high))))
    return found


def _refusals(parameters: list[Parameter], cost: Cost) -> list[str]:
    """Why no frontier can be drawn."""
    found = [f"{p.name}: {p.why}" for p in parameters if p.why and p.name[0] in "abAB"]
    return found + ([cost.refusal] if cost.refusal else [])


def _fit_repeats(law: Law, repeated: Runs) -> Repeats:
    """R* from repeated runs, D counted as the law's D: that unit times or over the epochs."""
    given = getattr(repeated, law.config.data)
    unique, total = (
        (given, given * repeated.epochs)
        if law.config.data == "unique_cells"
        else (given / repeated.epochs, given)
    )
    known = np.isin(repeated.k, law.design.levels)
    if law.form.exponents[:2] != ("alpha", "beta") or law.refusals or not known.all():
        why = "the law of fresh data is not identified" if known.all() else "k that fresh runs do not have"
        return Repeats(None, None, why, None, None, why, len(repeated))
    at = np.stack([law.form.at(int(k), law.estimate[None])[0] for k in repeated.k])
    alpha, beta = law.estimate[:2].tolist()
    size = getattr(repeated, law.config.size)
    return fit_repeats(
        size,
        unique,
        total,
        repeated.loss,
        at[:, 0],
        (alpha, beta, float(at[:, 1].mean()), float(at[:, 2].mean())),
        draws=min(law.config.draws, 200),
        seed=law.config.seed,
    )
