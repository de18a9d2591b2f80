"""A sweep: the training runs of a scaling study, as a recipe yields them.

A recipe is a Python file whose ``sweep()`` returns a `Sweep`. What its runs vary is Python's to say: model
size, training cells, neighbours, width to depth, masking rates, the share of spatial slides, or budgets of
FLOPs. What they must share is what makes their losses comparable, and is checked before one is run.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scfm_jax.corpus.split import SplitConfig
from scfm_jax.data.ranks import RankConfig
from scfm_jax.errors import InputError, check_least
from scfm_jax.models.nicheformer import NicheformerConfig
from scfm_jax.objectives.column_masking import ColumnMaskingConfig
from scfm_jax.objectives.masked_genes import MaskedGenesConfig
from scfm_jax.scaling.held_out import measure_of
from scfm_jax.training.config import RunConfig, from_python, override

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")


@dataclass(frozen=True)
class SweepRun:
    """One training.

    Attributes
    ----------
    name
        Of the run, its folder and its row.
    config
        What is trained. Its corpus may be given on the command line, for all runs.
    flops
        A budget: the run takes as many steps as spend it (model FLOPs of real tokens, reckoned from a sample
        of its cells), and its warm-up keeps its share of the steps. 0: the steps of `config`.
    after
        Name of a run whose last weights this one starts from; what that one cost is counted to this one too.
    """

    name: str
    config: RunConfig
    flops: float = 0.0
    after: str = ""

    def __post_init__(self) -> None:
        _check_name("run", self.name)
        if not isinstance(self.config, RunConfig):
            problem = f"has a config that is {type(self.config).__name__}"
            raise InputError(
                f"run {self.name}", problem, "give it a RunConfig, as recipe() of experiments/ do"
            )
        _check_least(f"run {self.name}", self, "flops")
        if self.after and self.flops:
            raise InputError(f"run {self.name}", "has both flops and after", "give it steps instead of flops")
        if self.after and self.config.initial_weights:
            raise InputError(f"run {self.name}", "has both initial_weights and after", "give it one of them")

    @property
    def family(self) -> str:
        """As in the results file."""
        return "nicheformer" if isinstance(self.config.model, NicheformerConfig) else "tissue"

    @property
    def neighbours(self) -> int:
        """k."""
        sample = self.config.data.sample
        return sample.niche_neighbours if isinstance(sample, RankConfig) else sample.neighbours


@dataclass(frozen=True)
class Sweep:
    """Runs that are judged alike.

    Attributes
    ----------
    name
        Of the study.
    runs
        In any order: they are run by cost, the cheapest first.
    objective
        By which all runs are judged, whatever they were trained by (a sweep over masking rates must name
        one); that of the runs if not given, which must then have the same.
    evaluate_cells
        Held-out centres that every run is judged by, a fixed random subset; 0 is all.
    seed
        Of the masks that every run is judged by.
    """

    name: str
    runs: tuple[SweepRun, ...]
    objective: ColumnMaskingConfig | MaskedGenesConfig | None = None
    evaluate_cells: int = 2_048
    seed: int = 0

    def __post_init__(self) -> None:
        _check_name("sweep", self.name)
        _check_least(f"sweep {self.name}", self, "evaluate_cells", "seed")
        check_runs(self.runs, self.objective)

    def run(self, name: str) -> SweepRun:
        """The run of a name."""
        return next(run for run in self.runs if run.name == name)

    def chain(self, run: SweepRun) -> list[SweepRun]:
        """A run, the one that it comes after, and so on."""
        runs = [run]
        while runs[-1].after:
            runs.append(self.run(runs[-1].after))
        return runs


def load_sweep(path: Path, *, flags: Sequence[str] = ()) -> Sweep:
    """The sweep of a recipe.

    Parameters
    ----------
    path
        A Python file with a function ``sweep() -> Sweep``.
    flags
        Dotted, for every run, as of ``scfm train``: ``--corpus PATH``.

    Raises
    ------
    InputError
        As `scfm_jax.training.config.load_recipe` and `check_runs`; a run without a corpus, or runs of
        several.
    """
    try:
        sweep = from_python(path, "sweep", Sweep)
    except InputError as error:
        raise error if error.where == str(path) else within(path, error) from error
    runs = tuple(
        replace(run, config=override(run.config, flags, f"{path}, run {run.name}")) for run in sweep.runs
    )
    for run in runs:
        if not run.config.corpus:
            raise InputError(path, f"run {run.name} names no corpus", "add --corpus PATH")
    if len(of := sorted({run.config.corpus for run in runs})) > 1:
        raise InputError(
            path, f"its runs have {len(of)} corpora", "give them one, so that their cells are the same"
        )
    try:
        return replace(sweep, runs=runs)
    except InputError as error:
        raise within(path, error) from error


def within(place: object, error: InputError) -> InputError:
    """The same error, told with the larger place that it is in."""
    return InputError(f"{place}, {error.where}", error.problem, error.mend)


def _check_least(where: str, of: object, *fields: str) -> None:
    try:
        check_least(of, 0, *fields)
    except ValueError as error:
        raise InputError(where, str(error), "give it one") from error


def _check_name(what: str, name: str) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InputError(f"{what} {name!r}", "is no name of a folder", "use letters, digits, . _ + and -")


def check_runs(runs: Sequence[SweepRun], objective: ColumnMaskingConfig | MaskedGenesConfig | None) -> None:
    """Find what would make the losses of runs incomparable, or their order impossible.

    Raises
    ------
    InputError
        No runs; a name or a training twice; runs of two families; other test cells, technologies, lengths of
        sentences or (without one for all) objectives than the first run has; an objective for all that is
        not of their family, or of another loss than they are trained by; a run after one that is not there,
        or after itself.
    """
    if not isinstance(runs, tuple | list):
        raise InputError("sweep", f"has runs that are {type(runs).__name__}", "give a tuple of SweepRun")
    if not runs:
        raise InputError("sweep", "has no runs", "let sweep() return some")
    for run in runs:
        if not isinstance(run, SweepRun):
            raise InputError("sweep", f"has a run that is {type(run).__name__}", "make each a SweepRun")
    for name, times in Counter(run.name for run in runs).items():
        if times > 1:
            raise InputError(
                f"run {name}", f"stands {times} times in the sweep", "give each run its own name"
            )
    same: dict[str, str] = {}
    for run in runs:
        if (other := same.setdefault(repr((run.config, run.flops, run.after)), run.name)) != run.name:
            problem = f"trains what run {other} does, with the same seed"
            raise InputError(f"run {run.name}", problem, "take one of them out, or give it another seed")
    first, named = runs[0], {run.name: run for run in runs}
    measure = _measure(first, objective)
    for run in runs:
        for what, mine, other in (
            ("family", run.family, first.family),
            ("split", test_of(run.config.split), test_of(first.config.split)),
            ("technologies", run.config.technologies, first.config.technologies),
            *([] if objective else [("objective", run.config.objective, first.config.objective)]),
        ):
            if mine != other:
                problem = f"has another {what} than run {first.name}, so that their losses cannot be compared"
                mend = "name Sweep.objective" if what == "objective" else "give all runs the same"
                raise InputError(f"run {run.name}", problem, mend)
        for what, value in _measure(run, objective).items():
            if value != measure[what]:
                problem = f"{what} is {value!r}, that of run {first.name} {measure[what]!r}"
                raise InputError(
                    f"run {run.name}",
                    f"{problem}, so that their losses cannot be compared",
                    "give all the same",
                )
        seen = [run.name]
        while named[seen[-1]].after:
            after = named[seen[-1]].after
            if after not in named or after in seen:
                problem = f"comes after run {after!r}, which " + (
                    "comes after it" if after in seen else "is not in the sweep"
                )
                raise InputError(f"run {seen[-1]}", problem, "name a run of the sweep that comes before it")
            seen.append(after)


def _measure(run: SweepRun, objective: ColumnMaskingConfig | MaskedGenesConfig | None) -> dict[str, Any]:
    """What decides the unit of a run's held-out loss, as it is judged."""
    if objective is None:
        return measure_of(run.config)
    trained = run.config.objective
    if type(objective) is not type(trained):
        problem = f"is a {type(objective).__name__}, run {run.name} is trained by a {type(trained).__name__}"
        raise InputError("Sweep.objective", problem, "give one of the runs' family")
    losses = [getattr(of, "loss", None) for of in (trained, objective)]
    if losses[0] != losses[1]:
        problem = f"is trained by the loss {losses[0]}, and Sweep.objective judges by {losses[1]}"
        raise InputError(
            f"run {run.name}", problem, "give both the same: a model predicts in the unit of one"
        )
    return measure_of(replace(run.config, objective=objective))


def test_of(split: SplitConfig) -> SplitConfig:
    """What decides the test cells of a split."""
    return replace(split, train_cells=0)
