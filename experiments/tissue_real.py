"""A small tissue model for real slides on a laptop: k = 16, our own choices where the published ones harm.

About 240,000 parameters without the gene table. Ours rather than published: normalisation by what is visible,
the slide's median depth as the target sum, no floor under the depth tokens, a value embedding that tells
values apart from step 0, one bias a gene, and a learning rate that suits the size.
"""

from scfm_jax.corpus.split import SplitConfig
from scfm_jax.data.loader import DataConfig
from scfm_jax.data.tokens import SampleConfig
from scfm_jax.models.tissue import TissueConfig
from scfm_jax.models.transformer import TransformerConfig
from scfm_jax.objectives.column_masking import ColumnMaskingConfig
from scfm_jax.training.config import OptimiserConfig, RunConfig


def recipe() -> RunConfig:
    return RunConfig(
        name="tissue_real",
        model=TissueConfig(
            encoder=TransformerConfig(layers=2, heads=4, width=64),
            decoder=TransformerConfig(layers=2, heads=4, width=64),
            value_init="spread",
            gene_bias=True,
        ),
        split=SplitConfig(),
        data=DataConfig(sample=SampleConfig(neighbours=16), batch_size=32),
        objective=ColumnMaskingConfig(normalise="visible", target_sum="median", depth_floor=None),
        optimiser=OptimiserConfig(
            name="muon", steps=2_000, initial_rate=1e-4, peak_rate=2e-3, final_rate=1e-5, warmup_steps=100
        ),
        evaluate_every=500,
        evaluate_cells=1_024,
        checkpoint_every=500,
    )
