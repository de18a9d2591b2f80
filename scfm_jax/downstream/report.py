"""The report of a run: figures as PNG files, and one HTML page that holds them and needs nothing else."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from jaxtyping import Float, Shaped
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy.stats import pearsonr

from scfm_jax.errors import InputError

# Okabe & Ito (2008), told apart by colour-blind readers; yellow last, it is faint on white.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#7A7A7A", "#F0E442")
INK = "#22282e"
# The palest blue of matplotlib's map is lost on white.
BLUES = LinearSegmentedColormap.from_list("blues", mpl.colormaps["Blues"](np.linspace(0.2, 1, 256)))
DPI = 160
PANEL_WIDTH = 4.2  # inches, of one panel of the tissue
STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#8a939b",
    "axes.linewidth": 0.8,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": "#5b646c",
    "ytick.color": "#5b646c",
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


class Table(NamedTuple):
    """A table of the report: numbers stand right and are rounded to four digits, the rest is text."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[object]]


class Predictions(NamedTuple):
    """True and predicted expression of masked entries, log1p of normalised counts."""

    true: Float[np.ndarray, " n"]
    predicted: Float[np.ndarray, " n"]


class Tissue(NamedTuple):
    """Cells of each slide with their domain and the one predicted; `unit` is that of the coordinates."""

    xy: Sequence[Float[np.ndarray, "n 2"]]
    domain: Sequence[Shaped[np.ndarray, " n"]]
    predicted: Sequence[Shaped[np.ndarray, " n"]]
    slides: Sequence[str]
    unit: str = "µm"


def write_report(
    folder: str | Path,
    *,
    title: str,
    history: Sequence[Mapping[str, Any]],
    tables: Sequence[Table] = (),
    predictions: Predictions | None = None,
    tissue: Tissue | None = None,
    notes: Sequence[str] = (),
) -> Path:
    """Write `figures/*.png` and `report.html` into a run folder.

    Parameters
    ----------
    folder
        The run folder, made where it is absent; an older report there is replaced.
    title
        Heading of the page.
    history
        Rows of `metrics.jsonl`, each with `step` and any of `loss` and `held_out_loss`.
    tables
        Shown in this order.
    predictions
        Masked entries, for the figure of predicted against true expression.
    tissue
        Cells for the figure of domains.
    notes
        Paragraphs of plain text: what was run, and what to beware of.

    Returns
    -------
    The page.

    Raises
    ------
    InputError
        Where there is nothing to draw in a part that was given.
    """
    folder = Path(folder)
    figures = folder / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    parts = []
    with mpl.rc_context(STYLE):
        drawn = [("loss.png", "Loss", *_draw_loss(history))]
        if predictions is not None:
            drawn.append(("expression.png", "Masked expression", *_draw_expression(predictions)))
        if tissue is not None:
            drawn.append(("tissue.png", "Tissue", *_draw_tissue(tissue)))
        for name, heading, figure, caption in drawn:
            path = figures / name
            figure.savefig(path, dpi=DPI)
            parts.append(_figure_html(path, heading, caption, width=figure.get_figwidth()))
    page = _PAGE.format(
        title=html.escape(title),
        notes="".join(f"<p>{html.escape(note)}</p>" for note in notes),
        tables="".join(map(_table_html, tables)),
        figures="".join(parts),
    )
    report = folder / "report.html"
    report.write_text(page, encoding="utf-8")
    return report


