"""The learning rate by model size that a sweep over rates gives, as scfm_jax.scaling.transfer fits it.

python tools/fit_rates.py runs/tissue_rates/results.jsonl --batch 32 --size 40000
"""

from __future__ import annotations

import reprlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from scfm_jax.errors import InputError
from scfm_jax.json_files import as_float, read_json_lines
from scfm_jax.scaling.transfer import FittedRule, TransferRule, fit_rates

COLUMNS = ("parameters_without_embeddings", "batch_size", "peak_rate", "loss")


@dataclass
class Arguments:
    """Fit the best peak rate as a power law of the size."""

    results: Annotated[Path, tyro.conf.Positional]
    size: float
    """Parameters without embeddings at which the rule's rate holds."""
    batch: float = 32
    """Samples of a batch at which it holds."""


def main(arguments: Arguments) -> None:
    mend = "give the results.jsonl that scfm scaling run wrote"
    rows = read_json_lines(arguments.results, mend)
    for line, row in rows.items():
        for name in COLUMNS:
            if as_float(row.get(name)) is None and not (name == "loss" in row and row[name] is None):
                problem = f"{name} is {reprlib.repr(row.get(name))}, no number"
                raise InputError(f"{arguments.results}:{line}", problem, mend)
    # A run that diverged has no loss.
    columns = [
        np.array([np.nan if row[name] is None else as_float(row[name]) for row in rows.values()], np.float64)
        for name in COLUMNS
    ]
    for flag, value in (("--size", arguments.size), ("--batch", arguments.batch)):
        if not 0 < value < np.inf:
            raise InputError(flag, f"{value} is out of range", "give a number above 0")
    base = TransferRule(rate=1e-3, size=arguments.size, batch=arguments.batch)
    show(fit_rates(*columns, base=base, where=str(arguments.results)))


def show(fitted: FittedRule) -> None:
    print(f"{'N':>10} {'batch':>6} {'best rate':>10} {'log error':>10} {'loss':>8}")
    for each in fitted.vertices:
        if each.rate is None or each.loss is None:
            print(f"{each.parameters:>10,.0f} {each.batch:>6.0f} {each.why}")
            continue
        spread = "-" if each.error is None else f"{each.error:.2f}"
        print(
            f"{each.parameters:>10,.0f} {each.batch:>6.0f} {each.rate:>10.3g} {spread:>10} {each.loss:>8.4f}"
        )
    rule, error = fitted.rule, fitted.size_exponent_error
    print(
        f"peak rate = {rule.rate:.3g} (N / {rule.size:,.0f})^-{rule.size_exponent:.3f}"
        + (f" (exponent's standard error {error:.3f})" if error is not None else "")
    )
    print("\n".join(fitted.notes))


if __name__ == "__main__":
    try:
        main(tyro.cli(Arguments))
    except InputError as error:
        print(f"fit_rates: {error}", file=sys.stderr)
        sys.exit(2)
