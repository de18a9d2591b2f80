"""Speed of training, taken apart: the loader alone, the step alone, their ratio, padding and compile time.

    python tools/bench_train.py RECIPE --corpus CORPUS [--any.field value ...] --json OUT.json
    python tools/bench_train.py RECIPE --corpus CORPUS --per-file --rungs 8 12 16

The recipe comes first; flags that are not the tool's own override it, as in `scfm train`. A token is real if
it is not padding, and speeds count the encoder's real tokens. The loader is timed over whole windows,
since it reads one at once; what it has read of the corpus before may come from its cache, as in training.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import sys
import time
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from jaxtyping import Int64
from rich.console import Console
from rich.table import Table

from scfm_jax.corpus import Corpus
from scfm_jax.corpus.split import split_cells
from scfm_jax.data.batch import Batch
from scfm_jax.errors import InputError
from scfm_jax.training.config import RunConfig, load_recipe, override
from scfm_jax.training.mesh import make_mesh
from scfm_jax.training.step import make_program
from scfm_jax.training.task import Task, make_task
from scfm_jax.training.train import select_cells, to_devices

# With seed 0 the ladder of lengths was fitted to the first two windows themselves.
FIRST_WINDOW = 2


@dataclass
class Arguments:
    """Measure the loader and the training step of a recipe. Any field of the recipe is a flag."""

    recipe: Annotated[Path, tyro.conf.Positional]
    """A Python file with a function recipe()."""
    repeats: int = 5
    """Windows: on each, the loader and then the step is timed."""
    steps: int = 16
    """Batches of each window that the step runs on: the first, whose lengths come in random order."""
    per_file: bool = False
    """Only the padding of each source file, trained on alone; no model is run."""
    rungs: tuple[int, ...] = ()
    """With --per-file: numbers of static lengths to compare; the recipe's if not given."""
    json: Path | None = None
    """Where to write all figures."""


def main(arguments: Arguments, overrides: list[str]) -> None:
    config = override(load_recipe(arguments.recipe), overrides, str(arguments.recipe))
    corpus = Corpus.open(config.corpus)
    cells = select_cells(corpus, split_cells(corpus, config.split), config)[0].numbers()
    measure = padding_per_file if arguments.per_file else speed
    figures = measure(arguments, config, corpus, cells)
    if arguments.json:
        figures["setting"] = {
            "config": dataclasses.asdict(config),
            "corpus_hash": corpus.hash,
            "training_cells": len(cells),
            "devices": [device.device_kind for device in jax.devices()],
            "platform": platform.platform(),
            "packages": {name: version(name) for name in ("scfm_jax", "jax", "numpy", "tensorstore")},
        }
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


def speed(
    arguments: Arguments, config: RunConfig, corpus: Corpus, cells: Int64[np.ndarray, " n"]
) -> dict[str, Any]:
    """Loader and step in turn, window after window, so that whatever else the machine does meets both."""
    task = make_task(config, corpus)
    loader, stepper = task.loader(cells, (0, 1)), Stepper(config, task)
    window = config.data.window
    for number in range(FIRST_WINDOW):
        loader.batch(number * window)
    fill, loader_speed, step_speed = Fill(), [], []
    for number in range(FIRST_WINDOW, FIRST_WINDOW + arguments.repeats):
        began = time.perf_counter()
        batches = [loader.batch(step) for step in range(number * window, (number + 1) * window)]
        loading = time.perf_counter() - began
        loader_speed.append(sum(batch.real[0] for batch in batches) / loading)
        for batch in batches:
            fill.add(batch)
        chosen = batches[: arguments.steps]
        step_speed.append(sum(batch.real[0] for batch in chosen) / stepper.seconds(chosen))
    ratio = [a / b for a, b in zip(loader_speed, step_speed, strict=True)]

    table = Table("", "median", "least", "most")
    for name, values in (("loader, tokens/s", loader_speed), ("step, tokens/s", step_speed)):
        table.add_row(name, *(f"{value:,.0f}" for value in spread(values)))
    table.add_row("loader / step", *(f"{value:.2f}" for value in spread(ratio)))
    encoder, decoder = fill.shares
    table.add_row("real tokens, encoder", f"{encoder:.1%}")
    table.add_row("real tokens, decoder", f"{decoder:.1%}")
    table.add_row(
        "compile a shape, s", *(f"{value:.1f}" for value in spread(list(stepper.compile_seconds.values())))
    )
    Console().print(table)
    return {
        "loader_tokens_per_second": loader_speed,
        "step_tokens_per_second": step_speed,
        "loader_over_step": ratio,
        "real_tokens": {"encoder": encoder, "decoder": decoder},
        "shapes": [
            {
                "encoder_length": length,
                "decoder_length": decoder_length,
                "share_of_steps": steps / fill.shapes.total(),
                "compile_seconds": stepper.compile_seconds.get((length, decoder_length)),
            }
            for (length, decoder_length), steps in sorted(fill.shapes.items())
        ],
    }


