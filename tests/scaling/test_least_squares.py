"""Variable projection beside SciPy's solvers."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import curve_fit, least_squares
from scipy.optimize import nnls as scipy_nnls

from scfm_jax.scaling.forms import FORMS, Design, Form, make_form, predict
from scfm_jax.scaling.huber import fit_huber, huber_cost
from scfm_jax.scaling.least_squares import fit, nnls

KS = (0, 1, 2, 4, 8, 16, 32)
TRUE = {
    "alpha": 0.34,
    "beta": 0.28,
    "gamma": 0.8,
    "k0": 3.0,
    "E": 1.69,
    "A": 406.4,
    "B": 410.7,
    "C": 0.9,
    "F": 150.0,
}


def random_design(n: int, ks: tuple[int, ...] = KS, seed: int = 0) -> Design:
    rng = np.random.default_rng(seed)
    return Design(10 ** rng.uniform(6, 10, n), 10 ** rng.uniform(8, 11.5, n), rng.choice(ks, n))


def true_parameters(form: Form) -> np.ndarray:
    """Those above, a little more for every k of a letter."""
    return np.array([TRUE[name.split("[")[0]] * (1 - 0.002 * i) for i, name in enumerate(form.names)])


@pytest.mark.parametrize("p", [1, 2, 3, 5, 8])
def test_nnls_is_scipys(p: int) -> None:
    rng = np.random.default_rng(p)
    x, y = rng.normal(size=(200, 20, p)) + 0.5, rng.normal(size=(200, 20))
    x[50:100] *= 10.0 ** rng.integers(-12, 3, size=(50, 1, p))  # as columns of powers are
    if p > 1:
        x[:20, :, 0] = 0  # as a k that a draw lacks
    found = nnls(np.einsum("bni,bnj->bij", x, x), np.einsum("bni,bn->bi", x, y))
    for one_x, one_y, b in zip(x, y, found, strict=True):
        expected, residual = scipy_nnls(one_x, one_y)
        assert (b >= 0).all()
        assert np.linalg.norm(one_x @ b - one_y) == pytest.approx(residual, rel=1e-9)
        scale = np.linalg.norm(one_x, axis=0)
        np.testing.assert_allclose(b * scale, expected * scale, atol=1e-7)


@pytest.mark.parametrize("name", sorted(FORMS))
def test_slopes_are_differences(name: str) -> None:
    design, form = random_design(30), make_form(name, KS)
    parameters = true_parameters(form)
    theta = np.log(parameters[None, : len(form.exponents)])
    parts = form.columns(design, theta) * parameters[len(form.exponents) :]
    slopes = form.slopes(design, theta, parts)[0]
    for place in range(len(form.exponents)):
        step = np.zeros_like(theta)
        step[0, place] = 1e-6
        above, below = (
            (form.columns(design, theta + sign * step)[0] @ parameters[len(form.exponents) :])
            for sign in (1, -1)
        )
        np.testing.assert_allclose(slopes[:, place], (above - below) / 2e-6, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", sorted(FORMS))
def test_a_surface_without_noise_is_found_again(name: str) -> None:
    design = random_design(300)
    form = make_form(name, KS)
    parameters = true_parameters(form)
    found = fit(form, design, predict(form, design, parameters[None])[0])
    np.testing.assert_allclose(found.parameters[0], parameters, rtol=1e-4)
    assert not found.edge.any()


@pytest.mark.parametrize("seed", range(3))
def test_the_least_squares_are_curve_fits(seed: int) -> None:
    """Started at the truth, SciPy's Levenberg-Marquardt reaches what the grid finds from nothing."""
    rng = np.random.default_rng(seed)
    design, form = random_design(60, (0,), seed), make_form("plain", (0,))
    loss = predict(form, design, np.array([[0.34, 0.28, 1.69, 406.4, 410.7]]))[0] + 0.02 * rng.normal(size=60)

    def surface(_: object, alpha: float, beta: float, e: float, log_a: float, log_b: float) -> np.ndarray:
        return e + np.exp(log_a) / design.size**alpha + np.exp(log_b) / design.data**beta

    start = [0.34, 0.28, 1.69, np.log(406.4), np.log(410.7)]
    expected = curve_fit(surface, np.zeros(60), loss, p0=start, ftol=1e-14, xtol=1e-14)[0]
    expected[3:] = np.exp(expected[3:])
    np.testing.assert_allclose(fit(form, design, loss).parameters[0], expected, rtol=2e-5)


