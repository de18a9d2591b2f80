"""Masked genes of held-out cells: trained runs of Nicheformer beside the baselines, by technology, and JSON.

    python tools/masked_genes.py CORPUS RUN [RUN ...] --json OUT.json

All runs must share the split, the technologies, the length of sentences and the mask. Every method predicts
the same masked genes of the same held-out cells (mask seed 0). Runs that differ in the seed alone make one
row: their mean, and the lowest and the highest.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from scfm_jax.corpus import Corpus
from scfm_jax.corpus.split import split_cells
from scfm_jax.downstream.masked_genes import (
    MaskedGenes,
    RankFrequencies,
    Scores,
    masked_genes,
    score_linear,
    score_model,
    score_uniform,
)
from scfm_jax.downstream.metrics import CellSums, paired_bootstrap
from scfm_jax.downstream.model import open_model
from scfm_jax.training.config import RunConfig
from scfm_jax.training.train import select_cells

REFERENCE = "most frequent by rank and technology"


@dataclass
class Arguments:
    """Compare runs of Nicheformer with baselines on held-out masked genes."""

    corpus: Annotated[Path, tyro.conf.Positional]
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    json: Path | None = None
    """Where to write all figures."""
    test_cells: int = 0
    """A fixed random subset of the held-out cells; 0 is all."""
    linear: bool = False
    """Add multinomial regression (minutes for some hundred genes, too much for thousands)."""
    best: bool = True
    """Use the best checkpoint by held-out loss rather than the last."""


def main(arguments: Arguments) -> None:
    corpus = Corpus.open(arguments.corpus)
    models = {run: open_model(run, checkpoint="best" if arguments.best else "last") for run in arguments.runs}
    config = next(iter(models.values())).config
    for run, model in models.items():
        if shared(model.config) != shared(config):
            raise SystemExit(f"{run} differs in split, technologies, sentences or mask: compare it apart")
    split = split_cells(corpus, config.split)
    chosen, test = select_cells(corpus, split, replace(config, evaluate_cells=arguments.test_cells))
    train = chosen.numbers()
    _, _, objective = config.nicheformer()
    widest = max(
        (model.config.nicheformer()[1] for model in models.values()), key=lambda s: s.niche_neighbours
    )
    rows = masked_genes(corpus, test, widest, objective)
    seen = masked_genes(corpus, train, widest, objective, seed=1)
    n_genes = len(corpus.vocabulary)
    print(f"{len(train):,} training cells, {len(test):,} held-out cells, {len(rows.gene):,} masked genes")
    table = RankFrequencies(seen, n_genes)
    methods: dict[str, list[Scores]] = {
        "uniform": [score_uniform(rows, n_genes)],
        REFERENCE: [table.score(rows, exclude=False)],
        "the same, less the genes seen": [table.score(rows, exclude=True)],
    }
    if arguments.linear:
        methods["linear, own genes"] = [score_linear(seen, rows, n_genes, niche=False)]
        print("linear, own genes: done", flush=True)
        if widest.niche_neighbours:
            methods["linear, own genes + neighbours' mean"] = [score_linear(seen, rows, n_genes, niche=True)]
    for run, model in models.items():
        methods.setdefault(name_of(model.config), []).append(score_model(model, corpus, rows))
        print(f"{run}: {name_of(model.config)}, step {model.step:,}", flush=True)
    result = {name: figures(of_seeds, rows) for name, of_seeds in methods.items()}
    for name, own in result.items():
        own["ratio"] = {
            other: paired_bootstrap(
                mean_loss(methods[name]), mean_loss(methods[other]), split.block[test]
            )._asdict()
            for other in methods
            if other != name
        }
    show(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))


def shared(config: RunConfig) -> tuple[Any, ...]:
    """What runs must have in common to be compared; means lie with each run, and are of one corpus."""
    _, sample, objective = config.nicheformer()
    own = replace(sample, mean_files=(), niche_neighbours=0, niche_length=1, niche_radius=None)
    return config.split, config.technologies, own, objective


def name_of(config: RunConfig) -> str:
    """A name that runs of one experiment share: what was trained, whatever the seed."""
    _, sample, _ = config.nicheformer()
    niche = f", niche of {sample.niche_neighbours}" if sample.niche_neighbours else ""
    return f"{config.name}{niche}, {config.optimiser.steps:,} steps of {config.data.batch_size}"


def mean_loss(of_seeds: list[Scores]) -> CellSums:
    return CellSums(np.mean([scores.loss.total for scores in of_seeds], axis=0), of_seeds[0].loss.weight)


def figures(of_seeds: list[Scores], rows: MaskedGenes) -> dict[str, Any]:
    """Loss and accuracy, all and by technology; means over the seeds, and each seed's."""
    everywhere = np.ones(len(rows.cells), bool)
    parts = {"all": everywhere} | {
        name: rows.technology == number for number, name in enumerate(rows.technologies)
    }

    def mean(of: Callable[[Scores], CellSums], chosen: np.ndarray) -> list[float]:
        return [CellSums(of(s).total[chosen], of(s).weight[chosen]).mean for s in of_seeds]

    return {
        name: {
            "loss": mean(lambda scores: scores.loss, chosen),
            "accuracy": [1 - missed for missed in mean(lambda scores: scores.missed, chosen)],
        }
        for name, chosen in parts.items()
    }


def show(result: dict[str, Any]) -> None:
    """Print a table: loss and accuracy in percent."""
    parts = [name for name in result[REFERENCE] if name != "ratio"]
    print(
        f"{'loss, accuracy':<44}" + "".join(f"{name:>16}" for name in parts) + "   loss, ratio to table [95%]"
    )
    for name, row in result.items():
        cells = (f"{np.mean(row[part]['loss']):9.4f}{np.mean(row[part]['accuracy']):7.2%}" for part in parts)
        ratio = row["ratio"].get(REFERENCE)
        interval = (
            f"{ratio['ratio']:.3f} [{ratio['ratio_low']:.3f}, {ratio['ratio_high']:.3f}]" if ratio else ""
        )
        seeds = row["all"]["loss"]
        spread = f"   seeds {min(seeds):.4f} to {max(seeds):.4f}" if len(seeds) > 1 else ""
        print(f"{name:<44}" + "".join(cells) + f"   {interval}{spread}")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
