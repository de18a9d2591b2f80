"""Optima straight from the runs: IsoFLOP parabolas, and the envelope of losses over compute.

Approaches 2 and 1 of Hoffmann et al., arXiv:2203.15556 (2022). A parabola in log N is not the shape of a sum
of powers: its vertex is off where alpha and beta differ or sizes lie to one side (docs/scaling.md shows by
how much).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64

from scfm_jax.scaling.forms import Design, binned, levels
from scfm_jax.scaling.intervals import Interval, draw_weights, tails

_SAME_BUDGET = 0.1  # spread of a budget's FLOPs, a share
_SIZES = 4  # of a parabola: one more than it has coefficients
_FEW = 0.05  # of bootstrap draws
_GRID = 500  # budgets of an envelope


@dataclass(frozen=True)
class Parabola:
    """Loss over log N at one budget and one k.

    Attributes
    ----------
    flops, k
        Of its runs, the geometric mean of their FLOPs.
    coefficients
        Loss = c0 + c1 x + c2 x^2 with x = log(N / centre).
    centre
        Geometric mean of N.
    size, data, loss
        At the vertex; None where it is refused.
    intervals
        95%, by a bootstrap over runs, of size, data and loss.
    why
        Why the vertex is no optimum; empty where it is one.
    """

    flops: float
    k: int
    coefficients: tuple[float, float, float]
    centre: float
    size: float | None
    data: float | None
    loss: float | None
    intervals: tuple[Interval, Interval, Interval] | None
    why: str


@dataclass(frozen=True)
class Trend:
    """log optimum = intercept + exponent x log C at one k, over budgets; intervals are 95%."""

    k: int
    size_exponent: float
    data_exponent: float
    size_intercept: float
    data_intercept: float
    size_interval: Interval | None
    data_interval: Interval | None
    budgets: int


def budgets_of(flops: Float64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
    """A number for each budget: runs whose FLOPs lie within a tenth of each other."""
    return binned(flops, _SAME_BUDGET)


def parabolas(
    design: Design,
    loss: Float64[np.ndarray, " n"],
    flops: Float64[np.ndarray, " n"],
    *,
    draws: int,
    seed: int,
) -> tuple[list[Parabola], list[Trend]]:
    """A parabola for every budget and k with four sizes or more, and the trend of vertices at each k."""
    budget = budgets_of(flops)
    found, trends = [], []
    for k in design.levels:
        good: list[tuple[float, np.ndarray]] = []
        runs = 0
        for number in np.unique(budget[design.k == k]):
            inside = np.flatnonzero((design.k == k) & (budget == number))
            if levels(design.size[inside]) < _SIZES:
                continue
            drawn = draw_weights(np.zeros(len(inside)), draws, seed + int(number))
            weights = np.concatenate([np.ones((1, len(inside))), drawn])
            parabola, vertices = _parabola(design.take(inside), loss[inside], flops[inside], weights)
            found.append(parabola)
            if not parabola.why:
                good.append((parabola.flops, vertices))
                runs += len(inside)
        if len(good) >= 2:
            budgets = np.array([flops for flops, _ in good])
            trends.append(_trend(k, budgets, np.stack([v for _, v in good]), runs))
    return found, trends


def best_neighbours(found: list[Parabola]) -> list[tuple[float, int]]:
    """FLOPs, and the k whose vertex is lowest, of every budget that has vertices at two k or more."""
    good = [(parabola.flops, parabola.k, parabola.loss) for parabola in found if parabola.loss is not None]
    budget = binned(np.array([flops for flops, _, _ in good]), _SAME_BUDGET)
    best = []
    for number in np.unique(budget):
        mine = [each for each, at in zip(good, budget, strict=True) if at == number]
        if len(mine) > 1:
            flops, k, _ = min(mine, key=lambda each: each[2])
            best.append((flops, k))
    return best


def _parabola(
    design: Design, loss: np.ndarray, flops: np.ndarray, weights: Float64[np.ndarray, "r n"]
) -> tuple[Parabola, Float64[np.ndarray, "r 3"]]:
    """The fit of all runs, and log N, log D and the loss at the vertex for each row of weights."""
    log_size, log_data = np.log(design.size), np.log(design.data)
    centre = log_size.mean()
    x = log_size - centre
    basis = np.stack([np.ones_like(x), x, x**2], axis=1)
    c = _polynomial(basis, loss, weights)
    # At one budget log D is a line in log N, of slope -u.
    line = _polynomial(basis[:, :2], log_data, weights)
    with np.errstate(divide="ignore", invalid="ignore"):
        at = np.where(c[:, 2] > 0, -c[:, 1] / (2 * c[:, 2]), np.nan)
    vertices = np.stack(
        [centre + at, line[:, 0] + line[:, 1] * at, c[:, 0] + c[:, 1] * at + c[:, 2] * at**2], axis=1
    )
    why = ""
    if not c[0, 2] > 0:
        why = "the curvature is wrong: loss has no minimum over N"
    elif not x.min() < at[0] < x.max():
        why = "the minimum lies at the edge of the sizes"
    solved = np.isfinite(c[1:, 2])
    if not why and (c[1:, 2][solved] <= 0).mean() > _FEW:
        why = "the curvature is wrong in some bootstrap draws: loss hardly bends over N"
    k, mean = int(design.k[0]), float(np.exp(np.log(flops).mean()))
    c0, c1, c2 = c[0].tolist()
    if why:
        return Parabola(mean, k, (c0, c1, c2), float(np.exp(centre)), None, None, None, None, why), vertices
    ends = np.quantile(vertices[1:][solved & np.isfinite(vertices[1:, 0])], tails(len(loss), 3), axis=0)
    ends[:, :2] = np.exp(ends[:, :2])
    size, data = np.exp(vertices[0, :2]).tolist()
    low = float(vertices[0, 2])
    first, second, third = ((float(a), float(b)) for a, b in ends.T)
    intervals = (first, second, third)
    return Parabola(mean, k, (c0, c1, c2), float(np.exp(centre)), size, data, low, intervals, ""), vertices


def _trend(
    k: int, flops: Float64[np.ndarray, " b"], vertices: Float64[np.ndarray, "b r 3"], runs: int
) -> Trend:
    x = np.log(flops)
    # A draw of few sizes has no vertex at some budgets: its line goes through the others.
    there = np.isfinite(vertices[..., 0])
    number = np.maximum(there.sum(0), 1)[:, None]
    y = np.where(there[..., None], vertices[..., :2], 0)
    x0 = np.where(there, x[:, None] - (there * x[:, None]).sum(0) / number[:, 0], 0)
    square = (x0**2).sum(0)[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        slopes = np.einsum("br,brv->rv", x0, y) / np.where(square > 0, square, np.nan)
    intercepts = y.sum(0) / number - slopes * x.mean()
    ends = np.nanquantile(slopes[1:], tails(runs, 3 * len(flops)), axis=0)
    (a, b), (c, d) = slopes[0].tolist(), intercepts[0].tolist()
    # Two budgets give a line and no idea of how far off it is.
    sure = len(flops) > 2
    return Trend(
        k,
        a,
        b,
        c,
        d,
        (float(ends[0, 0]), float(ends[1, 0])) if sure else None,
        (float(ends[0, 1]), float(ends[1, 1])) if sure else None,
        len(flops),
    )


def _polynomial(
    basis: Float64[np.ndarray, "n p"], y: Float64[np.ndarray, " n"], weights: Float64[np.ndarray, "r n"]
) -> Float64[np.ndarray, "r p"]:
    """Weighted least squares; NaN where a draw has too few sizes."""
    gram = np.einsum("rn,ni,nj->rij", weights, basis, basis)
    moment = np.einsum("rn,ni->ri", weights, basis * y[:, None])
    answer = np.full(moment.shape, np.nan)
    scale = np.sqrt(np.einsum("rii->ri", gram))
    scaled = gram / np.where(scale > 0, scale, 1)[:, :, None] / np.where(scale > 0, scale, 1)[:, None, :]
    fine = np.linalg.cond(scaled) < 1e10
    answer[fine] = np.linalg.solve(gram[fine], moment[fine][..., None])[..., 0]
    return answer


def envelope(
    design: Design, loss: Float64[np.ndarray, " n"], flops: Float64[np.ndarray, " n"], k: int
) -> tuple[float, float] | None:
    """Exponent and intercept of log N* over log C, from the size of least loss at each of many budgets.

    Each size that has two runs or more gives a curve of log loss over log FLOPs, linear between its runs.
    Only budgets count where sizes on both sides of the best are measured. None where that leaves fewer than
    two.
    """
    at = design.k == k
    sizes = [size for size in np.unique(design.size[at]) if (at & (design.size == size)).sum() > 1]
    if len(sizes) < 3:
        return None
    x = np.log(flops)
    grid = np.linspace(x[at].min(), x[at].max(), _GRID)
    curves = []
    for size in sizes:
        mine = np.flatnonzero(at & (design.size == size))
        mine = mine[np.argsort(x[mine])]
        curves.append(np.interp(grid, x[mine], np.log(loss[mine]), left=np.nan, right=np.nan))
    table = np.stack(curves)
    known = np.isfinite(table).any(0)
    best = np.where(np.isfinite(table), table, np.inf).argmin(0)
    measured = np.isfinite(np.pad(table, ((1, 1), (0, 0)), constant_values=np.nan))
    everywhere = np.arange(len(grid))
    inner = known & measured[best, everywhere] & measured[best + 2, everywhere]
    if len(np.unique(best[inner])) < 2:
        return None
    slope, intercept = np.polyfit(grid[inner], np.log(np.array(sizes))[best[inner]], 1)
    return float(slope), float(intercept)
