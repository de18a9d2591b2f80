"""Variable projection: exponents by a grid and Gauss-Newton, coefficients by non-negative least squares.

Many weighted fits of the same runs are done at once: a bootstrap draw, a run left out and a fold left out are
rows of weights. Golub and Pereyra, SIAM J. Numer. Anal. 10 (1973); non-negative least squares by block
principal pivoting, Kim and Park, SIAM J. Sci. Comput. 33 (2011).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64

from scfm_jax.scaling.forms import Design, Form

GRID = 400  # points, about
_KEPT = 100  # of the grid, those that fit all runs best: where fits of weighted runs look
_NUMBERS = 1 << 21  # in an array, at once
_RIDGE = 1e-13  # of a column's own square: keeps columns that are all but equal solvable
_STEPS, _SMALLEST_STEP = 60, 1e-7
_FULL_EXCHANGES = 3


class Fitted(NamedTuple):
    """Fits, one a row.

    `theta` are logarithms of exponents, `coefficients` those of the form's terms, `sse` the weighted sums of
    squares, and `edge` says which exponents lie at the end of what is looked at.
    """

    theta: Float64[np.ndarray, "r q"]
    coefficients: Float64[np.ndarray, "r p"]
    sse: Float64[np.ndarray, " r"]
    edge: Bool[np.ndarray, "r q"]

    @property
    def parameters(self) -> Float64[np.ndarray, "r q+p"]:
        """Exponents, then coefficients."""
        return np.concatenate([np.exp(self.theta), self.coefficients], axis=1)


class Held(NamedTuple):
    """One parameter of the form, by its place, at a value of its own in every fit."""

    place: int
    values: Float64[np.ndarray, " r"]


def nnls(
    gram: Float64[np.ndarray, "b p p"], moment: Float64[np.ndarray, "b p"]
) -> Float64[np.ndarray, "b p"]:
    """Least b' G b / 2 - h' b over b >= 0, for every G and h.

    A column of zeros gets 0.
    """
    scale = np.sqrt(np.einsum("bpp->bp", gram))
    inverse = np.where(scale > 0, 1 / np.where(scale > 0, scale, 1), 0)
    g = gram * inverse[:, :, None] * inverse[:, None, :]
    h = moment * inverse
    b, p = h.shape
    diagonal = np.arange(p)
    g[:, diagonal, diagonal] = 1 + _RIDGE
    # What rounding leaves must not count as below zero.
    small = 1e-11 * np.maximum(np.abs(h).max(1, initial=0), 1e-300)
    passive = scale > 0
    answer = np.zeros((b, p))
    fewest, left = np.full(b, p + 1), np.full(b, _FULL_EXCHANGES)
    live = np.arange(b)
    for _ in range(10 * p + 10):
        inside = passive[live]
        system = g[live] * (inside[:, :, None] & inside[:, None, :])
        system[:, diagonal, diagonal] = np.where(inside, 1 + _RIDGE, 1)
        x = np.linalg.solve(system, np.where(inside, h[live], 0)[..., None])[..., 0]
        slope = np.einsum("bij,bj->bi", g[live], x) - h[live]
        bad = np.where(inside, x < 0, (slope < -small[live, None]) & (scale[live] > 0))
        count = bad.sum(1)
        answer[live] = np.maximum(x, 0)
        better = count < fewest[live]
        fewest[live] = np.where(better, count, fewest[live])
        left[live] = np.where(better, _FULL_EXCHANGES, left[live] - 1)
        last = p - 1 - bad[:, ::-1].argmax(1)
        one = bad & (diagonal == last[:, None])
        passive[live] = inside ^ np.where((better | (left[live] >= 0))[:, None], bad, one)
        live = live[count > 0]
        if not len(live):
            break
    return answer * inverse


def fit(
    form: Form,
    design: Design,
    loss: Float64[np.ndarray, " n"],
    weights: Float64[np.ndarray, "r n"] | None = None,
) -> Fitted:
    """Least weighted squares for each row of weights; for no weights, the one fit of all runs.

    The first looks over the whole grid. Weighted fits look at the points of it that fit all runs best, and at
    the fit of all runs.
    """
    grid = form.grid(GRID)
    ones = np.ones((1, len(design)))
    _, sse = _on_grid(form, design, loss, ones, grid)
    best = np.argsort(sse[0])
    # One start may end in a side valley.
    starts = grid[best[: min(8, len(best))]]
    tried = refine(form, design, loss, np.repeat(ones, len(starts), axis=0), starts)
    whole = _row(tried, int(np.argmin(tried.sse)))
    if weights is None:
        return whole
    points = np.concatenate([whole.theta, grid[best[:_KEPT]]])
    _, sse = _on_grid(form, design, loss, weights, points)
    return refine(form, design, loss, weights, points[np.argmin(sse, axis=1)])


def refine(
    form: Form,
    design: Design,
    loss: Float64[np.ndarray, " n"],
    weights: Float64[np.ndarray, "r n"],
    start: Float64[np.ndarray, "r q"],
    held: Held | None = None,
) -> Fitted:
    """Gauss-Newton on the exponents from `start`, damped; coefficients are solved for at every step."""
    width = len(form.terms) + len(form.exponents) + 2
    rows = max(1, _NUMBERS // (len(design) * width))
    parts = [
        _refine(
            form,
            design,
            loss,
            weights[at : at + rows],
            start[at : at + rows],
            held and Held(held.place, held.values[at : at + rows]),
        )
        for at in range(0, len(weights), rows)
    ]
    return Fitted(*(np.concatenate(each) for each in zip(*parts, strict=True)))


def _refine(
    form: Form,
    design: Design,
    loss: Float64[np.ndarray, " n"],
    weights: Float64[np.ndarray, "r n"],
    start: Float64[np.ndarray, "r q"],
    held: Held | None,
) -> Fitted:
    low, high = form.bounds
    q = len(low)
    theta = np.clip(start, low, high)
    free = np.ones(q, bool)
    if held is not None and held.place < q:
        free[held.place] = False
        theta[:, held.place] = np.log(held.values)
    term = held.place - q if held is not None and held.place >= q else None

    def solve(at: np.ndarray, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        columns = form.columns(design, theta)
        weighted = columns * weights[at, :, None]
        gram = np.matmul(weighted.transpose(0, 2, 1), columns)
        moment = np.matmul(weighted.transpose(0, 2, 1), loss[:, None])[..., 0]
        if term is None:
            b = nnls(gram, moment)
        else:
            value = held.values[at]  # type: ignore[union-attr]
            rest = np.arange(len(form.terms)) != term
            b = np.empty_like(moment)
            b[:, term] = value
            b[:, rest] = nnls(
                gram[:, rest][:, :, rest], moment[:, rest] - gram[:, rest, term] * value[:, None]
            )
        parts = columns * b[:, None, :]
        residual = loss - parts.sum(-1)
        return b, (weights[at] * residual**2).sum(1), np.concatenate([columns, parts], axis=-1)

    everywhere = np.arange(len(theta))
    b, sse, both = solve(everywhere, theta)
    damping = np.full(len(theta), 1e-3)
    live = everywhere if free.any() else everywhere[:0]
    for _ in range(_STEPS):
        if not len(live):
            break
        step = _step(
            form, design, loss, weights[live], theta[live], b[live], both[live], damping[live], free, term
        )
        trial = np.clip(theta[live] + np.clip(step, -1, 1), low, high)
        if not free.all():
            trial[:, ~free] = theta[live][:, ~free]
        b_new, sse_new, both_new = solve(live, trial)
        lower = sse_new < sse[live]
        gained = np.where(lower, sse[live] - sse_new, 0)
        moved = np.abs(trial - theta[live]).max(1)
        done = (moved < _SMALLEST_STEP) | (lower & (gained <= 1e-13 * sse_new)) | (damping[live] > 1e8)
        damping[live] = np.where(lower, damping[live] / 10, damping[live] * 10)
        chosen = live[lower]
        theta[chosen], b[chosen], sse[chosen] = trial[lower], b_new[lower], sse_new[lower]
        both[chosen] = both_new[lower]
        live = live[~done]
    edge = ((theta <= low + 1e-6) | (theta >= high - 1e-6)) & free
    return Fitted(theta, b, sse, edge)


def _step(
    form: Form,
    design: Design,
    loss: np.ndarray,
    weights: np.ndarray,
    theta: np.ndarray,
    b: np.ndarray,
    both: np.ndarray,
    damping: np.ndarray,
    free: np.ndarray,
    term: int | None,
) -> Float64[np.ndarray, "r q"]:
    """Gauss-Newton's step in theta, coefficients above zero moving along."""
    p = len(form.terms)
    columns, parts = both[..., :p], both[..., p:]
    slopes = form.slopes(design, theta, parts)
    residual = loss - parts.sum(-1)
    moving = b > 0
    if term is not None:
        moving[:, term] = False
    rows = np.concatenate([columns * moving[:, None, :], slopes], axis=-1)
    scale = np.sqrt(np.einsum("rn,rnj->rj", weights, rows**2))
    rows /= np.where(scale > 0, scale, 1)[:, None, :]
    weighted = rows * weights[..., None]
    gram = np.matmul(weighted.transpose(0, 2, 1), rows)
    moment = np.matmul(weighted.transpose(0, 2, 1), residual[..., None])
    diagonal = np.arange(p)
    gram[:, diagonal, diagonal] = np.where(moving, 1 + _RIDGE, 1)
    inner, cross, outer = gram[:, :p, :p], gram[:, :p, p:], gram[:, p:, p:]
    solved = np.linalg.solve(inner, np.concatenate([cross, moment[:, :p]], axis=-1))
    schur = outer - np.matmul(cross.transpose(0, 2, 1), solved[..., :-1])
    slope = moment[:, p:] - np.matmul(cross.transpose(0, 2, 1), solved[..., -1:])
    axis = np.arange(len(free))
    alone = np.maximum(schur[:, axis, axis], 1e-14)
    schur[:, axis, axis] = alone * (1 + damping[:, None])
    schur[:, ~free, :] = 0
    schur[:, :, ~free] = 0
    schur[:, ~free, ~free] = 1
    slope[:, ~free] = 0
    step = np.linalg.solve(schur, slope)[..., 0]
    return step / np.where(scale[:, p:] > 0, scale[:, p:], 1)


