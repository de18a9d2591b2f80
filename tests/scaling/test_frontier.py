"""What a budget is best spent on: by parabolas, by the envelope, by the law; and what is refused."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from surfaces import ALPHA, BETA, FEW, A, B, grid, value, with_neighbours

from scfm_jax.errors import InputError
from scfm_jax.scaling.forms import Design, make_form
from scfm_jax.scaling.frontier import Cost, cost_of, optimum
from scfm_jax.scaling.isoflop import best_neighbours, budgets_of, envelope, parabolas
from scfm_jax.scaling.law import Law, fit_law
from scfm_jax.scaling.least_squares import fit
from scfm_jax.scaling.recommend import budget_of, choices_at, recommend
from scfm_jax.scaling.runs import runs_of
from scfm_jax.scaling.sizes import size_of
from scfm_jax.training.config import load_recipe

Rows = Callable[..., list[dict[str, Any]]]


def optimal_size(flops: float) -> float:
    """N* of Chinchilla's surface by SciPy, on C = 6 N D."""

    def loss(log_size: float) -> float:
        size = math.exp(log_size)
        return A / size**ALPHA + B / (flops / 6 / size) ** BETA

    return math.exp(minimize_scalar(loss, bounds=(5, 35), method="bounded", options={"xatol": 1e-10}).x)


def isoflop_design(
    centre: float, half_width: float, budgets: np.ndarray, sizes: int = 9
) -> tuple[Design, np.ndarray, np.ndarray]:
    """Sizes around `centre` times the best, on budgets; Chinchilla's loss without noise, and FLOPs."""
    flops = np.repeat(budgets, sizes)
    best = np.repeat([optimal_size(budget) for budget in budgets], sizes)
    size = best * centre * np.exp(np.tile(np.linspace(-half_width, half_width, sizes), len(budgets)))
    data = flops / (6 * size)
    return Design(size, data, np.zeros(len(size), np.int64)), 1.69 + A / size**ALPHA + B / data**BETA, flops


def test_three_approaches_agree_on_chinchillas_surface(make_rows: Rows) -> None:
    """The exponent of N* is beta / (alpha + beta) = .4516 by the law, by parabolas and by the envelope."""
    exact = BETA / (ALPHA + BETA)
    budgets = np.geomspace(1e18, 1e22, 9)
    design, loss, flops = isoflop_design(1.0, 1.2, budgets)
    _, (trend,) = parabolas(design, loss, flops, draws=20, seed=0)
    assert trend.size_exponent == pytest.approx(exact, abs=0.003)
    assert trend.size_exponent + trend.data_exponent == pytest.approx(1, abs=1e-9)
    assert math.exp(trend.size_intercept + trend.size_exponent * math.log(1e20)) == pytest.approx(
        optimal_size(1e20), rel=0.05
    )
    # Curves of loss over compute for each size, the envelope of which gives N*.
    points = [(n, c / (6 * n), 0) for n in np.geomspace(1e7, 1e11, 33) for c in np.geomspace(1e18, 1e22, 41)]
    runs = runs_of(make_rows(points), "runs")
    curves = Design(runs.parameters_without_embeddings, runs.cells, runs.k)
    line = envelope(curves, runs.loss, runs.flops, 0)
    assert line is not None and line[0] == pytest.approx(exact, abs=0.01)
    fitted = fit_law(runs.take(np.arange(0, len(runs), 9)), FEW)
    assert value(fitted, "beta") / (value(fitted, "alpha") + value(fitted, "beta")) == pytest.approx(
        exact, rel=1e-4
    )
    assert value(fitted, "E") == pytest.approx(1.69, rel=1e-4)


