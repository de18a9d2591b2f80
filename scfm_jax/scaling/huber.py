"""The second estimator: Huber's loss on the logarithm of the loss, by L-BFGS from many starts.

Approach 3 of Hoffmann et al., arXiv:2203.15556 (2022), with a floor for each k or a power law in k beside.
The losses are summed and not averaged: averaged, L-BFGS stops early (Besiroglu et al., arXiv:2404.10102,
2024).
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64
from scipy.optimize import minimize

from scfm_jax.scaling.forms import Design, Form, predict
from scfm_jax.scaling.least_squares import Fitted

DELTA = 1e-3
_STARTS = 8
_WIDE = 60.0  # a coefficient's logarithm may go so far from what the losses suggest
_LEAST = 1e-12  # of a coefficient, in units of its column: its logarithm is searched


def fit_huber(
    form: Form,
    design: Design,
    loss: Float64[np.ndarray, " n"],
    near: Fitted,
    *,
    delta: float = DELTA,
    seed: int = 0,
) -> Float64[np.ndarray, " p"]:
    """Exponents and coefficients, in the order of `Form.names`.

    Parameters
    ----------
    near
        A least-squares fit: the first start, and the others lie around it and over the whole range of
        exponents.
    delta
        Of log loss, where squares give way to absolute values.
    seed
        Of the starts.
    """
    q, p = len(form.exponents), len(form.terms)
    low, high = form.bounds
    target = np.log(loss)
    scale = form.columns(design, near.theta)[0].mean(0)
    level = np.log(np.median(loss))

    def objective(x: np.ndarray) -> tuple[float, np.ndarray]:
        columns = form.columns(design, x[None, :q])
        parts = columns * np.exp(x[q:])
        value = parts.sum(-1)[0]
        residual = np.log(value) - target
        inside = np.abs(residual) <= delta
        cost = np.where(inside, residual**2 / 2, delta * (np.abs(residual) - delta / 2)).sum()
        slope = np.clip(residual, -delta, delta) / value
        gradient = np.concatenate([form.slopes(design, x[None, :q], parts)[0], parts[0]], axis=1)
        # In units in which L-BFGS's own tolerances mean something.
        return cost / delta**2, slope @ gradient / delta**2

    rng = np.random.default_rng(seed)
    known = np.maximum(near.coefficients[0], _LEAST * np.median(loss) / scale)
    starts = [np.concatenate([near.theta[0], np.log(known)])]
    while len(starts) < _STARTS:
        theta = rng.uniform(low, high)
        columns = form.columns(design, theta[None])[0].mean(0)
        share = rng.dirichlet(np.ones(p)) + 1e-3
        starts.append(np.concatenate([theta, level + np.log(share) - np.log(columns)]))
    # Beyond these a coefficient is all or nothing, and its exponential overflows.
    middle = level - np.log(scale)
    limits = [*zip(low, high, strict=True), *((value - _WIDE, value + _WIDE) for value in middle)]
    found = [
        minimize(
            objective,
            start,
            jac=True,
            method="L-BFGS-B",
            bounds=limits,
            options={"maxiter": 3000, "maxfun": 6000, "maxcor": 20, "ftol": 1e-14, "gtol": 1e-9},
        )
        for start in starts
    ]
    best = min(found, key=lambda result: result.fun).x
    return np.exp(best)


def huber_cost(
    form: Form,
    design: Design,
    loss: Float64[np.ndarray, " n"],
    parameters: Float64[np.ndarray, " p"],
    delta: float = DELTA,
) -> float:
    """Sum of Huber's losses of the logarithms."""
    residual = np.abs(np.log(predict(form, design, parameters[None])[0]) - np.log(loss))
    return float(np.where(residual <= delta, residual**2 / 2, delta * (residual - delta / 2)).sum())
