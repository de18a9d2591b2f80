"""Gene names and tables of names, as they lie in files; what they mean is for `scfm_jax.genes` to say."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np

from scfm_jax.errors import InputError

_HEADER_WORDS = {"alias", "ensembl", "gene", "human", "id", "index", "mouse", "name", "symbol"}
_NAME_COLUMNS = ("gene_name", "gene", "symbol", "id")


def read_names(path: Path) -> list[str] | Mapping[str, Any]:
    """Read an ordered list of gene names.

    Parameters
    ----------
    path
        `.tsv`, `.csv`, `.json` or `.h5ad`, as `scfm_jax.genes.Vocabulary.read` says.

    Returns
    -------
    list of str or mapping
        The names; or, of a JSON object with a field `ids`, the object (a saved vocabulary).

    Raises
    ------
    InputError
        If the file cannot be read, has another extension, or its index is not 0 to n - 1.
    """
    reader = _NAME_READERS.get(path.suffix.lower())
    if reader is None:
        known = ", ".join(_NAME_READERS)
        raise InputError(path, f"no vocabulary has the extension {path.suffix!r}", f"give one of {known}")
    return reader(path)


def read_pairs(path: Path) -> Iterator[tuple[int, str, str]]:
    """Read the line number and the first two columns of each row of a `.csv` or `.tsv`, less its header.

    Raises
    ------
    InputError
        If the file cannot be read, has another extension, or a row has fewer than two columns.
    """
    if path.suffix.lower() not in (".csv", ".tsv"):
        raise InputError(path, f"no table of genes has the extension {path.suffix!r}", "give a .csv or .tsv")
    for line, row in _read_table(path)[1]:
        if len(row) < 2:
            raise InputError(
                path, f"line {line} has fewer than two columns", "separate them as its extension says"
            )
        yield line, row[0], row[1]


def _read_table(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Header (empty where there is none) and, with their line numbers, the rows."""
    try:
        # Spreadsheets leave a byte-order mark, which would else become part of the first gene's name.
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
            rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(path, f"it cannot be read ({error})", "give a readable table in UTF-8") from error
    if not rows:
        raise InputError(path, "it is empty", "give a table with a row for each gene")
    first = rows[0][1]
    words = {word for cell in first for word in re.split(r"[\W_]+", cell.lower())}
    return (first, rows[1:]) if words & _HEADER_WORDS else ([], rows)


def _names_in_table(path: Path) -> list[str]:
    header, rows = _read_table(path)
    columns = {cell.lower(): column for column, cell in reversed([*enumerate(header)])}
    column = next((columns[name] for name in _NAME_COLUMNS if name in columns), 0)
    order = columns.get("index", column)
    for line, row in rows:
        if len(row) <= max(column, order):
            raise InputError(
                path, f"line {line} has {len(row)} columns", "give every row those of the header"
            )
    names = [row[column] for _, row in rows]
    return names if order == column else _in_order(path, names, [row[order] for _, row in rows])


def _names_in_json(path: Path) -> list[str] | Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(path, f"it cannot be read ({error})", "give a readable JSON file") from error
    if isinstance(content, dict):
        return content if "ids" in content else _in_order(path, list(content), list(content.values()))
    if not isinstance(content, list) or not all(isinstance(name, str) for name in content):
        raise InputError(path, "it is no list of names", 'give ["A1BG", ...] or {"A1BG": 0, ...}')
    return content


def _names_in_h5ad(path: Path) -> list[str]:
    try:
        # Only `var` is read: the file may hold millions of cells.
        with h5py.File(path) as file:
            return [str(name) for name in anndata.io.read_elem(file["var"]).index]
    except Exception as error:  # h5py and anndata raise many kinds for what is no whole AnnData
        raise InputError(path, f"its var cannot be read ({error})", "give a whole AnnData .h5ad") from error


def _in_order(path: Path, names: list[str], indices: Sequence[object]) -> list[str]:
    try:
        order = np.asarray([str(index) for index in indices]).astype(np.int64)
    except ValueError:
        order = np.full(len(names), -1)
    if not np.array_equal(np.sort(order), np.arange(len(names))):
        raise InputError(
            path, f"index does not count 0 to {len(names) - 1}", "number every gene once, from 0"
        )
    return [names[row] for row in np.argsort(order)]


_NAME_READERS: dict[str, Callable[[Path], list[str] | Mapping[str, Any]]] = {
    ".tsv": _names_in_table,
    ".csv": _names_in_table,
    ".json": _names_in_json,
    ".h5ad": _names_in_h5ad,
}
