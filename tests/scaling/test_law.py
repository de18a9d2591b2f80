"""Laws of known surfaces: published ones, the frontier, forms compared, driving runs, repeated data."""

from __future__ import annotations

import itertools
import json
import math
import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.optimize import curve_fit
from scipy.stats import f as f_distribution
from scipy.stats import t as t_distribution
from surfaces import ALPHA, BETA, DATA, FEW, SIZES, A, B, grid, value, with_neighbours

from scfm_jax.errors import InputError
from scfm_jax.scaling.comparison import compare
from scfm_jax.scaling.forms import Design, make_form, predict
from scfm_jax.scaling.law import Law, LawConfig, fit_law
from scfm_jax.scaling.law_file import read_law, record_of, write_law
from scfm_jax.scaling.least_squares import fit
from scfm_jax.scaling.recommend import predict_run, recommend
from scfm_jax.scaling.repeats import effective
from scfm_jax.scaling.runs import Runs, runs_of

Rows = Callable[..., list[dict[str, Any]]]


def test_single_cell_masked_language_models(make_rows: Rows) -> None:
    """Exponent .234 of size and a floor of about 1.44, as published for masked models of single cells.

    How often intervals hold them is in test_intervals.
    """

    def surface(size: float, data: float, k: int) -> float:
        return 1.44 + 30.0 / size**0.234 + 60.0 / data**0.4

    points = list(itertools.product(np.geomspace(1e5, 1e9, 7), np.geomspace(1e6, 1e10, 6), (0,)))
    exact = fit_law(runs_of(make_rows(points, surface), "runs"), LawConfig(draws=100))
    for parameter, truth in zip(exact.parameters, (0.234, 0.4, 1.44, 30.0, 60.0), strict=True):
        assert parameter.value == pytest.approx(truth, rel=1e-4)
        assert exact.huber[parameter.name] == pytest.approx(truth, rel=0.01)
    noisy = fit_law(runs_of(make_rows(points, surface, noise=0.002), "runs"), LawConfig(draws=100))
    assert value(noisy, "alpha") == pytest.approx(0.234, abs=0.01)
    assert value(noisy, "E") == pytest.approx(1.44, abs=0.05)
    assert noisy.huber["alpha"] == pytest.approx(0.234, abs=0.01)


# ---- forms, noise, influence


def test_noise_is_that_between_seeds(law: Law) -> None:
    pairs = law.runs.loss.reshape(-1, 2)
    assert law.noise.deviation == pytest.approx(math.sqrt(np.mean(np.diff(pairs, axis=1) ** 2) / 2))
    assert law.noise.freedom == len(pairs)
    assert law.noise.deviation == pytest.approx(0.004, rel=0.2)


def test_effects_of_neighbours_are_told_without_the_floors(make_rows: Rows) -> None:
    """Two sizes and one amount of data identify no exponent, yet what k does."""
    points = itertools.product([1e5, 1e6], [16_000.0], (0, 4, 16))
    rows = make_rows(
        points, lambda n, d, k: 0.4 + 3 / n**0.3 - 0.004 * math.log2(1 + k), noise=0.0005, seeds=3
    )
    law = fit_law(runs_of(rows, "runs"), FEW)
    assert all(parameter.value is None for parameter in law.parameters)
    for effect, truth in zip(law.effects, (0.004 * math.log2(5), 0.004 * math.log2(17)), strict=True):
        assert effect.interval[0] <= -truth <= effect.interval[1] < 0
    assert law.refusals


def test_a_law_without_neighbours_is_not_told_to_have_them(make_rows: Rows) -> None:
    law = fit_law(runs_of(make_rows(grid((0, 4)), noise=0.01), "runs"), FEW)
    assert law.effects[0].interval[0] < 0 < law.effects[0].interval[1]
    by_name = {each.form: each for each in law.compared}
    assert by_name["plain"].aic is not None and by_name["offset_size"].aic is not None
    assert by_name["plain"].aic < by_name["offset_size"].aic


