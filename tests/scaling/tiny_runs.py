"""Runs of a few cells, for tests of sweeps."""

from __future__ import annotations

from dataclasses import replace

from scfm_jax.models.transformer import TransformerConfig
from scfm_jax.training.config import RunConfig


def small(
    config: RunConfig, *, steps: int = 2, seed: int = 0, k: int = 2, cells: int = 0, width: int = 8
) -> RunConfig:
    """A run of few cells of the tiny corpus."""
    model, sample, _ = config.tissue()
    stack = TransformerConfig(layers=1, heads=1, width=width)
    return replace(
        config,
        seed=seed,
        model=replace(model, encoder=stack, decoder=stack),
        split=replace(config.split, train_cells=cells),
        data=replace(config.data, sample=replace(sample, neighbours=k)),
        optimiser=replace(config.optimiser, steps=steps),
    )
