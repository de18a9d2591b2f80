"""A tissue model of cells alone (k = 0) that two CPU cores pretrain in minutes, for downstream studies.

The encoder of `tissue_real` over the least decoder that does: what is used downstream is the encoder.
Spatial files that are small get more than their share of the samples, as each is to be judged by itself.
"""

from dataclasses import replace

from experiments import tissue_real
from scfm_jax.data.tokens import SampleConfig
from scfm_jax.models.transformer import TransformerConfig
from scfm_jax.training.config import RunConfig


def recipe() -> RunConfig:
    real = tissue_real.recipe()
    model, _, _ = real.tissue()
    return replace(
        real,
        name="tissue_cells",
        # A cell alone is a row of a hundred tokens: all pairs at once take .6 of the time of chunks.
        model=replace(model, decoder=TransformerConfig(layers=1, heads=2, width=32), attention="plain"),
        data=replace(
            real.data,
            # Of a panel, the expressed and the masked genes are decoded: 130 places in place of 960.
            sample=SampleConfig(neighbours=0, panel_limit=0),
            batch_size=64,
            window=8,
            rungs=8,
            length_multiple=16,
        ),
        optimiser=replace(real.optimiser, steps=800),
        evaluate_every=800,
        evaluate_cells=128,
        checkpoint_every=400,
        keep_last=1,
    )