def test_comparison_speaks_for_the_form_that_is_true(make_rows: Rows) -> None:
    def meets_size(size: float, data: float, k: int) -> float:
        return 1.69 + A * (1 - 0.05 * math.log2(1 + k)) / size**ALPHA + B / data**BETA

    law = fit_law(runs_of(make_rows(grid((0, 4, 16)), meets_size, noise=0.004), "runs"), FEW)
    by_name = {each.form: each for each in law.compared}
    assert set(by_name) == {"plain", "offset", "offset_size", "offset_data"}
    errors = {name: each.held_out_error for name, each in by_name.items()}
    assert min(errors, key=lambda name: errors[name] or math.inf) == "offset_size"
    assert min(by_name, key=lambda name: by_name[name].aic or math.inf) == "offset_size"
    assert (errors["plain"] or 0) > 3 * (errors["offset_size"] or math.inf)


def test_held_out_error_is_that_of_fits_without_a_configuration(make_rows: Rows) -> None:
    rows = make_rows(grid()[::2], noise=0.02, seeds=2)
    runs = runs_of(rows, "runs")
    design, form = Design(runs.parameters, runs.cells, runs.k), make_form("plain", (0,))
    errors = []
    for configuration in range(15):
        inside = np.arange(30) // 2 == configuration
        parameters = fit(form, design.take(~inside), runs.loss[~inside]).parameters
        errors += list(np.log(predict(form, design.take(inside), parameters)[0] / runs.loss[inside]))
    compared = compare(form, design, runs.loss, 0)
    assert compared.held_out_error == pytest.approx(math.sqrt(np.mean(np.square(errors))), rel=1e-4)
    # AIC with the noise as a sixth parameter, corrected for 30 runs.
    sse = float(fit(form, design, runs.loss).sse[0])
    expected = 30 * math.log(sse / 30) + 2 * 6 + 2 * 6 * 7 / (30 - 6 - 1)
    assert compared.parameters == 5 and compared.aic == pytest.approx(expected, rel=1e-9)


def test_runs_that_the_others_cannot_predict_are_no_error_of_a_form(make_rows: Rows) -> None:
    """k = 64 at one size alone: nothing says what size is worth there, nor, without it, what its floor is."""
    points = [(n, d, 0) for n, d in itertools.product([1e6, 1e7, 1e8, 1e9], [1e8, 1e9, 1e10])]
    points += [(1e8, 1e9, 4), (1e7, 1e9, 4), (1e6, 1e9, 4), (1e7, 1e9, 64)]
    law = fit_law(runs_of(make_rows(points, with_neighbours, noise=0.002, seeds=2), "runs"), FEW)
    by_name = {each.form: each for each in law.compared}
    assert by_name["offset"].unpredictable == 2 and by_name["plain"].unpredictable == 0
    assert by_name["offset_size"].unpredictable == 2
    assert (by_name["offset_size"].held_out_error or 1) < 0.01
    assert "offset_data" not in by_name  # D varies at k = 0 alone, so that it is offset by another name


def test_a_power_law_in_k_needs_six_levels_and_ten_times_the_noise(make_rows: Rows) -> None:
    def power(size: float, data: float, k: int) -> float:
        return 1.4 + A / size**ALPHA + B / data**BETA + 0.6 / (k + 3) ** 0.7

    few = grid((0, 4, 16))
    with pytest.raises(InputError, match="not identified: 3 levels of k, 6 are needed"):
        fit_law(runs_of(make_rows(few, power), "runs"), LawConfig(draws=100, form="power"))
    ks = (0, 2, 4, 8, 16, 32, 64)
    points = list(itertools.product(SIZES[::2], DATA[::2], ks))
    noisy = runs_of(make_rows(points, power, noise=0.04), "runs")
    with pytest.raises(InputError, match=r"times the noise between runs, 10 are needed"):
        fit_law(noisy, LawConfig(draws=100, form="power"))
    assert "power" not in {each.form for each in fit_law(noisy, LawConfig(draws=100)).compared}
    law = fit_law(runs_of(make_rows(points, power, noise=0.002), "runs"), LawConfig(draws=200, form="power"))
    assert {"power", "power_size"} < {each.form for each in law.compared}
    for name, truth in (("gamma", 0.7), ("k0", 3.0), ("C", 0.6), ("E", 1.4)):
        found = next(parameter for parameter in law.parameters if parameter.name == name)
        assert found.profile is not None and found.profile[0] <= truth <= found.profile[1]


