"""What neighbours are for: a trained model uses those of the simulated tissue, whose signals are known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experiments import tissue_demo
from scfm_jax.corpus import Corpus
from scfm_jax.corpus.split import SplitConfig, split_cells
from scfm_jax.data.tokens import SampleConfig
from scfm_jax.downstream.demo import simulate_corpus
from scfm_jax.downstream.imputation import masked_expression, predict_masked
from scfm_jax.downstream.model import open_model
from scfm_jax.simulate import SimulationConfig
from scfm_jax.training.config import RunConfig
from scfm_jax.training.train import train

# Measured once: squared error of targets .511 alone, .453 with neighbours, .588 with those of other cells.
ALONE, TOGETHER = 1_500, 3_000
TISSUE = SimulationConfig(
    n_slides=3,
    cells_per_slide=2_000,
    n_genes=48,
    n_triples=8,
    technologies=(("simscope", 40), ("simseq", 40)),
)


class ShuffledNeighbours(Corpus):
    """Each cell has the neighbours of another cell of its slide."""

    def neighbours(self, index: np.ndarray, k: int) -> np.ndarray:
        if not hasattr(self, "instead"):
            random = np.random.default_rng(0)
            spans = zip(self.slide_starts[:-1], self.slide_starts[1:], strict=True)
            self.instead = np.concatenate([random.permutation(np.arange(*span)) for span in spans])
        return super().neighbours(self.instead[index], k)


def target_error(run: Path, corpus: Corpus, cells: np.ndarray) -> np.ndarray:
    """Squared errors of the masked target genes."""
    model = open_model(run, checkpoint="last")
    held = masked_expression(corpus, cells, model.config.objective, seed=0)
    targets = [model.vocabulary.symbols[gene].startswith("TARGET") for gene in held.panel]
    predicted, _, mask = predict_masked(model, corpus, cells, held.panel, seed=0)
    entries = mask & np.array(targets)
    return (predicted - held.values)[entries] ** 2


@pytest.mark.slow
def test_a_trained_model_gains_from_its_neighbours_and_not_from_others(tmp_path: Path) -> None:
    simulate_corpus(tmp_path, TISSUE)
    split = SplitConfig(held_out=("slide2",))
    whole = replace(tissue_demo.recipe(), corpus=str(tmp_path / "corpus"), split=split, evaluate_every=10**6)

    def run(name: str, neighbours: int, steps: int, start: str = "") -> Path:
        config: RunConfig = replace(
            whole,
            data=replace(whole.data, sample=SampleConfig(neighbours=neighbours)),
            optimiser=replace(whole.optimiser, steps=steps, peak_rate=2e-3),
            initial_weights=start and str(tmp_path / start),
        )
        assert train(config, tmp_path / name) == steps
        return tmp_path / name

    run("cells", 0, ALONE)
    alone, beside = run("alone", 0, TOGETHER, "cells"), run("beside", 8, TOGETHER, "cells")
    corpus, shuffled = (kind.open(tmp_path / "corpus") for kind in (Corpus, ShuffledNeighbours))
    cells = split_cells(corpus, split).test
    without, with_them, with_others = (
        target_error(model, of, cells)
        for model, of in ((alone, corpus), (beside, corpus), (beside, shuffled))
    )
    gain = 1 - with_them.mean() / without.mean()
    spread = (without - with_them).std() / np.sqrt(len(without)) / without.mean()
    assert gain > 3 * spread, (gain, spread)
    assert with_others.mean() > without.mean() - spread * without.mean()
