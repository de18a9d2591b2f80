"""The plan of a sweep: budgets, what comes after, what weights draw, and programs that runs share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_runs import small

from scfm_jax.corpus import Corpus
from scfm_jax.corpus.split import SplitConfig, split_cells
from scfm_jax.data.tokens import SampleConfig
from scfm_jax.errors import InputError
from scfm_jax.scaling.sweep import Sweep, SweepRun
from scfm_jax.scaling.sweep_plan import plan_sweep
from scfm_jax.scaling.sweep_run import SweepFolder, run_planned
from scfm_jax.training.config import RunConfig
from scfm_jax.training.mesh import make_mesh
from scfm_jax.training.step import make_program
from scfm_jax.training.task import make_task


def test_a_budget_becomes_steps(config: RunConfig) -> None:
    corpus = Corpus.open(config.corpus)
    runs = [SweepRun(f"w{width}", small(config, k=0, width=width), flops=5e7) for width in (8, 16)]
    sweep = Sweep("isoflop", tuple(runs))
    narrow, wide = sorted(plan_sweep(sweep, corpus), key=lambda each: each.size)
    assert narrow.run.config.optimiser.steps > wide.run.config.optimiser.steps > 1
    for each in (narrow, wide):
        steps = each.run.config.optimiser.steps
        assert abs(each.flops - 5e7) <= 5e7 / steps / 2 * 1.01
        assert each.run.config.optimiser.warmup_steps == max(round(steps * 2 / 2), 1)
    at_once = replace(runs[0].config, optimiser=replace(runs[0].config.optimiser, warmup_steps=0))
    (flat,) = plan_sweep(replace(sweep, runs=(replace(runs[0], config=at_once),)), corpus)
    assert flat.run.config.optimiser.warmup_steps == 0
    less = replace(sweep, runs=(replace(runs[0], flops=1.0),))
    with pytest.raises(InputError, match=r"run w8: flops is 1, a step takes [\d.e+]+; raise the budget"):
        plan_sweep(less, corpus)


@pytest.mark.parametrize(
    ("cells", "more", "told"),
    [
        (
            0,
            {"flops": 1e30},
            r"run w8: takes [\d.]+e\+\d\d steps, of which 2,147,483,647 can be counted; lower",
        ),
        (0, {"steps": 10**11}, r"run w8: takes 1e\+11 steps"),
        (10**6, {}, r"run w8, .*: split.train_cells is 1000000, there are \d+ training cells; give"),
    ],
)
def test_more_than_there_can_be_is_refused_by_the_name_of_the_run(
    config: RunConfig, cells: int, more: dict[str, Any], told: str
) -> None:
    run = small(config, k=0, cells=cells, steps=more.pop("steps", 2))
    with pytest.raises(InputError, match=told):
        plan_sweep(Sweep("one", (SweepRun("w8", run, **more),)), Corpus.open(config.corpus))


def test_a_run_after_another_has_read_the_cells_of_both(config: RunConfig) -> None:
    corpus = Corpus.open(config.corpus)
    few, all_cells = small(config, k=2, cells=60), small(config, steps=4, k=0)
    runs = (SweepRun("alone", few), SweepRun("all", all_cells), SweepRun("late", few, after="all"))
    planned = {each.run.name: each for each in plan_sweep(Sweep("chain", runs), corpus)}
    alone, late = planned["alone"], planned["late"]
    train = [split_cells(corpus, of.split).train for of in (few, all_cells)]
    near = corpus.neighbours(train[0], 2)
    assert late.unique_cells == len(np.unique([*near[near >= 0], *train[0], *train[1]])) > alone.unique_cells
    assert late.training_cells == alone.training_cells == len(train[0])
    assert late.epochs == pytest.approx(2 * 8 / len(train[0]) + 4 * 8 / len(train[1]))
    wider = (SweepRun("all", all_cells), SweepRun("late", small(config, width=16), after="all"))
    with pytest.raises(
        InputError, match=r"run late: comes after run all, which has [\d,]+ parameters and not"
    ):
        plan_sweep(Sweep("chain", wider), corpus)


def test_a_run_before_its_turn_leaves_nothing(config: RunConfig, tmp_path: Path) -> None:
    corpus, folder = Corpus.open(config.corpus), SweepFolder(tmp_path / "out")
    runs = (SweepRun("all", small(config, k=0)), SweepRun("late", small(config, k=2), after="all"))
    sweep = Sweep("chain", runs)
    late = plan_sweep(sweep, corpus)[1:]
    with pytest.raises(InputError, match=r"out: run late comes after run all, which is not done; run that"):
        run_planned(sweep, late, corpus, folder)
    assert not folder.path.exists()


def test_flops_are_reckoned_from_the_cells_that_weights_draw(config: RunConfig) -> None:
    corpus, run = Corpus.open(config.corpus), small(config, k=2)
    run = replace(run, split=SplitConfig(blocks=3, n_folds=3, margin=0, min_kept=0.0))
    changes: list[dict[str, Any]] = [
        {"data": replace(run.data, weights=("technology=simseq=0",))},
        {"technologies": ("simscope",)},
        {},
    ]
    drawn, same, all_cells = (
        plan_sweep(Sweep("one", (SweepRun("one", replace(run, **change)),)), corpus)[0].flops
        for change in changes
    )
    assert drawn == pytest.approx(same, rel=3e-3)
    assert all_cells != pytest.approx(same, rel=6e-3)


def test_runs_that_differ_in_seed_rate_steps_and_cells_share_their_compilations(config: RunConfig) -> None:
    corpus, texts = Corpus.open(config.corpus), []
    runs = [small(config, steps=4, k=0), small(config, steps=9, seed=3, k=0, cells=60)]
    runs[1] = replace(runs[1], optimiser=replace(runs[1].optimiser, peak_rate=0.02, warmup_steps=1))
    planned = plan_sweep(Sweep("two", (SweepRun("a", runs[0]), SweepRun("b", runs[1]))), corpus)
    assert planned[0].run.config.data.lengths == planned[1].run.config.data.lengths
    for each in planned:
        task = make_task(each.run.config, corpus)
        program = make_program(each.run.config, make_mesh(each.run.config.mesh), task)
        cells = split_cells(corpus, each.run.config.split).train
        batch = next(task.loader(cells, (0, 1)).iterate(0, 1))
        texts.append(program.step.lower(program.like, batch, program.given(0)).as_text())
    assert texts[0] == texts[1]


def test_controls_share_the_lengths_of_what_they_control(config: RunConfig) -> None:
    true = small(config, k=2)
    ring = replace(true, data=replace(true.data, sample=SampleConfig(neighbours=2, skip_nearest=2)))
    corpus, runs = Corpus.open(config.corpus), (SweepRun("true", true), SweepRun("ring", ring))
    planned = plan_sweep(Sweep("two", runs), corpus)
    lengths = {each.run.name: each.run.config.data.lengths for each in planned}
    assert lengths["ring"] == lengths["true"] != ()


# The runs of the tests above, so that no more is compiled.
