"""The rule of transfer: its formulas, and its fit to grids whose best rates are known."""

from __future__ import annotations

import dataclasses
import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import scipy.stats

from scfm_jax.errors import InputError
from scfm_jax.scaling.transfer import FittedRule, TransferRule, fit_rates
from scfm_jax.training.config import OptimiserConfig, from_dict
from scfm_jax.training.optimiser import learning_rate

TRUE = TransferRule(rate=3e-3, size=2e4, batch=32, size_exponent=0.23, batch_exponent=0.4)
BASE = TransferRule(rate=1.0, size=2e4, batch=32)
SIZES = (3e3, 1e4, 3e4, 1e5)
STEPS = 2.0 ** np.arange(-3, 4)

Grid = dict[str, np.ndarray]


def grid(
    sizes: tuple[float, ...] = SIZES,
    batches: tuple[float, ...] = (32,),
    *,
    noise: float = 0.0,
    seed: int = 0,
    seeds: int = 1,
    steps: np.ndarray = STEPS,
) -> Grid:
    """A parabola in log rate around the true best one; rates are round numbers, so the best is never run."""
    random = np.random.default_rng(seed)
    rows = []
    for n in sizes:
        for b in batches:
            best = TRUE.peak_rate(n, b)
            for rate in 2.0 ** np.round(np.log2(best)) * steps:
                for _ in range(seeds):
                    loss = 0.5 + 20 / n**0.5 + 0.02 * np.log(rate / best) ** 2 + noise * random.normal()
                    rows.append((n, b, rate, loss))
    return dict(zip(("parameters", "batch", "peak_rate", "loss"), np.array(rows).T, strict=True))


def test_rate_batch_and_schedule_are_what_the_rule_says() -> None:
    rule = TransferRule(
        rate=1e-2,
        size=1e4,
        batch=64,
        size_exponent=0.5,
        data=1e4,
        data_exponent=0.5,
        least_batch=16,
        most_batch=512,
        warmup_share=0.1,
        final_share=0.05,
    )
    assert rule.peak_rate(4e4, 256) == pytest.approx(1e-2 / 2 * 2)
    # 64 x sqrt(D / 10,000), to the nearest power of two, from 16 to 512.
    sizes = {data: rule.batch_size(data) for data in (1e2, 1e4, 1.9e4, 2.1e4, 1.6e5, 1e9)}
    assert sizes == {1e2: 16, 1e4: 64, 1.9e4: 64, 2.1e4: 128, 1.6e5: 256, 1e9: 512}
    config = rule.optimiser(
        OptimiserConfig(schedule_steps=9, weight_decay=0.3), parameters=4e4, batch=64, steps=200
    )
    rates = learning_rate(config)
    assert (config.steps, config.schedule_steps, config.warmup_steps) == (200, 0, 20)
    assert config.weight_decay == 0.3
    assert [float(rates(step)) for step in (0, 20, 200)] == pytest.approx([5e-4, 5e-3, 2.5e-4])
    assert float(rates(110)) == pytest.approx((5e-3 + 2.5e-4) / 2)  # half of the cosine


def test_a_rule_is_plain_numbers() -> None:
    fitted = fit_rates(**grid(batches=(16, 32)), base=BASE)
    text = json.dumps(dataclasses.asdict(fitted))
    assert from_dict(TransferRule, json.loads(text)["rule"], "rule.json") == fitted.rule
    for field, value in (
        ("rate", 0.0),
        ("size_exponent", float("nan")),
        ("most_batch", 48),
        ("most_batch", 0),
        ("final_share", 1.5),
    ):
        content = dataclasses.asdict(fitted.rule) | {field: value}
        with pytest.raises(InputError, match=f"rule.json: config: {field} is "):
            from_dict(TransferRule, content, "rule.json")


def test_a_true_rule_comes_back_without_noise() -> None:
    fitted = fit_rates(**grid(batches=(8, 32, 128)), base=BASE)
    for name in ("rate", "size_exponent", "batch_exponent"):
        assert getattr(fitted.rule, name) == pytest.approx(getattr(TRUE, name), rel=1e-9)
    for error in (fitted.log_rate_error, fitted.size_exponent_error, fitted.batch_exponent_error):
        assert error is not None and error < 1e-9
    assert fitted.notes == () and len(fitted.vertices) == 12
    for vertex in fitted.vertices:
        assert vertex.rate == pytest.approx(TRUE.peak_rate(vertex.parameters, vertex.batch))
        assert vertex.loss == pytest.approx(0.5 + 20 / vertex.parameters**0.5)
        assert (vertex.rates, vertex.left_out) == (5, 0)


