"""Sweeps: what is refused before anything runs, the plan, rows, going on where it stopped, job arrays."""

from __future__ import annotations

import json
import os
import subprocess
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from scfm_jax.cli import main
from scfm_jax.corpus import Corpus
from scfm_jax.corpus.split import split_cells
from scfm_jax.errors import InputError
from scfm_jax.models.transformer import TransformerConfig
from scfm_jax.objectives.column_masking import ColumnMaskingConfig
from scfm_jax.scaling import sweep_run
from scfm_jax.scaling.held_out import HeldOutErrors
from scfm_jax.scaling.runs import read_runs
from scfm_jax.scaling.slurm import write_scripts
from scfm_jax.scaling.sweep import Sweep, SweepRun, load_sweep
from scfm_jax.scaling.sweep_plan import PlannedRun, plan_sweep
from scfm_jax.scaling.sweep_run import Stopped, SweepFolder, run_planned
from scfm_jax.training.config import RunConfig
from scfm_jax.training.mesh import make_mesh
from scfm_jax.training.metrics import read_metrics
from scfm_jax.training.step import make_program
from scfm_jax.training.task import make_task


@pytest.fixture(scope="module", autouse=True)
def compile_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """As the verb does: runs of equal shape share what is compiled."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_disable_most_optimizations": True,
    }
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


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


@pytest.fixture(scope="module")
def sweep(config: RunConfig) -> Sweep:
    """Two sizes of data, and a second stage with neighbours that starts from one of them."""
    runs = (
        SweepRun("k2", small(config, k=2), after="large"),
        SweepRun("large", small(config, steps=4, k=0)),
        SweepRun("small", small(config, k=0, cells=60)),
    )
    return Sweep("tiny", runs, evaluate_cells=40)


@pytest.fixture(scope="module")
def done(sweep: Sweep, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[PlannedRun]]:
    """The sweep, run."""
    corpus, out = Corpus.open(sweep.runs[0].config.corpus), tmp_path_factory.mktemp("sweeps") / "tiny"
    planned = plan_sweep(sweep, corpus)
    assert run_planned(sweep, planned, corpus, SweepFolder(out)) == out / "results.jsonl"
    return out, planned


def rows_of(out: Path) -> dict[str, dict[str, Any]]:
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return {row["name"]: row for row in rows}


def test_the_plan_is_in_order_of_cost_and_what_comes_after_comes_after(
    done: tuple[Path, list[PlannedRun]],
) -> None:
    _, planned = done
    assert [each.run.name for each in planned] == ["small", "large", "k2"]
    assert [each.generation for each in planned] == [0, 0, 1]
    small, large, k2 = planned
    assert small.flops < large.flops < k2.flops
    assert k2.cells == 2 * 8 + large.cells == 2 * 8 + 4 * 8


def test_rows_say_what_was_trained(done: tuple[Path, list[PlannedRun]], sweep: Sweep) -> None:
    out, planned = done
    rows = rows_of(out)
    runs, dropped = read_runs(out / "results.jsonl")
    assert dropped == [] and sorted(runs.name) == ["k2", "large", "small"]
    for each in planned:
        row, config = rows[each.run.name], each.run.config
        steps = [row for row in read_metrics(out / "runs" / each.run.name / "metrics.jsonl") if "loss" in row]
        before = rows[each.run.after] if each.run.after else {"tokens": 0, "flops": 0, "cells": 0}
        assert row["tokens"] == sum(step["tokens"] for step in steps) + before["tokens"]
        assert row["flops"] == pytest.approx(
            sum(step["flops"] for step in steps) + before["flops"], rel=1e-12
        )
        assert row["cells"] == len(steps) * config.data.batch_size + before["cells"]
        assert row["parameters"] > row["parameters_without_embeddings"] > 0
        # What was reckoned beforehand, from all of these few cells, is about what they turned out to be.
        assert row["flops"] == pytest.approx(each.flops, rel=0.15)


def test_unique_cells_are_the_centres_and_their_neighbours(
    done: tuple[Path, list[PlannedRun]], sweep: Sweep
) -> None:
    out, _ = done
    corpus = Corpus.open(sweep.runs[0].config.corpus)
    for name, row in rows_of(out).items():
        config = sweep.run(name).config
        train = split_cells(corpus, config.split).train
        near = corpus.neighbours(train, row["k"])
        read = np.union1d(train, near[near >= 0])
        assert row["unique_cells"] == len(read)
        assert row["training_cells"] == len(train)
        assert row["epochs"] == pytest.approx(row["cells"] / len(train))
    assert rows_of(out)["small"]["unique_cells"] < rows_of(out)["large"]["unique_cells"]


def test_all_runs_are_judged_by_the_same_cells_and_masked_genes(done: tuple[Path, list[PlannedRun]]) -> None:
    out, planned = done
    errors = [HeldOutErrors.load(out / "errors" / f"{each.run.name}.npz") for each in planned]
    for of in errors[1:]:
        np.testing.assert_array_equal(of.cells, errors[0].cells)
        np.testing.assert_array_equal(of.loss.weight, errors[0].loss.weight)
        assert not np.array_equal(of.loss.total, errors[0].loss.total)
    for each, of in zip(planned, errors):
        row = rows_of(out)[each.run.name]
        assert row["loss"] == pytest.approx(of.loss.total.sum() / of.loss.weight.sum(), rel=1e-12)
        assert row["loss_se"] > 0
        assert row["loss_by_file"].keys() == {"slide1.h5ad"}


def test_what_is_done_is_left_alone(
    done: tuple[Path, list[PlannedRun]], sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, planned = done
    before = (out / "results.jsonl").read_bytes()
    monkeypatch.setattr(sweep_run, "train", None)
    (out / "results.jsonl").unlink()
    run_planned(sweep, planned, Corpus.open(sweep.runs[0].config.corpus), SweepFolder(out))
    assert (out / "results.jsonl").read_bytes() == before


def test_a_run_of_the_same_name_with_another_config_is_refused(
    done: tuple[Path, list[PlannedRun]], sweep: Sweep
) -> None:
    out, _ = done
    corpus = Corpus.open(sweep.runs[0].config.corpus)
    changed = replace(
        sweep,
        runs=(replace(sweep.run("small"), config=small(sweep.run("small").config, seed=7, k=0, cells=60)),),
    )
    with pytest.raises(
        InputError, match=r"run small was made with another config.*; remove runs/small and rows/small.json"
    ):
        run_planned(changed, plan_sweep(changed, corpus), corpus, SweepFolder(out))
    other = replace(sweep, evaluate_cells=30)
    with pytest.raises(InputError, match="run small was made with another config, corpus or judgement"):
        run_planned(other, plan_sweep(other, corpus), corpus, SweepFolder(out))


def test_a_larger_run_that_joins_later_changes_no_row(
    done: tuple[Path, list[PlannedRun]], sweep: Sweep
) -> None:
    out, planned = done
    corpus = Corpus.open(sweep.runs[0].config.corpus)
    part = replace(sweep, runs=(sweep.run("small"),))
    alone = plan_sweep(part, corpus)
    assert alone[0].run.name == planned[0].run.name
    folder = SweepFolder(out)
    assert sweep_run.digest_of(part, alone[0], corpus, folder) == rows_of(out)["small"]["digest"]


def test_a_run_that_was_stopped_goes_on(
    done: tuple[Path, list[PlannedRun]], sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, planned = done
    corpus, folder = Corpus.open(sweep.runs[0].config.corpus), SweepFolder(tmp_path / "stopped")
    whole = sweep_run.train

    def stopping_at_two(config: RunConfig, *arguments: Any, **more: Any) -> int:
        # As if a signal came: the run ends early with a checkpoint, its schedule unchanged.
        optimiser = config.optimiser
        return whole(
            replace(config, optimiser=replace(optimiser, steps=2, schedule_steps=optimiser.steps)),
            *arguments,
            **more,
        )

    large = [each for each in planned if each.run.name == "large"]
    with monkeypatch.context() as patched:
        patched.setattr(sweep_run, "train", stopping_at_two)
        with pytest.raises(Stopped, match="large"):
            run_planned(sweep, large, corpus, folder)
    assert folder.row("large") is None
    run_planned(sweep, large, corpus, folder)
    row, never_stopped = folder.row("large"), rows_of(done[0])["large"]
    assert row is not None
    assert (row["loss"], row["tokens"], row["flops"]) == tuple(
        never_stopped[name] for name in ("loss", "tokens", "flops")
    )


def test_a_run_that_diverges_has_no_loss(config: RunConfig, tmp_path: Path) -> None:
    wild = small(config, k=0)
    wild = replace(wild, optimiser=replace(wild.optimiser, peak_rate=1e30, clip=1e30))
    sweep, corpus = Sweep("wild", (SweepRun("wild", wild),), evaluate_cells=16), Corpus.open(config.corpus)
    results = run_planned(sweep, plan_sweep(sweep, corpus), corpus, SweepFolder(tmp_path / "wild"))
    assert rows_of(results.parent)["wild"]["loss"] is None
    with pytest.raises(InputError, match="loss is no number in wild; add --drop-nan"):
        read_runs(results)


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
    less = replace(sweep, runs=(replace(runs[0], flops=1.0),))
    with pytest.raises(InputError, match=r"run w8: flops is 1, a step takes [\d.e+]+; raise the budget"):
        plan_sweep(less, corpus)


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


CHANGES: dict[str, tuple[Callable[[SweepRun], SweepRun], str]] = {
    "name": (lambda run: replace(run, name="a"), "run a: stands 2 times in the sweep"),
    "family": (lambda run: run, ""),
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
}


@pytest.mark.parametrize("name", [name for name in CHANGES if name != "family"])
def test_runs_that_cannot_be_compared_are_refused(config: RunConfig, name: str) -> None:
    change, told = CHANGES[name]
    with pytest.raises(InputError, match=told):
        Sweep("two", (SweepRun("a", config), change(SweepRun("b", config))))


def test_families_do_not_mix_and_a_sweep_has_runs(config: RunConfig, ranks: RunConfig) -> None:
    with pytest.raises(InputError, match="run b: has another family than run a"):
        Sweep("two", (SweepRun("a", config), SweepRun("b", ranks)))
    with pytest.raises(InputError, match="sweep: has no runs"):
        Sweep("none", ())


def test_masking_rates_are_swept_under_one_judgement(config: RunConfig) -> None:
    _, _, objective = config.tissue()
    other = replace(config, objective=replace(objective, nonzero_rate=0.5))
    assert len(Sweep("rates", (SweepRun("a", config), SweepRun("b", other)), objective=objective).runs) == 2


RECIPE = """
from dataclasses import replace
from experiments import tissue_demo
from scfm_jax.models.transformer import TransformerConfig
from scfm_jax.scaling.sweep import Sweep, SweepRun


