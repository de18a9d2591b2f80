"""The report of a suite: which models beat the best baseline, in words, tables and figures."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from scfm_jax.downstream.metrics import FEW_BLOCKS
from scfm_jax.downstream.page import Cell, Drawing, Section, Table, markdown, write_page
from scfm_jax.downstream.scores import Interval
from scfm_jax.downstream.suite_comparison import Comparison, Gain, compare
from scfm_jax.downstream.suite_figures import (
    deviation,
    draw_confusion,
    draw_curves,
    draw_predicted,
    draw_training,
    score_label,
)
from scfm_jax.downstream.suite_maps import draw_embedding, draw_maps, embeddings_of
from scfm_jax.downstream.suite_results import Method, Task, read_results

MOST_EMBEDDINGS = 4
_MARKS = {
    "leaking": "tested on cells that neighbour or equal its training cells: too good",
    "transductive": "has seen the test tissue, though not its labels, in pretraining",
    "incomplete": "lacks folds, so that its scores are of fewer cells; its gain is on folds that both have",
}


def write_suite_report(folder: Path) -> Path:
    """Write `report.html`, `results.md` and `figures/*.png` into a suite's results folder.

    Parameters
    ----------
    folder
        Holds `tasks.json` and `results.jsonl`, the `predictions/*.npz` that it names, and where there are any
        `tissue/TASK.npz`, `embeddings/TASK*.npz` (`embedding` float32 `[n, d]`, `cells` int64 `[n]`) and
        `history/*.json` (rows of `epoch`, `loss`, `validation`), which a row names or which are called like
        its predictions. An older report is replaced.

    Returns
    -------
    The page.

    Raises
    ------
    InputError
        No results, a row with a field missing or of another kind, a file that is missing or is not what the
        rows say.

    Warns
    -----
    DataWarning
        A task of fewer than 10 spatial blocks, where intervals are too narrow.
    """
    folder = Path(folder)
    tasks = read_results(folder)
    figures = folder / "figures"
    figures.mkdir(exist_ok=True)
    comparisons, sections = [], []
    for number, task in enumerate(tasks):
        stem = f"{figures}/{number + 1}_{re.sub('[^A-Za-z0-9.-]+', '_', task.name)}"
        comparison = compare(task) if task.primary and task.methods else None
        panels = _panels(task, comparison, embeddings_of(task, tasks), stem)
        comparisons.append(comparison)
        sections.append(Section(task.name, _words(task, comparison), _tables(task, comparison), panels))
        task.release()
    title = f"Downstream results: {folder.resolve().name}"
    paragraphs = [verdict(tasks, comparisons), *_how_to_read(tasks)]
    (folder / "results.md").write_text(markdown(title, paragraphs, sections), encoding="utf-8")
    return write_page(folder / "report.html", title, paragraphs, sections)


def verdict(tasks: Sequence[Task], comparisons: Sequence[Comparison | None]) -> str:
    """In which tasks the best model beats the best baseline, and in which it does not."""
    judged = [found for found in comparisons if found and found.verdict]
    groups: dict[str, list[str]] = {"beats": [], "level": [], "below": [], "unsure": []}
    for found in judged:
        if (gain := found.verdict) is not None:
            sure = not np.isnan(gain.interval.low)
            place = "beats" if gain.above else "below" if gain.below else "level" if sure else "unsure"
            groups[place].append(_of_task(found, gain))
    n = len(judged)
    sentences = []
    if groups["beats"]:
        many = f"in {len(groups['beats'])} of {n} tasks" if n > 1 else "in the one task"
        sentences.append(
            f"The best model beats the best baseline, its 95% interval clear of zero, {many}: "
            f"{_list(groups['beats'])}."
        )
    elif n:
        many = f"any of {n} tasks" if n > 1 else "the one task"
        sentences.append(f"No model beats the best baseline in {many}.")
    for place, text in (
        ("level", "Not told apart from it, the interval holding zero:"),
        ("below", "Worse, the interval clear of zero:"),
        ("unsure", "Without an interval, for there are fewer than two blocks:"),
    ):
        if groups[place]:
            sentences.append(f"{text} {_list(groups[place])}.")
    compared = {found.task.name for found in judged}
    rest = [task.name for task in tasks if task.name not in compared and task.methods]
    if rest:
        sentences.append(f"No model is compared with a baseline in {_list(rest)}.")
    if waiting := [task.name for task in tasks if not task.methods]:
        sentences.append(f"No results yet: {_list(waiting)}.")
    if partial := [task.name for task in tasks if any(method.missing for method in task.methods)]:
        sentences.append(f"Incomplete, with folds missing: {_list(partial)}.")
    return " ".join(sentences)


def _of_task(found: Comparison, gain: Gain) -> str:
    """A task's verdict in brackets behind its name."""
    model = _named(found.best_model) if found.best_model else ""
    much = f"{_interval(gain.interval, sign=True)} {score_label(found.task.primary or '')}"
    return f"{found.task.name} ({model}: {much} over {_named(gain.against)})"


