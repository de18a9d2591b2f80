"""The figure of a law over k: losses measured at several k, all else equal, and the law through them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from scfm_jax.downstream.drawing import INK, PALETTE, WIDTH, grid
from scfm_jax.scaling.figure_style import DATA, SIZE, legend, loss_ticks, number
from scfm_jax.scaling.forms import binned, predict
from scfm_jax.scaling.isoflop import budgets_of
from scfm_jax.scaling.law import Law

MOST = 5  # sizes that are drawn
_RUN: Any = {"linestyle": "", "marker": ".", "markersize": 4, "color": "#7c858d"}
_MEAN: Any = {"linestyle": "", "marker": "D", "markersize": 5, "color": INK, "markerfacecolor": "white"}
_LAW: Any = {"color": PALETTE[0], "linewidth": 1.4}
_BAND: Any = {"color": PALETTE[0], "alpha": 0.15}


@dataclass(frozen=True, eq=False)
class Curve:
    """Runs of one size that differ in k.

    Attributes
    ----------
    size
        N.
    shared
        The amount that the runs have in common.
    runs
        Their places among those of the law.
    """

    size: float
    shared: float
    runs: Int64[np.ndarray, " m"]


@dataclass(frozen=True, eq=False)
class Curves:
    """Curves in the order of size.

    Attributes
    ----------
    what
        Runs of a curve share: ``D``, ``centre cells``, or ``FLOPs``.
    drawn
        `MOST` at most.
    left_out
        How many more sizes were run at several k.
    single
        How many sizes were run at one k alone.
    """

    what: str
    drawn: list[Curve]
    left_out: int
    single: int


def measured_curves(law: Law) -> Curves:
    """Sizes that were run at several k, each with the amount of data that has most levels of k.

    Runs of a curve saw equally many cells. Neighbours are cells too: a study of equal centre cells has
    another D at each k, and one of equal FLOPs other centre cells. Where no D was run at several k, runs of
    equal centre cells are taken together, and where there are none, those of one budget.
    """
    runs, data = law.runs, law.design.data
    size, seen, centres = binned(law.design.size), binned(runs.cells), runs.cells / runs.epochs
    same_d = (binned(data),) if law.config.data == "tokens" else (binned(data), seen)
    for what, values, levels in (
        ("D", data, same_d),
        ("centre cells", centres, (binned(centres), seen)),
        ("FLOPs", runs.flops, (budgets_of(runs.flops),)),
    ):
        group = np.unique(np.stack((size, *levels)), axis=1, return_inverse=True)[1].reshape(-1)
        curves: list[Curve] = []
        for n in np.unique(size):
            candidates = [np.flatnonzero(group == each) for each in np.unique(group[size == n])]
            most = max(candidates, key=lambda places: (_levels(law, places), len(places)))
            if _levels(law, most) > 1:
                curves.append(Curve(float(law.design.size[most].mean()), float(values[most].mean()), most))
        if curves:
            chosen = _spread([_levels(law, curve.runs) for curve in curves])
            drawn = [curves[place] for place in chosen]
            return Curves(what, drawn, len(curves) - len(drawn), len(np.unique(size)) - len(curves))
    return Curves("nothing", [], 0, len(np.unique(size)))


def _levels(law: Law, places: Int64[np.ndarray, " m"]) -> int:
    return len(np.unique(law.runs.k[places]))


def _spread(counts: list[int]) -> list[int]:
    """Places of the greatest counts, `MOST` at most; of equal ones, evenly from the first to the last."""
    chosen: list[int] = []
    for count in sorted(set(counts), reverse=True):
        equal, room = [place for place, each in enumerate(counts) if each == count], MOST - len(chosen)
        if len(equal) > room:
            equal = [equal[round(place)] for place in np.linspace(0, len(equal) - 1, room)]
        chosen += equal
    return sorted(chosen)


def draw_neighbours(law: Law) -> tuple[Figure | None, str]:
    """Loss over k, a panel for each size; or None, and why there is none."""
    ks = law.design.levels
    if len(ks) < 2:
        return None, f"all runs have k = {ks[0]}"
    curves = measured_curves(law)
    if not curves.drawn:
        return None, "no size was run at several k with the same D, centre cells or FLOPs"
    count = len(curves.drawn)
    columns = count if count <= 3 else 2 if count == 4 else 3
    rows = -(-count // columns)
    size = (max(WIDTH, 2.2 * columns), 2.6 * rows + 0.6)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes[count:]:
        ax.remove()
    axes = axes[:count]
    reached = [_panel(ax, law, curve, curves.what) for ax, curve in zip(axes, curves.drawn, strict=True)]
    half = 0.54 * max(np.log(high / low) for low, high in reached)
    for place, (ax, (low, high)) in enumerate(zip(axes, reached, strict=True)):
        centre = np.sqrt(low * high)
        ax.set_ylim(centre * np.exp(-half), centre * np.exp(half))
        loss_ticks(ax)
        grid(ax)
        if place % columns == 0:
            ax.set_ylabel("held-out loss")
        if place + columns >= count:
            ax.set_xlabel("k, neighbours")
    handles = [
        Line2D([], [], **_RUN, label="run"),
        Line2D([], [], **_MEAN, label="mean"),
        Line2D([], [], **_LAW, label="law"),
        Line2D([], [], **_BAND, linewidth=7, label="its 95% interval"),
    ]
    legend(figure, handles, columns=4)
    return figure, _caption(law, curves)


def _panel(ax: Axes, law: Law, curve: Curve, what: str) -> tuple[float, float]:
    """Draw one size; returns the least and the greatest loss that is drawn."""
    k, loss, ks = law.runs.k[curve.runs], law.runs.loss[curve.runs], law.design.levels
    measured = np.unique(k)
    at = np.searchsorted(ks, measured)
    middle, ends = _of_law(law, curve, measured)
    ax.fill_between(at, *ends, **_BAND, linewidth=0)
    ax.plot(at, middle, **_LAW)
    ax.plot(np.searchsorted(ks, k), loss, **_RUN)
    ax.plot(at, [loss[k == each].mean() for each in measured], **_MEAN)
    amount = f"D = {number(curve.shared)}" if what == "D" else f"{number(curve.shared)} {what}"
    ax.set_title(f"N = {number(curve.size)}\n{amount}", fontsize=9)
    ax.set_xticks(range(len(ks)), [str(each) for each in ks])
    ax.set(xlim=(-0.4, len(ks) - 0.6), yscale="log")
    return float(min(ends.min(), loss.min())), float(max(ends.max(), loss.max()))


def _of_law(
    law: Law, curve: Curve, measured: Int64[np.ndarray, " l"]
) -> tuple[Float64[np.ndarray, " l"], Float64[np.ndarray, "2 l"]]:
    """Mean loss at each k that the law gives the runs, and the ends of its interval."""
    at = [curve.runs[law.runs.k[curve.runs] == k] for k in measured]
    drawn = [predict(law.form, law.design.take(places), law.draws).mean(1) for places in at]
    ends = np.quantile(np.stack(drawn, axis=1), law.tails, axis=0)
    return np.array([law.fitted[places].mean() for places in at]), ends


def _caption(law: Law, curves: Curves) -> str:
    unit = DATA[law.config.data]
    said = [
        f"Held-out loss over k at sizes that were run at several k with the same {curves.what}"
        f"{'' if curves.what == 'FLOPs' else ', seen equally often'}: runs, their means, and the mean of the "
        f"law at their N and D. All panels span the same ratio. N is {SIZE[law.config.size]}."
    ]
    if curves.what == "D":
        said.append(f"D is {unit}; where a size has several, that with most levels of k is shown.")
    else:
        data = np.concatenate([law.design.data[curve.runs] for curve in curves.drawn])
        said.append(
            f"No size was run at several k with the same D, which lies from {data.min():.3g} to "
            f"{data.max():.3g} {unit} here."
        )
    if curves.left_out:
        said.append(f"Sizes with several k that are left out: {curves.left_out}.")
    if curves.single:
        said.append(f"Sizes that were run at one k alone: {curves.single}.")
    return " ".join(said)
