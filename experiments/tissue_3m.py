"""AIDO.Tissue-3M as published: encoder of 4 layers, 2 heads, 128 wide; decoder of 2 layers.

Every number with where it comes from: [P] the paper (bioRxiv 2025) or the released configuration and code,
[O] not public, so ours (``docs/models.md`` says why).
"""

from scfm_jax.corpus.split import SplitConfig
from scfm_jax.data.loader import DataConfig
from scfm_jax.data.tokens import SampleConfig
from scfm_jax.models.tissue import TissueConfig
from scfm_jax.models.transformer import TransformerConfig
from scfm_jax.objectives.column_masking import ColumnMaskingConfig
from scfm_jax.training.config import OptimiserConfig, RunConfig


def published(name: str, encoder: TransformerConfig, decoder: TransformerConfig) -> RunConfig:
    """The published training of AIDO.Tissue for a geometry."""
    return RunConfig(
        name=name,
        model=TissueConfig(
            encoder=encoder,
            decoder=decoder,
            bins=100,  # [P] bin_num
            bin_alpha=1.0,  # [P]
            positions="index",  # [P] gene and cell index
            init_std=0.02,  # [P] initializer_range
            value_init="published",  # [P] the same for the value embedding
            gene_bias=False,  # [P] the head has none
            dtype="bfloat16",  # [P]
            remat="dots",  # [O] how it is computed and not what: as fast as "none", in half the memory
        ),
        split=SplitConfig(),  # [O]
        data=DataConfig(
            sample=SampleConfig(
                neighbours=16,  # [P] one of 8, 16, 32, 64
                decoder="vocabulary",  # [P] the whole vocabulary, 19,264 genes
            ),
            batch_size=128,  # [P]
        ),
        objective=ColumnMaskingConfig(
            nonzero_rate=0.30,  # [O]
            zero_rate=0.03,  # [O]
            loss="mse",  # [P]
            normalise="published",  # [P] a cell's whole total
            target_sum=10_000.0,  # [P]
            depth_floor=5.0,  # [P] in the code
        ),
        optimiser=OptimiserConfig(
            name="adamw",  # [P] Adam with weight decay
            steps=150_000,  # [P]
            initial_rate=2e-5,  # [P]
            peak_rate=2e-4,  # [P]
            final_rate=2e-5,  # [O]
            warmup_steps=2_000,  # [O]
            b1=0.9,  # [P]
            b2=0.95,  # [P]
            epsilon=1e-8,  # [O]
            weight_decay=0.01,  # [P]; on matrices only [O]
            clip=1.0,  # [P]
        ),
    )


def recipe() -> RunConfig:
    return published(
        "tissue_3m",
        # [P] 4 layers, 2 heads, 128 wide; [O] feed-forward 8/3 of the width, rounded up to a multiple of 8.
        encoder=TransformerConfig(layers=4, heads=2, width=128, hidden=344),
        # [P] 2 layers; [O] blocks like the encoder's.
        decoder=TransformerConfig(layers=2, heads=2, width=128, hidden=344),
    )
