"""Linear models on the masked genes that the runs of a sweep are judged by, with and without neighbours.

    python tools/study_baselines.py runs/tissue_study w16-d16000-s0 --neighbours 4 16

For each source file: each gene's mean, ridge regression on the cell's other genes, and on these beside their
mean over k neighbours (column masking: what is masked in the cell is hidden in its neighbours). They learn
from the cells that the named run learnt from. Gains are paired, over the same blocks of tissue.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from jaxtyping import Int, Int64

from scfm_jax.corpus import Corpus
from scfm_jax.corpus.split import split_cells
from scfm_jax.downstream import baselines
from scfm_jax.downstream.imputation import baseline_inputs, masked_expression
from scfm_jax.downstream.metrics import CellSums, paired_bootstrap, squared_error
from scfm_jax.errors import InputError
from scfm_jax.objectives.column_masking import ColumnMaskingConfig
from scfm_jax.scaling.held_out import HeldOutErrors, places_by_source
from scfm_jax.scaling.sweep_run import SweepFolder
from scfm_jax.training.run import read_run
from scfm_jax.training.train import select_cells


@dataclass
class Arguments:
    """Linear models beside the runs of a sweep."""

    out: Annotated[Path, tyro.conf.Positional]
    run: Annotated[str, tyro.conf.Positional]
    corpus: Path | None = None
    """The corpus, if it has moved since."""
    neighbours: tuple[int, ...] = (4, 16)
    most_genes: int = 0
    """Leave out files of more genes, whose regressions take minutes; 0 is all."""


def main(arguments: Arguments) -> None:
    folder, name = SweepFolder(arguments.out), arguments.run
    config, _ = read_run(folder.run(name))
    judged = HeldOutErrors.load(folder.errors(name))
    corpus, objective = Corpus.open(arguments.corpus or config.corpus), config.tissue()[2]
    split = split_cells(corpus, config.split)
    learnt = select_cells(corpus, split, config)[0].numbers()
    train_at = places_by_source(corpus, learnt)
    print(f"{'file':<46} {'method':<20} {'loss':>7} gain over ridge alone, % [95%]")
    for file, at in places_by_source(corpus, judged.cells).items():
        train, test = learnt[train_at[file]], judged.cells[at]
        n_genes = len(corpus.slides[corpus.slide_of(test[:1])[0]].panel)
        if 0 < arguments.most_genes < n_genes:
            print(f"{file:<46} left out: {n_genes} genes")
            continue
        errors: dict[str, CellSums] = {}
        for k in (0, *arguments.neighbours):
            began = time.perf_counter()
            errors |= linear(corpus, train, split.block[train], test, objective, k=k, seed=judged.seed)
            print(f"{file}, k = {k}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
        errors[name] = CellSums(*(part[at] for part in judged.loss))
        for method, of in errors.items():
            if not np.array_equal(of.weight, errors[name].weight):
                problem = "other genes are masked than the runs are judged by"
                raise InputError(file, problem, "judge the sweep again by this version")
            found = paired_bootstrap(of, errors["ridge, k = 0"], split.block[test])
            gain, low, high = (
                100 * (1 - ratio) for ratio in (found.ratio, found.ratio_high, found.ratio_low)
            )
            print(
                f"{file:<46} {method:<20} {of.mean:>7.4f} {gain:+.2f} [{low:+.2f}, {high:+.2f}]", flush=True
            )


def linear(
    corpus: Corpus,
    train: Int64[np.ndarray, " n"],
    block: Int[np.ndarray, " n"],
    test: Int64[np.ndarray, " m"],
    objective: ColumnMaskingConfig,
    *,
    k: int,
    seed: int,
) -> dict[str, CellSums]:
    """Squared errors by cell of a ridge regression with k neighbours; of k = 0, of the gene mean too."""
    rates = (objective.nonzero_rate, objective.zero_rate)
    # A mean over neighbours is made in any case, and not read at k = 0.
    seen = masked_expression(corpus, train, objective, seed=seed + 1, neighbours=k or 1)
    held = masked_expression(corpus, test, objective, seed=seed, neighbours=k or 1)
    cells, masked = baseline_inputs(seen, block, held)
    said = {f"ridge, k = {k}": baselines.ridge(cells, masked, rates, neighbours=k > 0)}
    if k == 0:
        said = {"gene mean": baselines.weighted_gene_mean(cells, masked, rates), **said}
    nonzero = held.counts > 0
    return {
        method: squared_error(held.targets, prediction, held.mask, nonzero, rates)["all"]
        for method, prediction in said.items()
    }


if __name__ == "__main__":
    try:
        main(tyro.cli(Arguments))
    except InputError as error:
        print(f"study_baselines: {error}", file=sys.stderr)
        sys.exit(2)
