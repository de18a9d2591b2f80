"""An external sort: entries in the order of a file become rows in the order of the corpus, in bounded memory.

Entries are appended to one temporary file for each band of destination rows; a band is small enough to be
sorted in memory. So CSR, CSC and dense files are each read once, front to back.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from jaxtyping import Int
from scipy import sparse

from scfm_jax.corpus.matrix import Entries

BAND_ENTRIES = 1 << 23
_RECORD = np.dtype([("row", "<i4"), ("gene", "<i4"), ("count", "<i4")])


class Spool:
    """The bands of one file's cells.

    Parameters
    ----------
    folder
        Where the temporary files go.
    pieces
        Source rows of each piece (slide) in the order wanted.
    piece_entries
        Number of entries of each of these rows.
    n_cells
        Rows of the source.
    n_genes
        Genes of the vocabulary.
    """

    def __init__(
        self,
        folder: Path,
        pieces: list[Int[np.ndarray, " rows"]],
        piece_entries: Int[np.ndarray, " all_rows"],
        n_cells: int,
        n_genes: int,
    ) -> None:
        self._folder, self._n_genes = folder, n_genes
        rows = np.concatenate(pieces)
        ends = np.cumsum(piece_entries, dtype=np.int64)
        cuts = np.searchsorted(ends, np.arange(BAND_ENTRIES, ends[-1] + 1, BAND_ENTRIES), side="right")
        self._breaks = np.cumsum([0, *map(len, pieces)])
        self._edges = np.union1d(self._breaks, cuts)
        self._destination = np.full(n_cells, -1, np.int32)
        self._destination[rows] = np.arange(len(rows))

    def fill(self, entries: Iterable[Entries], target: Int[np.ndarray, " n_source_genes"]) -> None:
        """Sort a file's entries into the bands, without rows not wanted and genes whose ``target`` is -1."""
        self._folder.mkdir(parents=True)
        for rows, columns, values in entries:
            destination, gene = self._destination[rows], target[columns]
            wanted = (destination >= 0) & (gene >= 0)
            records = np.empty(int(wanted.sum()), _RECORD)
            records["row"], records["gene"], records["count"] = (
                destination[wanted],
                gene[wanted],
                values[wanted],
            )
            band = np.searchsorted(self._edges, records["row"], side="right") - 1
            if len(band) and band.min() != band.max():
                order = np.argsort(
                    band.astype(np.uint16 if len(self._edges) < 1 << 16 else np.int64), kind="stable"
                )
                band, records = band[order], records[order]
            starts = np.flatnonzero(np.diff(band, prepend=-1))
            for start, stop in zip(starts, [*starts[1:], len(band)]):
                with self._path(band[start]).open("ab") as file:
                    records[start:stop].tofile(file)

    def rows(self, piece: int) -> Iterable[sparse.csr_array]:
        """Yield the rows of a piece in order, a band at a time; genes ascend in a row, each once."""
        first, last = np.searchsorted(self._edges, self._breaks[piece : piece + 2])
        for band in range(first, last):
            start, stop = self._edges[band : band + 2]
            path = self._path(band)
            records = np.fromfile(path, _RECORD) if path.exists() else np.empty(0, _RECORD)
            path.unlink(missing_ok=True)
            places = (records["row"] - start, records["gene"])
            yield sparse.coo_array((records["count"], places), (stop - start, self._n_genes)).tocsr()

    def _path(self, band: int) -> Path:
        return self._folder / str(band)
