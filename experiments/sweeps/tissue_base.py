"""A run of the study of AIDO.Tissue on two CPU cores, from its width, cells, neighbours and seed.

Three layers whatever the width, two of the encoder and one of the decoder, in heads of 16: N without
embeddings goes with the width squared. All else is as in `experiments/tissue_real.py`.
"""

from dataclasses import replace

from experiments import tissue_real
from scfm_jax.corpus.split import SplitConfig
from scfm_jax.models.transformer import TransformerConfig
from scfm_jax.training.config import RunConfig

# Blocks of a sixteenth of every slide are held out. A training and a test cell may have neighbours in common,
# which keeps 64,000 cells to train on; neither is among the 64 nearest of the other. The two planes of the
# embryo overlie each other.
SPLIT = SplitConfig(blocks=8, n_folds=16, margin=64, context="shared", together=("seqfish/*",))
BATCH = 32


def run_config(width: int, cells: int, *, epochs: float, k: int = 0, seed: int = 0) -> RunConfig:
    real = tissue_real.recipe()
    model, sample, _ = real.tissue()
    heads = max(width // 16, 1)
    return replace(
        real,
        name="tissue_study",
        seed=seed,
        model=replace(
            model,
            encoder=TransformerConfig(layers=2, heads=heads, width=width),
            decoder=TransformerConfig(layers=1, heads=heads, width=width),
            # All pairs at once while they are few: .6 of the time of chunks.
            attention="plain" if k <= 4 else "chunked",
        ),
        split=replace(SPLIT, train_cells=cells),
        data=replace(
            real.data,
            # Of a panel, the expressed and the masked genes are decoded.
            sample=replace(sample, neighbours=k, panel_limit=0),
            batch_size=BATCH,
            window=16,
            rungs=4,
            length_multiple=32,
        ),
        optimiser=replace(real.optimiser, steps=max(round(epochs * cells / BATCH), 1)),
        evaluate_cells=BATCH,
        checkpoint_every=1_000,
    )
