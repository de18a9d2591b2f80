"""The training story, top to bottom: data, model, state, step, loop."""

from __future__ import annotations

import signal
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int64

from scfm_jax.corpus import Corpus
from scfm_jax.corpus.split import Split, split_cells
from scfm_jax.data.stream import CellBlocks
from scfm_jax.errors import DataWarning, InputError
from scfm_jax.models.functional import count_parameters
from scfm_jax.training.checkpoint import Checkpoints
from scfm_jax.training.config import RunConfig
from scfm_jax.training.mesh import batch_sharding, make_mesh
from scfm_jax.training.metrics import MetricsWriter
from scfm_jax.training.optimiser import learning_rate
from scfm_jax.training.run import open_run, restore_weights
from scfm_jax.training.step import make_program
from scfm_jax.training.task import Task, make_task

Report = Callable[[dict[str, Any]], None]


def train(config: RunConfig, folder: Path, *, resume: bool = False, report: Report = lambda row: None) -> int:
    """Train, and leave a run directory: config, metrics, checkpoints, environment.

    Parameters
    ----------
    config
        The experiment.
    folder
        The run directory, new unless `resume`.
    resume
        Go on from the newest checkpoint, with the same batches and, on a CPU, bit for bit the same losses as
        a run that never stopped.
    report
        Called with every row of metrics, and first with what was found: cells, parameters, devices.

    Returns
    -------
    The steps done: fewer than configured where Ctrl-C or SIGTERM asked to stop, which saves first.

    Raises
    ------
    InputError
        The folder holds a run already, or (resuming) one of another corpus or config.
    """
    corpus = Corpus.open(config.corpus, cache_bytes=config.data.cache_mib << 20)
    train_cells, test_cells = select_cells(corpus, split_cells(corpus, config.split), config)
    task = make_task(config, corpus)
    loader = task.loader(train_cells, (jax.process_index(), jax.process_count()))

    mesh = make_mesh(config.mesh)
    program = make_program(config, mesh, task)
    initial = None
    if config.initial_weights and not resume:  # before anything is written, so that an error leaves nothing
        initial = initial_parameters(Path(config.initial_weights), config, corpus, program.like["parameters"])
    open_run(folder, config, corpus, resume=resume)
    with (
        Checkpoints(
            folder / "checkpoints", keep_last=config.keep_last, keep_best=config.keep_best
        ) as checkpoints,
        stop_signals() as stopped,
    ):
        start = (checkpoints.latest or 0) if resume else 0
        state = checkpoints.restore(start, program.like) if start else program.fresh()
        if config.initial_weights and not start:
            state["parameters"] = initial or initial_parameters(
                Path(config.initial_weights), config, corpus, program.like["parameters"]
            )
        report(
            {
                "training_cells": len(train_cells),
                "held_out_cells": len(test_cells),
                "parameters": count_parameters(program.shapes),
                "devices": f"{mesh.size} {jax.devices()[0].platform}",
                "attention": getattr(config.model, "attention", None),
                "step": start,
                "steps": config.optimiser.steps,
            }
        )
        rates = learning_rate(config.optimiser)
        pending: list[tuple[int, dict[str, jax.Array], int]] = []
        with MetricsWriter(folder, start) as writer:

            def flush(clock: list[float]) -> None:
                """Fetch what the device has summed since the last look, one row a step."""
                rows = [(step, jax.device_get(sums), size) for step, sums, size in pending]
                elapsed, clock[0] = time.perf_counter() - clock[0], time.perf_counter()
                speed = sum(float(sums["tokens"]) for _, sums, _ in rows) / elapsed
                for step, sums, size in rows:
                    row = {
                        "step": step,
                        **summary(sums),
                        "real_tokens": float(sums["tokens"]) / size,
                        "tokens_per_second": round(speed, 1),
                        "learning_rate": float(rates(step - 1)),
                        "drawn": {
                            kind: int(n) for kind, n in zip(task.kinds, sums["drawn"], strict=True) if n
                        },
                    }
                    writer.write(row)
                    report(row)
                pending.clear()

            clock = [time.perf_counter()]
            step, saved = start, start
            batches = on_devices(loader.iterate(start, config.optimiser.steps), mesh)
            for step, (batch, placed) in enumerate(batches, start + 1):
                state, sums = program.step(state, placed)
                pending.append((step, sums, len(batch.weight) * batch.static_lengths[0]))
                last = step == config.optimiser.steps or bool(stopped)
                if step % config.log_every == 0 or last:
                    flush(clock)
                held_out = None
                if len(test_cells) and (step % config.evaluate_every == 0 or step == config.optimiser.steps):
                    if pending:
                        flush(clock)
                    held_out = evaluate_cells(program.evaluate, state["parameters"], task, test_cells)
                    row = {"step": step, **{f"held_out_{name}": value for name, value in held_out.items()}}
                    writer.write(row)
                    report(row)
                    clock[0] = time.perf_counter()
                if held_out or last or step % config.checkpoint_every == 0:
                    checkpoints.save(step, state, held_out_loss=held_out["loss"] if held_out else None)
                    saved = step
                if stopped:
                    break
            # A signal can come after this step was judged not to be the last.
            if pending:
                flush(clock)
            if saved != step:
                checkpoints.save(step, state)
    return step