def test_the_run_that_drives_a_fit_is_named(make_rows: Rows) -> None:
    rows = make_rows(grid(), noise=0.002)
    rows[-1]["loss"] += 0.1
    law = fit_law(runs_of(rows, "runs"), FEW)
    assert law.influence[0].run == rows[-1]["name"]
    assert [abs(each.shift) for each in law.influence] == sorted(
        (abs(each.shift) for each in law.influence), reverse=True
    )
    # The shift is that of a fit without the run.
    without = fit_law(runs_of(rows[:-1], "runs"), FEW)
    name = law.influence[0].parameter
    error = law.draws[:, law.form.names.index(name)].std(ddof=1)
    assert law.influence[0].shift == pytest.approx(
        (value(without, name) - value(law, name)) / error, rel=1e-3
    )


def test_largest_runs_are_predicted_from_the_others(make_rows: Rows) -> None:
    rows = make_rows(grid(), noise=0.01, seeds=2)
    law = fit_law(runs_of(rows, "runs"), FEW)
    largest = {row["name"] for row in rows if row["flops"] == max(row["flops"] for row in rows)}
    assert {each.run for each in law.predictions} == largest and len(largest) == 2
    rest = fit_law(runs_of([row for row in rows if row["name"] not in largest], "runs"), FEW)
    for each in law.predictions:
        e, a, b = rest.form.at(0, rest.estimate[None])[0]
        expected = e + a / SIZES[-1] ** rest.estimate[0] + b / DATA[-1] ** rest.estimate[1]
        assert each.predicted == pytest.approx(expected, rel=1e-9)
        assert 1 < (each.interval[1] - each.interval[0]) / (2 * 1.96 * rest.deviation) < 1.4
    assert fit_law(runs_of(rows, "runs"), LawConfig(draws=100, held_out=0)).predictions == []


def test_predictions_far_out_are_as_unsure_as_scipys_covariance_says(make_rows: Rows) -> None:
    near = itertools.product(np.geomspace(1e6, 1e9, 6), np.geomspace(1e8, 1e9, 6), (0,))
    rows = make_rows([*near, (1e11, 1e12, 0)], noise=0.02, seeds=2)
    first, _ = fit_law(runs_of(rows, "runs"), LawConfig(draws=400)).predictions
    runs = runs_of(rows[:-2], "runs")
    size, data, loss = runs.parameters_without_embeddings, runs.cells, runs.loss

    def surface(at: tuple[np.ndarray, np.ndarray], *x: float) -> np.ndarray:
        return x[2] + np.exp(x[3] - x[0] * np.log(at[0])) + np.exp(x[4] - x[1] * np.log(at[1]))

    start = [ALPHA, BETA, 1.69, math.log(A), math.log(B)]
    best, covariance = curve_fit(surface, (size, data), loss, p0=start)
    far = (np.array([1e11]), np.array([1e12]))
    steps = 1e-6 * np.eye(5)
    slope = (
        np.array([surface(far, *(best + step))[0] - surface(far, *(best - step))[0] for step in steps]) / 2e-6
    )
    noise = np.sum((loss - surface((size, data), *best)) ** 2) / (len(loss) - 5)
    expected = t_distribution.ppf(0.975, len(loss) - 5) * math.sqrt(slope @ covariance @ slope + noise)
    assert slope @ covariance @ slope > 2 * noise
    assert (first.interval[1] - first.interval[0]) / 2 == pytest.approx(expected, rel=0.2)


# ---- too little


