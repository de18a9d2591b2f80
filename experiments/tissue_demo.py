"""The model of ``make demo``: k = 8 on the simulated tissue, minutes on two cores."""

from dataclasses import replace

from experiments import tissue_real
from scfm_jax.corpus.split import SplitConfig
from scfm_jax.data.loader import DataConfig
from scfm_jax.data.tokens import SampleConfig
from scfm_jax.training.config import OptimiserConfig, RunConfig


def recipe() -> RunConfig:
    return replace(
        tissue_real.recipe(),
        name="tissue_demo",
        split=SplitConfig(held_out=("slide3",)),
        data=DataConfig(sample=SampleConfig(neighbours=8), batch_size=8, window=16, rungs=3),
        optimiser=OptimiserConfig(
            steps=1_200, initial_rate=1e-4, peak_rate=2e-3, final_rate=1e-5, warmup_steps=50
        ),
        evaluate_every=300,
        evaluate_cells=512,
        checkpoint_every=600,
    )