def test_the_line_and_its_errors_against_scipy() -> None:
    fitted = fit_rates(**grid(noise=2e-3), base=BASE)
    best = [vertex.rate for vertex in fitted.vertices]
    line = scipy.stats.linregress(np.log(np.array(SIZES) / BASE.size), np.log(best))
    assert fitted.rule.size_exponent == pytest.approx(-line.slope)
    assert np.log(fitted.rule.rate) == pytest.approx(line.intercept)
    assert fitted.size_exponent_error == pytest.approx(line.stderr)
    assert fitted.log_rate_error == pytest.approx(line.intercept_stderr)
    assert fitted.batch_exponent_error is None and fitted.rule.batch_exponent == BASE.batch_exponent
    assert any("best rates of one batch only" in note for note in fitted.notes)


def test_a_vertex_and_its_error_against_scipy() -> None:
    """A parabola whose vertex is a parameter, fitted by `scipy.optimize.curve_fit` to the same five rates."""
    runs = grid((1e4,), noise=2e-3, seed=1, seeds=2)
    (vertex,) = fit_rates(**runs, base=BASE).vertices
    levels, code = np.unique(np.log(runs["peak_rate"]), return_inverse=True)
    lowest = levels[np.argmin(np.bincount(code, runs["loss"]))]
    near = np.abs(np.log(runs["peak_rate"]) - lowest) < 2.5 * np.log(2)
    found, covariance = scipy.optimize.curve_fit(
        lambda x, a, centre, least: a * (x - centre) ** 2 + least,
        np.log(runs["peak_rate"])[near],
        runs["loss"][near],
        p0=(0.02, lowest, 0.7),
    )
    assert near.sum() == 10 and vertex.rates == 5
    assert np.log(vertex.rate) == pytest.approx(found[1], abs=1e-6)
    assert vertex.loss == pytest.approx(found[2], abs=1e-8)
    assert vertex.error == pytest.approx(covariance[1, 1] ** 0.5, rel=1e-3)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """300 noisy grids of four sizes: two degrees of freedom."""
    limit, draws = scipy.stats.t.ppf(0.95, 2), 300
    within = 0
    for seed in range(draws):
        fitted = fit_rates(**grid(noise=2e-3, seed=seed), base=BASE)
        assert fitted.size_exponent_error is not None
        within += abs(fitted.rule.size_exponent - TRUE.size_exponent) < limit * fitted.size_exponent_error
    low, high = scipy.stats.binom.ppf([0.005, 0.995], draws, 0.9)
    assert low <= within <= high


def test_two_sizes_have_the_errors_of_their_vertices() -> None:
    fitted = fit_rates(**grid((3e3, 1e5), noise=2e-3), base=BASE)
    first, second = (vertex.error for vertex in fitted.vertices)
    assert first is not None and second is not None and fitted.size_exponent_error is not None
    assert fitted.size_exponent_error == pytest.approx(np.hypot(first, second) / np.log(1e5 / 3e3))
    three = fit_rates(**grid((3e3, 1e5), noise=2e-3, steps=STEPS[2:5]), base=BASE)
    assert [vertex.error for vertex in three.vertices] == [None, None]
    assert three.size_exponent_error is None and three.rule.size_exponent != 0


def test_one_size_and_one_batch_keep_what_was_given() -> None:
    """A rate at 8 samples a batch, brought to the rule's 32 by the square root."""
    fitted = fit_rates(**grid((1e4,), (8,)), base=BASE)
    assert fitted.rule == dataclasses.replace(BASE, rate=fitted.rule.rate)
    assert fitted.rule.peak_rate(1e4, 8) == pytest.approx(TRUE.peak_rate(1e4, 8))
    assert fitted.rule.rate == pytest.approx(2 * TRUE.peak_rate(1e4, 8))
    assert fitted.size_exponent_error is None
    assert [note.split(":")[0] for note in fitted.notes] == [
        "size_exponent is 0",
        "batch_exponent is 0.5, as given",
    ]


def test_a_batch_that_grows_with_the_size_tells_no_exponent() -> None:
    together = grid((1e4,), (16,)), grid((1e5,), (64,))
    runs = {name: np.concatenate([part[name] for part in together]) for name in together[0]}
    fitted = fit_rates(**runs, base=dataclasses.replace(BASE, batch_exponent=TRUE.batch_exponent))
    assert any("varies with the size only" in note for note in fitted.notes)
    assert fitted.rule.size_exponent == pytest.approx(TRUE.size_exponent)  # as the batch's is the true one
    assert fitted.rule.rate == pytest.approx(TRUE.rate)


def change(runs: Grid, size: float, losses: list[float]) -> Grid:
    """Other losses of one size, by rate; one value for each run."""
    loss = runs["loss"].copy()
    loss[runs["parameters"] == size] = losses
    return {**runs, "loss": loss}