def test_parabolas_are_biased_where_the_sum_of_powers_is_not(make_rows: Rows) -> None:
    """Approach 2's known bias, without noise: it grows with the width of the sizes and with their offset."""
    budgets = np.geomspace(1e18, 1e22, 5)

    def off(centre: float, half_width: float) -> float:
        found, _ = parabolas(*isoflop_design(centre, half_width, budgets), draws=20, seed=0)
        sizes = np.array([parabola.size for parabola in found], np.float64)
        ratios = sizes / [optimal_size(budget) for budget in budgets]
        assert np.ptp(ratios) < 1e-6  # all budgets are off alike, so that the exponent is not
        return float(ratios[0] - 1)

    assert off(1.0, 0.3) == pytest.approx(0.0007, abs=2e-4)
    assert off(1.0, 1.2) == pytest.approx(0.011, abs=2e-3)
    assert off(1.0, 2.5) == pytest.approx(0.047, abs=2e-3)
    assert off(10.0, 2.5) == pytest.approx(0.21, abs=0.01)
    assert off(0.1, 2.5) == pytest.approx(-0.30, abs=0.01)
    # Sizes that fall behind as budgets grow bias the exponent too; the law of the same runs is right.
    parts = [
        isoflop_design(centre, 2.5, budgets[[i]])
        for i, centre in enumerate(np.geomspace(1, 0.2, len(budgets)))
    ]
    design = Design(
        *(np.concatenate([getattr(part[0], name) for part in parts]) for name in ("size", "data", "k"))
    )
    loss, flops = (np.concatenate([part[at] for part in parts]) for at in (1, 2))
    exact = BETA / (ALPHA + BETA)
    assert parabolas(design, loss, flops, draws=20, seed=0)[1][0].size_exponent < exact - 0.015
    alpha, beta = fit(make_form("plain", (0,)), design, loss).parameters[0, :2]
    assert beta / (alpha + beta) == pytest.approx(exact, rel=1e-5)


def test_parabolas_without_a_minimum_inside_are_refused() -> None:
    budgets = np.array([1e20])
    for centre, word in ((30.0, "edge"), (0.03, "edge")):
        found, trends = parabolas(*isoflop_design(centre, 1.0, budgets), draws=20, seed=0)
        assert [parabola.size for parabola in found] == [None] and word in found[0].why and trends == []
    design, loss, flops = isoflop_design(1.0, 1.0, budgets)
    found, _ = parabolas(design, 5 - loss, flops, draws=20, seed=0)
    assert "curvature is wrong" in found[0].why and found[0].size is None


def test_budgets_are_runs_of_about_the_same_flops() -> None:
    flops = np.array([1e18, 3e19, 1.04e18, 1.09e18, 1.2e18, 2.9e19])
    np.testing.assert_array_equal(budgets_of(flops), [0, 2, 0, 0, 1, 2])


# ---- the frontier


def test_the_frontier_is_scipys(law: Law) -> None:
    """N*, D* and L* at each k, where neighbours cost k + 1 cells' FLOPs."""
    budget = 3e20
    parameters = dict(zip(law.form.names, law.estimate, strict=True))
    (row,) = choices_at(law, np.array([budget]))
    for choice in row:

        def loss(log_size: float, k: int = choice.k) -> float:
            size = math.exp(log_size)
            data = budget / (6 * (k + 1) * size)
            return float(
                parameters[f"E[k={k}]"]
                + parameters["A"] / size ** parameters["alpha"]
                + parameters["B"] / data ** parameters["beta"]
            )

        best = minimize_scalar(loss, bounds=(5, 35), method="bounded", options={"xatol": 1e-10})
        assert choice.size == pytest.approx(math.exp(best.x), rel=1e-4)
        assert choice.data == pytest.approx(budget / (6 * (choice.k + 1) * choice.size), rel=1e-6)
        assert choice.loss == pytest.approx(best.fun, rel=1e-9)
        assert choice.size_interval[0] < choice.size < choice.size_interval[1]
    assert [choice.loss for choice in row] == sorted(choice.loss for choice in row)
    assert sum(choice.share for choice in row) == pytest.approx(1)


