"""Data that is seen again: unique data and repeats as worth ever less, and size past its use for unique data.

Muennighoff et al., arXiv:2305.16264 (2023): U + U R* (1 - exp(-R / R*)) in place of U (1 + R), for data with
R repeats and, with a constant of its own, for parameters beyond those that unique data is worth.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64
from scipy.optimize import minimize

from scfm_jax.scaling.intervals import Interval, tails

# Of R*: below, a repeat is worth nothing, above as much as fresh data.
LEAST, MOST = 0.05, 1e3
_AXIS = np.geomspace(LEAST, MOST, 40)


@dataclass(frozen=True)
class Repeats:
    """Half-lives of repeats, in units of their own: R*_D and R*_N.

    A value is None where the runs do not identify it, with the reason in `why`; intervals are 95%, by a
    bootstrap over the repeated runs.
    """

    data: float | None
    data_interval: Interval | None
    data_why: str
    size: float | None
    size_interval: Interval | None
    size_why: str
    runs: int


def effective(
    unique: Float64[np.ndarray, "*n"],
    total: Float64[np.ndarray, "*n"],
    half: Float64[np.ndarray, "*n"] | float,
) -> Float64[np.ndarray, "*n"]:
    """What `total` is worth, of which `unique` is new: `unique` (1 + R* (1 - exp(-R / R*))), R its repeats.

    No more than `total`, which it is where nothing is repeated or R* is without bound.
    """
    known = np.minimum(unique, total)
    again = total / known - 1
    return known * (1 + half * -np.expm1(-again / half))


def worth_of_unique(
    unique: Float64[np.ndarray, " n"], alpha: float, beta: float, a: float, b: float
) -> Float64[np.ndarray, " n"]:
    """The size that is compute-optimal for so much data seen once, where FLOPs go as N D."""
    return (alpha * a / (beta * b) * unique**beta) ** (1 / alpha)


def fit_repeats(
    size: Float64[np.ndarray, " n"],
    unique: Float64[np.ndarray, " n"],
    total: Float64[np.ndarray, " n"],
    loss: Float64[np.ndarray, " n"],
    floor: Float64[np.ndarray, " n"],
    law: tuple[float, float, float, float],
    *,
    draws: int,
    seed: int,
) -> Repeats:
    """Fit R*_D and R*_N to repeated runs, the law of fresh data given; least squares on log loss.

    Parameters
    ----------
    size, unique, total, loss
        N, different data, data seen, and the loss of every repeated run.
    floor
        E at the k of each.
    law
        alpha, beta, A and B of runs that repeat nothing.
    """
    alpha, beta, a, b = law
    base = worth_of_unique(unique, alpha, beta, a, b)
    target = np.log(loss)

    def residual(half_data: np.ndarray, half_size: np.ndarray) -> Float64[np.ndarray, "... n"]:
        data = effective(unique, total, half_data[..., None])
        used = effective(base, size, half_size[..., None])
        return np.log(floor + a / used**alpha + b / data**beta) - target

    grid = np.stack(np.meshgrid(_AXIS, _AXIS, indexing="ij"), -1).reshape(-1, 2)
    square = residual(grid[:, 0], grid[:, 1]) ** 2
    rng = np.random.default_rng(seed)
    n = len(loss)
    weights = np.concatenate([np.ones((1, n)), rng.multinomial(n, np.full(n, 1 / n), size=draws)])
    best = grid[np.argmin(weights @ square.T, axis=1)]
    limits = [(np.log(LEAST), np.log(MOST))] * 2

    def refined(weight: np.ndarray, start: np.ndarray) -> np.ndarray:
        def cost(x: np.ndarray) -> float:
            # In units in which L-BFGS's own tolerances mean something.
            return float(weight @ residual(np.exp(x[:1]), np.exp(x[1:]))[0] ** 2) / n * 1e6

        return np.exp(minimize(cost, np.log(start), method="L-BFGS-B", bounds=limits).x)

    found = np.stack([refined(weight, start) for weight, start in zip(weights, best, strict=True)])
    beyond = (size > base).sum()
    values: list[tuple[float | None, Interval | None, str]] = []
    for place, (what, count) in enumerate(
        (("repeat data", n), ("are larger than unique data is worth", beyond))
    ):
        low, high = np.quantile(found[1:, place], tails(n, 2))
        why = ""
        if count < 3:
            why = f"{count} runs {what}, 3 are needed"
        elif low <= LEAST * 1.01 or high >= MOST * 0.99:
            why = "its interval reaches the edge of what is looked at"
        values.append((None, None, why) if why else (float(found[0, place]), (float(low), float(high)), ""))
    return Repeats(*values[0], *values[1], runs=n)
