"""Intervals hold the truth as often as they say, and what a design cannot tell is not told."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import least_squares
from scipy.stats import f as f_distribution
from scipy.stats import norm
from scipy.stats import t as t_distribution

from scfm_jax.scaling.forms import Design, Form, make_form, predict
from scfm_jax.scaling.intervals import Parameter, bootstrap, draw_weights, parameters_of, profile, tails
from scfm_jax.scaling.least_squares import fit

# Chinchilla's surface, with a power law in k, and one of masked models of single cells.
TRUTH = {"E": 1.69, "alpha": 0.34, "beta": 0.28, "A": 406.4, "B": 410.7}
TRUTH |= {"gamma": 0.9, "k0": 4.0, "C": 1.2, "F": 200.0}
SINGLE_CELL = {"E": 1.44, "alpha": 0.234, "beta": 0.4, "A": 30.0, "B": 600.0}
KS, MANY_KS = (0, 4, 16, 64), (0, 1, 2, 4, 8, 16, 32, 64, 128)


def grid_design(ks: tuple[int, ...], sizes: int = 7, data: int = 6) -> Design:
    points = np.meshgrid(np.geomspace(1e6, 1e10, sizes), np.geomspace(1e8, 3e11, data), ks, indexing="ij")
    size, amount, k = (axis.ravel() for axis in points)
    return Design(size, amount, k.astype(np.int64))


def truth_of(form: Form, truth: dict[str, float] = TRUTH) -> np.ndarray:
    return np.array(
        [truth[name.split("[")[0]] - 0.02 * any(f"k={k}]" in name for k in KS[1:]) for name in form.names]
    )


def measured(
    form: Form, design: Design, noise: float, seed: int, truth: dict[str, float] = TRUTH
) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return predict(form, design, truth_of(form, truth)[None])[0] + noise * rng.normal(size=len(design))


def found(form: Form, design: Design, loss: np.ndarray, draws: int = 200) -> dict[str, Parameter]:
    best = fit(form, design, loss)
    return {
        p.name: p for p in parameters_of(form, design, loss, best, bootstrap(form, design, loss, draws, 0))
    }


def count_covered(
    name: str, ks: tuple[int, ...], repeats: int, draws: int, truth: dict[str, float] = TRUTH
) -> dict[tuple[str, str], int]:
    """Studies whose interval of each kind holds the true value; each identifies every parameter."""
    form, design = make_form(name, ks), grid_design(ks)
    true = dict(zip(form.names, truth_of(form, truth), strict=True))
    inside: dict[tuple[str, str], int] = {}
    for seed in range(repeats):
        loss = measured(form, design, 0.008, seed, truth)
        for parameter in found(form, design, loss, draws).values():
            assert parameter.value is not None, parameter.why
            for kind in ("bootstrap", "profile"):
                low, high = getattr(parameter, kind)
                held = low <= true[parameter.name] <= high
                inside[parameter.name, kind] = inside.get((parameter.name, kind), 0) + held
    return inside


def test_intervals_hold_the_truth() -> None:
    """The test below on fewer studies."""
    inside = count_covered("plain", (0,), 20, 200, SINGLE_CELL)
    assert min(inside.values()) >= 18, inside


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "ks", "truth"),
    [
        ("plain", (0,), TRUTH),
        ("plain", (0,), SINGLE_CELL),
        ("offset", KS, TRUTH),
        ("offset_size", KS, TRUTH),
        ("offset_data", KS, TRUTH),
        ("power", MANY_KS, TRUTH),
        ("power_size", MANY_KS, TRUTH),
    ],
)
def test_intervals_hold_the_truth_in_ninety_of_a_hundred_studies(
    name: str, ks: tuple[int, ...], truth: dict[str, float]
) -> None:
    inside = count_covered(name, ks, 100, 500, truth)
    assert min(inside.values()) >= 90, inside


@pytest.mark.parametrize("name", ["alpha", "beta", "E[k=4]", "A", "B"])
def test_an_end_of_a_profile_is_where_scipys_least_squares_say(name: str) -> None:
    """With the parameter held there, SciPy's least sum of squares exceeds the free one by F's quantile."""
    ks = (0, 4)
    form, design = make_form("offset", ks), grid_design(ks, 5, 4)
    loss = measured(form, design, 0.02, 3)
    best = fit(form, design, loss)
    place = form.names.index(name)
    freedom = len(loss) - form.n_parameters
    limit = float(best.sse[0]) * (1 + f_distribution.ppf(0.95, 1, freedom) / freedom)
    rest = [i for i in range(form.n_parameters) if i != place]
    for end in profile(form, design, loss, best, place):
        assert end is not None

        def residual(x: np.ndarray, end: float = end) -> np.ndarray:
            parameters = np.empty(form.n_parameters)
            parameters[rest], parameters[place] = np.exp(x), end
            return predict(form, design, parameters[None])[0] - loss

        start = np.log(best.parameters[0, rest])
        held = least_squares(
            residual, start, x_scale="jac", ftol=1e-14, xtol=1e-14, gtol=1e-14, max_nfev=5000
        )
        assert 2 * held.cost == pytest.approx(limit, rel=2e-3)


def test_draws_keep_every_group_whole() -> None:
    groups = np.repeat([0, 4, 16], [5, 1, 9])
    weights = draw_weights(groups, 300, 0)
    for group in (0, 4, 16):
        np.testing.assert_array_equal(weights[:, groups == group].sum(1), (groups == group).sum())
    assert np.abs(weights.mean(0) - 1).max() < 0.25


@pytest.mark.parametrize("runs", [6, 42, 10_000])
def test_expanded_percentiles_of_a_mean_are_students_interval(runs: int) -> None:
    """Its draws scatter by the deviation of the runs over n rather than n - 1."""
    low, high = tails(runs, 1)
    draws_deviation = math.sqrt((runs - 1) / runs)
    expected = t_distribution.interval(0.95, runs - 1)
    assert [norm.ppf(low) * draws_deviation, norm.ppf(high) * draws_deviation] == pytest.approx(expected)


def design_of(sizes: list[float], data: list[float]) -> Design:
    size, amount = (axis.ravel() for axis in np.meshgrid(sizes, data, indexing="ij"))
    return Design(size, amount, np.zeros(len(size), np.int64))


def test_one_size_tells_nothing_of_size() -> None:
    design = design_of([1e8], list(np.geomspace(1e8, 1e11, 10)))
    loss = measured(make_form("plain", (0,)), design, 0.005, 0)
    told = found(make_form("plain", (0,), size=False), design, loss)
    assert {name for name, p in told.items() if p.value is None} == {"alpha", "A", "E"}
    assert (
        "1 value of N only, 3 are needed" in told["alpha"].why and "cannot be told from A/N" in told["E"].why
    )
    assert told["beta"].profile is not None and told["beta"].profile[0] < 0.28 < told["beta"].profile[1]


def test_one_amount_of_data_tells_nothing_of_data() -> None:
    design = design_of(list(np.geomspace(1e6, 1e10, 10)), [1e10])
    loss = measured(make_form("plain", (0,)), design, 0.005, 0)
    told = found(make_form("plain", (0,), data=False), design, loss)
    assert {name for name, p in told.items() if p.value is None} == {"beta", "B", "E"}


def test_two_sizes_tell_no_exponent() -> None:
    design = design_of([1e7, 1e9], list(np.geomspace(1e8, 1e11, 8)))
    form = make_form("plain", (0,))
    told = found(form, design, measured(form, design, 0.005, 0))
    assert {name for name, p in told.items() if p.value is None} == {"alpha", "A", "E"}
    assert told["alpha"].why == "2 values of N only, 3 are needed"


def test_sizes_and_data_that_vary_together_are_not_told_apart() -> None:
    size = np.geomspace(1e6, 1e10, 40)
    design = Design(size, 20 * size, np.zeros(40, np.int64))
    form = make_form("plain", (0,))
    told = found(form, design, measured(form, design, 0.001, 0))
    assert {name for name, p in told.items() if p.value is None} == {"alpha", "beta", "A", "B", "E"}
    assert "vary together" in told["alpha"].why


def test_noise_that_hides_the_effect_leaves_the_profile_open() -> None:
    design = design_of(list(np.geomspace(1e9, 4e9, 4)), list(np.geomspace(1e8, 1e11, 8)))
    form = make_form("plain", (0,))
    told = found(form, design, measured(form, design, 0.1, 0))
    assert told["alpha"].value is None
    assert any(word in told["alpha"].why for word in ("open", "edge"))
    assert told["beta"].value is not None


@pytest.mark.parametrize("seed", range(6))
def test_an_interval_over_most_of_the_grid_is_no_number_whatever_the_draws(seed: int) -> None:
    """Sizes that are worth little more than the noise: what the edge of the grid cuts off is chance."""
    design = design_of(list(np.geomspace(3e3, 3e5, 4)), list(np.geomspace(4e3, 4e6, 6)))
    form = make_form("plain", (0,))
    loss = 0.28 + 0.5 / design.size**0.3 + 20 / design.data**0.5
    loss = loss + 0.004 * np.random.default_rng(3).normal(size=len(loss))
    best = fit(form, design, loss)
    for p in parameters_of(form, design, loss, best, bootstrap(form, design, loss, 300, seed)):
        if p.name in ("alpha", "A", "E"):
            assert p.value is None, (p.name, p.bootstrap)
        else:
            assert p.value is not None, p.why


def test_an_exponent_past_the_grid_is_no_number() -> None:
    design = design_of(list(np.geomspace(1e6, 1e10, 6)), list(np.geomspace(1e8, 1e11, 6)))
    loss = 1.69 + 5.0 / design.size**0.001 + 410.7 / design.data**0.28  # all but a constant
    told = found(make_form("plain", (0,)), design, loss + 1e-4 * np.random.default_rng(0).normal(size=36))
    assert told["alpha"].value is None and told["E"].value is None