@pytest.mark.parametrize("u", [0.7, 1.0, 1.2])
def test_the_optimum_under_any_power_of_size_is_scipys(u: float) -> None:
    """kappa N^u passes D = C, as where attention costs what no parameter does."""
    cost, budget = Cost(u, {8: 50.0}, {8: 2.5}, 1.0), 1e19
    form = make_form("power_size", (0, 8))
    truth = dict(zip(form.names, (ALPHA, BETA, 0.8, 3.0, 1.69, A, B, 0.5, 90.0), strict=True))
    parameters = np.array([list(truth.values())])
    gain = (8 + truth["k0"]) ** -truth["gamma"]

    def loss(log_size: float) -> float:
        size = math.exp(log_size)
        data = budget / (50.0 * size**u * 2.5)
        of_size = (truth["A"] + truth["F"] * gain) / size**ALPHA
        return 1.69 + truth["C"] * gain + of_size + B / data**BETA

    best = minimize_scalar(loss, bounds=(5, 45), method="bounded", options={"xatol": 1e-10})
    found = optimum(form, parameters, cost, 8, np.array([budget]))
    assert float(found.size[0, 0]) == pytest.approx(math.exp(best.x), rel=1e-4)
    assert float(found.loss[0, 0]) == pytest.approx(best.fun, rel=1e-10)
    assert 50.0 * found.size[0, 0] ** u * 2.5 * found.data[0, 0] == pytest.approx(budget)


def test_neighbours_pay_from_some_budget_on(law: Law) -> None:
    """They take .06 off the loss for each doubling at 1 + k times the cost: little compute goes without."""
    small, large = choices_at(law, np.array([1e17, 1e25]), extrapolate=True)
    assert (small[0].k, large[0].k) == (0, 16)


def test_costs_of_cells() -> None:
    """FLOPs a cell = kappa_k N^u; passes are cells seen for each unit of data."""
    rng = np.random.default_rng(0)
    size, k = 10 ** rng.uniform(5, 9, 60), rng.choice([0, 8], 60)
    data = 10 ** rng.uniform(5, 8, 60)
    cells = data * np.where(k == 0, 3.0, 2.0)
    flops = cells * np.where(k == 0, 600.0, 5e3) * size**0.93
    cost = cost_of(Design(size, data, k), cells, flops)
    assert cost.exponent == pytest.approx(0.93)
    assert cost.factor == pytest.approx({0: 600.0, 8: 5e3}) and cost.passes == pytest.approx({0: 3.0, 8: 2.0})
    assert cost.misfit == pytest.approx(1) and cost.refusal == ""
    flops[0] *= 2
    assert "times off their power law" in cost_of(Design(size, data, k), cells, flops).refusal


def test_vertices_of_parabolas_say_which_k_is_best(law: Law) -> None:
    """As the law of which they are made: alone at small budgets, with neighbours at large ones."""
    budgets = np.geomspace(1e17, 1e25, 5)
    parameters = law.estimate[None]
    points, loss, flops = [], [], []
    for budget, k, ratio in itertools.product(budgets, law.design.levels, np.linspace(-1, 1, 5)):
        best = optimum(law.form, parameters, law.cost, k, np.array([budget]))
        size = float(best.size[0, 0]) * math.exp(ratio)
        points.append((size, budget / (6 * (k + 1) * size), k))
        floor, a, b = law.form.at(k, parameters)[0]
        loss.append(floor + a / size ** law.estimate[0] + b / points[-1][1] ** law.estimate[1])
        flops.append(budget)
    design = Design(*(np.array(column) for column in zip(*points, strict=True)))
    found, _ = parabolas(design, np.array(loss), np.array(flops), draws=100, seed=0)
    said = best_neighbours(found)
    assert [budget for budget, _ in said] == pytest.approx(list(budgets))
    assert [k for _, k in said] == [row[0].k for row in choices_at(law, budgets, extrapolate=True)]
    assert said[0][1] == 0 and said[-1][1] == 16


# ---- recommendations


def test_recommendation_and_what_it_rests_on(law: Law) -> None:
    answer = recommend(law, 1e20)
    assert answer.choices == choices_at(law, np.array([1e20]))[0]
    assert answer.measured["size"] == pytest.approx((1e6, 1e10))
    assert answer.remarks == []
    assert answer.start is not None and answer.start.recipe.startswith("experiments/tissue_")
    own = size_of(load_recipe(Path(__file__).parents[2] / answer.start.recipe), 19_264).without_embeddings
    assert answer.start.parameters == own
    assert answer.start.ratio == pytest.approx(answer.choices[0].size / own)