def initial_parameters(folder: Path, config: RunConfig, corpus: Corpus, like: Any) -> Any:
    """Parameters of another run's best checkpoint, for the same vocabulary, geometry and meaning."""
    weights = restore_weights(folder)
    if weights.vocabulary.hash != corpus.vocabulary.hash:
        raise InputError(
            folder, "has another vocabulary than the corpus (initial_weights)", "start from the seed"
        )
    there, wanted = (jax.tree.map(lambda leaf: leaf.shape, tree) for tree in (weights.parameters, like))
    if there != wanted:
        raise InputError(
            folder,
            "has weights of another geometry (initial_weights)",
            "give the model the sizes in its config.json, or start from the seed",
        )
    before, now = weights.config.model.meaning(), config.model.meaning()
    if other := [f"model.{name} {value}" for name, value in before.items() if now.get(name) != value]:
        raise InputError(
            folder,
            f"was trained with {', '.join(other)} (initial_weights)",
            "set the same, or start from the seed",
        )
    before, now = weights.config.data.sample.meaning(), config.data.sample.meaning()
    if changed := [f"data.sample.{name} {value}" for name, value in before.items() if now[name] != value]:
        warnings.warn(
            f"{folder}: was trained with {', '.join(changed)} (initial_weights), which this run is not",
            DataWarning,
            stacklevel=2,
        )
    return jax.tree.map(lambda leaf, place: jax.device_put(leaf, place.sharding), weights.parameters, like)


def select_cells(
    corpus: Corpus, split: Split, config: RunConfig
) -> tuple[CellBlocks, Int64[np.ndarray, " m"]]:
    """Cells to train on, and the numbers of the held-out cells that evaluations look at, ascending."""
    chosen = np.array([config.takes(slide.technology) for slide in corpus.slides])
    if not chosen.any():
        there = sorted({slide.technology for slide in corpus.slides})
        raise InputError(
            corpus.path,
            f"has no slide of technologies {', '.join(config.technologies)}",
            f"there are {', '.join(there)}",
        )
    train_cells, test_cells = (CellBlocks.of(corpus, cells) for cells in (split.is_train, split.is_test))
    train_cells, test_cells = (
        cells.only(chosen[corpus.slide_of(cells.first)]) for cells in (train_cells, test_cells)
    )
    if config.evaluate_cells and len(test_cells) > config.evaluate_cells:
        random = np.random.default_rng(config.split.seed)
        places = random.choice(len(test_cells), config.evaluate_cells, replace=False)
        return train_cells, test_cells.at(np.sort(places))
    return train_cells, test_cells.numbers()


def evaluate_cells(
    evaluate: Callable[..., Any], parameters: Any, task: Task, cells: np.ndarray
) -> dict[str, float]:
    """Held-out loss and errors over `cells`, each seen once under a constant mask."""
    total: dict[str, float] = {}
    for _, batch in task.evaluation(cells):
        for name, value in jax.device_get(evaluate(parameters, batch)).items():
            total[name] = total.get(name, 0.0) + float(value)
    return summary(total)


def summary(sums: dict[str, Any]) -> dict[str, float]:
    """Means of the sums that an objective returns: each ``X_error`` or ``X_share`` over its ``X_count``."""
    means = {"loss": float(sums["loss"]) / max(float(sums["weight"]), 1e-9)}
    for name in sums:
        what, _, kind = name.rpartition("_")
        if kind in ("error", "share"):
            means[name] = float(sums[name]) / max(float(sums[f"{what}_count"]), 1e-9)
    if "gradient_norm" in sums:
        means["gradient_norm"] = float(sums["gradient_norm"])
    return means


def to_devices(batch: Any, mesh: Any) -> Any:
    """A host's rows as its part of a global batch."""
    place = batch_sharding(mesh)
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(place, rows), batch)


def on_devices(batches: Iterator[Any], mesh: Any, ahead: int = 1) -> Iterator[tuple[Any, Any]]:
    """Batches of the host and, as the step wants them, of the devices; `ahead` are on their way meanwhile."""
    waiting: deque[tuple[Any, Any]] = deque()
    for batch in batches:
        waiting.append((batch, to_devices(batch, mesh)))
        if len(waiting) > ahead:
            yield waiting.popleft()
    yield from waiting


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that Ctrl-C or SIGTERM fills; a second Ctrl-C interrupts at once."""
    received: list[int] = []

    def receive(number: int, frame: Any) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
