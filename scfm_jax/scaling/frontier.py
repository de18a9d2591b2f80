"""The compute-optimal frontier: the size and the data that a budget of FLOPs is best spent on at each k.

FLOPs are cells x kappa_k N^u, fitted to what the runs report, so that the cost of neighbours counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from scfm_jax.scaling.forms import Design, Form

_WORST_MISFIT = 1.5  # of FLOPs against their power law, a ratio


@dataclass(frozen=True)
class Cost:
    """FLOPs of a training: cells x kappa_k N^u.

    Attributes
    ----------
    exponent
        u.
    factor
        kappa by k.
    passes
        Cells that training goes through for one unit of D, by k: the median of the runs. For unique cells
        about the epochs, for tokens the inverse of a cell's.
    misfit
        The greatest ratio, either way, of a run's FLOPs to these.
    """

    exponent: float
    factor: dict[int, float]
    passes: dict[int, float]
    misfit: float

    @property
    def refusal(self) -> str:
        """Why no frontier can rest on it; empty where one can."""
        if self.misfit <= _WORST_MISFIT:
            return ""
        return f"FLOPs are up to {self.misfit:.2f} times off their power law of N"

    def flops(self, size: float, data: float, k: int) -> float:
        """Of a training at one N, D and k."""
        return self.factor[k] * self.passes[k] * size**self.exponent * data


def cost_of(design: Design, cells: Float64[np.ndarray, " n"], flops: Float64[np.ndarray, " n"]) -> Cost:
    """Fit FLOPs a cell by least squares on logarithms; u is 1 where N does not vary."""
    of_cell = np.log(flops / cells)
    size, ks = np.log(design.size), design.levels
    at = [design.k == k for k in ks]
    within = size.copy()
    outcome = of_cell.copy()
    for mask in at:
        within[mask] -= size[mask].mean()
        outcome[mask] -= of_cell[mask].mean()
    square = float(within @ within)
    u = float(within @ outcome / square) if square > 0 else 1.0
    level = [float((of_cell[mask] - u * size[mask]).mean()) for mask in at]
    fitted = u * size + np.select(at, level)
    return Cost(
        u,
        dict(zip(ks, np.exp(level).tolist(), strict=True)),
        {k: float(np.median(cells[mask] / design.data[mask])) for k, mask in zip(ks, at, strict=True)},
        float(np.exp(np.abs(of_cell - fitted).max())),
    )


@dataclass(frozen=True, eq=False)
class Optimum:
    """The best N and D at one k, for every fit and every budget."""

    size: Float64[np.ndarray, "r c"]
    data: Float64[np.ndarray, "r c"]
    loss: Float64[np.ndarray, "r c"]


def optimum(
    form: Form,
    parameters: Float64[np.ndarray, "r p"],
    cost: Cost,
    k: int,
    budgets: Float64[np.ndarray, " c"],
) -> Optimum:
    """Least loss under kappa_k N^u passes D = budget, in closed form.

    At the optimum alpha A / N^alpha = u beta B / D^beta. NaN where A or B is 0, and no optimum is.
    """
    alpha, beta = (parameters[:, [form.exponents.index(name)]] for name in ("alpha", "beta"))
    floor, a, b = (column[:, None] for column in form.at(k, parameters).T)
    u, unit = cost.exponent, cost.factor[k] * cost.passes[k]
    with np.errstate(divide="ignore", invalid="ignore"):
        log_size = (np.log(alpha * a / (u * beta * b)) + beta * np.log(budgets / unit)) / (alpha + u * beta)
        log_data = np.log(budgets / unit) - u * log_size
        loss = floor + a * np.exp(-alpha * log_size) + b * np.exp(-beta * log_data)
    bad = ~np.isfinite(log_size)
    return Optimum(*(np.where(bad, np.nan, each) for each in (np.exp(log_size), np.exp(log_data), loss)))
