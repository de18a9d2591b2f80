"""Nicheformer as published: 49 million parameters, 110 million cells, sentences of 1,500 tokens.

Sources: the paper (Schaar, Tejada-Lapuerta et al., Nature Methods 2025) and, where it is silent, the released
code and checkpoint (github.com/theislab/nicheformer); what is ours is said to be.
"""

from scfm_jax.corpus.split import SplitConfig
from scfm_jax.data.loader import DataConfig
from scfm_jax.data.ranks import RankConfig
from scfm_jax.models.nicheformer import NicheformerConfig
from scfm_jax.objectives.masked_genes import MaskedGenesConfig
from scfm_jax.training.config import OptimiserConfig, RunConfig


def recipe() -> RunConfig:
    return RunConfig(
        name="nicheformer_49m",
        model=NicheformerConfig(
            layers=12,  # paper
            heads=16,  # paper
            width=512,  # paper
            hidden=1_024,  # paper
            positions=1_500,  # paper
            attention="auto",  # ours: the implementation, not what is computed
            dtype="bfloat16",  # ours
            remat="dots",  # ours
        ),
        split=SplitConfig(),  # ours
        data=DataConfig(
            sample=RankConfig(
                length=1_500,  # paper
                context=("species", "assay", "modality"),  # paper; the order of the code
                means="exact",  # ours; the released notebooks round ("published")
            ),
            batch_size=256,  # ours: not public
            virtual_shards=8,
            length_multiple=128,  # ours
        ),
        objective=MaskedGenesConfig(
            rate=0.15,  # paper
            mask_share=0.80,  # paper
            random_share=0.10,  # paper
        ),
        optimiser=OptimiserConfig(
            name="adamw",  # paper
            steps=265_000,  # released checkpoint
            schedule_steps=30_661_140,  # released checkpoint
            schedule="product",  # code
            peak_rate=7e-4,  # released checkpoint
            final_rate=1e-5,  # code
            warmup_steps=100_000,  # released checkpoint
            b1=0.9,  # PyTorch's default, which the code leaves
            b2=0.999,  # the same
            epsilon=1e-8,  # the same
            weight_decay=0.1,  # code
            decay="all",  # code
            clip=1.0,  # released checkpoint
        ),
        evaluate_every=5_000,
        evaluate_cells=16_384,
        checkpoint_every=5_000,
    )
