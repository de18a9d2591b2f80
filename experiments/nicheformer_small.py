"""A small Nicheformer for a laptop: about 100,000 parameters beside the tables.

Ours rather than published: exact technology means, rates that suit the size, Muon for matrices.
"""

from scfm_jax.corpus.split import SplitConfig
from scfm_jax.data.loader import DataConfig
from scfm_jax.data.ranks import RankConfig
from scfm_jax.models.nicheformer import NicheformerConfig
from scfm_jax.objectives.masked_genes import MaskedGenesConfig
from scfm_jax.training.config import OptimiserConfig, RunConfig


def recipe() -> RunConfig:
    return RunConfig(
        name="nicheformer_small",
        model=NicheformerConfig(layers=2, heads=4, width=64, hidden=128, positions=256),
        split=SplitConfig(),
        data=DataConfig(
            sample=RankConfig(length=256, means="exact", extra_assays=("seqfish", "chromium")),
            batch_size=32,
            window=16,
            rungs=4,
        ),
        objective=MaskedGenesConfig(),
        optimiser=OptimiserConfig(
            name="muon", steps=2_000, initial_rate=1e-4, peak_rate=2e-3, final_rate=1e-5, warmup_steps=100
        ),
        evaluate_every=500,
        evaluate_cells=1_024,
        checkpoint_every=500,
    )
