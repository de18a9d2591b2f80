"""Which runs a sweep may hold: what makes their losses incomparable, or their order impossible."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.sweeps import tissue_study
from scfm_jax.corpus import Corpus
from scfm_jax.errors import InputError
from scfm_jax.objectives.column_masking import ColumnMaskingConfig
from scfm_jax.objectives.masked_genes import MaskedGenesConfig
from scfm_jax.scaling.runs import read_runs
from scfm_jax.scaling.sweep import Sweep, SweepRun, load_sweep
from scfm_jax.scaling.sweep_plan import plan_sweep
from scfm_jax.training.config import RunConfig

CHANGES: dict[str, tuple[Callable[[SweepRun], SweepRun], str]] = {
    "name": (lambda run: replace(run, name="a"), "run a: stands 2 times in the sweep"),
    "split": (
        lambda run: replace(run, config=replace(run.config, split=replace(run.config.split, margin=2))),
        "run b: has another split than run a, so that their losses cannot be compared; give all runs the",
    ),
    "technologies": (
        lambda run: replace(run, config=replace(run.config, technologies=("simscope",))),
        "run b: has another technologies than run a",
    ),
    "objective": (
        lambda run: replace(run, config=replace(run.config, objective=ColumnMaskingConfig(nonzero_rate=0.5))),
        "run b: has another objective than run a.*; name Sweep.objective",
    ),
    "missing": (lambda run: replace(run, after="c"), "run b: comes after run 'c', which is not in the sweep"),
    "itself": (lambda run: replace(run, after="b"), "run b: comes after run 'b', which comes after it"),
    "path": (lambda run: replace(run, name="../b"), r"run '../b': is no name of a folder"),
    "flops": (lambda run: replace(run, after="a", flops=1e9), "run b: has both flops and after"),
    "weights": (
        lambda run: replace(run, after="a", config=replace(run.config, initial_weights="runs/a")),
        "run b: has both initial_weights and after",
    ),
    "nan": (lambda run: replace(run, flops=float("nan")), "run b: flops is nan, not a number from 0"),
    "text": (lambda run: replace(run, flops="1e9"), "run b: flops is '1e9', not a number from 0"),
    "same": (
        lambda run: replace(run, config=replace(run.config)),
        "run b: trains what run a does, with the same seed; take one of them out",
    ),
    "config": (lambda run: replace(run, config=3), "run b: has a config that is int; give it a RunConfig"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_runs_that_cannot_be_compared_are_refused(config: RunConfig, name: str) -> None:
    change, told = CHANGES[name]
    with pytest.raises(InputError, match=told):
        Sweep("two", (SweepRun("a", config), change(SweepRun("b", config))))


def test_families_do_not_mix_and_a_sweep_has_runs(config: RunConfig, ranks: RunConfig) -> None:
    with pytest.raises(InputError, match="run b: has another family than run a"):
        Sweep("two", (SweepRun("a", config), SweepRun("b", ranks)))
    with pytest.raises(InputError, match="sweep one: evaluate_cells is -1, not a number from 0"):
        Sweep("one", (SweepRun("a", config),), evaluate_cells=-1)
    with pytest.raises(InputError, match="sweep: has no runs"):
        Sweep("none", ())
    with pytest.raises(InputError, match="sweep: has runs that are SweepRun; give a tuple"):
        Sweep("one", SweepRun("a", config))
    with pytest.raises(InputError, match="sweep: has a run that is RunConfig; make each a SweepRun"):
        Sweep("one", (config,))
    with pytest.raises(InputError, match=r"sweep '../a b': is no name of a folder"):
        Sweep("../a b", (SweepRun("a", config),))


def test_sentences_of_other_lengths_are_not_compared(ranks: RunConfig) -> None:
    _, sample, _ = ranks.nicheformer()
    shorter = replace(ranks, data=replace(ranks.data, sample=replace(sample, length=18)))
    with pytest.raises(InputError, match=r"run b: data.sample.length is 18, that of run a 20, so that their"):
        Sweep("two", (SweepRun("a", ranks), SweepRun("b", shorter)))
    fewer = replace(ranks, data=replace(ranks.data, sample=replace(sample, niche_neighbours=1)))
    sweep = Sweep("two", (SweepRun("a", ranks), SweepRun("b", fewer)))
    planned = plan_sweep(sweep, Corpus.open(ranks.corpus))
    assert [each.run.neighbours for each in planned] == [1, 3]
    assert planned[0].unique_cells <= planned[1].unique_cells


def test_masking_rates_are_swept_under_one_judgement(config: RunConfig) -> None:
    _, _, objective = config.tissue()
    other = replace(config, objective=replace(objective, nonzero_rate=0.5))
    runs = (SweepRun("a", config), SweepRun("b", other))
    assert len(Sweep("rates", runs, objective=objective).runs) == 2
    with pytest.raises(
        InputError, match=r"run a: is trained by the loss mse, and Sweep.objective judges by nb"
    ):
        Sweep("rates", runs, objective=replace(objective, loss="nb"))
    with pytest.raises(
        InputError, match=r"Sweep.objective: is a MaskedGenesConfig, run a is trained by a Col"
    ):
        Sweep("rates", runs, objective=MaskedGenesConfig())


def test_a_sweep_is_python(tmp_path: Path, config: RunConfig) -> None:
    path = tmp_path / "sweep.py"
    path.write_text("def sweep():\n    return 3\n")
    with pytest.raises(InputError, match=r"sweep\(\) returns int; return a scfm_jax.scaling.sweep.Sweep"):
        load_sweep(path)


def test_the_rows_of_the_study_are_of_its_recipe() -> None:
    """What docs/scaling.md rests on can be fitted, and its runs are those of the recipe."""
    rows = Path(__file__).parents[2] / "experiments" / "sweeps" / "tissue_study.jsonl"
    runs, dropped = read_runs(rows)
    recipe = {run.name: run for run in tissue_study.sweep().runs}
    assert not dropped and len(runs.name) == len(set(runs.name)) > 30
    for name, k, size in zip(runs.name, runs.k, runs.parameters_without_embeddings, strict=True):
        config = recipe[name].config
        assert k == recipe[name].neighbours
        assert size == tissue_study.SIZES[config.tissue()[0].encoder.width]
