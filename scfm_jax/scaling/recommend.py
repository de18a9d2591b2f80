"""What to train for a budget: size, data and neighbours on a law's frontier, and the recipe to start from."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
from jaxtyping import Float64

from scfm_jax.errors import InputError
from scfm_jax.models.nicheformer import NicheformerConfig
from scfm_jax.scaling.forms import Design
from scfm_jax.scaling.frontier import optimum
from scfm_jax.scaling.intervals import Interval
from scfm_jax.scaling.law import Law
from scfm_jax.scaling.prediction import single_runs
from scfm_jax.scaling.sizes import Size, size_of
from scfm_jax.training.hardware import ACCELERATORS

FARTHEST = 10.0  # times the largest budget measured
_BUDGETS = 7  # of a frontier that is listed
_OVERRIDE = "add --extrapolate to have an answer all the same"
# Of the published vocabularies; embeddings are not compared where N leaves them out.
_GENES = {"tissue": 19_264, "nicheformer": 20_310}


@dataclass(frozen=True)
class Choice:
    """The best at one k.

    `share` is that of bootstrap draws in which this k is the best of all.
    """

    k: int
    size: float
    data: float
    loss: float
    size_interval: Interval
    data_interval: Interval
    loss_interval: Interval
    share: float


@dataclass(frozen=True)
class Start:
    """The recipe whose size is nearest, and how many times its size is asked for."""

    recipe: str
    parameters: int
    ratio: float


@dataclass(frozen=True)
class Recommendation:
    """What a budget is best spent on.

    Attributes
    ----------
    flops
        The budget.
    choices
        For each k, the best first.
    size_field, data_field
        What N and D are.
    measured
        Least and greatest FLOPs, N and D of the runs.
    remarks
        Where the answer lies beyond what was measured, and anything that was overridden.
    isoflop
        N and D that the vertices of IsoFLOP parabolas lead to at the best k; None where there are no two.
    start
        None where no recipe is of the family.
    """

    flops: float
    choices: list[Choice]
    size_field: str
    data_field: str
    measured: dict[str, Interval]
    remarks: list[str]
    isoflop: tuple[float, float] | None
    start: Start | None


def budget_of(chips: int, hours: float, device: str, mfu: float) -> float:
    """Model FLOPs that so many chips do in so many hours at a share `mfu` of their dense bf16 peak.

    Raises
    ------
    InputError
        Another device, or a number that is out of range.
    """
    if device not in ACCELERATORS:
        raise InputError("--device", f"{device!r} is not known", f"give one of {', '.join(ACCELERATORS)}")
    if chips < 1:
        raise InputError("--chips", f"{chips} is no number of chips", "give 1 or more")
    if not 0 < hours < float("inf"):
        raise InputError("--hours", f"{hours} is no time", "give hours above 0")
    if not 0 < mfu <= 1:
        raise InputError("--mfu", f"{mfu} is no share of the peak", "give a number from 0 to 1")
    return chips * hours * 3600 * ACCELERATORS[device].peak_flops * mfu


def choices_at(
    law: Law, budgets: Float64[np.ndarray, " c"], *, extrapolate: bool = False
) -> list[list[Choice]]:
    """For each budget the best at every k, least loss first.

    A k stands only at budgets that its own runs reach, to within ten times, unless `extrapolate`.
    """
    parameters = np.concatenate([law.estimate[None], law.draws])
    ks = law.design.levels
    found = [optimum(law.form, parameters, law.cost, k, budgets) for k in ks]
    reached = np.stack([extrapolate | (_times_beyond(budgets, law.budgets(k)) <= FARTHEST) for k in ks])
    losses = np.where(reached[:, None], np.stack([each.loss for each in found]), np.nan)
    winner = np.where(np.isfinite(losses), losses, np.inf).argmin(0)[1:]
    rows = []
    for c in range(len(budgets)):
        of_budget = []
        for place, (k, each) in enumerate(zip(ks, found, strict=True)):
            if not reached[place, c]:
                continue
            three = np.stack([each.size[:, c], each.data[:, c], each.loss[:, c]])
            drawn = three[:, 1:][:, np.isfinite(three[2, 1:])]
            ends = np.quantile(drawn, law.tails, axis=1) if drawn.size else np.full((2, 3), np.nan)
            first, second, third = ((float(low), float(high)) for low, high in ends.T)
            size, data, loss = three[:, 0].tolist()
            share = float((winner[:, c] == place).mean())
            of_budget.append(Choice(k, size, data, loss, first, second, third, share))
        rows.append(sorted(of_budget, key=lambda choice: choice.loss))
    return rows


def _times_beyond(flops: Float64[np.ndarray, " c"], measured: Interval) -> Float64[np.ndarray, " c"]:
    """How many times above the greatest or below the least that was measured; 1 or less within."""
    least, greatest = measured
    return np.maximum(flops / greatest, least / flops)


def frontier_of(law: Law) -> list[tuple[float, list[Choice]]]:
    """Choices at budgets over the measured range; none where the law refuses."""
    if law.refusals:
        return []
    budgets = np.geomspace(law.runs.flops.min(), law.runs.flops.max(), _BUDGETS)
    return list(zip(budgets.tolist(), choices_at(law, budgets), strict=True))


def recommend(
    law: Law, flops: float, *, extrapolate: bool = False, where: Path | str = "the law"
) -> Recommendation:
    """The best size, data and neighbours for a budget.

    Parameters
    ----------
    flops
        Model FLOPs of the whole training.
    extrapolate
        Answer where the law refuses to: parameters at the edge of their grid or not identified, FLOPs that
        follow no power law, or past ten times the largest budget measured.

    where
        What to call the law in an error.

    Raises
    ------
    InputError
        A refusal; or, even if asked, a law in which N or D has no effect.
    """
    if not 0 < flops < float("inf"):
        raise InputError("--flops", f"{flops} is no budget", "give FLOPs above 0")
    if law.form.exponents[:2] != ("alpha", "beta"):
        raise InputError(
            where, "; ".join(law.refusals), "measure runs of three sizes and three amounts of data"
        )
    remarks = list[str]()
    if law.refusals:
        if not extrapolate:
            raise InputError(where, "; ".join(law.refusals), _OVERRIDE)
        remarks += law.refusals
    low, high = float(law.runs.flops.min()), float(law.runs.flops.max())
    remarks += _beyond("--flops", "a budget of", flops, (low, high), extrapolate=extrapolate)
    choices = choices_at(law, np.array([flops]), extrapolate=extrapolate)[0]
    for k in sorted(set(law.design.levels) - {choice.k for choice in choices}):
        least, most = law.budgets(k)
        remarks.append(f"k = {k} is left out: it was measured from {least:.3g} to {most:.3g} FLOPs")
    if not choices:
        raise InputError("--flops", "; ".join(remarks), _OVERRIDE)
    best = choices[0]
    if not np.isfinite(best.loss):
        raise InputError(where, "N or D has no effect, so that no optimum is", "measure more runs")
    measured = {
        "flops": (low, high),
        "size": (float(law.design.size.min()), float(law.design.size.max())),
        "data": (float(law.design.data.min()), float(law.design.data.max())),
    }
    for name, value in (("size", best.size), ("data", best.data)):
        least, most = measured[name]
        if not least <= value <= most:
            letter = "N" if name == "size" else "D"
            remarks.append(
                f"{letter} = {value:.3g} lies outside of what was measured, {least:.3g} to {most:.3g}"
            )
    return Recommendation(
        flops=flops,
        choices=choices,
        size_field=law.config.size,
        data_field=law.config.data,
        measured=measured,
        remarks=remarks,
        isoflop=_by_parabolas(law, flops, best.k),
        start=_nearest(law, best.size),
    )


@dataclass(frozen=True)
class RunPrediction:
    """Loss of a single run that is still to be run.

    Attributes
    ----------
    loss
        Expected.
    interval
        95%, the noise between runs included.
    flops
        Model FLOPs of the training, by the law's cost.
    remarks
        Where the run lies beyond what was measured, and what the law leaves open there.
    """

    loss: float
    interval: Interval
    flops: float
    remarks: list[str]


def predict_run(law: Law, size: float, data: float, k: int, *, extrapolate: bool = False) -> RunPrediction:
    """Predict a run that is still to be run.

    Parameters
    ----------
    size, data, k
        N, D and neighbours, counted as the law counts them.
    extrapolate
        Answer past ten times the N, D or FLOPs that were measured at this k, or below a tenth of the least.

    Raises
    ------
    InputError
        A k that was not measured, or a number that is out of range.
    """
    if k not in law.design.levels:
        raise InputError(
            "--k", f"{k} was not measured", f"give one of {', '.join(map(str, law.design.levels))}"
        )
    at, remarks = law.design.k == k, list[str]()
    for flag, what, value, measured in (
        ("--size", "N =", size, law.design.size[at]),
        ("--data", "D =", data, law.design.data[at]),
    ):
        if not 0 < value < float("inf"):
            raise InputError(flag, f"{value} is out of range", "give a number above 0")
        ends = float(measured.min()), float(measured.max())
        remarks += _beyond(flag, what, value, ends, extrapolate=extrapolate)
    flops = law.cost.flops(size, data, k)
    remarks += _beyond("--size", "training FLOPs of", flops, law.budgets(k), extrapolate=extrapolate)
    if remarks:  # within what was measured, nothing rests on a parameter that is not identified
        remarks += law.refusals
    asked = Design(np.array([size], float), np.array([data], float), np.array([k]))
    ((loss, interval),) = single_runs(
        law.form, asked, law.estimate, law.draws, law.deviation, law.tails, law.config.seed
    )
    return RunPrediction(loss, interval, flops, remarks)


def _beyond(flag: str, what: str, value: float, measured: Interval, *, extrapolate: bool) -> list[str]:
    """A remark where a value lies beyond what was measured.

    Raises
    ------
    InputError
        It lies more than ten times beyond, and nobody asked to extrapolate.
    """
    least, greatest = measured
    times = float(_times_beyond(np.array([value]), measured)[0])
    if times <= 1:
        return []
    side = "above the largest" if value > greatest else "below the smallest"
    far = f"{what} {value:.3g} is {times:.3g} times {side} measured ({least:.3g} to {greatest:.3g})"
    if times > FARTHEST and not extrapolate:
        raise InputError(flag, far, _OVERRIDE)
    return [far]


def _by_parabolas(law: Law, flops: float, k: int) -> tuple[float, float] | None:
    for trend in law.trends:
        if trend.k == k:
            size = np.exp(trend.size_intercept + trend.size_exponent * np.log(flops))
            return float(size), float(np.exp(trend.data_intercept + trend.data_exponent * np.log(flops)))
    return None


def _nearest(law: Law, size: float) -> Start | None:
    """Of the recipes in experiments/ that are of the family."""
    starts = [
        Start(recipe, own, size / own)
        for recipe, counted in _recipes(law.runs.family)
        for own in [counted.parameters if law.config.size == "parameters" else counted.without_embeddings]
    ]
    return min(starts, key=lambda start: abs(np.log(start.ratio)), default=None)


@functools.cache
def _recipes(family: str) -> list[tuple[str, Size]]:
    """Recipes of a family, and how large they are; none where it is no family of ours."""
    experiments, found = importlib.import_module("experiments"), []
    for entry in pkgutil.iter_modules(experiments.__path__):
        module: ModuleType = importlib.import_module(f"experiments.{entry.name}")
        if not hasattr(module, "recipe"):
            continue
        config = module.recipe()
        if family == ("nicheformer" if isinstance(config.model, NicheformerConfig) else "tissue"):
            found.append((f"experiments/{entry.name}.py", size_of(config, _GENES[family])))
    return found
