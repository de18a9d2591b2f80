"""AIDO.Tissue-60M as published: encoder of 12 layers, 8 heads, 512 wide; decoder of 4 layers.

All else is as in ``tissue_3m``, which says of every number where it comes from.
"""

from experiments.tissue_3m import published
from scfm_jax.models.transformer import TransformerConfig
from scfm_jax.training.config import RunConfig


def recipe() -> RunConfig:
    return published(
        "tissue_60m",
        # [P] 12 layers, 8 heads, 512 wide; [O] feed-forward 8/3 of the width, rounded up to a multiple of 8.
        encoder=TransformerConfig(layers=12, heads=8, width=512, hidden=1_368),
        # [P] 4 layers; [O] blocks like the encoder's.
        decoder=TransformerConfig(layers=4, heads=8, width=512, hidden=1_368),
    )