def _on_grid(
    form: Form,
    design: Design,
    loss: Float64[np.ndarray, " n"],
    weights: Float64[np.ndarray, "r n"],
    grid: Float64[np.ndarray, "g q"],
) -> tuple[Float64[np.ndarray, "r g p"], Float64[np.ndarray, "r g"]]:
    """Coefficients and sums of squares of every fit at every point: normal equations by one product."""
    p, r = len(form.terms), len(weights)
    first, second = np.triu_indices(p)
    square = weights @ loss**2
    b = np.empty((r, len(grid), p))
    sse = np.empty((r, len(grid)))
    at_once = max(1, _NUMBERS // (max(len(design), r) * (len(first) + p)))
    for start in range(0, len(grid), at_once):
        columns = form.columns(design, grid[start : start + at_once])
        g = len(columns)
        products = np.concatenate(
            [columns[..., first] * columns[..., second], columns * loss[:, None]], axis=-1
        )
        flat = products.transpose(1, 0, 2).reshape(len(design), -1)
        sums = (weights @ flat).reshape(r * g, -1)
        gram = np.empty((r * g, p, p))
        gram[:, first, second] = gram[:, second, first] = sums[:, : len(first)]
        moment = sums[:, len(first) :]
        solved = nnls(gram, moment)
        left = np.einsum("bi,bij,bj->b", solved, gram, solved) - 2 * (solved * moment).sum(1)
        b[:, start : start + g] = solved.reshape(r, g, p)
        sse[:, start : start + g] = square[:, None] + left.reshape(r, g)
    return b, sse


def _row(fitted: Fitted, place: int) -> Fitted:
    return Fitted(*(each[place : place + 1] for each in fitted))
