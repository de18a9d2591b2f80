"""The training story, top to bottom: data, model, state, step, loop."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int64

from scfm_jax.corpus import Corpus
from scfm_jax.corpus.split import Split, split_cells
from scfm_jax.data.stream import CellBlocks
from scfm_jax.errors import InputError
from scfm_jax.models.functional import count_parameters
from scfm_jax.training.checkpoint import Checkpoints
from scfm_jax.training.clock import Clock, Ledger, profiled, shares
from scfm_jax.training.config import RunConfig
from scfm_jax.training.hardware import accelerator_of
from scfm_jax.training.hosts import is_primary, share_of_batch, stopping
from scfm_jax.training.mesh import batch_sharding, make_mesh
from scfm_jax.training.metrics import Meter, MetricsWriter, summary
from scfm_jax.training.run import initial_parameters, open_run
from scfm_jax.training.step import Program, make_program
from scfm_jax.training.task import attention_of, make_task

Report = Callable[[dict[str, Any]], None]


def train(
    config: RunConfig,
    folder: Path,
    *,
    resume: bool = False,
    profile: tuple[int, int] | None = None,
    report: Report = lambda row: None,
) -> int:
    """Train, and leave a run directory: config, metrics, checkpoints, environment.

    On several hosts, all call it alike within `hosts.joined`; one writes and reports.

    Parameters
    ----------
    config
        The experiment.
    folder
        The run directory, new unless `resume`.
    resume
        Go on from the newest checkpoint, with the same batches and, on a CPU, bit for bit the same losses as
        a run that never stopped; on any mesh and any number of hosts that divides the virtual shards.
    profile
        First and last step to trace, on one host, into ``profile/``.
    report
        Called with every row of metrics, and first with what was found: cells, parameters, devices.

    Returns
    -------
    The steps done: fewer than configured where Ctrl-C or SIGTERM asked to stop, which saves first.

    Raises
    ------
    InputError
        The folder holds a run already, or (resuming) one of another corpus or config; or what the config, the
        devices or `profile` ask cannot be. A new folder is then not written.
    """
    began, clock = time.time(), Clock()
    if profile and profile[0] > config.optimiser.steps:
        raise InputError(
            "--profile",
            f"starts at step {profile[0]}, optimiser.steps is {config.optimiser.steps}",
            "trace steps of the run",
        )
    corpus = Corpus.open(config.corpus, cache_bytes=config.data.cache_mib << 20)
    train_cells, test_cells = select_cells(corpus, split_cells(corpus, config.split), config)
    task = make_task(config, corpus)

    mesh, device = make_mesh(config.mesh), jax.devices()[0]
    attention = attention_of(config, device.platform)
    program = make_program(config, mesh, task)
    share = share_of_batch(mesh, config.data.batch_size)
    loader = task.loader(train_cells, share)
    given = None
    if config.initial_weights and not resume:  # before anything is written, so that an error leaves nothing
        given = initial_parameters(config, corpus, program.like["parameters"])
    open_run(folder, config, corpus, resume=resume)
    kept = folder if is_primary() else None
    with (
        Checkpoints(
            folder / "checkpoints", keep_last=config.keep_last, keep_best=config.keep_best
        ) as checkpoints,
        stopping() as stop,
    ):
        start = (checkpoints.latest or 0) if resume else 0
        state = checkpoints.restore(start, program.like) if start else program.fresh()
        if config.initial_weights and not start:
            state["parameters"] = given or initial_parameters(config, corpus, program.like["parameters"])
        accelerator = accelerator_of(device.device_kind)
        found = {
            "training_cells": len(train_cells),
            "held_out_cells": len(test_cells),
            "parameters": count_parameters(program.shapes),
            "devices": f"{mesh.size} {device.platform}",
            "hosts": jax.process_count(),
            "attention": attention,
            "step": start,
            "steps": config.optimiser.steps,
        }
        if is_primary():
            report(found)
        with MetricsWriter(kept, start) as writer:
            ledger = Ledger(kept, writer.cut, began)
            peak = accelerator.peak_flops * mesh.size if accelerator else None
            meter = Meter(config.model, len(corpus.vocabulary), peak)
            pending: deque[tuple[int, dict[str, jax.Array], tuple[int, int]]] = deque()

            def log(row: dict[str, Any]) -> None:
                writer.write(row)
                if is_primary():
                    report(row)

            def flush(keep: int = 0) -> None:
                """A row for each step but the newest `keep`, which the devices may still be busy with."""
                while len(pending) > keep:
                    step, results, lengths = pending.popleft()
                    seconds, sums = clock.take(), jax.device_get(results)
                    ledger.add(seconds)
                    drawn = zip(task.kinds, sums["drawn"], strict=True)
                    log(
                        {
                            "step": step,
                            **summary(sums),
                            "learning_rate": float(program.given(step - 1)["rate"]),
                            "drawn": {kind: int(n) for kind, n in drawn if n},
                            **meter.read(sums, config.data.batch_size, lengths, seconds),
                            "seconds": seconds,
                            "shares": shares(seconds),
                            "goodput": ledger.goodput,
                        }
                    )
                ledger.save()

            step, compiled = start, set()
            batches = clock.waits(on_devices(loader.iterate(start, config.optimiser.steps), mesh))
            steps, traced = enumerate(batches, start + 1), profile if is_primary() else None
            for step, (batch, placed) in profiled(steps, traced, folder / "profile", clock.settle):
                lengths = batch.static_lengths
                state, sums = clock.launch(
                    program.step, state, placed, program.given(step - 1), compiles=lengths not in compiled
                )
                compiled.add(lengths)
                pending.append((step, sums, lengths))
                done = step == config.optimiser.steps
                evaluates = len(test_cells) > 0 and (done or step % config.evaluate_every == 0)
                saves = evaluates or done or step % config.checkpoint_every == 0
                if saves:
                    flush()
                elif step % config.log_every == 0:
                    flush(keep=1)
                held_out = None
                if evaluates:
                    with clock.spent("evaluation"):
                        cells = on_devices(own_rows(task.evaluation(test_cells), share), mesh)
                        held_out = evaluate_batches(program, state["parameters"], cells)
                    log({"step": step, **{f"held_out_{name}": value for name, value in held_out.items()}})
                stopped = stop(step)
                if saves or stopped:
                    flush()
                    with clock.spent("checkpoint"):
                        checkpoints.save(step, state, held_out_loss=held_out["loss"] if held_out else None)
                if stopped:
                    break
    ledger.add(clock.rest())
    ledger.save()
    return step


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


def own_rows(batches: Iterable[tuple[Any, Any]], share: tuple[int, int]) -> Iterator[Any]:
    """This host's rows of whole batches."""
    number, hosts = share
    for _, batch in batches:
        yield jax.tree.map(lambda rows: np.split(rows, hosts)[number], batch)


def evaluate_batches(
    program: Program, parameters: Any, batches: Iterable[tuple[Any, Any]]
) -> dict[str, float]:
    """Held-out loss and errors over batches; the devices have the next one while one's sums are fetched."""
    total: dict[str, float] = {}
    waiting: deque[dict[str, jax.Array]] = deque()

    def add(most: int) -> None:
        while len(waiting) > most:
            for name, value in jax.device_get(waiting.popleft()).items():
                total[name] = total.get(name, 0.0) + float(value)

    for _, placed in batches:
        waiting.append(program.evaluate(parameters, placed, program.key))
        add(1)
    add(0)
    return summary(total)


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
