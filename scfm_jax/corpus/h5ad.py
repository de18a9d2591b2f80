"""One AnnData file, read without loading it: its raw counts as a stream, and what ``obs`` says of its cells.

The counts pass by as (row, column, value) entries in the order of the file, a bounded number at a time,
whether it is CSR, CSC or dense. Only what there is one of for each cell or gene is held in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import h5py
import numpy as np
import pandas as pd
from anndata.io import read_elem, sparse_dataset
from jaxtyping import Float, Int, Int32, Int64, Shaped

from scfm_jax.corpus.sources import Source
from scfm_jax.errors import InputError

_ENTRIES = 1 << 21
_DENSE_ELEMENTS = 1 << 22
_PEEK = 1 << 16
_LARGEST = np.iinfo(np.int32).max
_MISSING = ("", "nan", "NaN", "None", "NA", "<NA>")
_PIECE_COLUMN = r"(?i)^(section|sample|slide|z)(_?(id|name|key|index))?$"


class Entries(NamedTuple):
    """Non-zero values of a matrix, with their row and column."""

    rows: Int[np.ndarray, " m"]
    columns: Int[np.ndarray, " m"]
    values: Shaped[np.ndarray, " m"]


class Matrix:
    """A cells x genes matrix in an open file: CSR, CSC or dense."""

    def __init__(self, node: h5py.Group | h5py.Dataset) -> None:
        self._node = node
        self.format = "dense" if isinstance(node, h5py.Dataset) else sparse_dataset(node).format
        self.shape: tuple[int, int] = node.shape if self.format == "dense" else sparse_dataset(node).shape

    def entries(self, at_once: int = _ENTRIES) -> Iterator[Entries]:
        """Yield all values that are not zero, in the file's order, about ``at_once`` (or fewer) at a time."""
        if self.format == "dense":
            yield from self._dense()
            return
        indptr = self._node["indptr"][:].astype(np.int64)
        for start in range(0, int(indptr[-1]), at_once):
            stop = min(start + at_once, int(indptr[-1]))
            first = int(np.searchsorted(indptr, start, side="right")) - 1
            last = int(np.searchsorted(indptr, stop, side="left"))
            lengths = np.diff(np.clip(indptr[first : last + 1], start, stop))
            major = np.repeat(np.arange(first, last, dtype=np.int32), lengths)
            minor = self._node["indices"][start:stop].astype(np.int32)
            values = self._node["data"][start:stop]
            if not values.all():
                stored = values != 0
                major, minor, values = major[stored], minor[stored], values[stored]
            yield Entries(major, minor, values) if self.format == "csr" else Entries(minor, major, values)

    def _dense(self) -> Iterator[Entries]:
        step = max(1, _DENSE_ELEMENTS // max(1, self.shape[1]))
        if self._node.chunks:
            # Reading part of a compressed chunk decompresses all of it; up to a point, read whole ones.
            chunk = self._node.chunks[0]
            step = min(-(-step // chunk) * chunk, 8 * step)
        for start in range(0, self.shape[0], step):
            block = self._node[start : start + step]
            rows, columns = np.nonzero(block)
            yield Entries((rows + start).astype(np.int32), columns.astype(np.int32), block[rows, columns])

    def looks_raw(self) -> bool:
        """Tell whether the first values are raw counts."""
        first = next(self.entries(_PEEK), None)
        return first is None or _first_not_raw(first.values) is None


@dataclass(frozen=True)
class Totals:
    """What one pass over a file's counts gives, with the genes that have a target told from the others.

    ``cell_raw`` and ``cell_matched`` are counts of each cell over all genes and over those with a target,
    ``cell_entries`` the number of non-zeros with a target, ``gene`` the counts of each gene.
    """

    cell_raw: Int32[np.ndarray, " n_cells"]
    cell_matched: Int32[np.ndarray, " n_cells"]
    cell_entries: Int32[np.ndarray, " n_cells"]
    gene: Int64[np.ndarray, " n_genes"]


class CountsFile:
    """An AnnData file opened for its raw counts.

    Parameters
    ----------
    source
        The file and how to read it.

    Raises
    ------
    InputError
        Anything about the file that would make a wrong corpus; the counts themselves are checked by `totals`.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        try:
            self._file = h5py.File(source.path)
            self.obs: pd.DataFrame = read_elem(self._file["obs"])
            self._matrices = self._find_matrices()
            self.layer, self.matrix = self._choose_matrix()
            var = "raw/var" if self.layer == "raw" else "var"
            self.gene_names = [str(name) for name in read_elem(self._file[var]).index]
        except InputError:
            raise
        except FileNotFoundError:
            raise InputError(source.path, "there is no such file", "give the path of an .h5ad file") from None
        except (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise InputError(
                source.path,
                f"it cannot be read as an AnnData file, or is truncated ({error})",
                "write or copy it again",
            ) from None
        self._check_shape()
        self.section_of, self.sections = self._sections()
        self.coordinates = self._coordinates()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def entries(self) -> Iterator[Entries]:
        """Yield the counts that are not zero, in the file's order; values are checked raw counts, int32."""
        try:
            for rows, columns, values in self.matrix.entries():
                bad = _first_not_raw(values)
                if bad is not None:
                    raise self._not_raw(f"holds {values[bad]} in cell {self.obs.index[rows[bad]]!r}")
                yield Entries(rows, columns, values.astype(np.int32))
        except (OSError, RuntimeError) as error:
            raise InputError(
                self.source.path,
                f"{self.layer} cannot be read, the file is damaged ({error})",
                "write or copy it again",
            ) from None

    def totals(self, target: Int[np.ndarray, " n_genes"]) -> Totals:
        """Pass over all counts once, checking them; ``target`` is -1 for a gene that is not carried along."""
        n_cells, n_genes = self.matrix.shape
        cells = np.zeros((3, n_cells), np.int64)
        gene = np.zeros(n_genes, np.int64)
        for rows, columns, values in self.entries():
            if not len(rows):
                continue
            matched = target[columns] >= 0
            low, high = int(rows.min()), int(rows.max()) + 1
            for total, weights in zip(cells, (values, values * matched, matched)):
                total[low:high] += np.bincount(rows - low, weights, high - low).astype(np.int64)
            gene += np.bincount(columns, values, n_genes).astype(np.int64)
        if cells[0].max() > _LARGEST:
            raise self._not_raw(f"gives cell {self.obs.index[cells[0].argmax()]!r} {cells[0].max()} counts")
        raw, matched, entries = cells.astype(np.int32)
        return Totals(raw, matched, entries, gene)

    def label(self, name: str) -> tuple[Int[np.ndarray, " n"], list[str]]:
        """Return codes (-1 where missing) and sorted classes of a column of ``obs``."""
        values = self._obs_column("labels", name)
        text = values.astype(str).to_numpy(object)
        missing = values.isna().to_numpy() | np.isin(text, _MISSING)
        classes, codes = np.unique(text[~missing].astype(str), return_inverse=True)
        filled = np.full(len(text), -1, np.int32)
        filled[~missing] = codes
        return filled, classes.tolist()

    def piece_warnings(self) -> list[str]:
        """Name the columns of ``obs`` that tell pieces apart within what was given as one section."""
        if not self.source.spatial:
            return []
        columns = self.obs.columns[self.obs.columns.astype(str).str.match(_PIECE_COLUMN)]
        several = {name: self.obs[name].groupby(self.section_of).nunique().max() for name in columns}
        return [
            f"obs[{name!r}] has {n} values in one section: give it as section if they are pieces of tissue"
            for name, n in several.items()
            if n > 1
        ]

    def _find_matrices(self) -> dict[str, Matrix]:
        nodes = {"X": self._file.get("X"), "raw": self._file.get("raw/X")}
        nodes |= dict(self._file.get("layers", {}).items())
        return {
            name: Matrix(node)
            for name, node in nodes.items()
            if (isinstance(node, h5py.Dataset) and node.ndim == 2)
            or (isinstance(node, h5py.Group) and "indptr" in node)
        }

    def _choose_matrix(self) -> tuple[str, Matrix]:
        asked = self.source.layer
        if asked is not None:
            if asked not in self._matrices:
                raise InputError(
                    self.source.path,
                    f"layer {asked!r} is not there",
                    f"use one of {', '.join(self._matrices) or 'none'}",
                )
            return asked, self._matrices[asked]
        usual = [name for name in ("X", "counts", "raw") if name in self._matrices]
        for name in usual:
            if self._matrices[name].looks_raw():
                return name, self._matrices[name]
        self.layer = " and ".join(usual) or "X"
        raise self._not_raw("has negative or fractional values" if usual else "is not there")

    def _not_raw(self, problem: str) -> InputError:
        others = [
            name
            for name, m in self._matrices.items()
            if name not in self.layer.split(" and ") and m.looks_raw()
        ]
        mend = (
            f"{others[0]} looks raw: give layer = {others[0]!r}"
            if others
            else "give the file its raw integer counts"
        )
        return InputError(self.source.path, f"{self.layer} {problem}, no raw counts", mend)

    def _check_shape(self) -> None:
        n_cells, n_genes = self.matrix.shape
        if not n_cells or not n_genes:
            raise InputError(
                self.source.path,
                f"{self.layer} is empty ({n_cells} cells x {n_genes} genes)",
                "leave the file out",
            )
        if (n_cells, n_genes) != (len(self.obs), len(self.gene_names)):
            raise InputError(
                self.source.path,
                f"{self.layer} is {n_cells} x {n_genes}, not obs x var",
                "write the file again",
            )
        if not self.obs.index.is_unique:
            double = self.obs.index[self.obs.index.duplicated()][0]
            raise InputError(
                self.source.path,
                f"obs_names holds {double!r} twice",
                "call obs_names_make_unique() and write it again",
            )

    def _obs_column(self, field: str, name: str) -> pd.Series:
        if name not in self.obs.columns:
            there = ", ".join(self.obs.columns.astype(str)) or "none"
            raise InputError(
                self.source.path, f"{field}: obs has no column {name!r}", f"use one of its columns: {there}"
            )
        return self.obs[name]

    def _sections(self) -> tuple[Int[np.ndarray, " n_cells"], list[str]]:
        """Number of each cell's section, and the sections' values, sorted."""
        if self.source.section is None:
            return np.zeros(len(self.obs), np.int64), [""]
        values = self._obs_column("section", self.source.section)
        if values.isna().any():
            raise InputError(
                self.source.path,
                f"obs[{self.source.section!r}] has missing values",
                "give every cell its section",
            )
        numbers, names = pd.factorize(values.astype(str).to_numpy(object), sort=True)
        return numbers, names.tolist()

    def _coordinates(self) -> Float[np.ndarray, "n_cells 2"] | None:
        if not self.source.spatial:
            return None
        where, key = self.source.path, self.source.coordinates
        if isinstance(key, str):
            field = f"obsm[{key!r}]"
            if f"obsm/{key}" not in self._file:
                there = ", ".join(self._file.get("obsm", ())) or "empty"
                raise InputError(
                    where,
                    f"{field}: no coordinates (obsm: {there})",
                    "give coordinates, or spatial = false for dissociated cells",
                )
            values = np.asarray(read_elem(self._file[f"obsm/{key}"]))
        else:
            field = f"obs[{key[0]!r}], obs[{key[1]!r}]"
            values = np.stack([self._obs_column("coordinates", name).to_numpy() for name in key], axis=1)
        if values.ndim != 2 or values.shape[1] < 2:
            raise InputError(where, f"{field} has shape {values.shape}", "give x and y of every cell")
        try:
            xy = values[:, :2].astype(np.float64)
        except (TypeError, ValueError):
            raise InputError(where, f"{field} is not numeric", "give x and y as numbers") from None
        bad = ~np.isfinite(xy).all(axis=1)
        if bad.any():
            raise InputError(
                where,
                f"{field} is not finite in {bad.sum()} cells, first {self.obs.index[int(np.argmax(bad))]!r}",
                "leave these cells out, or give spatial = false",
            )
        return xy


def _first_not_raw(values: Shaped[np.ndarray, " m"]) -> int | None:
    if values.dtype.kind in "ub" or not len(values):
        good = values <= _LARGEST
    elif values.dtype.kind == "i":
        good = (values >= 0) & (values <= _LARGEST)
    else:
        good = (values >= 0) & (values <= _LARGEST) & (np.rint(values) == values)
    return None if good.all() else int(np.argmin(good))
