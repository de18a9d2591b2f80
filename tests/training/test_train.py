from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from scfm_jax.corpus import Corpus
from scfm_jax.corpus.split import split_cells
from scfm_jax.data.batch import TissueBatch
from scfm_jax.errors import InputError
from scfm_jax.models.flops import Load, training_flops
from scfm_jax.models.functional import abstract
from scfm_jax.training.checkpoint import Checkpoints, abstract_state
from scfm_jax.training.config import RunConfig, override
from scfm_jax.training.hosts import stopping
from scfm_jax.training.mesh import make_mesh
from scfm_jax.training.metrics import CLOCKED, Meter, read_metrics
from scfm_jax.training.optimiser import make_optimiser
from scfm_jax.training.run import read_run
from scfm_jax.training.step import fresh_state, state_shardings
from scfm_jax.training.task import attention_of, make_task
from scfm_jax.training.train import select_cells, train


def rows_of(folder: Path) -> list[dict[str, Any]]:
    rows = read_metrics(folder / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name not in CLOCKED} for row in rows]


def steps_of(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir())


def restore(folder: Path, config: RunConfig, step: int | None = None) -> Any:
    """The state of a run's checkpoint, its newest unless `step` is given."""
    task = make_task(config, Corpus.open(config.corpus))
    _, shapes, names = abstract(task.build)
    optimiser = make_optimiser(config.optimiser, names)
    shardings = state_shardings(make_mesh(config.mesh), optimiser, shapes, names)
    like = jax.eval_shape(lambda: fresh_state(task, optimiser, jax.random.key(0)))
    with Checkpoints(folder / "checkpoints") as checkpoints:
        return checkpoints.restore(step or checkpoints.latest, abstract_state(like, shardings))


def assert_same_bits(first: Any, second: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_a_run_leaves_its_directory(finished: Path, config: RunConfig) -> None:
    assert {path.name for path in finished.iterdir()} >= {
        "config.json",
        "metrics.jsonl",
        "checkpoints",
        "environment.json",
        "vocabulary.json",
    }
    corpus = Corpus.open(config.corpus)
    assert read_run(finished) == (config, corpus.hash)
    assert json.loads((finished / "environment.json").read_text())["packages"]["jax"] == jax.__version__


def test_rows_of_metrics(finished: Path, config: RunConfig) -> None:
    rows = rows_of(finished)
    training = [row for row in rows if "loss" in row]
    held_out = [row for row in rows if "held_out_loss" in row]
    assert [row["step"] for row in training] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in held_out] == [2, 4, 6]
    assert len({row["loss"] for row in training}) == 6
    # One slide is held out: all cells come from the other.
    assert all(row["drawn"] == {"simscope human spatial": 8} for row in training)
    assert all(np.isfinite(value) for row in rows for name, value in row.items() if name != "drawn")
    assert all(row["gradient_norm"] > 0 and 0 < row["real_tokens"] <= 1 for row in training)
    assert held_out[-1]["held_out_loss"] < held_out[0]["held_out_loss"]
    for row in held_out:  # the mean over all entries lies between those over zeros and non-zeros
        errors = row["held_out_zero_error"], row["held_out_nonzero_error"]
        assert min(errors) < row["held_out_loss"] < max(errors)


@pytest.mark.parametrize("family", ["tissue", "ranks"])
def test_rows_say_what_was_padding_and_how_fast(
    family: str, request: pytest.FixtureRequest, finished: Path, config: RunConfig
) -> None:
    """Against the batches themselves, counted in NumPy."""
    if family == "ranks":
        finished, config = request.getfixturevalue("run_with_niche"), request.getfixturevalue("ranks")
    corpus = Corpus.open(config.corpus)
    cells, _ = select_cells(corpus, split_cells(corpus, config.split), config)
    loader = make_task(config, corpus).loader(cells, (0, 1))
    for row in read_metrics(finished / "metrics.jsonl"):
        if "loss" not in row:
            continue
        batch = loader.batch(row["step"] - 1)
        if isinstance(batch, TissueBatch):
            first, second = (batch.cells >= 0).sum(1), (batch.decoder_genes >= 0).sum(1)
        else:
            first, second = batch.lengths, (batch.places >= 0).sum(1)
        rows, width = len(first), batch.static_lengths[0]
        assert row["real_tokens"] == pytest.approx(first.sum() / (rows * width))
        assert row["real_pairs"] == pytest.approx((first**2).sum() / (rows * width**2))
        took = sum(row["seconds"][purpose] for purpose in ("compute", "data", "other"))
        assert row["real_tokens_per_second"] * took == pytest.approx(first.sum())
        assert row["tokens_per_second"] * took == pytest.approx(rows * width)
        for field, load in {
            "flops_per_second": Load.real(first, second),
            "padded_flops_per_second": Load.padded(rows, *batch.static_lengths),
        }.items():
            expected = training_flops(config.model, len(corpus.vocabulary), load)
            assert row[field] * took == pytest.approx(expected)
        # The peak of a CPU is not known.
        assert row["mfu"] is None and row["padded_mfu"] is None