def padding_per_file(
    arguments: Arguments, config: RunConfig, corpus: Corpus, cells: Int64[np.ndarray, " n"]
) -> dict[str, Any]:
    """Shares of real tokens when a file is trained on alone, by the number of rungs."""
    numbers = arguments.rungs or (config.data.rungs,)
    source = np.array([slide.source for slide in corpus.slides])[corpus.slide_of(cells)]
    table = Table("file", "cells", *(f"{number} rungs: encoder, decoder, shapes" for number in numbers))
    figures: dict[str, Any] = {}
    for name in np.unique(source).tolist():
        own = cells[source == name]
        figures[name] = {"training_cells": len(own)}
        for number in numbers:
            data = dataclasses.replace(config.data, rungs=number)
            loader = make_task(dataclasses.replace(config, data=data), corpus).loader(own, (0, 1))
            fill = Fill()
            for step in range(FIRST_WINDOW * data.window, (FIRST_WINDOW + 2) * data.window):
                fill.add(loader.batch(step))
            encoder, decoder = fill.shares
            figures[name][f"rungs_{number}"] = {
                "encoder": encoder,
                "decoder": decoder,
                "shapes": len(fill.shapes),
            }
        shown = (figures[name][f"rungs_{number}"] for number in numbers)
        table.add_row(
            name, f"{len(own):,}", *(f"{s['encoder']:.1%}  {s['decoder']:.1%}  {s['shapes']}" for s in shown)
        )
    Console().print(table)
    return {"real_tokens": figures}


class Fill:
    """Counts what the model computes on, and how much of it is real."""

    def __init__(self) -> None:
        self.shapes: Counter[tuple[int, int]] = Counter()
        self._real, self._computed = np.zeros(2), np.zeros(2)

    def add(self, batch: Batch) -> None:
        self.shapes[batch.static_lengths] += 1
        self._real += batch.real
        self._computed += len(batch.weight) * np.array(batch.static_lengths)

    @property
    def shares(self) -> tuple[float, float]:
        """Of the encoder's tokens, and of the decoder's or the masked places."""
        encoder, decoder = (self._real / self._computed).tolist()
        return encoder, decoder


class Stepper:
    """The training step of a run, compiled apart for each shape."""

    def __init__(self, config: RunConfig, task: Task) -> None:
        self._mesh = make_mesh(config.mesh)
        program = make_program(config, self._mesh, task)
        self._step, self._state, self._given = program.step, program.fresh(), program.given(0)
        self._compiled: dict[tuple[int, int], jax.stages.Compiled] = {}
        self.compile_seconds: dict[tuple[int, int], float] = {}

    def seconds(self, batches: list[Batch]) -> float:
        """Time that the steps take on batches that lie on the device; compilation is not counted."""
        ready = [(batch.static_lengths, to_devices(batch, self._mesh)) for batch in batches]
        for shape, batch in dict(ready).items():
            if shape not in self._compiled:
                began = time.perf_counter()
                self._compiled[shape] = self._step.lower(self._state, batch, self._given).compile()
                self.compile_seconds[shape] = time.perf_counter() - began
                self._state, _ = self._compiled[shape](self._state, batch, self._given)
        jax.block_until_ready((self._state, ready))
        began = time.perf_counter()
        for shape, batch in ready:
            self._state, _ = self._compiled[shape](self._state, batch, self._given)
        jax.block_until_ready(self._state)
        return time.perf_counter() - began


def spread(values: list[float]) -> tuple[float, float, float]:
    return float(np.median(values)), min(values), max(values)


if __name__ == "__main__":
    try:
        main(*tyro.cli(Arguments, return_unknown_args=True))
    except InputError as error:
        print(f"bench_train: {error}", file=sys.stderr)
        sys.exit(2)
