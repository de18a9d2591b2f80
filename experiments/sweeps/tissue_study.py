"""What size, cells and neighbours are worth on four spatial files: the study of docs/scaling.md.

Stage 1 learns from cells alone: five sizes by three amounts of data, four epochs each. Stage 2 goes on from
three seeds of two sizes at 16,000 cells, half an epoch with k neighbours, k = 0 too: the same centres under
the same masks. Two controls at k = 16: neighbours exchanged for others of their slide and cell type, and the
nearest ring of six left out, into which transcripts spill over the border of a cell. Last, k = 0 and 4 for
four epochs, and the controls of these: half an epoch is too short to learn what neighbours say.
"""

from dataclasses import replace
from typing import Any

from experiments.sweeps.tissue_base import BATCH, run_config
from scfm_jax.scaling.sweep import Sweep, SweepRun
from scfm_jax.scaling.transfer import TransferRule
from scfm_jax.training.config import RunConfig

# N without embeddings of each width.
SIZES = {8: 2_921, 16: 10_961, 32: 40_049, 64: 157_409, 96: 345_121}
CELLS, EPOCHS = (4_000, 16_000, 64_000), 4.0
SECOND_WIDTHS, SECOND_CELLS, SECOND_EPOCHS, SEEDS = (16, 32), 16_000, 0.5, (0, 1, 2)
NEIGHBOURS, MOST_NEIGHBOURS = (0, 4, 16), 64
LONG_NEIGHBOURS, LONG_EPOCHS = (0, 4), 4.0
CONTROLS: dict[str, dict[str, Any]] = {
    "exchanged": {"exchanged_within": ("cell_type", "cluster")},
    "ring": {"skip_nearest": 6},
}

# Of tools/fit_rates.py on the sweep tissue_rates.
RULE = TransferRule(
    rate=9.4e-3, size=40_049, batch=BATCH, size_exponent=0.074, initial_share=0.05, final_share=0.005
)


def sweep() -> Sweep:
    return Sweep("tissue_study", (*cells_alone(), *with_neighbours()))


def cells_alone() -> list[SweepRun]:
    runs = [SweepRun(f"w{width}-d{cells}-s0", first(width, cells, 0)) for width in SIZES for cells in CELLS]
    return runs + [
        SweepRun(f"w{width}-d{SECOND_CELLS}-s{seed}", first(width, SECOND_CELLS, seed))
        for width in SECOND_WIDTHS
        for seed in SEEDS[1:]
    ]


def with_neighbours() -> list[SweepRun]:
    runs = []
    for width in SECOND_WIDTHS:
        for seed in SEEDS:
            begun = f"w{width}-d{SECOND_CELLS}-s{seed}"
            for k in NEIGHBOURS:
                runs.append(SweepRun(f"{begun}-k{k}", second(width, k, seed), after=begun))
            runs += controls(f"{begun}-k16", second(width, 16, seed), begun)
            for k in LONG_NEIGHBOURS:
                config = second(width, k, seed, epochs=LONG_EPOCHS)
                runs.append(SweepRun(f"{begun}-k{k}-long", config, after=begun))
    wide = SECOND_WIDTHS[-1]
    begun = f"w{wide}-d{SECOND_CELLS}-s0"
    runs += controls(f"{begun}-k4-long", second(wide, 4, 0, epochs=LONG_EPOCHS), begun)
    narrow = SECOND_WIDTHS[0]
    begun = f"w{narrow}-d{SECOND_CELLS}-s0"
    return [*runs, SweepRun(f"{begun}-k{MOST_NEIGHBOURS}", second(narrow, MOST_NEIGHBOURS, 0), after=begun)]


def controls(name: str, config: RunConfig, begun: str) -> list[SweepRun]:
    """A run with neighbours, its neighbours other ones."""
    data = config.data
    return [
        SweepRun(
            f"{name}-{control}",
            replace(config, data=replace(data, sample=replace(data.sample, **change))),
            after=begun,
        )
        for control, change in CONTROLS.items()
    ]


def first(width: int, cells: int, seed: int) -> RunConfig:
    """Cells alone."""
    return with_rates(run_config(width, cells, epochs=EPOCHS, seed=seed), width)


def second(width: int, k: int, seed: int, *, epochs: float = SECOND_EPOCHS) -> RunConfig:
    """Going on with neighbours, from a quarter of the rate."""
    config = with_rates(run_config(width, SECOND_CELLS, epochs=epochs, k=k, seed=seed), width)
    optimiser = config.optimiser
    return replace(
        config,
        optimiser=replace(
            optimiser,
            initial_rate=optimiser.initial_rate / 4,
            peak_rate=optimiser.peak_rate / 4,
            final_rate=optimiser.final_rate / 4,
        ),
    )


def with_rates(config: RunConfig, width: int) -> RunConfig:
    optimiser, steps = config.optimiser, config.optimiser.steps
    chosen = RULE.optimiser(optimiser, parameters=SIZES[width], batch=BATCH, steps=steps)
    return replace(config, optimiser=chosen)
