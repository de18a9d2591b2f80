"""Reading and building corpora, side by side with other loaders: the tables of docs/benchmarks.md.

    python tools/bench_data.py cells WORK [--annbatch PYTHON] [--scdataset PYTHON] [--rounds 5]
    python tools/bench_data.py spatial WORK
    python tools/bench_data.py build WORK

WORK holds ``cells800.h5ad`` and ``tissue150.h5ad``, as ``tools/data_rivals.py make`` writes them, and the
corpora and stores that are made of them when they are missing. ``cells`` reads an epoch of raw counts, warm
and cold, with our loader and with every rival whose interpreter is given, in turn, round after round;
``spatial`` reads centres with 32 neighbours; ``build`` builds corpora. (Tokens: tools/bench_tokens.py.)
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from scfm_jax.corpus import BLOCK, Corpus, Source, build_corpus
from scfm_jax.data.stream import CellBlocks, ShardStreams

RIVALS = Path(__file__).with_name("data_rivals.py")
FILES = ("cells800", "tissue150")
NEIGHBOURS = 32
COLD_CELLS = {"backed": 5_000}
WARM_CELLS = {"backed": 20_000}


@dataclass(frozen=True)
class Arguments:
    what: Annotated[Literal["cells", "spatial", "build"], tyro.conf.Positional]
    work: Annotated[Path, tyro.conf.Positional]
    annbatch: Path | None = None
    """Python of an environment with annbatch."""
    scdataset: Path | None = None
    """Python of an environment with scdataset."""
    rounds: int = 5
    only: str = ""
    """One of the files."""


def cells(arguments: Arguments) -> None:
    for name in FILES:
        if arguments.only in ("", name):
            _cells_of(name, arguments)


def _cells_of(name: str, arguments: Arguments) -> None:
    file, corpus = arguments.work / f"{name}.h5ad", _corpus(arguments.work, name)
    own = Path(sys.executable)
    runs: list[tuple[str, Path, Path, list[str]]] = [
        ("scfm_jax 64 x 256", own, corpus, ["--rival", "scfm_jax", "--pool", "256"]),
        ("AnnData, backed, at random", own, file, ["--rival", "backed"]),
    ]
    for block, pool in ((64, 256), (512, 32)):
        size = ["--block", str(block), "--pool", str(pool)]
        if arguments.annbatch:
            store = _store(arguments.annbatch, file, arguments.work / f"{name}.zarr")
            label = f"annbatch {block} x {pool}"
            runs.append((label, arguments.annbatch, store, ["--rival", "annbatch", *size]))
        if arguments.scdataset:
            label = f"scDataset {block} x {pool}"
            runs.append((label, arguments.scdataset, file, ["--rival", "scdataset", *size]))
    found: dict[tuple[str, bool], list[dict[str, Any]]] = {}
    for round_number in range(arguments.rounds):
        for cold in (False, True):
            for label, python, path, options in runs:
                limit = (COLD_CELLS if cold else WARM_CELLS).get(options[1])
                command = [str(python), str(RIVALS), "read", str(path), *options, "--seed", str(round_number)]
                command += ["--cold"] if cold else []
                command += ["--cells", str(limit)] if limit else []
                text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                found.setdefault((label, cold), []).append(json.loads(text.splitlines()[-1]))
    for cold in (False, True):
        _print_cells(name, cold, {label: found[label, cold] for label, *_ in runs})


def _print_cells(name: str, cold: bool, found: dict[str, list[dict[str, Any]]]) -> None:
    ours = [result["cells_per_second"] for result in next(iter(found.values()))]
    table = Table(title=f"{name}, {'cold' if cold else 'warm'}: cells/s, {len(ours)} rounds side by side")
    for column in ("loader", "median", "least", "most", "a CPU second", "entropy", "ours over it"):
        table.add_column(column, justify="left" if column == "loader" else "right")
    for label, results in found.items():
        speed = [result["cells_per_second"] for result in results]
        per_cpu = statistics.median(result["cells"] / result["cpu_seconds"] for result in results)
        entropy = " / ".join(
            f"{statistics.median(r['entropy'][column] for r in results):.2f}" for column in ("slide", "type")
        )
        ratios = [one / other for one, other in zip(ours, speed, strict=True)]
        table.add_row(label, *_spread(speed), f"{per_cpu:,.0f}", entropy, " ".join(_spread(ratios, "{:.2f}")))
    independent = results[0]["entropy_independent"]
    table.caption = "entropy of slide / type in a batch of 64, bits; independent draws: " + " / ".join(
        f"{independent[column]:.2f}" for column in ("slide", "type")
    )
    Console(width=130).print(table)


def spatial(arguments: Arguments) -> None:
    """Centres with their neighbours' counts, from a memory that holds a fraction of the corpus."""
    path = _corpus(arguments.work, "tissue150")
    speeds, per_cpu, read_per_centre = [], [], []
    for seed in range(arguments.rounds):
        corpus = Corpus.open(path, cache_bytes=1 << 27)
        everything = CellBlocks.of(corpus, np.arange(corpus.n_cells))
        streams = ShardStreams(everything, n_shards=1, seed=seed, pool_blocks=256)
        touched = 0
        started, cpu = time.perf_counter(), time.process_time()
        for pool in range(corpus.n_cells // (256 * BLOCK)):
            centres, _ = streams.pool(0, pool)
            near = corpus.neighbours(centres, NEIGHBOURS)
            members = np.unique(np.concatenate([centres, near[near >= 0]]))
            rows = corpus.cells(members)
            assert len(rows.genes) == len(rows.counts) == rows.offsets[-1]
            touched += len(np.unique(corpus.block_of(members))) * BLOCK
        n_centres = corpus.n_cells // (256 * BLOCK) * 256 * BLOCK
        speeds.append(n_centres / (time.perf_counter() - started))
        per_cpu.append(n_centres / (time.process_time() - cpu))
        read_per_centre.append(touched / n_centres)
    print(f"centres/s with {NEIGHBOURS} neighbours, median, least, most:", *_spread(speeds))
    print(
        "a CPU second:", *_spread(per_cpu), " cells read for a centre:", *_spread(read_per_centre, "{:.2f}")
    )


def build(arguments: Arguments) -> None:
    """Cells built in a second of one core, and the greatest memory, each build in a process of its own."""
    for name in FILES:
        found = []
        for _ in range(arguments.rounds):
            with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
                program = (
                    f"import bench_data; bench_data.build_one({str(arguments.work)!r}, {name!r}, {folder!r})"
                )
                environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(RIVALS.parent), *sys.path])}
                done = subprocess.run(
                    [sys.executable, "-c", program],
                    check=True,
                    capture_output=True,
                    text=True,
                    env=environment,
                )
                found.append(json.loads(done.stdout.splitlines()[-1]))
        for field, form in (
            ("cells_a_core_second", "{:,.0f}"),
            ("cells_a_second", "{:,.0f}"),
            ("gib", "{:.2f}"),
        ):
            print(name, field, *_spread([result[field] for result in found], form))