def test_utilisation_is_a_share_of_all_devices_peak(config: RunConfig) -> None:
    sums = {"tokens": 60.0, "pairs": 700.0, "second_tokens": 30.0, "second_pairs": 300.0}
    seconds = {"compute": 0.25, "data": 0.125, "other": 0.125, "compile": 9.0}
    said = Meter(config.model, 24, 1e6).read(sums, 8, (10, 5), seconds)
    loads = Load(8, *sums.values()), Load.padded(8, 10, 5)
    for field, load in zip(("mfu", "padded_mfu"), loads, strict=True):
        assert said[field] == pytest.approx(training_flops(config.model, 24, load) / 0.5 / 1e6)


def test_learning_rate_is_linear_then_a_cosine(finished: Path, config: RunConfig) -> None:
    rates = [row["learning_rate"] for row in rows_of(finished) if "loss" in row]
    initial, peak, final, warmup = 1e-3, 1e-2, config.optimiser.final_rate, 2
    stated = [
        initial + (peak - initial) * step / warmup
        if step < warmup
        else final + (peak - final) * (1 + np.cos(np.pi * (step - warmup) / (6 - warmup))) / 2
        for step in range(6)
    ]
    np.testing.assert_allclose(rates, stated, rtol=1e-5)


def test_the_best_and_the_last_checkpoints_stay(finished: Path, config: RunConfig) -> None:
    losses = {row["step"]: row["held_out_loss"] for row in rows_of(finished) if "held_out_loss" in row}
    best = min(losses, key=lambda step: losses[step])
    assert steps_of(finished) == sorted({best, 5, 6})
    with Checkpoints(finished / "checkpoints") as checkpoints:
        assert (checkpoints.best, checkpoints.latest) == (best, 6)


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
def test_a_stopped_run_goes_on_to_the_bit(
    optimiser: str, finished: Path, config: RunConfig, tmp_path: Path
) -> None:
    folder = tmp_path / "stopped"
    if optimiser != config.optimiser.name:
        config, finished = override(config, ["--optimiser.name", optimiser], "test"), tmp_path / "finished"
        train(config, finished)

    def stop_after_three(row: dict[str, Any]) -> None:
        if row.get("step") == 3 and "loss" in row:
            os.kill(os.getpid(), signal.SIGTERM)

    handler = signal.getsignal(signal.SIGTERM)
    assert train(config, folder, report=stop_after_three) == 3
    assert signal.getsignal(signal.SIGTERM) is handler
    assert max(steps_of(folder)) == 3
    assert [row["step"] for row in rows_of(folder) if "loss" in row] == [1, 2, 3]

    assert train(config, folder, resume=True) == 6
    assert rows_of(folder) == rows_of(finished)
    assert_same_bits(restore(folder, config), restore(finished, config))
    assert steps_of(folder) == steps_of(finished)


def test_rows_after_the_restored_step_are_cut(finished: Path, config: RunConfig, tmp_path: Path) -> None:
    """As after a crash: rows of step 6 are there, and half a line, but no checkpoint of it."""
    folder = tmp_path / "crashed"
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "checkpoints" / "6")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "loss": 0.0}\n{"step": 8, "lo')
    started = []
    assert train(config, folder, resume=True, report=started.append) == 6
    assert started[0]["step"] == 5
    assert rows_of(folder) == rows_of(finished)
    # The sixth step's time counts as lost, the time since then as down.
    before, after = (json.loads((run / "goodput.json").read_text()) for run in (finished, folder))
    (sixth,) = (row for row in read_metrics(finished / "metrics.jsonl") if row["step"] == 6 and "loss" in row)
    assert after["seconds"]["lost"] == pytest.approx(sum(sixth["seconds"].values()))
    assert after["seconds"]["down"] > 0 and after["starts"] == 2 and after["started"] == before["started"]
    assert sum(after["seconds"].values()) == pytest.approx(after["seen"] - after["started"])
    assert_same_bits(restore(folder, config), restore(finished, config))


def test_accumulation_changes_the_memory_and_nothing_else(
    finished: Path, config: RunConfig, tmp_path: Path
) -> None:
    halves = override(config, ["--optimiser.accumulation", "2"], "flags")
    train(halves, tmp_path / "halves")
    for mine, whole in zip(rows_of(tmp_path / "halves"), rows_of(finished), strict=True):
        assert mine.keys() == whole.keys()
        assert mine.get("drawn") == whole.get("drawn")
        for name in whole.keys() - {"drawn"}:
            np.testing.assert_allclose(mine[name], whole[name], rtol=1e-5, err_msg=name)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        restore(tmp_path / "halves", halves)["parameters"],
        restore(finished, config)["parameters"],
    )


