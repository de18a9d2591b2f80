"""Which layout of the counts reads fastest, and what it costs in bytes: the table of docs/benchmarks.md.

    python tools/bench_layout.py CORPUS [--cells 60000] [--rounds 5]

The first cells of a corpus are written in every layout, and pools of 256 random blocks of 64 cells are read
from each in turn, round after round. "Two" keeps genes and counts in arrays of uint16, "one" packs both into
uint32; "a block" makes every block a chunk, filled up to the longest.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tensorstore as ts
import tyro
from rich.console import Console
from rich.table import Table

from scfm_jax.corpus import BLOCK, Corpus

POOL = 256
BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
CHECKSUM = {"name": "crc32c"}


@dataclass(frozen=True)
class Arguments:
    corpus: Annotated[Path, tyro.conf.Positional]
    cells: int = 60_000
    rounds: int = 5


@dataclass(frozen=True)
class Layout:
    """Arrays of a variant, the elements of an inner chunk (0: a block), and its compressor."""

    packed: bool
    chunk: int
    codec: str

    @property
    def label(self) -> str:
        chunk = f"{self.chunk:,}" if self.chunk else "a block"
        return f"{'one' if self.packed else 'two'}, {chunk}, {self.codec}"

    def codecs(self) -> list[dict[str, Any]]:
        name, _, level = self.codec.partition("-")
        if name == "raw":
            return []
        if name == "plain":
            return [{"name": "zstd", "configuration": {"level": 3}}]
        cname, shuffle = name.split("+")
        itemsize = 4 if self.packed else 2
        options = {"cname": cname, "clevel": int(level), "shuffle": shuffle, "typesize": itemsize}
        return [{"name": "blosc", "configuration": options}]


CHUNKS = (8_192, 16_384, 32_768, 65_536)
OURS = Layout(True, 0, "lz4+shuffle-5")
LAYOUTS = [
    *(Layout(True, 0, codec) for codec in ("lz4+shuffle-5", "lz4+bitshuffle-5", "zstd+shuffle-5")),
    *(Layout(packed, chunk, "lz4+shuffle-5") for chunk in CHUNKS for packed in (True, False)),
    *(Layout(packed, 16_384, "lz4+bitshuffle-5") for packed in (True, False)),
    Layout(True, 16_384, "zstd+shuffle-1"),
    *(Layout(packed, 16_384, "zstd+shuffle-5") for packed in (True, False)),
    Layout(False, 16_384, "plain-zstd"),
    Layout(True, 16_384, "raw"),
]


def write(folder: Path, values: np.ndarray, layout: Layout) -> ts.TensorStore:
    chunk = [layout.chunk] if layout.chunk else [1, values.shape[1]]
    shard = [-(-len(values) // chunk[0]) * chunk[0], *chunk[1:]]
    sharding = {
        "chunk_shape": chunk,
        "codecs": [BYTES, *layout.codecs(), CHECKSUM],
        "index_codecs": [BYTES, CHECKSUM],
    }
    array = ts.open(
        {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": f"{folder}/"},
            "recheck_cached_data": False,
            "metadata": {
                "shape": list(values.shape),
                "data_type": values.dtype.name,
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shard}},
                "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            },
        },
        create=True,
        # Room for the indexes of shards, and too little for decoded chunks to be found again.
        context=ts.Context({"cache_pool": {"total_bytes_limit": 1 << 21}}),
    ).result()
    array.write(values).result()
    return array


def read(arrays: list[ts.TensorStore], starts: np.ndarray, blocks: np.ndarray) -> None:
    with ts.Batch() as batch:
        reads = [
            (
                array[block, : int(starts[block + 1] - starts[block])]
                if array.rank == 2
                else array[int(starts[block]) : int(starts[block + 1])]
            ).read(batch=batch)
            for block in blocks.tolist()
            for array in arrays
        ]
    for one in reads:
        one.result()


def main(arguments: Arguments) -> None:
    corpus = Corpus.open(arguments.corpus)
    n_cells = min(arguments.cells, corpus.n_cells) // BLOCK * BLOCK
    cells = corpus.cells(np.arange(n_cells))
    starts = cells.offsets[::BLOCK]
    genes, counts = cells.genes.astype(np.uint16), cells.counts.astype(np.uint16)
    apart, packed = [genes, counts], [genes.astype(np.uint32) | counts.astype(np.uint32) << 16]
    rows = np.zeros((len(starts) - 1, int(np.diff(starts).max())), np.uint32)
    rows[np.arange(rows.shape[1]) < np.diff(starts)[:, None]] = packed[0]
    found: dict[Layout, list[tuple[float, float]]] = {layout: [] for layout in LAYOUTS}
    size: dict[Layout, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        opened = {}
        for number, layout in enumerate(LAYOUTS):
            folder = Path(scratch) / str(number)
            values = ([rows], packed)[layout.chunk > 0] if layout.packed else apart
            opened[layout] = [write(folder / str(n), array, layout) for n, array in enumerate(values)]
            size[layout] = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / n_cells
        for number in range(arguments.rounds + 1):
            order = np.random.default_rng(number).permutation(len(starts) - 1)
            pools = [np.sort(order[first : first + POOL]) for first in range(0, len(order) - POOL, POOL)]
            for layout, arrays in opened.items():
                wall, cpu = time.perf_counter(), time.process_time()
                for pool in pools:
                    read(arrays, starts, pool)
                n = len(pools) * POOL * BLOCK
                if number:  # the first round warms the caches
                    found[layout].append((n / (time.perf_counter() - wall), n / (time.process_time() - cpu)))
    best = [speed for speed, _ in found[OURS]]
    table = Table(title=f"{n_cells:,} cells, {len(genes) / n_cells:.0f} non-zeros a cell")
    for column in (
        "arrays, chunk, codec",
        "bytes a cell",
        "cells/s",
        "least",
        "most",
        "a CPU second",
        "of ours",
    ):
        table.add_column(column, justify="right")
    for layout in LAYOUTS:
        speed = [one for one, _ in found[layout]]
        per_cpu = statistics.median(two for _, two in found[layout])
        ratio = statistics.median(one / other for one, other in zip(speed, best, strict=True))
        spread = [f"{value:,.0f}" for value in (statistics.median(speed), min(speed), max(speed), per_cpu)]
        table.add_row(layout.label, f"{size[layout]:,.0f}", *spread, f"{ratio:.2f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
