"""How well a design identifies each parameter: bootstrap, profile likelihood, and reasons where not."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64
from scipy.stats import f as f_distribution
from scipy.stats import norm
from scipy.stats import t as t_distribution

from scfm_jax.scaling.forms import Design, Form, levels
from scfm_jax.scaling.least_squares import Fitted, Held, fit, refine

LEVEL = 0.95
# Of the variance of log D, what must be left after log N is known.
_LEAST_OWN_VARIANCE = 0.01
_LEVELS = 3  # of N or D, for an exponent beside a floor
# Trial values of a profile, in standard errors.
_TRIALS = np.geomspace(0.25, 60, 24)
_WIDEST = 3.0  # a standard error of a logarithm
_MOST_OF_GRID = 0.5  # of the logarithms that were searched, what an interval may span
_FARTHEST = 40.0  # from the estimate, a logarithm

Interval = tuple[float, float]


@dataclass(frozen=True)
class Parameter:
    """A parameter of the law.

    Attributes
    ----------
    name
        As the form has it.
    value
        Least squares; None where the design does not identify it.
    bootstrap, profile
        95% intervals.
    why
        Why it is not identified; empty where it is.
    """

    name: str
    value: float | None
    bootstrap: Interval | None
    profile: Interval | None
    why: str = ""


def collinear(design: Design) -> bool:
    """Whether log N all but tells log D, or one of them varies as the other wherever both do."""
    first = np.unique(design.configurations, return_index=True)[1]
    size, data = np.log(design.size[first]), np.log(design.data[first])
    if np.ptp(size) == 0 or np.ptp(data) == 0:
        return False
    return bool(1 - np.corrcoef(size, data)[0, 1] ** 2 < _LEAST_OWN_VARIANCE)


def jacobian(form: Form, design: Design, fitted: Fitted) -> Float64[np.ndarray, "n q+p"]:
    """Derivatives of the loss by logarithms of exponents and by coefficients, at one fit."""
    columns = form.columns(design, fitted.theta)
    slopes = form.slopes(design, fitted.theta, columns * fitted.coefficients[:, None, :])
    return np.concatenate([slopes[0], columns[0]], axis=1)


def rank(form: Form, design: Design, fitted: Fitted) -> int:
    """Directions of the parameters that the design tells apart."""
    rows = jacobian(form, design, fitted)
    scale = np.linalg.norm(rows, axis=0)
    return int(np.linalg.matrix_rank(rows / np.where(scale > 0, scale, 1), tol=1e-7))


def tails(runs: int, parameters: int) -> tuple[float, float]:
    """Quantiles of bootstrap draws between which a 95% interval lies.

    Draws scatter too little by the runs that the parameters take up, and a normal distribution has thinner
    tails than Student's: the expanded percentiles of Hesterberg, The American Statistician 69 (2015), for a
    fit of several parameters.
    """
    freedom = max(runs - parameters, 1)
    wide = np.sqrt(runs / freedom) * t_distribution.ppf((1 + LEVEL) / 2, freedom)
    tail = float(norm.cdf(-wide))
    return tail, 1 - tail


def bootstrap(form: Form, design: Design, loss: Float64[np.ndarray, " n"], draws: int, seed: int) -> Fitted:
    """Fits of runs drawn with replacement within each k, so that no draw lacks one."""
    return fit(form, design, loss, draw_weights(design.k, draws, seed))


def draw_weights(groups: np.ndarray, draws: int, seed: int) -> Float64[np.ndarray, "r n"]:
    """How often each run stands in a draw with replacement within its group."""
    rng = np.random.default_rng(seed)
    weights = np.zeros((draws, len(groups)))
    for group in np.unique(groups):
        inside = np.flatnonzero(groups == group)
        weights[:, inside] = rng.multinomial(len(inside), np.full(len(inside), 1 / len(inside)), size=draws)
    return weights


def profile(
    form: Form, design: Design, loss: Float64[np.ndarray, " n"], best: Fitted, place: int
) -> tuple[float | None, float | None]:
    """Interval of one parameter by profile likelihood; None for an end that stays open.

    The parameter is held at values ever farther from its estimate while all others are fitted; the interval
    ends where the sum of squares exceeds the least by F(1, n - rank) / (n - rank). A floor or a coefficient
    may reach 0: that end is closed, a limit of nature and no want of data.

    Parameters
    ----------
    best
        The fit of all runs.
    place
        Of the parameter, exponents first.
    """
    q = len(form.exponents)
    log = (
        place < q
        or form.terms[place - q].size
        or form.terms[place - q].data
        or form.terms[place - q].neighbours
    )
    value = float(best.parameters[0, place])
    if log and value <= 0:
        return None, None
    freedom = len(loss) - rank(form, design, best)
    error, along = _standard_error(form, design, loss, best, place, freedom)
    if log and place >= q:
        error, along = error / value, along * value
    centre = np.log(value) if log else value
    error = min(error, _WIDEST) if log else min(error, 10 * float(np.ptp(loss)))
    if place < q:
        low, high = form.bounds[:, place]
    else:
        low, high = (centre - _FARTHEST, centre + _FARTHEST) if log else (0.0, float(loss.max()))
    ends = []
    for sign, end in ((-1, low), (1, high)):
        trials = centre + sign * error * _TRIALS
        trials = np.append(trials[(trials > low) & (trials < high)], end)
        start = best.theta + (trials - centre)[:, None] * along
        if place < q:
            start[:, place] = trials
        held = Held(place, np.exp(trials) if log else trials)
        sse = refine(form, design, loss, np.ones((len(trials), len(loss))), start, held).sse
        # The root of the excess is all but linear in the parameter.
        least = float(best.sse[0])
        excess = np.sqrt(np.maximum(sse - least, 0) * freedom / max(least, 1e-300))
        limit = np.sqrt(f_distribution.ppf(LEVEL, 1, freedom))
        crossed = np.flatnonzero(excess > limit)
        if not len(crossed):
            ends.append(0.0 if not log and sign < 0 else None)
            continue
        at = crossed[0]
        x = np.array([centre if at == 0 else trials[at - 1], trials[at]])
        y = np.array([0.0 if at == 0 else excess[at - 1], excess[at]])
        found = float(np.interp(limit, y, x))
        ends.append(float(np.exp(found)) if log else found)
    return ends[0], ends[1]


def _standard_error(
    form: Form, design: Design, loss: np.ndarray, best: Fitted, place: int, freedom: int
) -> tuple[float, Float64[np.ndarray, " q"]]:
    """Of one parameter by the curvature; and how the exponents move along with it."""
    rows = jacobian(form, design, best)
    scale = np.linalg.norm(rows, axis=0)
    scale = np.where(scale > 0, scale, 1)
    inverse = np.linalg.pinv((rows / scale).T @ (rows / scale), rcond=1e-13, hermitian=True)
    covariance = inverse / scale[:, None] / scale[None, :] * float(best.sse[0]) / freedom
    own = float(covariance[place, place])
    if own <= 0:
        return float(np.ptp(loss)), np.zeros(len(form.exponents))
    return float(np.sqrt(own)), covariance[: len(form.exponents), place] / own


def parameters_of(
    form: Form, design: Design, loss: Float64[np.ndarray, " n"], best: Fitted, draws: Fitted
) -> list[Parameter]:
    """Every parameter of the form, with its intervals or with the reason why it has no value."""
    q = len(form.exponents)
    reasons = _structural(form, design)
    at_edge = (draws.edge.mean(0), best.edge[0])
    values = draws.parameters
    ends_at = tails(len(loss), rank(form, design, best))
    found = []
    for place, name in enumerate(form.names):
        why = reasons.get(name, "")
        ends: tuple[float | None, float | None] = (None, None)
        if not why and place < q and _without_effect(form, best, name):
            why = "no effect: the coefficient that it goes with is 0"
        if not why and place < q and at_edge[1][place]:
            why = "the least squares lie at the edge of the grid"
        if not why:
            ends = profile(form, design, loss, best, place)
            if place >= q and name[0] != "E" and best.coefficients[0, place - q] == 0:
                why = "no effect: its coefficient is 0"
            elif None in ends:
                side = "on both sides" if ends == (None, None) else "below" if ends[0] is None else "above"
                why = f"the profile likelihood is open {side}"
            elif place < q and at_edge[0][place] > ends_at[0]:
                why = f"{at_edge[0][place]:.1%} of bootstrap draws lie at the edge of the grid"
        low, high = np.quantile(values[:, place], ends_at)
        if not why and place < q and np.log(high / low) > _MOST_OF_GRID * np.ptp(form.bounds[:, place]):
            # Whether a draw or two lie at the edge is chance, and so is where such an interval ends.
            why = f"its interval, {low:.2g} to {high:.2g}, spans most of the grid"
        if why:
            found.append(Parameter(name, None, None, None, why))
        else:
            value = float(best.parameters[0, place])
            found.append(Parameter(name, value, (float(low), float(high)), (ends[0], ends[1])))  # type: ignore[arg-type]
    # Without its exponent a coefficient means nothing, and a floor is only what the grid's edge makes of it.
    unknown = {parameter.name for parameter in found if parameter.why}
    for axis, exponent in (
        ("size", "alpha"),
        ("data", "beta"),
        ("neighbours", "gamma"),
        ("neighbours", "k0"),
    ):
        for place, parameter in enumerate(found):
            tied = parameter.name in ("gamma", "k0")
            if place >= q:
                term = form.terms[place - q]
                tied = getattr(term, axis) or not (term.size or term.data or term.neighbours)
            elif axis != "neighbours":
                continue
            if exponent in unknown and tied and not parameter.why:
                found[place] = Parameter(parameter.name, None, None, None, f"{exponent} is not identified")
    missing = [(name, why) for name, why in reasons.items() if name not in form.names]
    return [*found, *(Parameter(name, None, None, None, why) for name, why in missing)]


def _without_effect(form: Form, best: Fitted, exponent: str) -> bool:
    axis = {"alpha": "size", "beta": "data"}.get(exponent, "neighbours")
    return not best.coefficients[0, [getattr(term, axis) for term in form.terms]].any()


def _structural(form: Form, design: Design) -> dict[str, str]:
    """Parameters that no noise-free measurement at these points would give."""
    reasons: dict[str, str] = {}
    floors = [term.name for term in form.terms if term.name[0] == "E"]
    for axis, letter, exponent, values in (
        ("size", "A", "alpha", design.size),
        ("data", "B", "beta", design.data),
    ):
        number = levels(values)
        if number >= _LEVELS:
            continue
        what = {"size": "N", "data": "D"}[axis]
        why = f"{number} value{'s' if number > 1 else ''} of {what} only, {_LEVELS} are needed"
        terms = [term.name for term in form.terms if getattr(term, axis)] or [letter]
        reasons |= dict.fromkeys([exponent, *terms], why)
        reasons |= dict.fromkeys(floors, f"a floor cannot be told from {letter}/{what}^{exponent}: {why}")
    if collinear(design):
        why = "N and D vary together, so that their shares cannot be told apart"
        terms = [term.name for term in form.terms if term.size or term.data]
        reasons |= dict.fromkeys(("alpha", "beta", *terms), why)
    return reasons