def _named(method: Method) -> str:
    marks = f" [{', '.join(method.marks)}]" if method.marks else ""
    return f"{method.label}{marks}"


def _by_name(methods: Sequence[Method]) -> str:
    """Methods with all their k behind each name."""
    found: dict[str, list[str]] = {}
    for method in methods:
        marks = f" [{', '.join(method.marks)}]" if method.marks else ""
        found.setdefault(method.family, []).append("" if method.k is None else f"{method.k}{marks}")
    return _list([f"{name} (k: {', '.join(ks)})" if any(ks) else name for name, ks in found.items()])


def _how_to_read(tasks: Sequence[Task]) -> list[str]:
    marks = dict.fromkeys(mark for task in tasks for method in task.methods for mark in method.marks)
    texts = [
        "Pooled scores are of the predictions of all folds together, averaged over seeds; their 95% "
        "intervals and those of gains come from drawing spatial blocks of tissue with replacement. A gain is "
        "positive where the method is better, for errors too. The best model of a task is picked from its "
        "rows by the score shown, which flatters it a little."
    ]
    if marks:
        texts.append(" ".join(f"{mark.capitalize()}: {_MARKS[mark]}." for mark in marks))
    return texts


def _words(task: Task, comparison: Comparison | None) -> list[str]:
    """What the task is, and what came out at each k."""
    facts = [f"{task.what} of {task.file}", *([task.unit] if task.unit else []), f"split by {task.split}"]
    facts += [f"{len(task.classes)} classes"] if task.classes else []
    folds = len(task.methods[0].folds) if task.methods else 0
    facts += [f"{folds} fold{'s' * (folds != 1)}"] if folds else []
    facts += [f"{comparison.n_blocks} blocks"] if comparison else []
    texts = [f"{', '.join(facts)}."]
    if task.left_out:
        classes = _list([f"{name} ({cells:,} cells)" for name, cells in task.left_out.items()])
        texts.append(f"Left out as too rare: {classes}.")
    if not task.methods:
        texts.append("No results yet.")
    if missing := [method for method in task.methods if method.missing]:
        lacking = _list([f"{method.label} (fold {_list(method.missing)})" for method in missing])
        texts.append(f"Incomplete. Folds are missing of {lacking}.")
    if comparison is None:
        return texts
    if comparison.n_blocks < FEW_BLOCKS:
        short = "no interval can be given" if comparison.n_blocks < 2 else "intervals are too narrow"
        texts.append(f"Only {comparison.n_blocks} block{'s' * (comparison.n_blocks != 1)}: {short}.")
    if models := [pair for pair in zip(task.methods, comparison.gains) if pair[0].group == "model"]:
        above = [method for method, gain in models if gain and gain.above]
        below = [method for method, gain in models if gain and gain.below]
        texts.append(
            f"Against the best baseline at the same k or without k, {len(above)} of {len(models)} rows of "
            f"models are better, the interval clear of zero{f': {_by_name(above)}' if above else ''}."
            + (f" Clearly worse: {_by_name(below)}." if below else "")
        )
    if comparison.best_model and (gain := comparison.over_control):
        texts.append(
            f"The best model, {_named(comparison.best_model)}, has {_interval(gain.interval, sign=True)} "
            f"over the best control, {_named(gain.against)}, which was not pretrained."
        )
    return texts


def _tables(task: Task, comparison: Comparison | None) -> list[Table]:
    tables = [_main_table(task, comparison)] if comparison else []
    names = dict.fromkeys(name for method in task.methods for row in method.rows for name in row["scores"])
    if comparison:
        names = {name: None for name in names if name not in (task.primary, "ece")}
    if names:
        header = ["method", "k", *map(score_label, names)]
        rows = [
            [
                Cell(method.name, marks=method.marks),
                _k(method),
                *(_spread(method.over_folds(n)) for n in names),
            ]
            for method in task.methods
        ]
        what = "Other scores" if comparison else "Scores"
        tables.append(Table(f"{what}, mean ± standard deviation over folds", header, rows))
    return tables


