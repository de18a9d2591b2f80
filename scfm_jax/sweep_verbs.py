"""The verbs ``scfm scaling run`` and ``compare``, each thin."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from tyro.conf import Positional, arg

from scfm_jax.console import TrainingBar, print_json
from scfm_jax.errors import InputError
from scfm_jax.flags import MOST_DRAWS, check_count

if TYPE_CHECKING:
    from scfm_jax.scaling.sweep_plan import PlannedRun

# Flags of the verb itself; all others override the recipe of every run.
OWN_FLAGS = (
    "--index",
    "--plan",
    "--no-plan",
    "--slurm",
    "--no-slurm",
    "--distributed",
    "--json",
    "--no-json",
)


def run(
    sweep: Positional[Annotated[Path, arg(metavar="SWEEP.py")]],
    out: Positional[Annotated[Path | None, arg(metavar="[OUT]")]] = None,
    /,
    index: Annotated[int | None, arg(metavar="PLACE")] = None,
    plan: bool = False,
    slurm: bool = False,
    distributed: Annotated[str | None, arg(metavar="HOW")] = None,
    json: bool = False,
    overrides: Annotated[tuple[str, ...], tyro.conf.Suppress] = (),
) -> int:
    """Train and judge the runs of a sweep, for scaling fit. Any field of a recipe is a flag: --corpus PATH.

    The cheapest run is first. Runs that are done are left alone, and one that was stopped goes on: the same
    command again is all that is needed. Begun several times, the processes share the runs. Exit status 1
    where Ctrl-C or SIGTERM stopped it.

    Parameters
    ----------
    sweep
        A Python file with a function sweep(); see experiments/sweeps/.
    out
        The folder of results, new or that of an earlier call; runs/ and the sweep's name if not given.
    index
        Run one run alone, as a job of an array does: its place in the plan, counted from 0.
    plan
        Print what the runs will take, and train nothing.
    slurm
        Write scripts that submit the runs to SLURM as job arrays, and train nothing.
    distributed
        How several hosts find each other: auto, ADDRESS:PORT,COUNT,NUMBER, or off; see scfm train --help.
    json
        Print the plan, or the rows of results, as JSON.
    """
    from scfm_jax.compilations import cache_compilations
    from scfm_jax.corpus import Corpus
    from scfm_jax.scaling.slurm import write_scripts
    from scfm_jax.scaling.sweep import load_sweep
    from scfm_jax.scaling.sweep_plan import plan_sweep
    from scfm_jax.scaling.sweep_run import Stopped, SweepFolder, done_row, run_planned
    from scfm_jax.training.hosts import is_primary, joined

    loaded = load_sweep(sweep, flags=overrides)
    folder = SweepFolder(out or Path("runs") / loaded.name)
    cache_compilations(short=True)
    with joined(distributed):
        corpus = Corpus.open(loaded.runs[0].config.corpus)
        planned = plan_sweep(loaded, corpus)
        if index is not None and not 0 <= index < len(planned):
            raise InputError("--index", f"{index} is no run's place", f"give 0 to {len(planned) - 1}")
        speaks = is_primary()
        if plan or slurm:
            if speaks:
                done = [done_row(loaded, each, corpus, folder) is not None for each in planned]
                _print_plan(planned, done, json)
            if slurm and speaks:
                folder.make("logs")
                words = [sys.executable, "-m", "scfm_jax.cli", "scaling", "run"]
                paths = [str(sweep.absolute()), str(folder.path.absolute())]
                script = write_scripts(folder.path, [*words, *paths, *overrides], planned)
                print(
                    f"submit with: bash {script} [options of sbatch]", file=sys.stderr if json else sys.stdout
                )
            return 0
        chosen = planned if index is None else planned[index : index + 1]
        told = _Reports(len(chosen), quiet=json or not speaks)
        try:
            results = run_planned(loaded, chosen, corpus, folder, report=told, wait_for=told.wait_for)
        except Stopped as stopped:
            if speaks:
                print(f"stopped and saved in run {stopped}: the same command goes on", file=sys.stderr)
            return 1
        finally:
            told.close()
    if speaks and json:
        print_json([folder.row(each.run.name) for each in chosen])
    elif speaks:
        print(f"the results: {results}")
    return 0


class _Reports:
    """A bar for each run, and a line when it is done."""

    def __init__(self, runs: int, *, quiet: bool) -> None:
        self._runs, self._quiet, self._done = runs, quiet, 0
        self._bar: TrainingBar | None = None

    def __call__(self, each: PlannedRun, row: dict[str, Any]) -> None:
        if "digest" in row:
            self.close()
            self._done += 1
            if not self._quiet:
                loss = "no loss" if row["loss"] is None else f"loss {row['loss']:.4f}"
                print(f"{row['name']} ({self._done}/{self._runs}): {_facts(row)}, {loss}", flush=True)
            return
        if self._bar is None:
            self._bar = TrainingBar(each.run.config.optimiser.steps, each.run.name, quiet=self._quiet)
            self._bar.__enter__()
        self._bar.report(row)

    def wait_for(self, names: list[str]) -> None:
        self.close()
        if not self._quiet:
            print(f"waiting for runs that other processes are at: {', '.join(names)}", flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
            self._bar = None


def _facts(row: dict[str, Any]) -> str:
    return (
        f"N {row['parameters_without_embeddings']:,}, D {row['unique_cells']:,}, k {row['k']}, "
        f"{row['epochs']:.2f} epochs, {row['flops']:.3g} FLOPs"
    )


def _print_plan(planned: Sequence[PlannedRun], done: Sequence[bool], json: bool) -> None:
    rows: list[dict[str, Any]] = [
        {
            "index": place,
            "name": each.run.name,
            "done": is_done,
            "after": each.run.after,
            "parameters": each.size.parameters,
            "parameters_without_embeddings": each.size.without_embeddings,
            "unique_cells": each.unique_cells,
            "k": each.run.neighbours,
            "seed": each.run.config.seed,
            "steps": each.run.config.optimiser.steps,
            "cells": each.cells,
            "epochs": each.epochs,
            "tokens": each.tokens,
            "flops": each.flops,
        }
        for place, (each, is_done) in enumerate(zip(planned, done, strict=True))
    ]
    if json:
        print_json(rows)
        return
    for row in rows:
        mark, after = " (done)" if row["done"] else "", f", after {row['after']}" if row["after"] else ""
        print(f"{row['index']:>4}  {row['name']}{mark}: {_facts(row)}, {row['steps']:,} steps{after}")
    of = {each.run.name: each.flops for each in planned}
    own = (each.flops - of.get(each.run.after, 0.0) for each in planned)
    print(f"{len(rows)} runs, {sum(own):.3g} FLOPs in all")


def compare(
    out: Positional[Annotated[Path, arg(metavar="OUT")]],
    /,
    of: Annotated[tuple[str, ...], arg(metavar="NAME ...")],
    than: Annotated[str, arg(metavar="NAME")],
    corpus: Annotated[Path | None, arg(metavar="CORPUS")] = None,
    part: str = "loss",
    draws: int = 1_000,
    seed: int = 0,
    json: bool = False,
) -> None:
    """What runs of a sweep gain over others, file by file: paired losses, with intervals over blocks.

    scfm scaling compare OUT --of 'w16-*-k4' 'w16-*-k16' --than 'w16-*-k0'

    Parameters
    ----------
    out
        The folder of results that scfm scaling run wrote.
    of
        Names of the runs whose gain is asked. A * stands for anything, the seed say; all that fit one name
        are taken together.
    than
        Name of the runs that they are held against, with a * in the same places.
    corpus
        The corpus that the runs learnt from, if it has moved since.
    part
        What is compared: loss, or for AIDO.Tissue its part nonzero or zero, or for Nicheformer top1.
    draws
        Draws of the bootstrap over blocks of tissue; 100 at least.
    seed
        Seed of the bootstrap over blocks of tissue.
    json
        Print the gains as JSON.
    """
    from scfm_jax.scaling.gains import gains
    from scfm_jax.scaling.sweep_run import SweepFolder

    check_count("--draws", draws, 100, MOST_DRAWS)
    check_count("--seed", seed, 0)
    found = gains(SweepFolder(out), of, than, corpus=corpus, part=part, draws=draws, seed=seed)
    rows = [asdict(gain) for gain in found]
    if json:
        print_json(rows)
        return
    wide = max(len(row["file"]) for row in rows)
    print(f"gain: 1 - {part} / {part} of {than}, in %, [95% over blocks of tissue], sd between pairs of runs")
    for runs in of:
        print(runs)
        for row in (row for row in rows if row["runs"] == runs):
            gain, low, high = (100 * row[name] for name in ("gain", "low", "high"))
            spread = "" if row["spread"] is None else f", sd {100 * row['spread']:.2f} of {row['pairs']}"
            losses = f"{row['loss']:.4f} for {row['reference']:.4f}"
            print(f"  {row['file']:<{wide}}  {losses}  {gain:+.2f} [{low:+.2f}, {high:+.2f}]{spread}")


VERBS: dict[str, Callable[..., Any]] = {"scaling run": run, "scaling compare": compare}
