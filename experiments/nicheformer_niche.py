"""Nicheformer with the niche as a second sentence: the mean of a cell's neighbours, ranked like a cell.

The niche is an idea of the paper's that its released code lacks; all numbers of it are ours.
"""

from dataclasses import replace

from experiments import nicheformer_49m
from scfm_jax.training.config import RunConfig


def recipe() -> RunConfig:
    published = nicheformer_49m.recipe()
    model, sample, _ = published.nicheformer()
    return replace(
        published,
        name="nicheformer_niche",
        model=replace(model, niche=True),
        data=replace(published.data, sample=replace(sample, niche_neighbours=16, niche_length=256)),
    )
