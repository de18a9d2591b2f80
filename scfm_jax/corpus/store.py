"""The arrays of one slide on disk: zarr v3 with the sharding codec, through TensorStore.

One folder a slide. ``genes`` and ``counts`` hold the non-zeros of its cells, cell after cell, genes ascending
within a cell; ``nnz`` says how many each cell has and ``block_starts`` where each block of `BLOCK` cells
begins. A count that does not fit 16 bits is stored as `OVERFLOW` and kept in full in the overflow table.
``scaled_sum`` and ``expressing`` hold, for each gene of the slide's panel, the sum over its cells of counts
scaled to 10,000 a cell, and how many cells express it: what technology means are made of.
Every inner chunk is blosc lz4 with shuffle under a CRC-32C, so a flipped byte is an error when it is read,
never a wrong count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

BLOCK = 64
OVERFLOW = 65535
# What the counts of a cell are scaled to where technologies are compared (Nicheformer).
SCALED_TOTAL = 10_000.0


@dataclass(frozen=True)
class Layout:
    """How an array is stored: its dtype, and the rows of an inner chunk and of a shard."""

    dtype: str
    chunk: int
    shard: int


_CELLS = {"chunk": 1 << 14, "shard": 1 << 20}
_NONZEROS = {"chunk": 1 << 15, "shard": 1 << 25}
_NEIGHBOURS = {"chunk": 1 << 8, "shard": 1 << 16}
LAYOUTS = {
    "genes": Layout("uint16", **_NONZEROS),
    "genes_wide": Layout("uint32", **_NONZEROS),
    "counts": Layout("uint16", **_NONZEROS),
    "overflow_position": Layout("int64", **_CELLS),
    "overflow_count": Layout("int32", **_CELLS),
    "nnz": Layout("uint16", **_CELLS),
    "block_starts": Layout("int64", **_CELLS),
    "x": Layout("float32", **_CELLS),
    "y": Layout("float32", **_CELLS),
    "total_raw": Layout("int32", **_CELLS),
    "total_matched": Layout("int32", **_CELLS),
    "source_row": Layout("int64", **_CELLS),
    "label": Layout("int32", **_CELLS),
    "scaled_sum": Layout("float64", **_CELLS),
    "expressing": Layout("int64", **_CELLS),
    "neighbours": Layout("int32", **_NEIGHBOURS),
    "distances": Layout("float32", **_NEIGHBOURS),
}


def gene_layout(n_genes: int) -> str:
    """Name the layout of ``genes`` for a vocabulary of ``n_genes``."""
    return "genes" if n_genes <= OVERFLOW else "genes_wide"


class ArrayWriter:
    """Writes one array by appending rows, a whole shard at a time.

    Parameters
    ----------
    folder
        Folder of the slide.
    name
        Path of the array within it.
    layout
        Its entry of `LAYOUTS`.
    width
        Length of a row for a matrix; ``None`` for a vector.
    """

    def __init__(self, folder: Path, name: str, layout: str, width: int | None = None) -> None:
        how = LAYOUTS[layout]
        self._row = () if width is None else (width,)
        self._dtype = np.dtype(how.dtype)
        self._shard = how.shard
        self._waiting: list[np.ndarray] = []
        self._n_waiting = self._n_written = 0
        self._array = ts.open(_create_spec(folder / name, how, self._row), create=True).result()

    def append(self, rows: np.ndarray) -> None:
        """Add rows at the end."""
        self._waiting.append(np.asarray(rows, self._dtype).reshape(-1, *self._row))
        self._n_waiting += len(rows)
        if self._n_waiting >= self._shard:
            self._write(self._n_waiting // self._shard * self._shard)

    def close(self) -> None:
        """Write what is left."""
        self._write(self._n_waiting)

    def _write(self, n: int) -> None:
        if n == 0:
            return
        rows = np.concatenate(self._waiting)
        self._waiting, self._n_waiting = [rows[n:].copy()], len(rows) - n
        stop = self._n_written + n
        self._array = self._array.resize(exclusive_max=[stop, *self._row], expand_only=True).result()
        self._array[self._n_written : stop].write(rows[:n]).result()
        self._n_written = stop


def write_array(folder: Path, name: str, layout: str, values: np.ndarray) -> None:
    """Write one whole array."""
    writer = ArrayWriter(folder, name, layout, values.shape[1] if values.ndim == 2 else None)
    writer.append(values)
    writer.close()


class SlideArrays:
    """Opens the arrays of a slide when they are first asked for, and keeps them open.

    Safe to share between threads, not across a fork.
    """

    def __init__(self, folder: Path, context: ts.Context) -> None:
        self._folder, self._context = folder, context
        self._open: dict[str, ts.TensorStore] = {}

    def __getitem__(self, name: str) -> ts.TensorStore:
        if name not in self._open:
            self.open([name])
        return self._open[name]

    def open(self, names: Sequence[str]) -> None:
        """Open several arrays at once."""
        asked = {name: ts.open(_open_spec(self._folder / name), context=self._context) for name in names}
        self._open.update({name: array.result() for name, array in asked.items()})


def _create_spec(path: Path, layout: Layout, row: tuple[int, ...]) -> dict[str, Any]:
    byte_codec = {"name": "bytes", "configuration": {"endian": "little"}}
    blosc = {"cname": "lz4", "clevel": 5, "shuffle": "shuffle", "typesize": np.dtype(layout.dtype).itemsize}
    sharding = {
        "chunk_shape": [layout.chunk, *row],
        "codecs": [byte_codec, {"name": "blosc", "configuration": blosc}, {"name": "crc32c"}],
        "index_codecs": [byte_codec, {"name": "crc32c"}],
    }
    return {
        **_open_spec(path),
        "metadata": {
            "shape": [0, *row],
            "data_type": layout.dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [layout.shard, *row]}},
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        },
    }


def _open_spec(path: Path) -> dict[str, Any]:
    return {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{path.resolve()}/"},
        # A chunk that is not there is a lost file, never a run of zeros.
        "store_data_equal_to_fill_value": True,
        "fill_missing_data_reads": False,
        # A finished corpus never changes.
        "recheck_cached_data": False,
        "recheck_cached_metadata": False,
    }