def refusal(fitted: FittedRule, size: float) -> str:
    (vertex,) = [vertex for vertex in fitted.vertices if vertex.parameters == size]
    assert vertex.rate is None and vertex.loss is None and vertex.error is None
    assert any(note.startswith(f"not used: N = {size:g}") for note in fitted.notes)
    return vertex.why


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("losses", "why", "left_out"),
    [
        ([1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6], "the least loss is at the lowest rate, ", 0),
        ([1.6, 1.5, 1.4, 1.3, 1.2, 1.1, 1.0], "the least loss is at the highest rate, ", 0),
        ([1.6, 1.5, 1.4, 1.3, 1.2, NAN, INF], "at the highest rate that did not diverge, ", 2),
        ([9.0, 9.0, 3.0, 0.9, 3.0, NAN, NAN], "", 2),
        ([9.0, 1.0, 3.0, 0.9, 3.0, 1.0, 9.0], "opens downwards", 0),
        ([1.5, 1.0, NAN, NAN, NAN, NAN, NAN], "2 rates with a loss, 3 are needed", 5),
        ([1.001, 1.0, 1.5, 2.01, 2.53, 9.0, 9.0], "outside of its rates", 0),
    ],
)
def test_what_has_no_minimum_is_refused_and_the_others_are_used(
    losses: list[float], why: str, left_out: int
) -> None:
    fitted = fit_rates(**change(grid(), SIZES[1], losses), base=BASE)
    assert fitted.vertices[1].left_out == left_out
    if why:
        assert why in refusal(fitted, SIZES[1])
        assert fitted.rule.size_exponent == pytest.approx(TRUE.size_exponent)
    assert any(f"left out: {left_out} runs" in note for note in fitted.notes) == (left_out > 0)


def test_an_uneven_grid_is_looked_at_on_both_sides_of_its_best_rate() -> None:
    """The five rates nearest to the best one are all above it."""
    steps = np.exp([-3.0, 0.02, 0.1, 0.2, 0.3, 0.4])
    runs = grid((TRUE.size,), steps=steps * TRUE.rate / 2.0 ** np.round(np.log2(TRUE.rate)))
    (vertex,) = fit_rates(**runs, base=BASE).vertices
    assert vertex.rates == 6 and vertex.rate == pytest.approx(TRUE.rate)


def test_a_rate_at_which_one_seed_diverged_is_left_out_whole() -> None:
    runs = grid(seeds=2)
    highest = runs["peak_rate"] == runs["peak_rate"][runs["parameters"] == SIZES[0]].max()
    runs["loss"][np.flatnonzero(highest & (runs["parameters"] == SIZES[0]))[0]] = INF
    fitted = fit_rates(**runs, base=BASE)
    assert [vertex.left_out for vertex in fitted.vertices] == [2, 0, 0, 0]
    assert fitted.rule.size_exponent == pytest.approx(TRUE.size_exponent)


def test_bad_grids_are_refused() -> None:
    rising = grid((1e4,))
    rising["loss"] = rising["peak_rate"]
    with pytest.raises(
        InputError, match=r"^grid.csv: no best rate in the grid: N = 10000, B = 32: the least"
    ):
        fit_rates(**rising, base=BASE, where="grid.csv")
    runs = grid()
    for field, values, problem in (
        ("batch", runs["batch"] * 0, "batch has a value that is not over 0"),
        ("peak_rate", runs["peak_rate"] * np.nan, "peak_rate has a value"),
        ("loss", runs["loss"][1:], "columns are of shapes"),
    ):
        with pytest.raises(InputError, match=problem):
            fit_rates(**{**runs, field: values}, base=BASE)
    nothing = {name: values[:0] for name, values in runs.items()}
    with pytest.raises(InputError, match="rates: holds no runs; run a sweep over rates"):
        fit_rates(**nothing, base=BASE)


@pytest.fixture(scope="module")
def tool() -> dict[str, Any]:
    return runpy.run_path(str(Path(__file__).parents[2] / "tools" / "fit_rates.py"))


ROW = {"parameters_without_embeddings": 1e4, "batch_size": 32, "peak_rate": 1e-3, "loss": 0.5}


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], "results.jsonl: holds no runs"),
        (["{"], "results.jsonl:1: is no JSON"),
        ([json.dumps(ROW), "[1]"], "results.jsonl:2: is no JSON object"),
        ([json.dumps(ROW), json.dumps(ROW | {"loss": "low"})], "results.jsonl:2: loss is 'low', no number"),
        ([json.dumps(ROW | {"peak_rate": None})], "results.jsonl:1: peak_rate is None, no number"),
        ([json.dumps({"loss": None})], "results.jsonl:1: parameters_without_embeddings is None"),
        # A loss beyond all numbers is that of a run that diverged.
        ([json.dumps(ROW | {"loss": 10**400})], "results.jsonl: no best rate in the grid"),
    ],
)
def test_the_tool_says_what_is_wrong_with_its_file(
    tool: dict[str, Any], tmp_path: Path, lines: list[str], said: str
) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines))
    with pytest.raises(InputError, match=said):
        tool["main"](tool["Arguments"](path, size=1e4))