def test_weights_of_another_run_with_another_k_and_optimiser(
    finished: Path, config: RunConfig, tmp_path: Path
) -> None:
    flags = ["--data.sample.neighbours", "1", "--optimiser.steps", "1", "--optimiser.peak_rate", "0"]
    flags += ["--optimiser.name", "muon"]
    other = override(config, [*flags, "--initial_weights", str(finished)], "flags")
    assert train(other, tmp_path / "fewer") == 1
    with Checkpoints(finished / "checkpoints") as checkpoints:
        best = checkpoints.best
    # One step at rate 0 leaves the weights as they came.
    assert_same_bits(
        restore(tmp_path / "fewer", other)["parameters"], restore(finished, config, best)["parameters"]
    )
    assert read_run(tmp_path / "fewer")[0].data.sample.neighbours == 1


def test_bad_input_is_one_line(
    finished: Path, config: RunConfig, make_corpus: Callable[[int], Path], tmp_path: Path
) -> None:
    before = {path: path.read_bytes() for path in finished.glob("*.json*")}
    elsewhere = dataclasses.replace(config, corpus=str(make_corpus(1)))
    wider = override(config, ["--seed", "5"], "flags")
    a_file = tmp_path / "file"
    a_file.touch()
    cases: list[tuple[RunConfig, Path, bool, str]] = [
        (config, finished, False, "holds a run already; resume it with --resume"),
        (elsewhere, finished, True, "was trained on another corpus"),
        (wider, finished, True, "was started with another config"),
        (config, tmp_path / "nothing", True, "is no run directory"),
        (
            override(config, ["--technologies", "x"], "f"),
            tmp_path / "new",
            False,
            "has no slide of technologies x",
        ),
        (
            override(config, ["--data.sample.neighbours", "9"], "f"),
            tmp_path / "new",
            False,
            "stores 4 a cell",
        ),
        (override(config, ["--split.held_out", "no*"], "f"), tmp_path / "new", False, "matches no slide"),
        (override(config, ["--mesh.tensor", "3"], "f"), tmp_path / "new", False, "is not 1 devices"),
        (config, a_file, False, "cannot be made: File exists; name another folder"),
        (config, a_file / "run", False, "cannot be made: Not a directory; name another folder"),
        (
            override(config, ["--model.attention", "splash"], "f"),
            tmp_path / "new",
            False,
            "splash runs on TPUs",
        ),
        (
            dataclasses.replace(config, initial_weights=str(tmp_path)),
            tmp_path / "new",
            False,
            "is no run directory",
        ),
        (
            override(config, ["--initial_weights", str(finished), "--model.encoder.layers", "1"], "f"),
            tmp_path / "new",
            False,
            "has weights of another geometry",
        ),
        (dataclasses.replace(config, corpus=str(tmp_path / "none")), tmp_path / "new", False, "none"),
    ]
    for run, folder, resume, message in cases:
        with pytest.raises(InputError, match=message) as error:
            train(run, folder, resume=resume)
        assert "\n" not in str(error.value)
        assert not (tmp_path / "new").exists(), message
    assert {path: path.read_bytes() for path in finished.glob("*.json*")} == before


def test_one_attention_serves_encoder_and_decoder_or_it_is_an_error(config: RunConfig) -> None:
    """What a run says of its attention holds for all of its layers."""
    flags = ["--model.dtype", "bfloat16", "--model.attention", "auto"]
    assert attention_of(override(config, flags, "flags"), "gpu") == "cudnn"
    wide = [*flags, "--model.decoder.width", "512", "--model.decoder.heads", "2"]
    assert attention_of(override(config, wide, "flags"), "tpu") == "splash"
    with pytest.raises(InputError, match="auto is cudnn for the encoder's heads and plain for the decoder's"):
        attention_of(override(config, wide, "flags"), "gpu")
    named = override(config, [*wide, "--model.attention", "cudnn"], "flags")
    with pytest.raises(InputError, match=r"cudnn takes heads of 8, .* and these have 256"):
        attention_of(named, "gpu")


def test_a_profile_beyond_the_run_is_one_line(config: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--profile: starts at step 7, optimiser\.steps is 6; trace steps"):
        train(config, tmp_path / "new", profile=(7, 9))
    assert not (tmp_path / "new").exists()


def test_a_second_ctrl_c_interrupts_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), stopping() as stop:
        assert not stop(1)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop(1)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the second signal did not interrupt")
