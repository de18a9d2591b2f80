"""The arrays of one slide on disk: zarr v3 with the sharding codec, through TensorStore.

One folder a slide. ``entries`` holds the non-zeros of its cells, a row for each block of `BLOCK` cells, cell
after cell, genes ascending within a cell, filled up with zeros to the length of the longest row: the gene in
the lower 16 bits and the count in the upper 16 (32 and 32 for a vocabulary of over 65,536 genes). So a block
is one chunk, and one read brings it. ``nnz`` says how many non-zeros each cell has. A count that does not fit
is stored as the largest that does, and kept in full in the overflow table. ``scaled_sum`` and ``expressing``
hold, for each gene of the slide's panel, the sum over its cells of counts scaled to 10,000 a cell, and how
many cells express it: what technology means are made of.

A shard is never longer than its array, so that the index that a read begins with is short. Every inner chunk
is blosc with shuffle under a CRC-32C, so a flipped byte is an error when it is read, never a wrong count.
docs/benchmarks.md has what the layout was measured against.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import tensorstore as ts
from jaxtyping import Int, Int32, UInt

from scfm_jax.corpus.place import Place
from scfm_jax.errors import InputError

BLOCK = 64
# What the counts of a cell are scaled to where technologies are compared (Nicheformer).
SCALED_TOTAL = 10_000.0
MOST_EXPRESSED = 65_535  # genes of a cell: what ``nnz`` holds
LARGEST_NARROW = 65_535  # the largest count of an entry of 16 bits, which stands for the overflow table

Codec: TypeAlias = Literal["lz4", "zstd"]
_LEVELS = {"lz4": 5, "zstd": 5}


@dataclass(frozen=True)
class ArrayLayout:
    """How an array is stored: its dtype, and the rows of an inner chunk and of a shard."""

    dtype: str
    chunk: int
    shard: int


# Elements of a shard of entries, whose rows are as long as the longest block.
SHARD_ENTRIES = 1 << 25
# A corpus is read by these and not by what its arrays say: to change one is a new schema.
_CELLS = {"chunk": 1 << 10, "shard": 1 << 20}
LAYOUTS = {
    "entries": ArrayLayout("uint32", 1, SHARD_ENTRIES),
    "entries_wide": ArrayLayout("uint64", 1, SHARD_ENTRIES),
    "overflow_position": ArrayLayout("int64", **_CELLS),
    "overflow_count": ArrayLayout("int32", **_CELLS),
    "nnz": ArrayLayout("uint16", **_CELLS),
    "x": ArrayLayout("float64", **_CELLS),
    "y": ArrayLayout("float64", **_CELLS),
    "total_raw": ArrayLayout("int32", **_CELLS),
    "total_matched": ArrayLayout("int32", **_CELLS),
    "source_row": ArrayLayout("int64", **_CELLS),
    "label": ArrayLayout("int32", **_CELLS),
    "scaled_sum": ArrayLayout("float64", **_CELLS),
    "expressing": ArrayLayout("int64", **_CELLS),
    "neighbours": ArrayLayout("int32", BLOCK, 1 << 16),
}


@dataclass(frozen=True)
class StoreOptions:
    """What a build may choose of the layout.

    Attributes
    ----------
    codec
        ``lz4`` reads fastest; ``zstd`` takes about a quarter less space.
    shard_factor
        Rows of a shard in multiples of `LAYOUTS`: files of an object store may be larger.
    """

    codec: Codec = "lz4"
    shard_factor: int = 1

    @classmethod
    def suited_to(cls, place: Place, codec: Codec = "lz4") -> StoreOptions:
        """Larger files in a bucket than in a folder."""
        return cls(codec, shard_factor=1 if place.is_local else 4)


def entry_layout(n_genes: int) -> str:
    """Name the layout of ``entries`` for a vocabulary of ``n_genes``."""
    return "entries" if n_genes <= 1 << 16 else "entries_wide"


def shard_rows(layout: str, options: StoreOptions, width: int) -> int:
    """Rows of a whole shard of an array whose rows have ``width`` elements."""
    how = LAYOUTS[layout]
    rows = max(how.shard // width, 1) if layout.startswith("entries") else how.shard
    return rows * options.shard_factor


def pack(
    genes: Int[np.ndarray, " m"], counts: Int[np.ndarray, " m"], layout: str
) -> tuple[UInt[np.ndarray, " m"], Int[np.ndarray, " overflows"]]:
    """Genes and counts as entries, and the places of counts that do not fit."""
    dtype = np.dtype(LAYOUTS[layout].dtype)
    half = dtype.itemsize * 4
    largest = (1 << half) - 1
    entries = np.minimum(counts, largest).astype(dtype) << dtype.type(half) | genes.astype(dtype)
    return entries, np.flatnonzero(np.asarray(counts) >= largest)


def unpack_genes(entries: UInt[np.ndarray, " m"]) -> Int32[np.ndarray, " m"]:
    """Genes of entries."""
    half = entries.itemsize * 4
    return _as_int32(entries & entries.dtype.type((1 << half) - 1))


def unpack_counts(entries: UInt[np.ndarray, " m"]) -> Int32[np.ndarray, " m"]:
    """Counts of entries."""
    return _as_int32(entries >> entries.dtype.type(entries.itemsize * 4))


def widened(entries: UInt[np.ndarray, " m"], dtype: np.dtype) -> UInt[np.ndarray, " m"]:
    """Entries with gene and count in the halves of ``dtype``."""
    if entries.dtype == dtype:
        return entries
    genes, counts = (unpack(entries).astype(dtype) for unpack in (unpack_genes, unpack_counts))
    return genes | counts << dtype.type(dtype.itemsize * 4)


def _as_int32(values: UInt[np.ndarray, " m"]) -> Int32[np.ndarray, " m"]:
    return values.view(np.int32) if values.itemsize == 4 else values.astype(np.int32)


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
    options
        Of the build.
    width
        Length of a row for a matrix; ``None`` for a vector.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        layout: str,
        options: StoreOptions,
        width: int | None = None,
    ) -> None:
        how = LAYOUTS[layout]
        self._row = () if width is None else (width,)
        self._layout, self._options = layout, options
        # Memory is taken by the system only when it is touched.
        self._rows = np.empty((shard_rows(layout, options, width or 1), *self._row), how.dtype)
        self._n_waiting = self._n_written = 0
        self._place = Place(folder) / name
        self._array: ts.TensorStore | None = None

    def append(self, rows: np.ndarray) -> None:
        """Add rows at the end."""
        rows = np.asarray(rows).reshape(-1, *self._row)
        while len(rows):
            start = self._n_waiting
            self._n_waiting = min(start + len(rows), len(self._rows))
            self._rows[start : self._n_waiting] = rows[: self._n_waiting - start]
            rows = rows[self._n_waiting - start :]
            if self._n_waiting == len(self._rows):
                self._write()

    def close(self) -> None:
        """Write what is left."""
        if self._array is None or self._n_waiting:
            self._write()

    def _write(self) -> None:
        rows, self._n_waiting = self._rows[: self._n_waiting], 0
        if self._array is None:
            # What fits a shard is written at once, so that its length is known here.
            spec = _spec(self._place, self._layout, rows.shape, self._options)
            self._array = ts.open(spec, create=True).result()
        if len(rows):
            stop = self._n_written + len(rows)
            self._array = self._array.resize(exclusive_max=[stop, *self._row], expand_only=True).result()
            self._array[self._n_written : stop].write(rows).result()
            self._n_written = stop


def write_array(folder: Path, name: str, layout: str, values: np.ndarray, options: StoreOptions) -> None:
    """Write one whole array."""
    width = values.shape[1] if values.ndim == 2 else None
    writer = ArrayWriter(folder, name, layout, options, width)
    writer.append(values)
    writer.close()


class SlideArrays:
    """Opens the arrays of a slide when they are first asked for, and keeps them open.

    Their shapes and codecs follow from the slide's record, so opening reads nothing. Safe to share between
    threads, not across a fork.

    Parameters
    ----------
    place
        Folder of the slide.
    record
        The slide's, from the manifest.
    n_genes
        Genes of the vocabulary.
    panel_size
        Genes that the slide measured.
    context
        TensorStore's.
    """

    def __init__(
        self, place: Place, record: Mapping[str, Any], n_genes: int, panel_size: int, context: ts.Context
    ) -> None:
        self._place, self._name, self._context = place, record["name"], context
        self._options = StoreOptions(record["codec"], record["shard_factor"])
        self._entries = entry_layout(n_genes)
        n_cells = record["n_cells"]
        self._shapes: dict[str, tuple[int, ...]] = {
            "entries": (-(-n_cells // BLOCK), record["longest_block"]),
            "overflow_position": (record["overflow"],),
            "overflow_count": (record["overflow"],),
            "neighbours": (n_cells, record["n_neighbours"]),
            "scaled_sum": (panel_size,),
            "expressing": (panel_size,),
        }
        self._of_cells = (n_cells,)
        self._open: dict[str, ts.TensorStore] = {}

    def __getitem__(self, name: str) -> ts.TensorStore:
        if name not in self._open:
            self.open([name])
        return self._open[name]

    def open(self, names: Sequence[str]) -> None:
        """Open several arrays at once."""
        asked = {}
        for name in names:
            layout = self._entries if name == "entries" else name.split("_")[0] if "label" in name else name
            shape = self._shapes.get(name, self._of_cells)
            spec = _spec(self._place / name, layout, shape, self._options)
            asked[name] = ts.open({**spec, "open": True, "assume_metadata": True}, context=self._context)
        self._open.update({name: array.result() for name, array in asked.items()})

    def result(self, name: str, read: Any) -> np.ndarray:
        """Wait for a read of the array `name`.

        Raises
        ------
        InputError
            A chunk is lost or damaged.
        """
        try:
            return read.result()
        except (ValueError, OSError, RuntimeError) as error:
            # TensorStore's text goes on with where in its own source it was raised.
            reason = " ".join(str(error).split(" [")[0].split())
            raise InputError(
                self._place / name,
                f"slide {self._name!r} cannot be read ({reason})",
                "run scfm corpus verify and restore what it names, or check the connection",
            ) from None


def _spec(place: Place, layout: str, shape: tuple[int, ...], options: StoreOptions) -> dict[str, Any]:
    how = LAYOUTS[layout]
    width = shape[1] if len(shape) == 2 else 1
    shard = min(shard_rows(layout, options, width), max(-(-shape[0] // how.chunk), 1) * how.chunk)
    byte_codec = {"name": "bytes", "configuration": {"endian": "little"}}
    blosc = {
        "cname": options.codec,
        "clevel": _LEVELS[options.codec],
        "shuffle": "shuffle",
        "typesize": np.dtype(how.dtype).itemsize,
        "blocksize": 0,
    }
    sharding = {
        "chunk_shape": [how.chunk, *shape[1:]],
        "codecs": [byte_codec, {"name": "blosc", "configuration": blosc}, {"name": "crc32c"}],
        "index_codecs": [byte_codec, {"name": "crc32c"}],
        "index_location": "end",
    }
    return {
        "driver": "zarr3",
        "kvstore": place.kvstore(),
        # A chunk that is not there is a lost file, never a run of zeros.
        "store_data_equal_to_fill_value": True,
        "fill_missing_data_reads": False,
        # A finished corpus never changes.
        "recheck_cached_data": False,
        "recheck_cached_metadata": False,
        "metadata": {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(shape),
            "data_type": how.dtype,
            "fill_value": 0,
            "chunk_key_encoding": {"name": "default"},
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": [shard, *shape[1:]]},
            },
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        },
    }