def test_too_far_is_refused_unless_asked(law: Law) -> None:
    most = float(law.runs.flops.max())
    assert any("above the largest" in remark for remark in recommend(law, 9 * most).remarks)
    with pytest.raises(InputError, match=r"11 times above the largest measured.*add --extrapolate"):
        recommend(law, 11 * most)
    answer = recommend(law, 11 * most, extrapolate=True)
    assert any("11 times above" in remark for remark in answer.remarks)
    with pytest.raises(InputError, match="times below the smallest"):
        recommend(law, float(law.runs.flops.min()) / 11)
    for flops in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(InputError, match="is no budget"):
            recommend(law, flops)


def test_a_k_stands_at_budgets_that_its_own_runs_reach(make_rows: Rows) -> None:
    """That of the costlier k begins at 11 times the least budget here, and is said to be left out."""
    rows = make_rows(grid((0, 4)), with_neighbours, noise=0.004)
    least = min(row["flops"] for row in rows)
    rows = [row for row in rows if row["k"] == 0 or row["flops"] > 110 * least]
    law = fit_law(runs_of(rows, "runs"), FEW)
    answer = recommend(law, 10 * least)
    assert [choice.k for choice in answer.choices] == [0]
    assert answer.choices[0].share == 1
    assert any(remark.startswith("k = 4 is left out: it was measured from") for remark in answer.remarks)
    assert {choice.k for choice in recommend(law, 100 * least).choices} == {0, 4}
    assert {choice.k for choice in recommend(law, 10 * least, extrapolate=True).choices} == {0, 4}


def test_what_is_not_identified_is_not_recommended(make_rows: Rows) -> None:
    one = runs_of(make_rows([(1e8, d, 0) for d in np.geomspace(1e8, 1e11, 8)], noise=0.01), "runs")
    with pytest.raises(InputError, match=r"alpha: 1 value of N only"):
        recommend(fit_law(one, FEW), 1e20, extrapolate=True)
    two = [(n, d, 0) for n, d in itertools.product([1e7, 1e9], np.geomspace(1e8, 1e11, 6))]
    fitted = fit_law(runs_of(make_rows(two, noise=0.01), "runs"), FEW)
    with pytest.raises(InputError, match=r"2 values of N only.*--extrapolate"):
        recommend(fitted, 1e20)
    assert any("2 values of N" in remark for remark in recommend(fitted, 1e20, extrapolate=True).remarks)


def test_budgets_of_machines() -> None:
    assert budget_of(256, 48, "v5p", 0.4) == pytest.approx(256 * 48 * 3600 * 459e12 * 0.4)
    for arguments, said in (
        ((0, 1.0, "v5p", 0.4), "--chips"),
        ((1, 0.0, "v5p", 0.4), "--hours"),
        ((1, 1.0, "abacus", 0.4), "--device.*v5p"),
        ((1, 1.0, "v5p", 1.5), "--mfu"),
    ):
        with pytest.raises(InputError, match=said):
            budget_of(*arguments)


def test_sizes_leave_out_what_has_the_vocabulary() -> None:
    config = load_recipe(Path(__file__).parents[2] / "experiments" / "tissue_3m.py")
    few, many = size_of(config, 1_000), size_of(config, 19_264)
    assert few.without_embeddings == many.without_embeddings < many.parameters
    sentences = load_recipe(Path(__file__).parents[2] / "experiments" / "nicheformer_small.py")
    assert size_of(sentences, 1_000).without_embeddings == size_of(sentences, 20_310).without_embeddings
    # Encoder and decoder by hand: projections with biases, SwiGLU, norms; then norm, narrowing and head.
    layer = 4 * (128 * 128 + 128) + 2 * (128 * 344 + 344) + 344 * 128 + 128 + 2 * 128
    assert 6 * layer < many.without_embeddings < 6 * layer + 3 * (128 * 128 + 128)
