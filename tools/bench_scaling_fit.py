"""How long a scaling law takes to fit: runs on a random design, 1,000 bootstrap draws, every form.

``python tools/bench_scaling_fit.py`` prints a table; seconds are of the wall and, beside, of all cores.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from scfm_jax.scaling.forms import Design, Form, make_form, predict
from scfm_jax.scaling.intervals import bootstrap, parameters_of
from scfm_jax.scaling.law import LawConfig, fit_law
from scfm_jax.scaling.least_squares import fit
from scfm_jax.scaling.runs import Runs

KS = (0, 1, 2, 4, 8, 16, 32, 64)
_TRUTH = {"alpha": 0.34, "beta": 0.28, "gamma": 0.8, "k0": 3.0, "E": 1.69, "A": 406.4, "B": 410.7, "C": 0.9}
_FORMS = ("plain", "offset", "offset_size", "offset_data", "power", "power_size")


def study(runs: int, seed: int = 0) -> tuple[Design, Any]:
    """Random N, D and k, and losses of the power law in k with noise."""
    rng = np.random.default_rng(seed)
    design = Design(10 ** rng.uniform(6, 10, runs), 10 ** rng.uniform(8, 11.5, runs), rng.choice(KS, runs))
    form = make_form("power", KS)
    loss = predict(form, design, np.array([[_TRUTH[name] for name in form.names]]))[0]
    return design, loss + 0.005 * rng.normal(size=runs)


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    wall, cores = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cores


def as_runs(design: Design, loss: Any) -> Runs:
    """The study as a results file has it."""
    n = len(design)
    return Runs(
        name=tuple(f"run-{i}" for i in range(n)),
        family="tissue",
        seed=np.zeros(n, np.int64),
        k=design.k,
        parameters=design.size,
        parameters_without_embeddings=design.size,
        cells=design.data,
        tokens=design.data,
        unique_cells=design.data,
        epochs=np.ones(n),
        flops=6 * design.size * design.data * (design.k + 1.0),
        loss=loss,
        loss_se=np.full(n, np.nan),
    )


def main(runs: int = 1_000, draws: int = 1_000, out: Path | None = None) -> None:
    """Print a table, and write it as JSON.

    Parameters
    ----------
    runs
        Of the study.
    draws
        Of the bootstrap.
    out
        A JSON file.
    """
    design, loss = study(runs)

    def whole(form: Form) -> None:
        parameters_of(form, design, loss, fit(form, design, loss), bootstrap(form, design, loss, draws, 0))

    rows = []
    for name in _FORMS:
        form = make_form(name, KS)
        wall, cores = timed(functools.partial(whole, form))
        rows.append({"what": f"{name}: fit, draws, profiles", "wall": wall, "cores": cores})
    wall, cores = timed(lambda: fit_law(as_runs(design, loss), LawConfig(draws=draws)))
    rows.append({"what": "scfm scaling fit, all of it", "wall": wall, "cores": cores})
    print(f"{runs:,} runs, {draws:,} draws")
    for row in rows:
        print(f"{row['what']:<36}{row['wall']:>8.1f} s {row['cores']:>8.1f} s of cores")
    if out:
        out.write_text(json.dumps({"runs": runs, "draws": draws, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