@pytest.mark.parametrize(
    ("ks", "points", "form", "said"),
    [
        (
            (0,),
            5,
            None,
            r"5 different \(N, D, k\) are too few for the form plain .*it needs 6, seeds counted once",
        ),
        ((0, 4), 6, None, r"6 different \(N, D, k\) are too few for the form offset .*it needs 7"),
        ((0,), 30, "offset", r"all runs have k = 0"),
        ((0, 4), 30, "plain", r"the form plain knows no k"),
        ((0,), 30, "other", r"'other' is none of plain, offset"),
    ],
)
def test_too_few_runs_say_how_many(
    make_rows: Rows, ks: tuple[int, ...], points: int, form: str | None, said: str
) -> None:
    chosen = [grid(ks)[i] for i in np.random.default_rng(0).permutation(len(grid(ks)))[:points]]
    with pytest.raises(InputError, match=said):
        fit_law(runs_of(make_rows(chosen, seeds=3), "runs"), LawConfig(draws=100, form=form))


def test_without_sizes_or_data_there_is_no_law(make_rows: Rows) -> None:
    rows = make_rows([(1e7, 1e9, k) for k in (0, 4, 16, 64)], with_neighbours, seeds=3)
    with pytest.raises(InputError, match="neither N nor D varies"):
        fit_law(runs_of(rows, "runs"), FEW)


def test_a_loss_that_rises_with_size_has_no_optimum(make_rows: Rows) -> None:
    def rising(size: float, data: float, k: int) -> float:
        return 1 + 0.02 * math.log(size) + 410.7 / data**0.28

    law = fit_law(runs_of(make_rows(grid(), rising, noise=0.002), "runs"), FEW)
    why = {parameter.name: parameter.why for parameter in law.parameters}
    assert "no effect" in why["alpha"] and "no effect" in why["A"]
    with pytest.raises(InputError, match="N or D has no effect"):
        recommend(law, 1e20, extrapolate=True)


# ---- repeated data


def test_effective_data_is_the_papers() -> None:
    """Muennighoff et al.: 4 epochs are nearly as good as fresh data, 40 are worth little more than 16."""
    unique = np.array([1e6, 1e6, 1e6, 1e6])
    total = unique * [0.5, 1, 5, 50]
    expected = [
        0.5e6,
        1e6,
        1e6 + 15.4e6 * (1 - math.exp(-4 / 15.4)),
        1e6 + 15.4e6 * (1 - math.exp(-49 / 15.4)),
    ]
    np.testing.assert_allclose(effective(unique, total, 15.4), expected)
    np.testing.assert_allclose(effective(unique, total, 1e9), total, rtol=1e-6)


def test_repeats_are_found_again(make_rows: Rows) -> None:
    fresh = make_rows([(n, d, k) for n, d, k in grid() if n < 1e9], noise=0.002)
    base = lambda unique: (ALPHA * A / (BETA * B) * unique**BETA) ** (1 / ALPHA)  # noqa: E731
    again = []
    for number, (size, unique, epochs) in enumerate(
        itertools.product(np.geomspace(1e7, 1e10, 5), (1e8, 1e9), (2.0, 6.0, 20.0, 60.0))
    ):
        data = float(effective(np.array(unique), np.array(unique * epochs), 15.0))
        used = float(effective(np.array(base(unique)), np.array(size), 5.0))
        (row,) = make_rows([(float(size), unique * epochs, 0)], epochs=epochs)
        noise = 0.002 * np.random.default_rng(number).normal()
        loss = 1.69 + A / used**ALPHA + B / data**BETA + noise
        again.append(row | {"name": f"again-{number}", "loss": loss})
    runs = runs_of([*fresh, *again], "runs")
    for field in ("unique_cells", "cells"):
        law = fit_law(runs, LawConfig(draws=200, repeats=True, data=field))  # type: ignore[arg-type]
        assert len(law.runs) == len(fresh)
        assert law.repeats is not None and law.repeats.data is not None and law.repeats.size is not None
        assert law.repeats.runs == len(again)
        assert law.repeats.data == pytest.approx(15.0, rel=0.15)
        assert law.repeats.size == pytest.approx(5.0, rel=0.25)
    with pytest.raises(InputError, match="no run has more than one epoch"):
        fit_law(runs_of(fresh, "runs"), LawConfig(repeats=True))
    with pytest.raises(InputError, match="every run has more than one epoch"):
        fit_law(runs_of(again, "runs"), LawConfig(repeats=True))


