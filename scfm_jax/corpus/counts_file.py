"""One file of cells, read without loading it: its raw counts as a stream, and what ``obs`` says of its cells.

Only what there is one of for each cell or gene is held in memory. What differs between formats lies in
`scfm_jax.corpus.formats`; here all of them are alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int, Int32, Int64, Shaped
from scipy import sparse

from scfm_jax.corpus.formats import DAMAGED, UNREADABLE, Opened, open_source, telling
from scfm_jax.corpus.matrix import Entries, Matrix
from scfm_jax.corpus.sources import Source
from scfm_jax.errors import InputError

_PEEK = 1 << 16
_LARGEST = np.iinfo(np.int32).max
_MISSING = ("", "nan", "NaN", "None", "NA", "<NA>")
_PIECE_COLUMN = r"(?i)^(section|sample|slide|z)(_?(id|name|key|index))?$"


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
    """A file opened for its raw counts.

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
        self._opened: Opened = open_source(source)
        self.obs: pd.DataFrame = self._opened.obs
        self.excluded: dict[str, int] = self._opened.excluded
        with telling(source.path, f"it cannot be read as {self._opened.kind}, or is truncated", UNREADABLE):
            self.layer, self.matrix = self._choose_matrix()
            self.gene_names = self._opened.gene_names(self.layer)
        self._check_shape()
        self.section_of, self.sections = self._sections()
        self.coordinates = self._coordinates()

    def close(self) -> None:
        """Close the file."""
        self._opened.close()

    def fingerprint(self) -> dict[str, Any]:
        """Tell the state of what was read, file or folder by name: bytes, number of files, newest change."""
        states = {}
        for path in self._opened.paths:
            files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
            stats = [file.stat() for file in files]
            states[path.name] = {
                "bytes": sum(stat.st_size for stat in stats),
                "files": len(stats),
                "modified_ns": max(stat.st_mtime_ns for stat in stats),
            }
        return states

    def entries(self, rows: Int[np.ndarray, " wanted"] | None = None) -> Iterator[Entries]:
        """Yield the counts that are not zero, in the file's order; values are checked raw counts, int32.

        ``rows`` are the cells wanted, ascending; all if None.
        """
        with telling(self.source.path, f"{self.layer} cannot be read, the file is damaged", DAMAGED):
            for found, columns, values in self.matrix.entries(rows):
                counts = _as_counts(values)
                if counts is None:
                    bad = int(np.argmin(_is_count(values)))
                    raise self._not_raw(f"holds {values[bad]} in cell {self.obs.index[found[bad]]!r}")
                yield Entries(found, columns, counts)

    def totals(self, target: Int[np.ndarray, " n_genes"]) -> Totals:
        """Pass over all counts once, checking them; ``target`` is -1 for a gene that is not carried along."""
        n_cells, n_genes = self.matrix.shape
        cells = np.zeros((3, n_cells), np.int64)
        gene = np.zeros(n_genes, np.int64)
        has_target = target >= 0
        for rows, columns, values in self.entries():
            if not len(rows):
                continue
            matched = has_target.take(columns)
            low, high = int(rows.min()), int(rows.max()) + 1
            for total, weights in zip(cells, (values, values * matched, matched.view(np.int8))):
                total[low:high] += _sums(rows - low, weights, high - low)
            gene += _sums(columns, values, n_genes)
        if cells[0].max() > _LARGEST:
            raise self._not_raw(f"gives cell {self.obs.index[cells[0].argmax()]!r} {cells[0].max()} counts")
        cell_raw, cell_matched, cell_entries = cells.astype(np.int32)
        return Totals(cell_raw, cell_matched, cell_entries, gene)

    def label(self, name: str) -> tuple[Int[np.ndarray, " n"], list[str]]:
        """Return codes (-1 where missing) and sorted classes of a column of ``obs``."""
        values = self._obs_column("labels", name)
        text = values.astype(str).to_numpy(object)
        missing = values.isna().to_numpy() | np.isin(text, _MISSING)
        classes, codes = np.unique(text[~missing].astype(str), return_inverse=True)
        filled = np.full(len(text), -1, np.int32)
        filled[~missing] = codes
        return filled, classes.tolist()

    def warnings(self) -> list[str]:
        """Say what looks odd: cells left out, and pieces within what was given as one section."""
        if not self.source.spatial:
            return list(self._opened.doubts)
        names = self.obs.columns.astype(str)
        columns = self.obs.columns[names.str.match(_PIECE_COLUMN) | (names == self._opened.region)]
        several = {name: self.obs[name].groupby(self.section_of).nunique().max() for name in columns}
        return list(self._opened.doubts) + [
            f"obs[{name!r}] has {n} values in one section: give it as section if they are pieces of tissue"
            for name, n in several.items()
            if n > 1
        ]

    def _choose_matrix(self) -> tuple[str, Matrix]:
        asked = self.source.layer
        if asked is not None:
            if asked not in self._opened.matrices:
                raise InputError(
                    self.source.path,
                    f"layer {asked!r} is not there",
                    f"use one of {', '.join(self._opened.matrices) or 'none'}",
                )
            return asked, self._opened.matrices[asked]
        usual = [name for name in ("X", "counts", "raw") if name in self._opened.matrices]
        for name in usual:
            if _looks_raw(self._opened.matrices[name]):
                return name, self._opened.matrices[name]
        self.layer = " and ".join(usual) or "X"
        raise self._not_raw("has negative or fractional values" if usual else "is not there")

    def _not_raw(self, problem: str) -> InputError:
        others = [
            name
            for name, m in self._opened.matrices.items()
            if name not in self.layer.split(" and ") and _looks_raw(m)
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
        if key == "spatial" and self._opened.coordinates:
            key = self._opened.coordinates
        if isinstance(key, str):
            field = f"obsm[{key!r}]"
            if key not in self._opened.obsm:
                there = ", ".join(self._opened.obsm) or "empty"
                raise InputError(
                    where,
                    f"{field}: no coordinates (obsm: {there})",
                    "give coordinates, or spatial = false for dissociated cells",
                )
            with telling(where, f"{field} cannot be read, the file is damaged", UNREADABLE):
                values = np.asarray(self._opened.read_obsm(key))
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


def _is_count(values: Shaped[np.ndarray, " m"]) -> Bool[np.ndarray, " m"]:
    return (values >= 0) & (values < _LARGEST) & (np.rint(values) == values)


def _as_counts(values: Shaped[np.ndarray, " m"]) -> Int32[np.ndarray, " m"] | None:
    """Return the values as int32, or None where one of them is no count."""
    with np.errstate(invalid="ignore"):
        counts = values.astype(np.int32)
    if not len(counts):
        return counts
    # A number out of range becomes negative or, on some machines, the largest there is.
    good = counts.min() >= 0 and counts.max() < _LARGEST and (counts.astype(values.dtype) == values).all()
    return counts if good else None


def _looks_raw(matrix: Matrix) -> bool:
    """Tell whether the first values are raw counts."""
    first = next(matrix.entries(at_once=_PEEK), None)
    return first is None or _as_counts(first.values) is not None


def _sums(keys: Int[np.ndarray, " m"], weights: Int[np.ndarray, " m"], n: int) -> Int64[np.ndarray, " n"]:
    """Sum the weights of each key: `numpy.bincount` in whole numbers, in a quarter of the time."""
    column = np.array([0, len(keys)], np.int32)  # int64 would have all keys copied
    return sparse.csc_array((weights, keys, column), (n, 1)) @ np.ones(1, np.int64)