def test_a_weight_is_a_run_that_stands_there_so_often() -> None:
    rng = np.random.default_rng(0)
    design, form = random_design(40, (0, 4)), make_form("offset", (0, 4))
    loss = predict(form, design, true_parameters(form)[None])[0] + 0.02 * rng.normal(size=40)
    weights = rng.multinomial(40, np.full(40, 1 / 40), size=20).astype(float)
    found = fit(form, design, loss, weights)
    for row, parameters, sse in zip(weights, found.parameters, found.sse, strict=True):
        places = np.repeat(np.arange(40), row.astype(int))
        alone = fit(form, design.take(places), loss[places])
        np.testing.assert_allclose(parameters, alone.parameters[0], rtol=1e-4)
        assert sse == pytest.approx(float(alone.sse[0]), rel=1e-8)


def test_no_effect_gives_coefficients_of_zero() -> None:
    """Loss that rises with size has no law of size: non-negative least squares says 0."""
    design, form = random_design(50, (0,)), make_form("plain", (0,))
    loss = 2 + 0.1 * np.log10(design.size) + 410.7 / design.data**0.28
    found = fit(form, design, loss)
    assert found.parameters[0, form.names.index("A")] == 0


@pytest.mark.parametrize("scale", [1e-3, 100.0])
def test_a_loss_in_other_units_has_the_same_law(scale: float) -> None:
    design, form = random_design(60, (0, 4)), make_form("offset", (0, 4))
    noise = 0.003 * np.random.default_rng(0).normal(size=60)
    loss = predict(form, design, true_parameters(form)[None])[0] * np.exp(noise)
    one, other = (fit(form, design, loss * times) for times in (1, scale))
    expected = one.parameters[0] * np.where(np.arange(form.n_parameters) < 2, 1, scale)
    np.testing.assert_allclose(other.parameters[0], expected, rtol=1e-5)
    robust, scaled = fit_huber(form, design, loss, one), fit_huber(form, design, loss * scale, other)
    costs = [huber_cost(form, design, loss, robust), huber_cost(form, design, loss * scale, scaled)]
    assert costs[1] == pytest.approx(costs[0], rel=1e-4)
    np.testing.assert_allclose(scaled[:2], robust[:2], rtol=2e-3)


@pytest.mark.parametrize("name", ["plain", "offset", "power"])
def test_huber_is_scipys(name: str) -> None:
    """Huber's loss of log losses, as scipy.optimize.least_squares has it, with runs that went astray."""
    rng = np.random.default_rng(1)
    ks = (0,) if name == "plain" else KS
    design, form = random_design(120, ks, 1), make_form(name, ks)
    truth = true_parameters(form)
    loss = predict(form, design, truth[None])[0] * np.exp(0.003 * rng.normal(size=120))
    loss[:6] *= 1.2
    q = len(form.exponents)

    def residual(x: np.ndarray) -> np.ndarray:
        return np.log(predict(form, design, np.exp(x)[None])[0]) - np.log(loss)

    start, options = np.log(truth), {"x_scale": "jac", "ftol": 1e-13, "xtol": 1e-13, "gtol": 1e-13}
    expected = least_squares(residual, start, loss="huber", f_scale=1e-3, max_nfev=3000, **options)
    found = fit_huber(form, design, loss, fit(form, design, loss))
    # SciPy's cost is ours: half of rho, scaled alike.
    assert huber_cost(form, design, loss, found) <= expected.cost * (1 + 1e-5)
    np.testing.assert_allclose(found[:q], np.exp(expected.x[:q]), rtol=0.02)
    # Squares are led astray by six runs of 120, Huber's loss is not.
    squares = fit(form, design, loss).parameters[0]
    assert abs(found[0] - 0.34) < abs(squares[0] - 0.34)
