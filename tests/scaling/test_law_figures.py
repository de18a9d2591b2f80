"""Figures of a law: series that grey tells apart, losses over k as measured, parameters on fit axes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from surfaces import DATA, FEW, SIZES, value, with_neighbours

from scfm_jax.scaling import figure_style
from scfm_jax.scaling.figure_style import lines, number, points
from scfm_jax.scaling.intervals import Parameter
from scfm_jax.scaling.law import Law, fit_law
from scfm_jax.scaling.law_figures import figures_of
from scfm_jax.scaling.neighbour_figure import measured_curves
from scfm_jax.scaling.recommend import FARTHEST
from scfm_jax.scaling.runs import runs_of

Row = dict[str, Any]
Rows = Callable[..., list[Row]]
LIGHTNESS = 9  # of 100, by which a reader tells two greys apart


@pytest.fixture(scope="module")
def isoflop(make_rows: Rows) -> Law:
    """Five sizes on each of four budgets, at two k."""
    points = [
        (float(ratio * (c / 120) ** 0.5), float(c / (6 * (k + 1)) / (ratio * (c / 120) ** 0.5)), k)
        for c, ratio, k in itertools.product(np.geomspace(1e17, 1e20, 4), np.geomspace(0.3, 3, 5), (0, 4))
    ]
    return fit_law(runs_of(make_rows(points, with_neighbours, noise=0.004), "runs"), FEW)


def with_rows(law: Law, rows: list[Row]) -> Law:
    return replace(law, runs=runs_of(rows, "runs"))


def drawn(law: Law, name: str) -> tuple[Figure, str]:
    figure, caption = figures_of(law)[name]
    assert figure is not None, caption
    return figure, caption


# --- readable in grey


def lightness(colour: Any) -> float:
    """CIE L* of an sRGB colour; that of white where there is none."""
    *rgb, alpha = to_rgba(colour)
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    y = alpha * float(np.dot([0.2126, 0.7152, 0.0722], linear)) + 1 - alpha
    return 116 * y ** (1 / 3) - 16 if y > 0.008856 else 903.3 * y


def alike(axes: Axes) -> list[str]:
    """Pairs of series, all lines and marks of one colour, that are alike but for their colour."""
    series: dict[Any, list[Line2D]] = {}
    for line in axes.lines:
        series.setdefault(to_rgba(line.get_color()), []).append(line)

    def looks(of: list[Line2D]) -> tuple[set[Any], set[Any], float, float]:
        marks = {line.get_marker() for line in of} - {"None", "", "|"}
        dashes = {str(line._dash_pattern) for line in of if line.get_linestyle() not in ("None", "")}
        faces = [lightness(line.get_markerfacecolor()) for line in of if line.get_marker() in marks]
        return marks, dashes, lightness(of[0].get_color()), max(faces, default=0.0)

    found = []
    for first, second in itertools.combinations(series.values(), 2):
        (marks, dashes, edge, face), (others, other_dashes, other_edge, other_face) = (
            looks(first),
            looks(second),
        )
        if (marks and not others and not dashes) or (others and not marks and not other_dashes):
            continue  # a line is no mark
        if marks & others if marks and others else dashes & other_dashes:
            found.append(f"marks {marks & others} or dashes {dashes & other_dashes} twice")
        if max(abs(edge - other_edge), abs(face - other_face)) < LIGHTNESS:
            found.append(f"{marks or dashes} as light as {others or other_dashes}")
    return found


@pytest.mark.parametrize("which", ["law", "isoflop"])
def test_series_are_told_apart_in_grey(which: str, request: pytest.FixtureRequest) -> None:
    figures = figures_of(request.getfixturevalue(which))
    seen = 0
    for name, (figure, _) in figures.items():
        for axes in figure.axes if figure is not None else ():
            assert not alike(axes), f"{name}: {alike(axes)}"
            seen += 1
    assert seen >= 14
    assert (figures["isoflop"][0] is None) == (which == "law")


def test_seven_series_are_told_apart_in_grey() -> None:
    axes = Figure().subplots()
    for dash, marker in zip(lines(7), points(7), strict=True):
        axes.plot([0, 1], [0, 1], **dash)
        axes.plot([0, 1], [0, 1], **marker)
    assert not alike(axes)


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ({"marker": "o", "color": "black"}, {"marker": "o", "color": "#999999"}, "twice"),
        ({"linestyle": "--", "color": "black"}, {"linestyle": "--", "color": "#bbbbbb"}, "twice"),
        ({"marker": "o", "color": "#0072B2"}, {"marker": "s", "color": "#D55E00"}, "as light"),
        ({"linestyle": "-", "color": "#0072B2"}, {"linestyle": "--", "color": "#D55E00"}, "as light"),
    ],
)
def test_series_that_grey_does_not_tell_apart(
    first: dict[str, Any], second: dict[str, Any], said: str
) -> None:
    """One mark or dash in two greys; blue and vermilion, which are about as light."""
    axes = Figure().subplots()
    for place, style in enumerate((first, second)):
        axes.plot([0, 1], [place, 1], **({"linestyle": ""} | style))
    (found,) = alike(axes)
    assert said in found


@pytest.mark.parametrize("name", ["MARKERS", "shades"])
def test_figures_without_marks_or_shades_are_found(
    name: str, law: Law, monkeypatch: pytest.MonkeyPatch
) -> None:
    same = "o" if name == "MARKERS" else lambda count: ["#0072b2", "#d55e00", "#0e7c5b"][:count]
    monkeypatch.setattr(figure_style, name, same)
    few = replace(law, refusals=["no frontier is drawn"])
    found = figures_of(few)
    for which in ("compute", "residuals"):
        figure = found[which][0]
        assert figure is not None and all(alike(axes) for axes in figure.axes)


# --- k


def means(law: Law, n: float, d: float) -> list[float]:
    at = np.isclose(law.runs.parameters_without_embeddings, n) & np.isclose(law.runs.unique_cells, d)
    return [law.runs.loss[at & (law.runs.k == k)].mean() for k in (0, 4, 16)]


def test_losses_over_k_are_those_that_were_measured(law: Law) -> None:
    figure, caption = drawn(law, "neighbours")
    shown = [SIZES[place] for place in (0, 1, 2, 4, 5)]
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        f"N = {number(n)}\nD = {number(DATA[0])}" for n in shown
    ]
    assert "Sizes with several k that are left out: 1." in caption and "one k alone" not in caption
    alpha, beta, a, b = (value(law, name) for name in ("alpha", "beta", "A", "B"))
    floors = np.array([value(law, f"E[k={k}]") for k in (0, 4, 16)])
    for axes, n in zip(figure.axes, shown, strict=True):
        fitted, runs, mean = axes.lines
        assert mean.get_ydata() == pytest.approx(means(law, n, DATA[0]), rel=1e-12)
        assert len(runs.get_ydata()) == 6
        assert fitted.get_ydata() == pytest.approx(floors + a / n**alpha + b / DATA[0] ** beta, rel=1e-9)
        low, high = axes.get_ylim()
        assert low < min(*mean.get_ydata(), *fitted.get_ydata())
        assert high > max(*mean.get_ydata(), *fitted.get_ydata())
    ratios = [np.divide(*axes.get_ylim()) for axes in figure.axes]
    assert ratios == pytest.approx([ratios[0]] * 5)


def test_the_data_with_most_levels_of_k_is_shown(law: Law, make_rows: Rows) -> None:
    points = [(1e6, 1e8, 0), (1e6, 1e9, 0), (1e6, 1e9, 4), (1e7, 1e8, 0), (1e7, 1e8, 4), (1e7, 1e8, 16)]
    few = with_rows(law, make_rows([*points, (1e7, 1e9, 0), (1e7, 1e9, 4), (1e8, 1e9, 0)], with_neighbours))
    found = measured_curves(few)
    assert (found.what, found.left_out, found.single) == ("D", 0, 1)
    assert [(curve.size, curve.shared, len(curve.runs)) for curve in found.drawn] == [
        (1e6, 1e9, 2),
        (1e7, 1e8, 3),
    ]


def test_sizes_with_most_levels_of_k_are_shown(law: Law, make_rows: Rows) -> None:
    sizes = [float(n) for n in np.geomspace(1e6, 1e9, 9)]
    points = [(n, 1e8, k) for n in sizes for k in ((0, 4, 16) if n in sizes[3:5] else (0, 4))]
    found = measured_curves(with_rows(law, make_rows(points, with_neighbours)))
    assert [curve.size for curve in found.drawn] == [sizes[place] for place in (0, 3, 4, 5, 8)]
    assert found.left_out == 4


def test_where_neighbours_add_to_the_data(law: Law, make_rows: Rows) -> None:
    """Equal centre cells: runs that saw them more often are no part of the curve."""
    rows = make_rows([(1e6, 1e8, 0), (1e6, 1e8, 4), (1e6, 1e8, 16), (1e7, 1e8, 0)], with_neighbours, seeds=2)
    for row in rows:
        row["unique_cells"] = row["cells"] * (1 + row["k"] / 16)
    longer = dict(rows[0], name="longer", cells=4e8, epochs=4.0, loss=1.0)
    one = with_rows(law, [*rows, longer])
    found = measured_curves(one)
    assert (found.what, found.single) == ("centre cells", 1)
    (curve,) = found.drawn
    assert curve.shared == 1e8 and curve.runs.tolist() == list(range(6))
    figure, caption = drawn(one, "neighbours")
    assert figure.axes[0].get_title(loc="left") == "N = $10^{6}$\n$10^{8}$ centre cells"
    assert "the same D, which lies from 1e+08 to 2e+08 unique cells" in caption
    expected = [np.mean([row["loss"] for row in rows[2 * place : 2 * place + 2]]) for place in range(3)]
    assert figure.axes[0].lines[2].get_ydata() == pytest.approx(expected)


def test_where_budgets_are_shared(isoflop: Law) -> None:
    found = measured_curves(isoflop)
    assert found.what == "FLOPs" and len(found.drawn) == 5
    for curve in found.drawn:
        assert isoflop.runs.flops[curve.runs] == pytest.approx(curve.shared, rel=0.1)
        assert isoflop.design.size[curve.runs] == pytest.approx(curve.size)
        assert isoflop.runs.k[curve.runs].tolist() == [0, 4]


def test_nothing_is_shared(law: Law, make_rows: Rows) -> None:
    rows = make_rows([(1e6, 1e8, 0), (1e6, 7e8, 4), (1e7, 1e9, 16)], with_neighbours)
    figure, why = figures_of(replace(with_rows(law, rows), refusals=["few"]))["neighbours"]
    assert figure is None and why == "no size was run at several k with the same D, centre cells or FLOPs"


# --- parameters


def test_parameters_have_axes_that_suit_them(law: Law) -> None:
    parameters = [
        Parameter("alpha", 0.5, (0.03, 1.4), (0.2, 0.8)),
        Parameter("beta", None, None, None, "the profile likelihood is open below"),
        Parameter("E[k=0]", 0.28, (0.0, 0.3), (0.25, 0.3)),
        Parameter("A", 1.8, (0.0, 3871.0), (0.26, 24.0)),
        Parameter("B", None, None, None, "beta is not identified"),
    ]
    figure, caption = drawn(replace(law, parameters=parameters, huber={"alpha": 0.4, "A": 1.0}), "parameters")
    exponents, floors, coefficients = figure.axes
    assert [axes.get_xscale() for axes in figure.axes] == ["linear", "linear", "log"]
    assert exponents.get_xlim()[1] < 2 and floors.get_xlim()[1] < 1 and coefficients.get_xlim()[1] > 3871
    names = [[label.get_text() for label in axes.get_yticklabels()] for axes in figure.axes]
    assert names == [["alpha", "beta"], ["E[k=0]"], ["A", "B"]]
    assert [text.get_text() for text in exponents.texts] == [
        "not identified: the profile likelihood is open below"
    ]
    for axes in (exponents, coefficients):
        assert all(np.max(line.get_ydata()) < 0.5 for line in axes.lines), "beta or B has a number"
        assert axes.texts[0].get_position()[1] == 1
    bootstrap = coefficients.lines[0].get_xdata()
    assert 0 < bootstrap[0] < 0.26 and bootstrap[1] == 3871
    assert "<" in {line.get_marker() for line in coefficients.lines}
    assert "<" not in {line.get_marker() for line in floors.lines}
    assert caption.endswith("An arrow goes on to 0.")


# --- compute


def test_the_frontier_of_a_k_ends_where_its_runs_are_far(law: Law) -> None:
    runs = law.runs
    small = runs.flops < np.quantile(runs.flops, 0.3)
    few = replace(law, runs=runs.take((runs.k != 16) | small), refusals=[])
    figure, _ = drawn(few, "compute")
    (axes,) = figure.axes
    least, most = few.budgets(16)
    assert most < few.runs.flops.max() / FARTHEST**2
    colour = lines(3)[2]["color"]
    marks, thin, thick = (line for line in axes.lines if line.get_color() == colour)
    assert len(marks.get_xdata()) == int((few.runs.k == 16).sum())
    assert thin.get_xdata().max() <= FARTHEST * most * (1 + 1e-9)
    assert (thick.get_xdata().min(), thick.get_xdata().max()) == pytest.approx((least, most))


def test_numbers_for_a_reader() -> None:
    assert [number(each) for each in (0, 0.25, 15_993.4, 1e6, 3.98e7, 1.2e-5)] == [
        "0",
        "0.25",
        "15,993",
        "$10^{6}$",
        r"$3.98 \times 10^{7}$",
        r"$1.2 \times 10^{-5}$",
    ]