# ---- the file

TREND = ("size_exponent", "data_exponent", "size_intercept", "data_intercept")
NO_INTERVALS = {"size_interval": None, "data_interval": None}


def test_a_law_is_read_as_it_was_written(law: Law, tmp_path: Path) -> None:
    path = tmp_path / "law.json"
    write_law(law, path)
    again = read_law(path)
    assert record_of(again) == record_of(law)
    assert recommend(again, 1e20) == recommend(law, 1e20)
    assert isinstance(again.runs, Runs) and again.form == make_form("offset", (0, 4, 16))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"format"', "is no JSON"),
        ("[" * 100_000, "is no JSON .*recursion"),
        ("[]", "is no 'scfm scaling law 1'"),
        ('{"format": "other"}', "is no 'scfm scaling law 1'"),
        ('{"format": "scfm scaling law 1"}', "lacks config, runs, dropped, form"),
    ],
    ids=reprlib.repr,
)
def test_what_is_no_law(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "law.json"
    path.write_text(text)
    with pytest.raises(InputError, match=f"law.json: {said}.*; give a file that scfm scaling fit wrote"):
        read_law(path)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("cost", None, "the field 'cost' cannot be None; give Cost"),
        ("runs", [{}], "law.json, run 0: lacks name, family"),
        ("runs", {}, "runs cannot be that of a law"),
        ("form", 5, "the field 'form' cannot be 5; give str"),
        ("form", "other", "form cannot be that of a law"),
        ("form", "plain", "estimate cannot be that of a law of its form and runs"),
        ("envelopes", [], r"the field 'envelopes' cannot be \[\]; give dict"),
        ("envelopes", {"0": [1.0]}, r"the field 'envelopes.0' cannot be \[1.0\]"),
        ("envelopes", {"x": [1.0, 2.0]}, "the field 'envelopes' cannot be 'x'; give int"),
        ("parameters", "x", "the field 'parameters' cannot be 'x'; give list"),
        ("parameters", [{}], "lacks the field 'parameters.name'"),
        ("estimate", [1], "estimate cannot be that of a law"),
        ("estimate", None, "estimate cannot be that of a law"),
        ("draws", None, "draws cannot be that of a law"),
        ("draws", [], "draws cannot be that of a law"),
        ("draws", [[1.0, 2.0]], "draws cannot be that of a law"),
        ("draws", [[1.0], 2.0], "draws cannot be that of a law"),
        ("draws", [[-1.0] * 7], "draws cannot be that of a law"),
        ("draws", [[0.0] * 7], "draws cannot be that of a law"),
        ("draws", [[10**400] * 7], "draws cannot be that of a law"),
        ("cost.factor", {}, "cost.factor cannot be that of a law"),
        ("cost.passes", {"0": 1.0, "4": 0.0, "16": 1.0}, "cost.passes cannot be that of a law"),
        ("deviation", -1, "deviation cannot be that of a law"),
        ("deviation", 10**400, "deviation cannot be that of a law"),
        ("config.seed", -1, "config.seed cannot be that of a law"),
        ("config.size", "length", "the field 'config.size' cannot be 'length'"),
        ("trends", [dict.fromkeys(TREND, 1.0) | {"k": 3, "budgets": 2, **NO_INTERVALS}], "k of parabolas"),
    ],
    ids=reprlib.repr,
)
def test_a_damaged_law(law: Law, tmp_path: Path, field: str, value: object, said: str) -> None:
    record = json.loads(json.dumps(record_of(law)))
    *outer, last = field.split(".")
    within = record[outer[0]] if outer else record
    within[last] = value
    path = tmp_path / "law.json"
    path.write_text(json.dumps(record))
    with pytest.raises(InputError, match=said):
        read_law(path)


