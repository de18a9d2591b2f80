"""Sweeps: what is refused before anything runs, the plan, rows, going on where it stopped, job arrays."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compiled_once import compiled_once
from tiny_runs import small

from scfm_jax.cli import main
from scfm_jax.corpus import Corpus
from scfm_jax.corpus.split import split_cells
from scfm_jax.errors import InputError
from scfm_jax.scaling import sweep_run
from scfm_jax.scaling.held_out import HeldOutErrors
from scfm_jax.scaling.runs import read_runs
from scfm_jax.scaling.slurm import write_scripts
from scfm_jax.scaling.sweep import Sweep, SweepRun
from scfm_jax.scaling.sweep_plan import PlannedRun, plan_sweep
from scfm_jax.scaling.sweep_run import Stopped, SweepFolder, run_planned
from scfm_jax.training.config import MeshConfig, RunConfig
from scfm_jax.training.metrics import read_metrics

PAIRED = ("k2", "large"), ("large", "small")  # runs of two pairs, and what they are held against


@pytest.fixture(scope="module", autouse=True)
def compile_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with compiled_once(tmp_path_factory.mktemp("compiled")):
        yield


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


def test_gains_are_of_pairs_on_the_same_cells(
    done: tuple[Path, list[PlannedRun]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two pairs, k2 over large and large over small, against NumPy: pooled losses, spread, other corpora."""
    out = tmp_path / "pairs"
    shutil.copytree(done[0], out)
    for name, other in (("k2", "k2-a"), ("large", "large-a"), ("large", "k2-b"), ("small", "large-b")):
        for path in (Path("rows"), Path("errors"), Path("runs")):
            (found,) = done[0].glob(f"{path}/{name}*")
            copied = out / path / f"{other}{found.suffix}"
            (shutil.copytree if found.is_dir() else shutil.copy)(found, copied)
    command = ["scaling", "compare", str(out), "--of", "k2-*", "k2", "--than", "large-*"]
    assert main([*command, "--json"]) == 2
    assert "more * than" in capsys.readouterr().err
    command.remove("k2")
    assert main([*command, "--json"]) == 0
    whole, of_file = json.loads(capsys.readouterr().out)
    loss = {
        name: HeldOutErrors.load(out / "errors" / f"{name}.npz").loss for name in ("k2", "large", "small")
    }
    runs, references = (loss[first].total.sum() + loss[second].total.sum() for first, second in PAIRED)
    weight = 2 * loss["small"].weight.sum()
    assert [whole["loss"], whole["reference"]] == pytest.approx([runs / weight, references / weight])
    assert whole["gain"] == pytest.approx(1 - runs / references)
    assert whole["low"] <= whole["gain"] <= whole["high"] and whole["low"] < whole["high"]
    alone = [1 - loss[of].total.sum() / loss[than].total.sum() for of, than in zip(*PAIRED, strict=True)]
    assert whole["spread"] == pytest.approx(abs(alone[0] - alone[1]) / 2**0.5)
    assert of_file == whole | {"file": "slide1.h5ad"}
    assert main([*command[:-1], "large-a", "--of", "k2-a"]) == 0
    assert "slide1.h5ad" in capsys.readouterr().out
    for flags, said in (
        (["--of", "k3-*"], "no run that is done is named k3-*"),
        (["--than", "k4-*"], "run k4-a, which k2-a is held against, is not done"),
        (["--part", "top1"], "give one of loss"),
        (["--draws", "1"], "--draws"),
        (["--draws", "1000000000"], "--draws: 1000000000 is too high"),
        (["--seed", "-1"], "--seed: -1 is too low"),
        (["--of"], "--of: names no runs"),
    ):
        assert main([*command, *flags]) == 2
        assert said in capsys.readouterr().err


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


def test_two_sweeps_in_one_folder_are_judged_alike_or_refused(
    done: tuple[Path, list[PlannedRun]], sweep: Sweep, tmp_path: Path
) -> None:
    out, _ = done
    corpus = Corpus.open(sweep.runs[0].config.corpus)
    other = Sweep("other", (replace(sweep.run("small"), name="of-another-sweep"),), evaluate_cells=30)
    before = (out / "results.jsonl").read_bytes()
    with pytest.raises(
        InputError, match=r"tiny: holds runs that are judged by another evaluate_cells.*; name another folder"
    ):
        run_planned(other, plan_sweep(other, corpus), corpus, SweepFolder(out))
    assert (out / "results.jsonl").read_bytes() == before
    (tmp_path / "judged.json").write_text("{")
    with pytest.raises(InputError, match=r"judged.json: is no JSON .*; remove it"):
        run_planned(other, plan_sweep(other, corpus), corpus, SweepFolder(tmp_path))


