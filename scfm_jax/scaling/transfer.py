"""Learning rate, batch and schedule of a large run from those of small ones, by a stated rule.

The best peak rate is taken as a power law of the number of parameters, as in the fits of Bjorck et al.
("Scaling Optimal LR Across Token Horizons", ICLR 2025) and Li et al. ("Predictable Scale: Part I, Step Law",
2025), and of the batch, for which the square root is the rule of Adam (Malladi et al., "On the SDEs and
Scaling Rules for Adaptive Gradient Algorithms", NeurIPS 2022). The batch is a power law of the data alone, as
in Li et al. and in Bergsma et al. ("Power Lines", 2025). Both papers on rates find that the best one also
depends on the length of the run: fit and use a rule at like lengths, or see what that costs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Float64

from scfm_jax.errors import InputError, check_least
from scfm_jax.training.config import OptimiserConfig

_POINTS, _LEAST_POINTS = 5, 3  # rates that a parabola goes through


@dataclass(frozen=True)
class TransferRule:
    """Which rate, batch and schedule a run gets; plain numbers, for JSON.

    Attributes
    ----------
    rate, size, batch
        The best peak rate at so many parameters and samples a batch.
    size_exponent, batch_exponent
        The rate is ``rate * (N / size)**-size_exponent * (B / batch)**batch_exponent``.
    data, data_exponent, least_batch, most_batch
        The batch is ``batch * (D / data)**data_exponent``, rounded to a power of two and held between two
        powers of two; `data` counts what the caller counts, such as the centre cells that training goes
        through.
    warmup_share
        Warm-up, of the steps.
    initial_share, final_share
        Rates at step 0 and at the end, of the peak (initial: published for AIDO.Tissue; final: ours).
    """

    rate: float
    size: float
    batch: float
    size_exponent: float = 0.0
    batch_exponent: float = 0.5
    data: float = 1.0
    data_exponent: float = 0.0
    least_batch: int = 1
    most_batch: int = 2**20
    warmup_share: float = 0.05
    initial_share: float = 0.1
    final_share: float = 0.1

    def __post_init__(self) -> None:
        for name in ("rate", "size", "batch", "data"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, not a number over 0")
        for name in ("size_exponent", "batch_exponent", "data_exponent"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)}, not a number")
        check_least(self, 1, "least_batch")
        check_least(self, self.least_batch, "most_batch")
        check_least(self, 0, "warmup_share", "initial_share", "final_share")
        for name in ("least_batch", "most_batch"):
            if getattr(self, name).bit_count() != 1:
                raise ValueError(f"{name} is {getattr(self, name)}, not a power of two")
        for name in ("warmup_share", "initial_share", "final_share"):
            if getattr(self, name) > 1:
                raise ValueError(f"{name} is {getattr(self, name)}, over 1")

    def peak_rate(self, parameters: float, batch: float) -> float:
        """The peak rate of a model of so many parameters at so many samples a batch."""
        of_size = (parameters / self.size) ** -self.size_exponent
        return self.rate * of_size * (batch / self.batch) ** self.batch_exponent

    def batch_size(self, data: float) -> int:
        """Samples a batch of a run over so much data, a power of two."""
        power = round(math.log2(self.batch) + self.data_exponent * math.log2(data / self.data))
        return min(max(2 ** max(power, 0), self.least_batch), self.most_batch)

    def optimiser(
        self, config: OptimiserConfig, *, parameters: float, batch: int, steps: int
    ) -> OptimiserConfig:
        """`config` for so many steps, with the rates of this rule and a schedule of that length."""
        peak = self.peak_rate(parameters, batch)
        return replace(
            config,
            steps=steps,
            schedule_steps=0,
            warmup_steps=round(self.warmup_share * steps),
            initial_rate=self.initial_share * peak,
            peak_rate=peak,
            final_rate=self.final_share * peak,
        )


@dataclass(frozen=True)
class Vertex:
    """The best rate of one size and batch: the vertex of a parabola of the loss in log rate.

    Attributes
    ----------
    parameters, batch
        Of the runs.
    rate, loss
        At the vertex; None where it is refused.
    error
        Standard error of the log of `rate`, by the scatter around the parabola; None where no point is left
        to tell it.
    rates
        Different rates that the parabola goes through.
    left_out
        Runs at rates where any run diverged.
    why
        Why there is no vertex; empty where there is one.
    """

    parameters: float
    batch: float
    rate: float | None
    loss: float | None
    error: float | None
    rates: int
    left_out: int
    why: str = ""


@dataclass(frozen=True)
class FittedRule:
    """A rule that a grid of runs gave.

    Attributes
    ----------
    rule
        The rule.
    log_rate_error, size_exponent_error, batch_exponent_error
        Standard errors, of the log of ``rule.rate`` and of the exponents; None where the grid tells none, or
        an exponent was not fitted.
    vertices
        Every size and batch of the grid, refused ones too.
    notes
        What was not fitted or not used, and why, a sentence each.
    """

    rule: TransferRule
    log_rate_error: float | None
    size_exponent_error: float | None
    batch_exponent_error: float | None
    vertices: tuple[Vertex, ...]
    notes: tuple[str, ...]


def fit_rates(
    parameters: Float[np.ndarray, " n"],
    batch: Float[np.ndarray, " n"],
    peak_rate: Float[np.ndarray, " n"],
    loss: Float[np.ndarray, " n"],
    *,
    base: TransferRule,
    where: str = "rates",
) -> FittedRule:
    """Fit a rule to a small grid of runs.

    For each size and batch a parabola of the loss in log rate goes through the five rates nearest to the best
    one and those on either side of it, or as many as there are, at least three. The logs of the rates at the
    vertices are then a line in log size, and in log batch where several batches were run, by least squares.
    Rates at which a run diverged (its loss is no number) are left out and counted: the mean of those that
    survived would flatter them.

    Parameters
    ----------
    parameters, batch, peak_rate, loss
        Of each run; runs alike but for the seed are averaged.
    base
        What the grid does not tell: its `size` and `batch` are where the fitted rate holds, and its
        `batch_exponent` stays where the grid tells none. With one size `size_exponent` is 0.
    where
        What an error names: the file of the grid.

    Raises
    ------
    InputError
        Columns that differ in length, hold no runs or numbers that are not over 0, or no vertex at all.

    Notes
    -----
    Standard errors of the line come from the scatter of the vertices where there are more than the line
    needs, else from the errors of the vertices, where all have one.
    """
    runs = _checked(parameters, batch, peak_rate, loss, where)
    vertices = tuple(_vertices(*runs))
    good = [vertex for vertex in vertices if not vertex.why]
    refused = [f"N = {each.parameters:g}, B = {each.batch:g}: {each.why}" for each in vertices if each.why]
    if not good:
        raise InputError(where, f"no best rate in the grid: {'; '.join(refused)}", "run more rates")
    notes = [f"not used: {reason}" for reason in refused]
    if lost := sum(vertex.left_out for vertex in vertices):
        notes.append(f"left out: {lost} runs at rates where a run diverged")
    size = np.log([vertex.parameters / base.size for vertex in good])
    amount = np.log([vertex.batch / base.batch for vertex in good])
    target = np.log([vertex.rate or math.nan for vertex in good])
    columns = {"log_rate": np.ones(len(good))}
    if np.ptp(size) > 0:
        columns["size_exponent"] = -size
    else:
        notes.append("size_exponent is 0: best rates of one size only")
    both = np.column_stack([*columns.values(), amount])
    if np.ptp(amount) > 0 and np.linalg.matrix_rank(both) == both.shape[1]:
        columns["batch_exponent"] = amount
    else:
        target = target - base.batch_exponent * amount
        only = "the batch varies with the size only" if np.ptp(amount) > 0 else "best rates of one batch only"
        notes.append(f"batch_exponent is {base.batch_exponent:g}, as given: {only}")
    design = np.column_stack([*columns.values()])
    fitted, *_ = np.linalg.lstsq(design, target)
    values = dict(zip(columns, fitted.tolist(), strict=True))
    spread = _errors(design, target - design @ fitted, [vertex.error for vertex in good])
    errors = dict(zip(columns, spread, strict=True))
    rule = replace(
        base,
        rate=math.exp(values["log_rate"]),
        size_exponent=values.get("size_exponent", 0.0),
        batch_exponent=values.get("batch_exponent", base.batch_exponent),
    )
    return FittedRule(
        rule,
        errors["log_rate"],
        errors.get("size_exponent"),
        errors.get("batch_exponent"),
        vertices,
        tuple(notes),
    )


def _checked(
    parameters: np.ndarray, batch: np.ndarray, rate: np.ndarray, loss: np.ndarray, where: str
) -> tuple[Float64[np.ndarray, " n"], ...]:
    columns = {"parameters": parameters, "batch": batch, "peak_rate": rate, "loss": loss}
    runs = {name: np.asarray(values, np.float64) for name, values in columns.items()}
    shapes = {values.shape for values in runs.values()}
    if shapes == {(0,)}:
        raise InputError(where, "holds no runs", "run a sweep over rates")
    if len(shapes) > 1 or np.ndim(loss) != 1:
        raise InputError(where, f"columns are of shapes {sorted(shapes)}", "give one value for each run")
    for name in ("parameters", "batch", "peak_rate"):
        if not (np.isfinite(runs[name]) & (runs[name] > 0)).all():
            raise InputError(where, f"{name} has a value that is not over 0", "mend these runs")
    return tuple(runs.values())


def _vertices(
    parameters: Float64[np.ndarray, " n"],
    batch: Float64[np.ndarray, " n"],
    rate: Float64[np.ndarray, " n"],
    loss: Float64[np.ndarray, " n"],
) -> Iterator[Vertex]:
    for n, b in np.unique(np.column_stack([parameters, batch]), axis=0).tolist():
        own = (parameters == n) & (batch == b)
        yield _vertex(n, b, np.log(rate[own]), loss[own])


def _vertex(
    parameters: float, batch: float, log_rate: Float64[np.ndarray, " m"], loss: Float64[np.ndarray, " m"]
) -> Vertex:
    diverged = np.isin(log_rate, log_rate[~np.isfinite(loss)])
    left_out = int(diverged.sum())
    x, y = log_rate[~diverged], loss[~diverged]
    levels, code = np.unique(x, return_inverse=True)

    def refused(why: str) -> Vertex:
        return Vertex(parameters, batch, None, None, None, len(levels), left_out, why)

    if len(levels) < _LEAST_POINTS:
        return refused(f"{len(levels)} rates with a loss, {_LEAST_POINTS} are needed")
    best = int(np.argmin(np.bincount(code, y) / np.bincount(code)))
    if best in (0, len(levels) - 1):
        end = "lowest" if best == 0 else "highest"
        past = " that did not diverge" if best and log_rate.max() > levels[-1] else ""
        return refused(f"the least loss is at the {end} rate{past}, {math.exp(levels[best]):.3g}")
    nearest = np.argsort(np.abs(levels - levels[best]), kind="stable")[:_POINTS]
    # On an uneven grid they may all lie on one side.
    nearest = np.union1d(nearest, [best - 1, best, best + 1])
    near = np.isin(code, nearest)
    centred = x[near] - levels[best]
    design = np.vander(centred, 3)
    (a, b, c), *_ = np.linalg.lstsq(design, y[near])
    if a <= 0:
        return refused("the parabola opens downwards")
    vertex = -b / (2 * a)
    if not centred.min() < vertex < centred.max():
        return refused("the vertex of the parabola lies outside of its rates")
    residual = y[near] - design @ [a, b, c]
    gradient = np.array([[b / (2 * a**2), -1 / (2 * a), 0]])
    (error,) = _errors(design, residual, [None] * len(residual), gradient)
    return Vertex(
        parameters,
        batch,
        rate=math.exp(levels[best] + vertex),
        loss=float(c - b**2 / (4 * a)),
        error=error,
        rates=len(nearest),
        left_out=left_out,
    )


def _errors(
    design: Float64[np.ndarray, "n p"],
    residual: Float64[np.ndarray, " n"],
    known: list[float | None],
    gradients: Float64[np.ndarray, "q p"] | None = None,
) -> list[float | None]:
    """Standard errors of the coefficients of least squares, or of functions of these with such gradients.

    By the scatter of the residuals where there are more than coefficients, else by the `known` errors of what
    was fitted, else None.
    """
    n, p = design.shape
    if n > p:
        variance = np.full(n, residual @ residual / (n - p))
    elif None not in known:
        variance = np.square(np.array(known, np.float64))
    else:
        return [None] * (p if gradients is None else len(gradients))
    inverse = np.linalg.pinv(design)
    covariance = inverse * variance @ inverse.T
    if gradients is None:
        gradients = np.eye(p)
    return np.sqrt(np.einsum("qi,ij,qj->q", gradients, covariance, gradients)).tolist()