@pytest.mark.parametrize(("curved", "follows"), [(0.0, True), (0.05, False)])
def test_lack_of_fit_is_told_from_noise_between_seeds(make_rows: Rows, curved: float, follows: bool) -> None:
    def loss(size: float, data: float, k: int) -> float:
        return with_neighbours(size, data, k) + curved * math.sin(math.log(size * data))

    rows = make_rows(grid(), loss, noise=0.01, seeds=3)
    law = fit_law(runs_of(rows, "runs"), FEW)
    # The same by SciPy's F, from the squares that remain and those within configurations.
    values = np.array([row["loss"] for row in rows]).reshape(-1, 3)
    within = ((values - values.mean(1, keepdims=True)) ** 2).sum()
    whole = law.deviation**2 * (values.size - law.form.n_parameters)
    degrees = values.size - law.form.n_parameters - 2 * len(values), 2 * len(values)
    chance = f_distribution.sf((whole - within) / degrees[0] / (within / degrees[1]), *degrees)
    assert law.lack_of_fit == pytest.approx(chance, rel=1e-6)
    assert (chance > 0.01) == follows
    assert fit_law(runs_of(rows[::3], "runs"), FEW).lack_of_fit is None


def test_runs_that_went_on_are_no_repeats(make_rows: Rows) -> None:
    """The same N and unique cells after more epochs: another loss, and no noise."""
    rows = make_rows(grid(), noise=0.001, seeds=2)
    longer = [
        row
        | {"name": row["name"] + "-on", "cells": 2 * row["cells"], "tokens": 2 * row["tokens"]}
        | {"flops": 2 * row["flops"], "epochs": 2.0, "loss": row["loss"] - 0.1}
        for row in rows
    ]
    noise = fit_law(runs_of([*rows, *longer], "runs"), FEW).noise
    assert noise.freedom == len(rows) and noise.deviation == pytest.approx(0.001, rel=0.4)


def rows_in_the_middle(law: Law) -> tuple[float, float]:
    return float(np.median(law.design.size)), float(np.median(law.design.data))


def test_a_run_is_predicted_before_it_is_run(make_rows: Rows) -> None:
    rows = make_rows(grid(), noise=0.01, seeds=2)
    law = fit_law(runs_of(rows, "runs"), FEW)
    largest = max(rows, key=lambda row: row["flops"])
    rest = fit_law(runs_of([row for row in rows if row["flops"] < largest["flops"]], "runs"), FEW)
    size, data = largest["parameters_without_embeddings"], largest["unique_cells"]
    # As the fit itself predicts the largest runs that it leaves out.
    (one, *_) = law.predictions
    said = predict_run(rest, size, data, 0)
    assert said.loss == pytest.approx(one.predicted, rel=1e-9)
    # The noise is drawn anew.
    assert said.interval == pytest.approx(one.interval, abs=0.05 * (one.interval[1] - one.interval[0]))
    assert said.flops == pytest.approx(largest["flops"], rel=0.01)
    assert any(remark.startswith("training FLOPs of ") for remark in said.remarks)
    assert predict_run(rest, *rows_in_the_middle(rest), 0).remarks == []


@pytest.mark.parametrize(
    ("size", "data", "k", "told"),
    [
        (1e7, 1e9, 3, "--k: 3 was not measured; give one of 0"),
        (
            1e13,
            1e9,
            0,
            r"--size: N = 1e\+13 is 1e\+03 times above the largest measured .*; add --extrapolate",
        ),
        (1e7, 1.0, 0, r"--data: D = 1 is 1e\+08 times below the smallest measured"),
        # Neither N nor D is ten times beyond, and what they cost together is.
        (9e10, 2.7e12, 0, "--size: training FLOPs of 1.46e.24 is 81 times above the largest measured"),
        (-1.0, 1e9, 0, "--size: -1.0 is out of range"),
    ],
)
def test_a_run_far_out_is_not_predicted(make_rows: Rows, size: float, data: float, k: int, told: str) -> None:
    law = fit_law(runs_of(make_rows(grid(), noise=0.01), "runs"), FEW)
    with pytest.raises(InputError, match=told):
        predict_run(law, size, data, k)
