"""A cells x genes matrix in an open file, as a stream: CSR, CSC or dense, in HDF5 or in zarr.

The values pass by as (row, column, value) entries in the order of the file, a bounded number at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import h5py
import numpy as np
import zarr
from anndata.io import sparse_dataset
from jaxtyping import Int, Int64, Shaped

# Few enough that a block stays in the cache of a core.
ENTRIES = 1 << 18
DENSE_ELEMENTS = 1 << 22
# Entries not wanted that are read rather than skipped: a read of its own costs more.
GAP = 1 << 16


class Entries(NamedTuple):
    """Non-zero values of a matrix, with their row and column."""

    rows: Int[np.ndarray, " m"]
    columns: Int[np.ndarray, " m"]
    values: Shaped[np.ndarray, " m"]


class Matrix:
    """A matrix in an open file.

    Parameters
    ----------
    node
        A two-dimensional array, or a group with `data`, `indices` and `indptr`.
    form
        ``"csr"``, ``"csc"`` or ``"dense"``.
    shape
        Cells and genes as stored.
    column_of
        The column that each stored gene gets, ascending, or -1 where it is left out; all as stored if None.
    """

    def __init__(
        self,
        node: Any,
        form: str,
        shape: tuple[int, int],
        column_of: Int[np.ndarray, " n_stored"] | None = None,
    ) -> None:
        self.format = form
        self.shape = shape if column_of is None else (shape[0], int(column_of.max()) + 1)
        self._node, self._stored_shape, self._column_of = node, shape, column_of

    @classmethod
    def of_anndata(cls, node: Any) -> Matrix | None:
        """Make one of an element of an AnnData file; None where that is no matrix."""
        if isinstance(node, h5py.Dataset | zarr.Array):
            return cls(node, "dense", (node.shape[0], node.shape[1])) if node.ndim == 2 else None
        if isinstance(node, h5py.Group | zarr.Group) and "indptr" in node:
            stored = sparse_dataset(node)
            return cls(node, stored.format, stored.shape)
        return None

    def entries(
        self, rows: Int[np.ndarray, " wanted"] | None = None, at_once: int | None = None
    ) -> Iterator[Entries]:
        """Yield the values that are not zero, in the file's order.

        Parameters
        ----------
        rows
            The cells wanted, ascending; all if None. Of a CSR matrix only what lies near them is read.
        at_once
            About how many values to yield at a time; `ENTRIES` (of a CSC matrix 8 times as many) if None.

        Raises
        ------
        OSError, RuntimeError, ValueError
            The file is damaged.
        """
        wanted = None
        if rows is not None:
            wanted = np.zeros(self.shape[0], bool)
            wanted[rows] = True
        # Entries by gene are spread over all cells, and what a caller adds up takes time for each of these.
        usual = ENTRIES if self.format == "csr" else 8 * ENTRIES
        stored = self._dense() if self.format == "dense" else self._sparse(rows, at_once or usual)
        for row, column, values in stored:
            masks = [] if values.all() else [values != 0]
            if wanted is not None:
                masks.append(wanted.take(row))
            if self._column_of is not None:
                column = self._column_of.take(column)
                masks.append(column >= 0)
            if masks:
                keep = np.logical_and.reduce(masks)
                row, column, values = row[keep], column[keep], values[keep]
            yield Entries(row, column, values)

    def _sparse(self, rows: Int[np.ndarray, " wanted"] | None, at_once: int) -> Iterator[Entries]:
        by_cell = self.format == "csr"
        n_minor = self._stored_shape[by_cell]
        indptr = self._indptr()
        data, indices = self._node["data"], self._node["indices"]
        step = _whole_chunks(at_once, max((array.chunks or (1,))[0] for array in (data, indices)))
        for begin, end in _ranges(indptr, rows if by_cell else None):
            for start, stop in pairwise([begin, *range((begin // step + 1) * step, end, step), end]):
                first = int(np.searchsorted(indptr, start, side="right")) - 1
                last = int(np.searchsorted(indptr, stop, side="left"))
                lengths = np.diff(np.clip(indptr[first : last + 1], start, stop))
                major = np.repeat(np.arange(first, last, dtype=np.int32), lengths)
                minor = indices[start:stop]
                if minor.min() < 0 or minor.max() >= n_minor:
                    raise ValueError(f"indices reach from {minor.min()} to {minor.max()} of {n_minor}")
                minor = minor.astype(np.int32, copy=False)
                row, column = (major, minor) if by_cell else (minor, major)
                yield Entries(row, column, data[start:stop])

    def _indptr(self) -> Int64[np.ndarray, " n_major_and_1"]:
        """Where each row (column) begins, after a look at whether the parts fit together."""
        indptr = self._node["indptr"][:].astype(np.int64)
        n_major = self._stored_shape[self.format == "csc"]
        stored = min(self._node[part].shape[0] for part in ("data", "indices"))
        if indptr.shape != (n_major + 1,) or indptr[-1] > stored:
            raise ValueError(f"indptr, indices and data do not fit {n_major} {self.format} rows")
        if indptr[0] != 0 or (np.diff(indptr) < 0).any():
            raise ValueError("indptr does not ascend from 0")
        if stored:
            for part in ("data", "indices", "indptr"):
                check_whole(self._node[part])
        return indptr

    def _dense(self) -> Iterator[Entries]:
        step = max(1, DENSE_ELEMENTS // max(1, self.shape[1]))
        if self._node.chunks:
            step = _whole_chunks(step, self._node.chunks[0])
        for start in range(0, self.shape[0], step):
            block = self._node[start : start + step]
            rows, columns = np.nonzero(block)
            yield Entries((rows + start).astype(np.int32), columns.astype(np.int32), block[rows, columns])


def check_whole(array: Any) -> None:
    """Raise OSError where a zarr array lacks chunks: they would be read as zeros, as none of a matrix are."""
    if isinstance(array, zarr.Array) and array.nchunks_initialized < array.nchunks:
        lost = array.nchunks - array.nchunks_initialized
        raise OSError(f"{lost} of {array.nchunks} chunks of {array.path} are missing")


def _whole_chunks(step: int, chunk: int) -> int:
    # Reading part of a compressed chunk decompresses all of it; up to a point, read whole ones.
    return min(-(-step // chunk) * chunk, 8 * step)


def _ranges(
    indptr: Int64[np.ndarray, " n_and_1"], rows: Int[np.ndarray, " wanted"] | None
) -> list[tuple[int, int]]:
    """Ranges of entries that hold the rows wanted, those near each other as one."""
    if rows is None:
        starts, stops = indptr[:1], indptr[-1:]
    else:
        full = rows[indptr[rows] < indptr[rows + 1]]
        starts, stops = indptr[full], indptr[full + 1]
        apart = starts[1:] - stops[:-1] > GAP
        starts, stops = (
            starts[np.append(True, apart)[: len(full)]],
            stops[np.append(apart, True)[: len(full)]],
        )
    return [(int(start), int(stop)) for start, stop in zip(starts, stops) if start < stop]
