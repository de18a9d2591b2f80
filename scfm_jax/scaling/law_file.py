"""The file of a law: JSON with all that plots and recommendations need, runs and bootstrap draws too."""

from __future__ import annotations

import json
import math
import typing
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from scfm_jax.errors import InputError
from scfm_jax.json_files import read_json
from scfm_jax.scaling.comparison import forms_for
from scfm_jax.scaling.forms import FORMS, Form
from scfm_jax.scaling.isoflop import best_neighbours
from scfm_jax.scaling.law import Law, design_of
from scfm_jax.scaling.recommend import frontier_of
from scfm_jax.scaling.runs import checked_row, runs_of
from scfm_jax.training.config import typed

FORMAT = "scfm scaling law 1"
_MEND = "give a file that scfm scaling fit wrote"
# All else is in the file as it is in the law.
_APART = ("runs", "form", "estimate", "draws")
_PLAIN = tuple(field.name for field in fields(Law) if field.name not in _APART)


def record_of(law: Law) -> dict[str, Any]:
    """The law as JSON has it."""
    return {
        "format": FORMAT,
        "family": law.runs.family,
        "form": law.form.name,
        "equation": law.form.equation,
        "names": list(law.form.names),
        **{name: _plain(getattr(law, name)) for name in _PLAIN},
        "estimate": law.estimate.tolist(),
        "lack_of_fit": law.lack_of_fit,
        "frontier": [
            {"flops": flops, "choices": [asdict(choice) for choice in choices]}
            for flops, choices in frontier_of(law)
        ],
        "isoflop_neighbours": best_neighbours(law.parabolas),
        "draws": law.draws.tolist(),
        "runs": law.runs.rows(),
    }


def write_law(law: Law, path: Path) -> None:
    """Write it as JSON."""
    path.write_text(json.dumps(record_of(law), indent=1) + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return asdict(value) if hasattr(value, "__dataclass_fields__") else value


def read_law(path: Path) -> Law:
    """Read what `write_law` wrote.

    Raises
    ------
    InputError
        No file, one of another kind, or a field that cannot be a law's.
    """
    record = read_json(path, _MEND)
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise InputError(path, f"is no {FORMAT!r}", _MEND)
    hints = typing.get_type_hints(Law)
    if missing := [name for name in hints if name not in record]:
        raise InputError(path, f"lacks {', '.join(missing)}", _MEND)
    plain = {name: typed(hints[name], record[name], str(path), name) for name in _PLAIN}
    rows, name = record["runs"], typed(str, record["form"], str(path), "form")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise _unfit(path, "runs")
    if name not in FORMS:
        raise _unfit(path, "form")
    runs = runs_of([checked_row(row, f"{path}, run {place}") for place, row in enumerate(rows)], path)
    (form,) = forms_for(design_of(runs, plain["config"]), [name])
    (estimate,) = _parameters([record["estimate"]], form, path, "estimate")
    draws = _parameters(record["draws"], form, path, "draws")
    law = Law(**plain, runs=runs, form=form, estimate=estimate, draws=draws)
    _check(law, path)
    return law


def _parameters(value: Any, form: Form, path: Path, field: str) -> Float64[np.ndarray, "r p"]:
    """Rows of exponents, which are above 0, and coefficients, which may be 0."""
    try:
        found = np.array(value, np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise _unfit(path, field) from error
    if found.ndim != 2 or found.shape[1] != form.n_parameters or not len(found):
        raise _unfit(path, field)
    if not (np.isfinite(found) & (found >= 0)).all() or not (found[:, : len(form.exponents)] > 0).all():
        raise _unfit(path, field)
    return found


def _check(law: Law, path: Path) -> None:
    """Find values that are of the right types and can be no law's."""
    levels, cost = set(law.design.levels), law.cost
    drawn = {parabola.k for parabola in law.parabolas} | {trend.k for trend in law.trends}
    for field, fits in (
        ("config.seed", law.config.seed >= 0),
        ("runs", np.isfinite(law.runs.loss).all()),
        ("deviation", 0 <= law.deviation < math.inf),
        ("cost.exponent", math.isfinite(cost.exponent)),
        *(
            (f"cost.{name}", levels == by_k.keys() and all(0 < each < math.inf for each in by_k.values()))
            for name, by_k in (("factor", cost.factor), ("passes", cost.passes))
        ),
        ("k of parabolas or trends", drawn <= levels),
    ):
        if not fits:
            raise _unfit(path, field)


def _unfit(path: Path, field: str) -> InputError:
    return InputError(path, f"{field} cannot be that of a law of its form and runs", _MEND)
