"""The model of ``make demo``, in two stages: cells alone first, then with their 8 nearest neighbours.

Cells alone are cheap, and what genes say of one another is learnt there; the second stage starts from its
weights and learns what the neighbours add. On two cores the two together take about three minutes.
"""

from dataclasses import replace

from experiments import tissue_real
from scfm_jax.corpus.split import SplitConfig
from scfm_jax.data.loader import DataConfig
from scfm_jax.data.tokens import SampleConfig
from scfm_jax.training.config import RunConfig


def alone() -> RunConfig:
    real = tissue_real.recipe()
    model, _, _ = real.tissue()
    return replace(
        real,
        name="tissue_demo_alone",
        model=replace(model, decoder=replace(model.decoder, layers=1)),
        split=SplitConfig(held_out=("slide3",)),
        data=DataConfig(sample=SampleConfig(neighbours=0), batch_size=8, window=8, rungs=2),
        optimiser=replace(real.optimiser, steps=1_200, warmup_steps=50),
        evaluate_every=400,
        evaluate_cells=512,
        checkpoint_every=1_200,
    )


def recipe() -> RunConfig:
    first = alone()
    return replace(
        first,
        name="tissue_demo",
        data=replace(first.data, sample=SampleConfig(neighbours=8), window=16, rungs=3),
        optimiser=replace(first.optimiser, steps=700),
        evaluate_every=350,
        checkpoint_every=700,
    )
