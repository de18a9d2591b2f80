"""The table of cells beside a 10x matrix: where it lies, and which of its rows belongs to which barcode.

Xenium writes `cells.parquet` and `cells.csv.gz` (`cell_id`, and centroids in µm), CosMx a metadata CSV (field
of view and number of a cell in it, and centres in pixels).
"""

from __future__ import annotations

import zlib
from pathlib import Path

import pandas as pd

from scfm_jax.corpus.sources import Source
from scfm_jax.errors import InputError

_XENIUM = ("cells.parquet", "cells.csv.gz", "cells.csv")
_COORDINATES = (("x_centroid", "y_centroid"), ("CenterX_global_px", "CenterY_global_px"))
_IDS = ("cell_id", "cell", "cell_ID")


def find_cell_table(source: Source) -> Path | None:
    """Return the cell table that a source names, or else the one beside its file; None if there is none."""
    if source.cells is not None:
        if not Path(source.cells).is_file():
            raise InputError(source.cells, "cells: there is no such file", "give the path of the cell table")
        return Path(source.cells)
    folder = Path(source.path).parent
    for name in _XENIUM:
        if (folder / name).is_file():
            return folder / name
    found = sorted(
        p for p in folder.glob("*metadata*") if p.name.endswith((".csv", ".csv.gz")) and p.is_file()
    )
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise InputError(
            source.path, f"several cell tables are beside it: {names}", "give cells, one of them"
        )
    return found[0] if found else None


def read_cell_table(path: Path) -> pd.DataFrame:
    """Read a `.parquet`, `.csv` or `.csv.gz`.

    Raises
    ------
    InputError
        It cannot be read, or pyarrow is not installed.
    """
    if not path.name.endswith((".parquet", ".csv", ".csv.gz")):
        raise InputError(path, "it is no known kind of cell table", "give a .parquet, .csv or .csv.gz")
    try:
        if path.suffix == ".parquet":
            return pd.read_parquet(path, engine="pyarrow")
        return pd.read_csv(path, dtype=dict.fromkeys((*_IDS, "fov"), str), low_memory=False)
    except ImportError:
        mend = "pip install 'scfm_jax[xenium]', or give cells, a .csv.gz"
        raise InputError(path, "pyarrow is needed to read it", mend) from None
    except (OSError, ValueError, EOFError, zlib.error, NotImplementedError) as error:
        raise InputError(path, f"it cannot be read as a table ({error})", "write or copy it again") from None


def match_cells(
    table: pd.DataFrame, path: Path, barcodes: pd.Index
) -> tuple[pd.DataFrame, tuple[str, str] | None, list[str]]:
    """Order a table as the barcodes.

    The barcodes may be the column `cell_id`, `cell` or `cell_ID`, or `fov` and `cell_ID` joined by an
    underscore in either order.

    Parameters
    ----------
    table
        Read from `path`.
    path
        For errors.
    barcodes
        Unique.

    Returns
    -------
    A row for each barcode; the columns with its coordinates, if they are known ones; what is suspicious.

    Raises
    ------
    InputError
        The table has no such columns, or they do not match the barcodes in one way.
    """
    candidates = {name: _texts(table[name]) for name in _IDS if name in table}
    if {"fov", "cell_ID"} <= set(table):
        fov, number = _texts(table["fov"]), _texts(table["cell_ID"])
        candidates |= {"fov_cell_ID": fov + "_" + number, "cell_ID_fov": number + "_" + fov}
    if not candidates:
        there = ", ".join(table.columns.astype(str))
        mend = "give Xenium's cells.parquet or cells.csv.gz, or CosMx's metadata"
        raise InputError(path, f"no column cell_id, nor fov and cell_ID (there are: {there})", mend)
    rows = {name: pd.Index(ids).get_indexer(barcodes) for name, ids in candidates.items() if ids.is_unique}
    if not rows:
        name, ids = next(iter(candidates.items()))
        twice = ids[ids.duplicated()].iloc[0]
        raise InputError(path, f"{name} holds {twice!r} twice", "give every cell a row of its own")
    name = min(rows, key=lambda name: int((rows[name] < 0).sum()))
    found = rows[name]
    if (found < 0).any():
        missing = barcodes[found < 0]
        problem = (
            f"{len(missing):,} of {len(barcodes):,} barcodes are not in its {name}, first {missing[0]!r}"
        )
        raise InputError(path, problem, "give the cell table of the same run")
    for other, rival in rows.items():
        if (rival >= 0).all() and (rival != found).any():
            mend = "add a column 'cell' with the barcodes, and drop 'cell_ID'"
            raise InputError(
                path, f"the barcodes are in its {name} and in its {other}, in another order", mend
            )
    coordinates = next((names for names in _COORDINATES if set(names) <= set(table)), None)
    spare = len(table) - len(barcodes)
    doubts = [f"{spare:,} of {len(table):,} cells in {path.name} have no barcode"] if spare else []
    return table.iloc[found].set_index(barcodes), coordinates, doubts


def _texts(ids: pd.Series) -> pd.Series:
    """Ids as text; older Xenium files hold bytes."""
    is_bytes = len(ids) and isinstance(ids.iloc[0], bytes)
    return ids.str.decode("utf-8") if is_bytes else ids.astype(str)