def _series(history: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    rows = [(row["step"], row[key]) for row in history if row.get(key) is not None]
    steps, values = np.array(rows, float).reshape(-1, 2).T
    return steps, values


def _draw_loss(history: Sequence[Mapping[str, Any]]) -> tuple[Figure, str]:
    steps, loss = _series(history, "loss")
    eval_steps, held_out_loss = _series(history, "held_out_loss")
    if not len(steps) and not len(eval_steps):
        raise InputError("history", "no row has loss or held_out_loss", "give the rows of metrics.jsonl")
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    ax = figure.subplots()
    caption = "Loss over the steps of training"
    if len(steps):
        window = max(1, len(steps) // 40)
        smooth = np.convolve(loss, np.full(window, 1 / window), mode="valid")
        if window > 1:
            ax.plot(steps, loss, color=PALETTE[4], linewidth=0.8, alpha=0.55)
            caption += f" (pale: each record, dark: mean of {window})"
        ax.plot(
            steps[window // 2 :][: len(smooth)], smooth, color=PALETTE[0], linewidth=1.8, label="training"
        )
    if len(eval_steps):
        style: Any = {"color": PALETTE[5], "linewidth": 1.4, "marker": "o", "markersize": 4}
        ax.plot(eval_steps, held_out_loss, label="held-out cells", **style)
    ax.legend(loc="upper right")
    every = np.concatenate([loss, held_out_loss])
    every = every[np.isfinite(every)]
    if len(every) and every.min() > 0 and every.max() > 10 * every.min():
        ax.set_yscale("log")
    ax.set(xlabel="step", ylabel="loss")
    ax.grid(axis="y", color="#e8ecef", linewidth=0.7)
    ax.set_axisbelow(True)
    return figure, caption + "."


def _draw_expression(predictions: Predictions) -> tuple[Figure, str]:
    true, predicted = (np.asarray(x, float) for x in predictions)
    if len(true) < 2:
        raise InputError("predictions", "fewer than two entries", "give the masked entries of held-out cells")
    high = float(max(true.max(), predicted.max())) * 1.02 or 1.0
    low = min(0.0, float(predicted.min()))
    figure = Figure(figsize=(5.4, 4.6), layout="constrained")
    ax = figure.subplots()
    bins = ax.hexbin(
        true,
        predicted,
        gridsize=45,
        bins="log",
        mincnt=1,
        cmap=BLUES,
        linewidths=0.1,
        extent=(low, high) * 2,
    )
    ax.plot([low, high], [low, high], color=INK, linewidth=1, linestyle=(0, (4, 3)))
    edges = np.quantile(predicted, np.linspace(0, 1, 21))
    group = np.searchsorted(edges[1:-1], predicted)
    filled = np.unique(group)
    means = [(true[group == g].mean(), predicted[group == g].mean()) for g in filled]
    ax.plot(*zip(*means), color=PALETTE[5], linewidth=1.4, marker="o", markersize=3.5)
    ax.set(
        xlim=(low, high),
        ylim=(low, high),
        aspect="equal",
        xlabel="true expression, log1p of normalised counts",
        ylabel="predicted expression, log1p of normalised counts",
    )
    figure.colorbar(
        bins, ax=ax, label="masked entries", format="{x:,.0f}", shrink=0.7, aspect=24
    ).outline.set_visible(False)
    handles = [
        Line2D([], [], color=INK, linewidth=1, linestyle=(0, (4, 3)), label="predicted = true"),
        Line2D(
            [],
            [],
            color=PALETTE[5],
            marker="o",
            markersize=3.5,
            label="mean of each twentieth, by prediction",
        ),
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=2, fontsize=8.5)
    varied = np.ptp(true) > 0 and np.ptp(predicted) > 0
    correlation = f", Pearson's r {pearsonr(true, predicted).statistic:.2f}" if varied else ""
    caption = (
        f"{len(true):,} masked entries of held-out cells{correlation}. "
        "A sure prediction lies on the dashed line; a calibrated one has its means there."
    )
    return figure, caption


def _draw_tissue(tissue: Tissue) -> tuple[Figure, str]:
    if not len(tissue.xy):
        raise InputError("tissue", "no slide", "give the cells of at least one slide")
    domains = [np.asarray(d).astype(str) for d in tissue.domain]
    predicted = [np.asarray(d).astype(str) for d in tissue.predicted]
    classes = np.unique(np.concatenate(domains + predicted))
    colours = np.array([_class_colour(i) for i in range(len(classes))])

    spans = [np.maximum(np.ptp(xy, axis=0), 1e-9) for xy in tissue.xy]
    heights = [float(np.clip(PANEL_WIDTH * span[1] / span[0], 1.6, 6.0)) for span in spans]
    legend_rows = math.ceil(len(classes) / 5)
    figure = Figure(
        figsize=(9.2, sum(heights) + 0.75 * len(heights) + 0.25 * legend_rows), layout="constrained"
    )
    axes = figure.subplots(len(heights), 2, squeeze=False, height_ratios=heights)
    n_wrong = n_cells = 0
    for i, (left, right) in enumerate(axes):
        xy, wrong = np.asarray(tissue.xy[i]), domains[i] != predicted[i]
        n_wrong, n_cells = n_wrong + int(wrong.sum()), n_cells + len(wrong)
        # A little under the size, in points, at which discs of evenly spread cells touch.
        scale = 72 * min(heights[i] / spans[i][1], PANEL_WIDTH / spans[i][0])
        size = float(np.clip(0.8 * scale**2 * np.prod(spans[i]) / max(len(xy), 1), 1.0, 40.0))
        for ax, labels in ((left, domains[i]), (right, predicted[i])):
            colour = colours[np.searchsorted(classes, labels)]
            ax.scatter(*xy.T, s=size, c=colour, linewidths=0, rasterized=True)
            ax.set(aspect="equal", xlabel=f"x ({tissue.unit})", ylabel=f"y ({tissue.unit})")
        right.scatter(*xy[wrong].T, s=0.7 * size, c=INK, marker="x", linewidths=0.16 * math.sqrt(size))
        left.set_title(f"{tissue.slides[i]}: domain")
        right.set_title(f"predicted, {1 - wrong.mean():.1%} right" if len(wrong) else "predicted")
        right.set_ylabel("")
    handles = [
        Line2D([], [], linestyle="", marker="o", markersize=6, color=c, label=n)
        for n, c in zip(classes, colours)
    ]
    handles.append(
        Line2D([], [], linestyle="", marker="x", markersize=5, markeredgewidth=1.1, color=INK, label="wrong")
    )
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 6), handletextpad=0.2)
    caption = (
        f"{n_cells:,} held-out cells; {n_wrong:,} of them ({n_wrong / n_cells:.1%}) wrong, marked by a cross."
    )
    return figure, caption


def _class_colour(index: int) -> tuple[float, float, float]:
    """The palette, then its colours mixed with white, then with black: 24 in all before one returns."""
    mix, amount = ((1.0, 0.0), (1.0, 0.5), (0.0, 0.45))[index // len(PALETTE) % 3]
    r, g, b = ((1 - amount) * c + amount * mix for c in to_rgb(PALETTE[index % len(PALETTE)]))
    return r, g, b


def _figure_html(path: Path, heading: str, caption: str, *, width: float) -> str:
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    text = html.escape(caption)
    return (
        f'<section><h2>{html.escape(heading)}</h2><figure style="max-width:{width * 6:.0f}rem">'
        f'<img alt="{text}" src="data:image/png;base64,{data}">'
        f"<figcaption>{text}</figcaption></figure></section>"
    )


def _table_html(table: Table) -> str:
    numeric = [all(map(_is_number, column)) for column in zip(*table.rows)]

    def line(tag: str, cells: Sequence[object]) -> str:
        kinds = (' class="number"' if number else "" for number in numeric)
        texts = (html.escape(_cell_text(cell)) for cell in cells)
        return "<tr>" + "".join(f"<{tag}{kind}>{text}</{tag}>" for kind, text in zip(kinds, texts)) + "</tr>"

    return (
        f'<div class="table"><table><caption>{html.escape(table.caption)}</caption>'
        f"<thead>{line('th', table.header)}</thead>"
        f"<tbody>{''.join(line('td', row) for row in table.rows)}</tbody></table></div>"
    )


def _is_number(cell: object) -> bool:
    return isinstance(cell, int | float | np.number) and not isinstance(cell, bool)


def _cell_text(cell: object) -> str:
    if isinstance(cell, int | np.integer) and not isinstance(cell, bool):
        return f"{int(cell):,}"
    if isinstance(cell, float | np.floating):
        return "–" if math.isnan(cell) else f"{float(cell):.4g}".replace("-", "−")
    return str(cell)


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light; }}
body {{ margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 58rem; background: #fff; color: #22282e;
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }}
h1 {{ font-size: 1.7rem; line-height: 1.25; font-weight: 650; margin: 0 0 1rem; }}
h2 {{ font-size: 1.1rem; font-weight: 650; margin: 2.75rem 0 .75rem; }}
p {{ max-width: 42rem; margin: 0 0 .75rem; }}
figure {{ margin: 0; }}
img {{ display: block; width: 100%; height: auto; }}
figcaption {{ max-width: 42rem; margin-top: .5rem; font-size: .9rem; color: #5b646c; }}
.table {{ overflow-x: auto; margin-top: 2rem; }}
table {{ border-collapse: collapse; font-size: .92rem; min-width: 60%; }}
caption {{ text-align: left; padding-bottom: .5rem; font-weight: 600; }}
th, td {{ text-align: left; padding: .4rem 1.5rem .4rem 0; border-bottom: 1px solid #e3e8ec;
  white-space: nowrap; }}
th {{ border-bottom: 1.5px solid #8a939b; font-weight: 600; font-size: .85rem; color: #5b646c; }}
.number {{ text-align: right; font-variant-numeric: tabular-nums; }}
@media (max-width: 36rem) {{ body {{ padding: 1.5rem 1rem 3rem; }} h1 {{ font-size: 1.4rem; }} }}
@media print {{ body {{ max-width: none; padding: 0; font-size: 10pt; }} .table {{ overflow: visible; }}
  section, tr, figure {{ break-inside: avoid; }} h2 {{ break-after: avoid; }} }}
</style>
</head>
<body>
<h1>{title}</h1>
{notes}
{tables}
{figures}
</body>
</html>
"""
