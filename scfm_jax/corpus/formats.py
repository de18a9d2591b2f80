"""The formats that cells come in: one function each, which opens a file and says where things lie in it.

`.h5ad`, AnnData as a zarr folder, a table of a SpatialData folder, and 10x's `.h5` with the cell table of a
Xenium or CosMx beside it. What they give, an `Opened`, looks the same for all.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import zarr
from anndata.io import read_elem

from scfm_jax.corpus.cell_table import find_cell_table, match_cells, read_cell_table
from scfm_jax.corpus.matrix import Matrix, check_whole
from scfm_jax.corpus.sources import Source
from scfm_jax.errors import InputError

DAMAGED = (OSError, RuntimeError, ValueError, EOFError, zlib.error)
UNREADABLE = (*DAMAGED, KeyError, IndexError, TypeError, AttributeError, NotImplementedError)
_GENES = "Gene Expression"


@dataclass(frozen=True)
class Opened:
    """An open file: its matrices by name, its cells, and how to read the rest.

    ``paths`` are the files and folders it was read from. ``coordinates`` are the columns of `obs` that hold
    them where the source names none, ``region`` is the column that names the tissue of a cell, ``excluded``
    counts the features left out by their type, and ``doubts`` are warnings.
    """

    kind: str
    paths: tuple[Path, ...]
    close: Callable[[], None]
    matrices: dict[str, Matrix]
    obs: pd.DataFrame
    gene_names: Callable[[str], list[str]]
    obsm: tuple[str, ...]
    read_obsm: Callable[[str], Any]
    coordinates: tuple[str, str] | None
    region: str | None
    excluded: dict[str, int]
    doubts: tuple[str, ...]


def open_source(source: Source) -> Opened:
    """Open a source, whatever its format.

    Raises
    ------
    InputError
        It is not there, of no known format or damaged, or the source has a field that its format has not.
    """
    path = Path(source.path)
    if path.is_dir():
        return _open_zarr(source, path)
    if source.table is not None:
        raise InputError(path, f"table is {source.table!r}, but it is no SpatialData folder", "leave it out")
    if not path.exists():
        raise InputError(path, "there is no such file", "give the path of an .h5ad, .zarr or 10x .h5 file")
    if path.suffix == ".h5":
        return _open_10x(source, path)
    if path.suffix != ".h5ad":
        raise InputError(
            path,
            f"{path.suffix or 'no extension'} is no known format",
            "give an .h5ad, .zarr or 10x .h5 file",
        )
    _no_cells(source, "an .h5ad")
    kind = "an AnnData file"
    with _open_hdf5(path, kind) as file:
        return _of_anndata(file, kind, path, file.close)


@contextlib.contextmanager
def telling(where: object, problem: str, errors: tuple[type[BaseException], ...]) -> Iterator[None]:
    """Turn what a library raises over a bad file into an `InputError`."""
    try:
        yield
    except InputError:
        raise
    except errors as error:
        raise InputError(where, f"{problem} ({error})", "write or copy it again") from None


@contextlib.contextmanager
def _open_hdf5(path: Path, kind: str) -> Iterator[h5py.File]:
    """Open an HDF5 file, and close it again if it turns out bad."""
    with (
        telling(path, f"it cannot be read as {kind}, or is truncated", UNREADABLE),
        contextlib.ExitStack() as stack,
    ):
        yield stack.enter_context(h5py.File(path))
        stack.pop_all()


def _of_anndata(
    group: Any, kind: str, path: Path, close: Callable[[], None], region: str | None = None
) -> Opened:
    """Say where things lie in an AnnData element, of HDF5 or of zarr."""
    layers = group.get("layers", {})
    nodes = {"X": group.get("X"), "raw": group.get("raw/X"), **{name: layers[name] for name in layers}}
    found = {name: Matrix.of_anndata(node) for name, node in nodes.items()}

    def gene_names(layer: str) -> list[str]:
        return [str(name) for name in read_elem(group["raw/var" if layer == "raw" else "var"]).index]

    def read_obsm(key: str) -> Any:
        check_whole(group[f"obsm/{key}"])
        return read_elem(group[f"obsm/{key}"])

    return Opened(
        kind=kind,
        paths=(path,),
        close=close,
        matrices={name: matrix for name, matrix in found.items() if matrix is not None},
        obs=read_elem(group["obs"]),
        gene_names=gene_names,
        obsm=tuple(group.get("obsm", ())),
        read_obsm=read_obsm,
        coordinates=None,
        region=region,
        excluded={},
        doubts=(),
    )


def _open_zarr(source: Source, path: Path) -> Opened:
    _no_cells(source, "a zarr folder")
    try:
        # Metadata put together at the root may be older than the tables.
        group = zarr.open_group(path, mode="r", use_consolidated=False)
    except FileNotFoundError:
        mend = "give an AnnData or SpatialData .zarr, or a file in this folder"
        raise InputError(path, "it is a folder, but no zarr group", mend) from None
    except UNREADABLE as error:
        raise InputError(path, f"it cannot be read as zarr ({error})", "write or copy it again") from None
    kind = "an AnnData zarr folder"
    with telling(path, f"it cannot be read as {kind}, or is truncated", UNREADABLE):
        if "tables" in group and "obs" not in group:
            return _open_table(source, path, group["tables"])
        if source.table is not None:
            raise InputError(
                path, f"table is {source.table!r}, but it is no SpatialData folder", "leave it out"
            )
        return _of_anndata(group, kind, path, lambda: None)


def _open_table(source: Source, path: Path, tables: Any) -> Opened:
    """Open a table of a SpatialData folder."""
    names = sorted(tables.group_keys())
    listed = ", ".join(names)
    if not names:
        raise InputError(path, "it is a SpatialData folder without tables", "leave it out")
    if source.table is None and len(names) > 1:
        raise InputError(path, f"it holds {len(names)} tables", f"give table, one of {listed}")
    name = names[0] if source.table is None else source.table
    if name not in names:
        raise InputError(path, f"table {name!r} is not there", f"use one of {listed}")
    attributes = tables[name].get("uns/spatialdata_attrs")
    region = None if attributes is None else str(read_elem(attributes).get("region_key"))
    return _of_anndata(tables[name], "a SpatialData table", path / "tables" / name, lambda: None, region)


def _open_10x(source: Source, path: Path) -> Opened:
    """Open a 10x `.h5`: cells x features in CSR, by its barcodes, with the table of cells beside it."""
    kind = "a 10x .h5 file"
    with _open_hdf5(path, kind) as file:
        if not isinstance(file.get("matrix"), h5py.Group):
            mend = "give what Cell Ranger 3 (or newer) or Xenium wrote; name an AnnData file .h5ad"
            raise InputError(path, "it has no group 'matrix'", mend)
        group = file["matrix"]
        lacking = [
            name
            for name in (
                "barcodes",
                "features/name",
                "features/feature_type",
                "data",
                "indices",
                "indptr",
                "shape",
            )
            if name not in group
        ]
        if lacking:
            raise InputError(path, f"its matrix lacks {', '.join(lacking)}", "write or copy it again")
        barcodes = pd.Index(group["barcodes"].asstr()[:])
        names, types = (group[f"features/{field}"].asstr()[:] for field in ("name", "feature_type"))
        n_features, n_cells = (int(n) for n in group["shape"][:])
        if (n_features, n_features, n_cells) != (len(names), len(types), len(barcodes)):
            problem = f"its matrix is {n_features} x {n_cells}, but there are {len(names)} feature names, "
            problem += f"{len(types)} feature types and {len(barcodes)} barcodes"
            raise InputError(path, problem, "write or copy it again")
        if not barcodes.is_unique:
            twice = barcodes[barcodes.duplicated()][0]
            raise InputError(path, f"barcodes holds {twice!r} twice", "give every cell a barcode of its own")
        is_gene = types == _GENES
        kinds, numbers = np.unique(types[~is_gene].astype(str), return_counts=True)
        if not is_gene.any():
            there = ", ".join(kinds) or "none"
            raise InputError(path, f"no feature is {_GENES} (there are: {there})", "leave the file out")
        table = find_cell_table(source)
        if table is None and source.spatial:
            raise InputError(
                path,
                "no cell table with coordinates is beside it (cells.parquet, cells.csv.gz or *metadata*.csv)",
                "put it there, give cells, or give spatial = false for dissociated cells",
            )
        obs, coordinates, doubts = pd.DataFrame(index=barcodes), None, list[str]()
        if table is not None:
            obs, coordinates, doubts = match_cells(read_cell_table(table), table, barcodes)
        column_of = np.where(is_gene, np.cumsum(is_gene) - 1, -1).astype(np.int32)
        return Opened(
            kind=kind,
            paths=(path,) if table is None else (path, table),
            close=file.close,
            matrices={"X": Matrix(group, "csr", (n_cells, n_features), None if is_gene.all() else column_of)},
            obs=obs,
            gene_names=lambda layer: [str(name) for name in names[is_gene]],
            obsm=(),
            read_obsm=lambda key: None,
            coordinates=coordinates,
            region=None,
            excluded=dict(zip(kinds.tolist(), numbers.tolist())),
            doubts=tuple(doubts),
        )


def _no_cells(source: Source, what: str) -> None:
    if source.cells is not None:
        raise InputError(
            source.path, f"cells is {source.cells!r}, but {what} has its cells in obs", "leave it out"
        )