def build_one(work: str, name: str, folder: str) -> None:
    started = time.perf_counter()
    report = build_corpus(Path(folder) / "corpus", [_source(Path(work), name)])
    used = resource.getrusage(resource.RUSAGE_SELF)
    figures = {
        "cells_a_core_second": report["n_cells"] / (used.ru_utime + used.ru_stime),
        "cells_a_second": report["n_cells"] / (time.perf_counter() - started),
        "gib": used.ru_maxrss / 2**20,
    }
    print(json.dumps(figures))


def _source(work: Path, name: str) -> Source:
    fields: dict[str, Any] = {"section": "slide", "labels": ("type",), "um_per_unit": 1.0}
    return Source(str(work / f"{name}.h5ad"), "human", "simulated", **fields)


def _corpus(work: Path, name: str) -> Path:
    path = work / f"{name}.corpus"
    if not path.exists():
        build_corpus(path, [_source(work, name)])
    return path


def _store(python: Path, file: Path, store: Path) -> Path:
    if not store.exists():
        command = [str(python), str(RIVALS), "prepare", str(file), str(store), "--rival", "annbatch"]
        try:
            subprocess.run([*command, "--no-shuffle"], check=True, capture_output=True)
        except BaseException:
            shutil.rmtree(store, ignore_errors=True)
            raise
    return store


def _spread(values: list[float], form: str = "{:,.0f}") -> list[str]:
    return [form.format(value) for value in (statistics.median(values), min(values), max(values))]


def main(arguments: Arguments) -> None:
    {"cells": cells, "spatial": spatial, "build": build}[arguments.what](arguments)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
