"""A small grid of learning rates at three sizes, from which the study has its rule (tools/fit_rates.py)."""

from dataclasses import replace

from experiments.sweeps.tissue_base import run_config
from scfm_jax.scaling.sweep import Sweep, SweepRun

WIDTHS = (8, 32, 64)
RATES = (2e-3, 4e-3, 8e-3, 16e-3, 32e-3)


def sweep() -> Sweep:
    runs = []
    for width in WIDTHS:
        config = run_config(width, 4_000, epochs=4)
        for rate in RATES:
            optimiser = replace(
                config.optimiser,
                initial_rate=rate / 20,
                peak_rate=rate,
                final_rate=rate / 200,
                warmup_steps=config.optimiser.steps // 20,
            )
            runs.append(SweepRun(f"w{width}-rate{rate:g}", replace(config, optimiser=optimiser)))
    return Sweep("tissue_rates", tuple(runs))