def test_what_changes_no_weight_is_not_in_the_digest_and_what_does_is(
    sweep: Sweep, done: tuple[Path, list[PlannedRun]]
) -> None:
    out, planned = done
    corpus, folder, small = Corpus.open(sweep.runs[0].config.corpus), SweepFolder(out), planned[0]

    def digest(**changed: Any) -> str:
        run = replace(small.run, config=replace(small.run.config, **changed))
        return sweep_run.digest_of(sweep, replace(small, run=run), corpus, folder)

    assert digest() == rows_of(out)["small"]["digest"]
    assert digest(mesh=MeshConfig(tensor=2), log_every=7, checkpoint_every=7, corpus="elsewhere") == digest()
    assert len({digest(), digest(seed=1), digest(initial_weights="a"), digest(initial_weights="b")}) == 4


def test_what_another_process_is_at_is_left_to_it_and_taken_over_where_it_died(
    done: tuple[Path, list[PlannedRun]], sweep: Sweep, tmp_path: Path
) -> None:
    out, planned = done
    corpus, folder = Corpus.open(sweep.runs[0].config.corpus), SweepFolder(tmp_path / "shared")
    folder.make("locks")
    hold = (
        "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.flock(f, 2); print('held', flush=True); input()"
    )
    lock = folder.path / "locks" / "large"
    with subprocess.Popen(
        [sys.executable, "-uc", hold, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout and other.stdout.readline() == "held\n"
        waited: list[list[str]] = []

        def died(names: list[str]) -> None:
            waited.append(names)
            other.kill()

        run_planned(sweep, planned, corpus, folder, wait_for=died)
    assert waited == [["large", "k2"]]
    losses = {name: row["loss"] for name, row in rows_of(folder.path).items()}
    assert losses == {name: row["loss"] for name, row in rows_of(out).items()}


def test_a_row_of_another_job_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, replace_file = SweepFolder(tmp_path), sweep_run._replace
    folder.make("rows")
    others = [{"name": name, "flops": 1.0, "tokens": 1, "digest": ""} for name in ("b", "c")]

    def while_others_write(path: Path, text: str) -> None:
        if others:
            row = others.pop()
            (tmp_path / "rows" / f"{row['name']}.json").write_text(json.dumps(row))
        replace_file(path, text)

    monkeypatch.setattr(sweep_run, "_replace", while_others_write)
    folder.write({"name": "a", "flops": 2.0, "tokens": 1, "digest": ""})
    assert [*rows_of(tmp_path)] == ["b", "c", "a"]


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "[]", '{"name": "a"}', None])
def test_a_damaged_row_is_named(tmp_path: Path, text: str | None) -> None:
    folder, path = SweepFolder(tmp_path), tmp_path / "rows" / "a.json"
    folder.make("rows")
    path.mkdir() if text is None else path.write_text(text)
    for read in (lambda: folder.row("a"), folder.gather):
        with pytest.raises(InputError, match=r"rows/a.json: (is|has|cannot) .*; remove it, and the run is"):
            read()


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
    (each,) = large
    optimiser = replace(each.run.config.optimiser, peak_rate=0.5)
    other = replace(each, run=replace(each.run, config=replace(each.run.config, optimiser=optimiser)))
    with pytest.raises(
        InputError, match=r"runs/large: was begun with another config.*; remove runs/large, and"
    ):
        run_planned(sweep, [other], corpus, folder)
    ledger = folder.run("large") / "goodput.json"
    spent = json.loads(ledger.read_text())
    spent["seconds"] |= {"compute": 1e6, "down": 1e9}
    ledger.write_text(json.dumps(spent))
    run_planned(sweep, large, corpus, folder)
    row, never_stopped = folder.row("large"), rows_of(done[0])["large"]
    assert row is not None
    assert (row["loss"], row["tokens"], row["flops"]) == tuple(
        never_stopped[name] for name in ("loss", "tokens", "flops")
    )
    assert 1e6 < row["seconds"] < 1e9
    # Trained but not judged, as after a crash in between; then also without what it was measured by.
    (folder.path / "rows" / "large.json").unlink()
    run_planned(sweep, large, corpus, folder)
    assert rows_of(folder.path)["large"]["loss"] == row["loss"]
    (folder.path / "rows" / "large.json").unlink()
    (folder.run("large") / "metrics.jsonl").unlink()
    with pytest.raises(
        InputError, match=r"metrics.jsonl: has rows of 0 steps, and 4 were trained; remove runs"
    ):
        run_planned(sweep, large, corpus, folder)


def test_a_folder_that_is_named_otherwise_goes_on(
    done: tuple[Path, list[PlannedRun]], sweep: Sweep, tmp_path: Path
) -> None:
    out, planned = done
    corpus, moved = Corpus.open(sweep.runs[0].config.corpus), SweepFolder(tmp_path / "moved")
    shutil.copytree(out, moved.path)
    (moved.path / "rows" / "k2.json").unlink()
    run_planned(sweep, planned, corpus, moved)
    assert rows_of(moved.path)["k2"]["loss"] == rows_of(out)["k2"]["loss"]


