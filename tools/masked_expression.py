"""Held-out masked expression of trained runs beside the baselines: a table with paired intervals, and JSON.

    python tools/masked_expression.py CORPUS RUN [RUN ...] --json OUT.json

All runs must share the split, the technologies and the objective. Every method predicts the same masked
entries of the same held-out cells (mask seed 0). Runs that differ in the seed alone make one row: their mean
error, and the lowest and the highest.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from scfm_jax.corpus import Corpus
from scfm_jax.corpus.split import split_cells
from scfm_jax.downstream import baselines, metrics
from scfm_jax.downstream.imputation import (
    MaskedExpression,
    baseline_inputs,
    masked_expression,
    predict_masked,
)
from scfm_jax.downstream.model import open_model
from scfm_jax.training.config import RunConfig
from scfm_jax.training.train import select_cells

PARTS = ("all", "nonzero", "zero", "inverse_rate")
REFERENCE = "weighted gene mean"


@dataclass
class Arguments:
    """Compare runs with baselines on held-out masked expression."""

    corpus: Annotated[Path, tyro.conf.Positional]
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    json: Path | None = None
    """Where to write all figures."""
    test_cells: int = 0
    """A fixed random subset of the held-out cells; 0 is all."""
    train_cells: int = 0
    """A fixed random subset of the training cells for the baselines; 0 is all."""
    boosted_genes: int = 0
    """Genes for gradient boosting; 0 is all. With fewer, all methods are compared again on these alone."""
    best: bool = True
    """Use the best checkpoint by held-out loss rather than the last."""


def main(arguments: Arguments) -> None:
    corpus = Corpus.open(arguments.corpus)
    models = {run: open_model(run, checkpoint="best" if arguments.best else "last") for run in arguments.runs}
    config = next(iter(models.values())).config
    for model in models.values():
        other = model.config
        if (other.split, other.technologies, other.objective) != (
            config.split,
            config.technologies,
            config.objective,
        ):
            raise SystemExit("the runs differ in split, technologies or objective: compare them apart")
    alike: dict[str, RunConfig] = {}
    for run, model in models.items():
        experiment = replace(model.config, seed=0, corpus="", initial_weights="")
        if alike.setdefault(without_seed(model.config), experiment) != experiment:
            raise SystemExit(f"{run} differs from another run in more than the seed: compare them apart")
    split = split_cells(corpus, config.split)
    chosen, test = select_cells(corpus, split, config)
    train = chosen.numbers()
    if arguments.test_cells:
        test = subset(test, arguments.test_cells)
    if arguments.train_cells:
        train = subset(train, arguments.train_cells)
    _, _, objective = config.tissue()
    rates = (objective.nonzero_rate, objective.zero_rate)
    seen = masked_expression(corpus, train, objective, seed=1)
    held = masked_expression(corpus, test, objective, seed=0)
    block = split.block[test]
    print(
        f"{len(train):,} training cells, {len(test):,} held-out cells, "
        f"{len(held.panel)} genes, {len(np.unique(block))} blocks"
    )

    cells, masked = baseline_inputs(seen, split.block[train], held)
    predictions: dict[str, list[np.ndarray]] = {}
    for name, baseline in {
        REFERENCE: baselines.weighted_gene_mean,
        "calibrated neighbours (sees the masked column)": baselines.calibrated_neighbours,
        "ridge": baselines.ridge,
    }.items():
        started = time.perf_counter()
        predictions[name] = [baseline(cells, masked, rates)]
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
    genes = np.arange(len(held.panel))
    if arguments.boosted_genes:
        genes = np.sort(np.random.default_rng(0).permutation(genes)[: arguments.boosted_genes])
    started = time.perf_counter()
    boosted = baselines.gradient_boosting(cells, masked, rates, genes=genes)
    print(f"gradient boosting, {len(genes)} genes: {time.perf_counter() - started:.0f} s", flush=True)
    for run, model in models.items():
        value, target, mask = predict_masked(model, corpus, test, held.panel, seed=0)
        assert np.array_equal(mask, held.mask), "the model masked other entries than the baselines"
        np.testing.assert_allclose(target[mask], held.values[mask], rtol=1e-4, atol=1e-4)
        predictions.setdefault(without_seed(model.config), []).append(value)
        print(f"{run}: {without_seed(model.config)}", flush=True)
    result: dict[str, Any] = {"panel": table(predictions, held, block, rates, np.arange(len(held.panel)))}
    whole = np.zeros(held.mask.shape, np.float32)
    whole[:, genes] = boosted
    key = "panel" if len(genes) == len(held.panel) else f"{len(genes)} genes"
    result[key] = table({**predictions, "gradient boosting": [whole]}, held, block, rates, genes)
    for name, rows in result.items():
        print(f"\n{name}")
        show(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))


def without_seed(config: RunConfig) -> str:
    """A name that runs of one experiment share: what was trained, whatever the seed."""
    optimiser = config.optimiser
    start = ", from weights" if config.initial_weights else ""
    return (
        f"{config.name}, k = {config.tissue()[1].neighbours}, "
        f"{optimiser.steps:,} steps of {config.data.batch_size}{start}"
    )


def subset(cells: np.ndarray, size: int) -> np.ndarray:
    """At most `size` of `cells`, drawn by a constant seed."""
    if len(cells) <= size:
        return cells
    return np.sort(np.random.default_rng(0).choice(cells, size, replace=False))


def table(
    predictions: dict[str, list[np.ndarray]],
    held: MaskedExpression,
    block: np.ndarray,
    rates: tuple[float, float],
    genes: np.ndarray,
) -> dict[str, Any]:
    """Scores of each method over the columns `genes`, means over its seeds, and ratios to the others."""
    target, counts, mask = held.values[:, genes], held.counts[:, genes], held.mask[:, genes]
    errors, deviance, seeds, rank = {}, {}, {}, {}
    for name, of_seeds in predictions.items():
        of_genes = [prediction[:, genes] for prediction in of_seeds]
        squared = [metrics.squared_error(target, said, mask, counts > 0, rates) for said in of_genes]
        seeds[name] = [parts["all"].mean for parts in squared]
        errors[name] = mean_of_seeds(squared)
        deviance[name] = mean_of_seeds(
            [
                metrics.poisson_deviance(
                    counts, said, mask, counts > 0, rates, total=held.total, target_sum=held.target_sum
                )
                for said in of_genes
            ]
        )
        rank[name] = float(np.mean([metrics.gene_spearman(target, said, mask).mean for said in of_genes]))
    return {
        name: {
            **{part: errors[name][part].mean for part in PARTS},
            "seeds": seeds[name],
            "skill": metrics.skill(errors[name], errors[REFERENCE]),
            "spearman": rank[name],
            "deviance_skill": metrics.skill(deviance[name], deviance[REFERENCE])["all"],
            "ratio": {
                other: metrics.paired_bootstrap(errors[name]["all"], errors[other]["all"], block)._asdict()
                for other in predictions
                if other != name
            },
        }
        for name in predictions
    }


def mean_of_seeds(scores: list[dict[str, metrics.CellSums]]) -> dict[str, metrics.CellSums]:
    """Each cell's error, averaged over the seeds."""
    return {
        part: metrics.CellSums(np.mean([score[part].total for score in scores], axis=0), first.weight)
        for part, first in scores[0].items()
    }


def show(rows: dict[str, Any]) -> None:
    """Print a table."""
    print(
        f"{'method':<50}{'all':>8}{'non-zero':>10}{'zero':>8}{'inv.rate':>10}"
        f"{'skill':>8}{'rho':>7}{'dev.':>7}   ratio to mean [95%]"
    )
    for name, row in rows.items():
        paired = row["ratio"].get(REFERENCE)
        interval = (
            f"{paired['ratio']:.3f} [{paired['ratio_low']:.3f}, {paired['ratio_high']:.3f}]" if paired else ""
        )
        print(
            f"{name:<50}"
            + f"{row['all']:8.4f}{row['nonzero']:10.4f}{row['zero']:8.4f}{row['inverse_rate']:10.4f}"
            + f"{row['skill']['all']:8.3f}{row['spearman']:7.3f}{row['deviance_skill']:7.3f}   {interval}"
            + (
                f"   seeds {min(row['seeds']):.4f} to {max(row['seeds']):.4f}"
                if len(row["seeds"]) > 1
                else ""
            )
        )


if __name__ == "__main__":
    main(tyro.cli(Arguments))
