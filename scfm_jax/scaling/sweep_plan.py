"""What the runs of a sweep will take, in which order they are run, and the shapes that they share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Int64

from scfm_jax.corpus import Corpus
from scfm_jax.corpus.context import Context
from scfm_jax.corpus.split import Split, SplitConfig, split_cells
from scfm_jax.corpus.subset import unique_cells
from scfm_jax.data.loader import Loader, Reader
from scfm_jax.data.mixture import MixedStreams, slide_weights
from scfm_jax.data.stream import CellBlocks
from scfm_jax.data.tokens import EVALUATION_STEP, SampleConfig
from scfm_jax.errors import InputError
from scfm_jax.models.flops import Load, training_flops
from scfm_jax.scaling.sizes import Size, size_of
from scfm_jax.scaling.sweep import Sweep, SweepRun, within
from scfm_jax.training.config import RunConfig
from scfm_jax.training.train import select_cells

_SAMPLED = 512  # training cells by which the tokens of a sample are reckoned
_MOST_STEPS = 2**31 - 1  # of a checkpoint's counter


@dataclass(frozen=True)
class PlannedRun:
    """A run, and what it will take.

    Attributes
    ----------
    run
        With all that the plan decided: its steps where it had a budget, and static lengths that it shares
        with the runs of its shape.
    generation
        How many runs come before it, one after the other.
    size
        Of the model.
    training_cells
        Centres that are trained on.
    unique_cells, epochs, cells, tokens, flops
        Of the whole training, those of the runs before it too: cells that it reads, how often it sees its
        centres, and what it goes through; tokens and FLOPs are reckoned from a sample of cells.
    """

    run: SweepRun
    generation: int
    size: Size
    training_cells: int
    unique_cells: int
    epochs: float
    cells: int
    tokens: float
    flops: float


def plan_sweep(
    sweep: Sweep, corpus: Corpus, progress: Callable[[int, int], None] = lambda done, total: None
) -> list[PlannedRun]:
    """Plan the runs of a sweep, in the order in which they are run.

    Runs that come after others follow them; else the cheapest is first, by model FLOPs.

    Raises
    ------
    InputError
        As `split_cells`; a budget that is less than a step, more steps than can be counted, more training
        cells than there are, or a run after one of another size.
    """
    cells = _TrainingCells(corpus)
    for run in sweep.runs:
        try:
            cells.load(run.config)
        except InputError as error:
            raise within(f"run {run.name}", error) from error
    lengths, planned = _shared_lengths(sweep, cells), dict[str, PlannedRun]()
    while len(planned) < len(sweep.runs):
        for run in sweep.runs:
            if run.name not in planned and (not run.after or run.after in planned):
                before = planned[run.after] if run.after else None
                planned[run.name] = _planned(sweep, run, before, cells, lengths[_shape(run.config)])
                progress(len(planned), len(sweep.runs))
    return sorted(planned.values(), key=lambda each: (each.generation, each.flops, each.run.name))


class _TrainingCells:
    """Splits of a corpus and the training cells of runs, each found once."""

    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus
        self._split = functools.cache(self._find_split)
        self._cells: dict[str, CellBlocks] = {}
        self._loads: dict[str, Load] = {}
        self._unique: dict[str, int] = {}

    def _find_split(self, config: SplitConfig) -> Split:
        return split_cells(self.corpus, config)

    def of(self, config: RunConfig) -> CellBlocks:
        """The centres that a run trains on."""
        key = repr((config.split, config.technologies))
        if key not in self._cells:
            self._cells[key] = select_cells(self.corpus, self._split(config.split), config)[0]
        return self._cells[key]

    def unique(self, *configs: RunConfig) -> int:
        """How many different cells a run reads, and those before it."""
        key = repr([(config.split, config.technologies, config.data.sample) for config in configs])
        if key not in self._unique:
            self._unique[key] = unique_cells(
                *self._read_by(configs[0]), *(self._read_by(config) for config in configs[1:])
            )
        return self._unique[key]

    def _read_by(self, config: RunConfig) -> tuple[Int64[np.ndarray, " n"], Context]:
        return self.of(config).numbers(), config.data.sample.context_of(self.corpus)

    def load(self, config: RunConfig) -> Load:
        """Of a training sample of the run, the mean."""
        data = config.data
        key = repr((config.split, config.technologies, data.sample, data.weights, config.objective.rates))
        if key not in self._loads:
            reader: Reader = data.sample.reader(self.corpus)
            cells = np.sort(self._sampled(config))
            read = reader.read(cells, draw=EVALUATION_STEP, seed=0, rates=config.objective.rates)
            whole = Load.real(*read.lengths.T)
            self._loads[key] = whole.scaled(1 / whole.rows)
        return self._loads[key]

    def _sampled(self, config: RunConfig) -> Int64[np.ndarray, " n"]:
        """Some cells, drawn as training draws them."""
        cells = self.of(config)
        if config.data.weights:
            weights = slide_weights(self.corpus, config.data.weights)[self.corpus.slide_of(cells.first)]
            pool = config.data.pool_blocks
            return MixedStreams(cells, weights, n_shards=1, seed=0, pool_blocks=pool).draw(0, 0, _SAMPLED)
        random = np.random.default_rng(0)
        return cells.at(random.choice(len(cells), min(_SAMPLED, len(cells)), replace=False))


def _planned(
    sweep: Sweep,
    run: SweepRun,
    before: PlannedRun | None,
    cells: _TrainingCells,
    lengths: tuple[tuple[int, ...], ...],
) -> PlannedRun:
    config = replace(run.config, data=replace(run.config.data, lengths=lengths))
    load, n_genes, batch = cells.load(config), len(cells.corpus.vocabulary), config.data.batch_size
    of_step = training_flops(config.model, n_genes, load.scaled(batch))
    if run.flops:
        config = _spending(run, config, of_step)
    if config.optimiser.steps > _MOST_STEPS:
        problem = f"takes {config.optimiser.steps:.3g} steps, of which {_MOST_STEPS:,} can be counted"
        raise InputError(f"run {run.name}", problem, "lower its flops or optimiser.steps")
    seen, training_cells, size = (
        config.optimiser.steps * batch,
        len(cells.of(config)),
        size_of(config, n_genes),
    )
    if before and size != before.size:
        problem = f"comes after run {run.after}, which has {before.size.parameters:,} parameters and not "
        raise InputError(
            f"run {run.name}", f"{problem}{size.parameters:,}", "give both models the same sizes"
        )
    return PlannedRun(
        run=replace(run, config=config),
        generation=before.generation + 1 if before else 0,
        size=size,
        training_cells=training_cells,
        unique_cells=cells.unique(*(each.config for each in sweep.chain(run))),
        epochs=seen / training_cells + (before.epochs if before else 0.0),
        cells=seen + (before.cells if before else 0),
        tokens=seen * load.tokens + (before.tokens if before else 0.0),
        flops=config.optimiser.steps * of_step + (before.flops if before else 0.0),
    )


def _spending(run: SweepRun, config: RunConfig, of_step: float) -> RunConfig:
    """The run's config with the steps that its budget allows, and as large a share of them for warm-up."""
    optimiser, steps = config.optimiser, round(run.flops / of_step)
    if steps < 1:
        problem = f"flops is {run.flops:.3g}, a step takes {of_step:.3g}"
        raise InputError(f"run {run.name}", problem, "raise the budget, or lower the batch")
    warmup = round(optimiser.warmup_steps * steps / optimiser.steps)
    warmup = max(warmup, min(optimiser.warmup_steps, 1))
    return replace(config, optimiser=replace(optimiser, steps=steps, schedule_steps=0, warmup_steps=warmup))


def _shape(config: RunConfig) -> str:
    """What the static lengths of a run's batches depend on, but for which cells and neighbours it reads.

    A control's other neighbours are much as long, and what is longer than all lengths gets one of its own.
    """
    sample = config.data.sample
    if isinstance(sample, SampleConfig):
        sample = replace(sample, skip_nearest=0, exchanged_within=())
    data = replace(config.data, lengths=(), weights=(), sample=sample)
    return repr((data, config.objective.rates, config.technologies))


def _shared_lengths(sweep: Sweep, cells: _TrainingCells) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Static lengths for each shape of batch: those that suit the run with most training cells."""
    by_shape: dict[str, list[RunConfig]] = {}
    for run in sweep.runs:
        by_shape.setdefault(_shape(run.config), []).append(run.config)
    lengths = {}
    for shape, configs in by_shape.items():
        config = max(configs, key=lambda config: len(cells.of(config)))
        loader = Loader(
            cells.corpus, cells.of(config), config.data, seed=config.seed, rates=config.objective.rates
        )
        lengths[shape] = tuple(ladder.rungs for ladder in loader.ladders)
    return lengths