def _main_table(task: Task, comparison: Comparison) -> Table:
    columns: dict[str, Callable[[Method], object]] = {
        "ECE": lambda method: _spread(method.over_folds("ece")),
        "s a fold": lambda method: _compact([row["seconds"] for row in method.rows], np.mean),
        "peak MiB": lambda method: _compact([row["peak_mib"] for row in method.rows], max),
        "stored MiB": lambda method: _compact([row["stored_bytes"] for row in method.rows], max, 2**-20),
    }
    found = {name: [of(method) for method in task.methods] for name, of in columns.items()}
    found = {name: cells for name, cells in found.items() if set(cells) != {"–"}}
    score = score_label(task.primary or "")
    header = ["method", "k", f"{score}, mean ± SD", "pooled [95%]", "gain at k [95%]", "gain [95%]", *found]
    header.append("gain is over")
    rows = []
    for method, pooled, at_k, gain, *rest in zip(
        task.methods, comparison.pooled, comparison.gains_at_k, comparison.gains, *found.values()
    ):
        best = method is comparison.best
        rows.append(
            [
                Cell(method.name, best, method.marks),
                _k(method),
                _spread(method.over_folds(task.primary or "")),
                Cell(_interval(pooled), best),
                _interval(at_k.interval, sign=True) if at_k else "–",
                _interval(gain.interval, sign=True) if gain else "–",
                *rest,
                gain.against.label if gain else "it is the best baseline",
            ]
        )
    better = "higher" if task.higher_is_better else "lower"
    caption = (
        f"{score} ({better} is better); gain over the baseline at the same k, and over the best "
        "at that k, at 0 or without k"
    )
    return Table(caption, header, rows)


def _panels(
    task: Task, comparison: Comparison | None, embeddings: Mapping[str, Path], stem: str
) -> list[list[Drawing]]:
    model = comparison.best_model if comparison else None
    first = [draw_curves(task, Path(f"{stem}_k.png")), draw_training(task, Path(f"{stem}_training.png"))]
    panels = [[drawing for drawing in first if drawing]]
    tissue = task.tissue()
    if comparison and task.kind != "imputation":  # whose predictions are of genes
        draw = draw_confusion if task.kind == "classes" else draw_predicted
        shown = {"model": model, "baseline": comparison.best_baseline}
        panels.append(
            [
                draw(task, method, task.pooled(method), Path(f"{stem}_{name}.png"))
                for name, method in shown.items()
                if method
            ]
        )
        mapped = model or comparison.best_baseline
        if tissue and mapped:
            panels += draw_maps(task, tissue, mapped, task.pooled(mapped), stem)
    # Those at the best model's k first.
    k = f"-k{model.k}-" if model else ""
    names = sorted(embeddings, key=lambda what: (k not in f"-{what}-", what))[:MOST_EMBEDDINGS]
    panels.append(
        [
            draw_embedding(task, tissue, what, embeddings[what], Path(f"{stem}_embedding{number}.png"))
            for number, what in enumerate(names, 1)
        ]
    )
    return panels


def _k(method: Method) -> object:
    return "–" if method.k is None else method.k


def _number(value: float, sign: bool = False) -> str:
    return f"{value:{'+' if sign else ''}.3f}".replace("-", "−")


def _interval(found: Interval, sign: bool = False) -> str:
    if np.isnan(found.low):
        return "–" if np.isnan(found.value) else _number(found.value, sign)
    return f"{_number(found.value, sign)} [{_number(found.low, sign)}, {_number(found.high, sign)}]"


def _spread(values: np.ndarray) -> str:
    if not len(values) or np.isnan(values).all():
        return "–"
    mean = _number(float(values.mean()))
    return f"{mean} ± {_number(deviation(values))}" if len(values) > 1 else mean


def _compact(values: Sequence[float | None], of: Callable[..., float], unit: float = 1) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    value = float(of(known)) * unit
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _list(texts: Sequence[str]) -> str:
    """Texts as a sentence lists them."""
    return f"{'; '.join(texts[:-1])} and {texts[-1]}" if len(texts) > 1 else "".join(texts)