def test_a_run_that_diverges_has_no_loss(config: RunConfig, tmp_path: Path) -> None:
    wild = small(config, k=0)
    wild = replace(wild, optimiser=replace(wild.optimiser, peak_rate=1e30))
    sweep, corpus = Sweep("wild", (SweepRun("wild", wild),), evaluate_cells=16), Corpus.open(config.corpus)
    results = run_planned(sweep, plan_sweep(sweep, corpus), corpus, SweepFolder(tmp_path / "wild"))
    assert rows_of(results.parent)["wild"]["loss"] is None
    with pytest.raises(InputError, match=r"loss is no number in wild \(line 1\); add --drop-nan"):
        read_runs(results)


RECIPE = """
from dataclasses import replace
from pathlib import Path
import json
from scfm_jax.scaling.sweep import Sweep, SweepRun
from scfm_jax.training.config import RunConfig, from_dict


def sweep():
    content = json.loads(Path(__file__).with_suffix(".json").read_text())
    config = from_dict(RunConfig, content, "recipe")
    runs = tuple(SweepRun(f"seed{seed}", replace(config, seed=seed)) for seed in (0, 1))
    return Sweep("demo", runs, evaluate_cells=60)
"""


@pytest.fixture
def recipe(tmp_path: Path, config: RunConfig) -> Path:
    path = tmp_path / "sweep.py"
    path.write_text(RECIPE)
    path.with_suffix(".json").write_text(json.dumps(asdict(replace(small(config, k=0), corpus=""))))
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
    assert main([*words, "--plan", "--json"]) == 0
    assert [row["done"] for row in json.loads(capsys.readouterr().out)] == [False, False]
    assert main([*words, "--index", "1"]) == 0
    assert "seed1 (1/1): N " in capsys.readouterr().out
    assert rows_of(tmp_path / "out").keys() == {"seed1"}
    assert main([*words, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == ["seed0", "seed1"]
    assert rows_of(tmp_path / "out").keys() == {"seed0", "seed1"}
    assert main([*words, "--plan"]) == 0
    assert capsys.readouterr().out.count("(done)") == 2
    assert main([*words, "--plan", "--optimiser.clip", "3"]) == 2
    assert "run seed0 was made with another config" in capsys.readouterr().err
    assert main([*words, "--plan", "--seed", "3"]) == 2
    assert "run seed1: trains what run seed0 does" in capsys.readouterr().err


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
        (
            ["{recipe}", "{recipe}", "--corpus", "{corpus}"],
            "sweep.py: cannot be written: Not a directory; name",
        ),
        (
            ["{recipe}", "{recipe}", "--corpus", "{corpus}", "--slurm"],
            "sweep.py: cannot be written: Not a dir",
        ),
        (["{recipe}", "--corpus", "{corpus}/missing"], "missing: no manifest.json there, so no corpus"),
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
    (tmp_path / "a sweep").mkdir()
    submit = write_scripts(tmp_path / "a sweep", ["scfm", "scaling", "run", "s.py", "an out"], planned)
    (option,) = [line for line in submit.with_name("job.sh").read_text().splitlines() if "--output" in line]
    # As sbatch reads the line.
    assert shlex.split(option.removeprefix("#SBATCH")) == [f"--output={tmp_path}/a sweep/logs/%A_%a.log"]
    bin_, calls = tmp_path / "bin", tmp_path / "calls"
    bin_.mkdir()
    srun = '#!/bin/bash\nprintf "%s|" "$PWD" "$@" > "$CALLS"\n'
    for name, text in (("sbatch", SBATCH), ("srun", srun)):
        (bin_ / name).write_text(text)
        (bin_ / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{bin_}:{os.environ['PATH']}", "CALLS": str(calls)}
    subprocess.run(["bash", str(submit), "--time=1:00:00"], env=environment, check=True)
    job = tmp_path / "a sweep" / "job.sh"
    assert calls.read_text().splitlines() == [
        f"--parsable --array=0-1 --time=1:00:00 {job}",
        f"--parsable --array=2-2 --dependency=afterok:101 --time=1:00:00 {job}",
    ]
    environment["SLURM_ARRAY_TASK_ID"] = "2"
    subprocess.run(["bash", str(job)], env=environment, check=True, cwd=tmp_path)
    # Where the script was written, since flags may name files from there.
    there, *words = calls.read_text().split("|")[:-1]
    assert Path(there) == Path.cwd()
    assert words == ["scfm", "scaling", "run", "s.py", "an out", "--index", "2"]