def sweep():
    config = tissue_demo.recipe()
    stack = TransformerConfig(layers=1, heads=1, width=8)
    config = replace(
        config,
        model=replace(config.model, encoder=stack, decoder=stack, attention="plain"),
        data=replace(config.data, batch_size=4, window=1, rungs=1, length_multiple=96),
    )
    config = replace(config, data=replace(config.data, sample=replace(config.data.sample, neighbours=0)))
    runs = tuple(SweepRun(f"seed{seed}", replace(config, seed=seed)) for seed in (0, 1))
    return Sweep("demo", runs, evaluate_cells=60)
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "sweep.py"
    path.write_text(textwrap.dedent(RECIPE))
    return path


def flags(corpus: Path) -> list[str]:
    return [
        "--corpus",
        str(corpus),
        "--split.held_out",
        "slide1*",
        "--optimiser.steps",
        "2",
        "--split.margin",
        "2",
    ]


def test_the_verb_plans_runs_and_goes_on(
    recipe: Path, corpus_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["scaling", "run", str(recipe), str(tmp_path / "out"), *flags(corpus_path)]
    assert main([*words, "--plan"]) == 0
    said = capsys.readouterr().out
    assert "seed0: N " in said and "2 runs, " in said
    assert not (tmp_path / "out").exists()
    assert main([*words, "--index", "1"]) == 0
    assert rows_of(tmp_path / "out").keys() == {"seed1"}
    assert main([*words, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out.partition("\n[")[2].join(["[", ""]))
    assert [row["name"] for row in rows] == ["seed0", "seed1"]
    assert rows_of(tmp_path / "out").keys() == {"seed0", "seed1"}
    assert main([*words, "--plan"]) == 0
    assert capsys.readouterr().out.count("(done)") == 2


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["missing.py"], "missing.py: there is no such sweep; name a Python file with a function sweep()"),
        (["{recipe}"], "run seed0 names no corpus; add --corpus PATH"),
        (["{recipe}", "--corpus", "{corpus}", "--optimiser.stops", "2"], "did you mean 'steps'?"),
        (
            ["{recipe}", "{out}", "--corpus", "{corpus}", "--split.held_out", "slide1*", "--index", "2"],
            "--index: 2 is no run's place; give 0 to 1",
        ),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    words: list[str],
    told: str,
    recipe: Path,
    corpus_path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    filled = [word.format(recipe=recipe, corpus=corpus_path, out=tmp_path / "out") for word in words]
    assert main(["scaling", "run", *filled]) == 2
    error = capsys.readouterr().err.strip()
    assert told in error and "\n" not in error
    assert not (tmp_path / "out").exists()


SBATCH = """#!/bin/bash
echo "$@" >> "$CALLS"
echo $((100 + $(wc -l < "$CALLS")))
"""


def test_slurm_runs_stages_one_behind_the_other(done: tuple[Path, list[PlannedRun]], tmp_path: Path) -> None:
    _, planned = done
    submit = write_scripts(tmp_path / "a sweep", ["scfm", "scaling", "run", "s.py", "an out"], planned)
    bin_, calls = tmp_path / "bin", tmp_path / "calls"
    bin_.mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", '#!/bin/bash\nprintf "%s|" "$@" > "$CALLS"\n')):
        (bin_ / name).write_text(text)
        (bin_ / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{bin_}:{os.environ['PATH']}", "CALLS": str(calls)}
    subprocess.run(["bash", str(submit), "--time=1:00:00"], env=environment, check=True)
    job = tmp_path / "a sweep" / "job.sh"
    assert calls.read_text().splitlines() == [
        f"--parsable --array=0-1 --time=1:00:00 {job}",
        f"--parsable --array=2-2 --dependency=afterok:101 --time=1:00:00 {job}",
    ]
    subprocess.run(["bash", str(job)], env=environment | {"SLURM_ARRAY_TASK_ID": "2"}, check=True)
    assert calls.read_text().split("|")[:-1] == ["scfm", "scaling", "run", "s.py", "an out", "--index", "2"]


def test_a_sweep_is_python(tmp_path: Path, config: RunConfig) -> None:
    path = tmp_path / "sweep.py"
    path.write_text("def sweep():\n    return 3\n")
    with pytest.raises(InputError, match=r"sweep\(\) returns int; return a scfm_jax.scaling.sweep.Sweep"):
        load_sweep(path)
