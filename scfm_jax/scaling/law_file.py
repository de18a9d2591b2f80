"""The file of a law: JSON with all that plots and recommendations need, runs and bootstrap draws too."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from scfm_jax.errors import InputError
from scfm_jax.scaling.comparison import Compared, Influence, Noise, forms_for
from scfm_jax.scaling.frontier import Cost
from scfm_jax.scaling.intervals import Parameter
from scfm_jax.scaling.isoflop import Parabola, Trend, best_neighbours
from scfm_jax.scaling.law import Effect, Law, LawConfig, design_of
from scfm_jax.scaling.prediction import Prediction
from scfm_jax.scaling.recommend import frontier_of
from scfm_jax.scaling.repeats import Repeats
from scfm_jax.scaling.runs import runs_of

FORMAT = "scfm scaling law 1"
_PLAIN = (
    "config",
    "dropped",
    "parameters",
    "deviation",
    "noise",
    "huber",
    "compared",
    "power_law",
    "effects",
    "influence",
    "cost",
    "parabolas",
    "trends",
    "envelopes",
    "predictions",
    "predictions_why",
    "repeats",
    "refusals",
)
_LISTS: dict[str, type] = {
    "parameters": Parameter,
    "compared": Compared,
    "effects": Effect,
    "influence": Influence,
    "parabolas": Parabola,
    "trends": Trend,
    "predictions": Prediction,
}


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
        No file, or one of another kind.
    """
    mend = "give a file that scfm scaling fit wrote"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(path, f"cannot be read ({error})", mend) from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise InputError(path, f"is no {FORMAT!r}", mend)
    try:
        runs = runs_of(record["runs"], path)
        config = LawConfig(**record["config"])
        given = {name: record[name] for name in _PLAIN if name not in ("config", *_LISTS)}
        lists = {name: [kind(**_tuples(row)) for row in record[name]] for name, kind in _LISTS.items()}
        cost = record["cost"]
        by_k = {name: {int(k): value for k, value in cost[name].items()} for name in ("factor", "passes")}
        return Law(
            **given
            | lists
            | {
                "cost": Cost(**cost | by_k),
                "noise": Noise(**record["noise"]),
                "envelopes": {int(k): tuple(line) for k, line in record["envelopes"].items()},
                "repeats": record["repeats"] and Repeats(**_tuples(record["repeats"])),
            },
            config=config,
            runs=runs,
            form=forms_for(design_of(runs, config), [record["form"]])[0],
            estimate=np.array(record["estimate"]),
            draws=np.array(record["draws"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(path, f"is not whole ({error!r})", mend) from error


def _tuples(row: dict[str, Any]) -> dict[str, Any]:
    """JSON's lists as the tuples they were."""
    return {
        key: tuple(tuple(v) if isinstance(v, list) else v for v in value)
        if isinstance(value, list)
        else value
        for key, value in row.items()
    }
