"""Training runs of a scaling study as they stand in a results file: one JSON object a line.

The held-out loss of every run is that of the same centre cells, masked genes and panel, or runs cannot be
compared. Fields that are not listed here are left alone.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
from jaxtyping import Float64, Int64

from scfm_jax.errors import InputError
from scfm_jax.json_files import as_float, read_json_lines

SizeField = Literal["parameters_without_embeddings", "parameters"]
DataField = Literal["unique_cells", "cells", "tokens"]
_TEXT = ("name", "family")
_WHOLE = ("k", "seed")
_POSITIVE = (
    "parameters",
    "parameters_without_embeddings",
    "cells",
    "tokens",
    "unique_cells",
    "epochs",
    "flops",
)
# Runs alike in all of these are one and the same.
_SAME = (*_WHOLE, "parameters", "parameters_without_embeddings", "cells", "tokens", "unique_cells")
_MEND = "let scfm scaling run write it, or see docs/scaling.md for the fields"
_NAMED = 5  # runs in a message


@dataclass(frozen=True, eq=False)
class Runs:
    """Runs of one family, as columns.

    Attributes
    ----------
    name
        Of each run; no two are the same.
    family
        Of models, as ``tissue`` or ``nicheformer``.
    k
        Neighbours of a centre cell.
    parameters, parameters_without_embeddings
        Scalars that were trained.
    cells, tokens
        Centre cells and tokens that training went through, repeats counted.
    unique_cells
        Different cells that training read, neighbours included.
    epochs
        How often the training cells were seen, a fraction where not all were.
    flops
        Model FLOPs of the whole training.
    loss, loss_se
        Held-out loss, and its standard error over spatial blocks (NaN where it is not known).
    """

    name: tuple[str, ...]
    family: str
    seed: Int64[np.ndarray, " n"]
    k: Int64[np.ndarray, " n"]
    parameters: Float64[np.ndarray, " n"]
    parameters_without_embeddings: Float64[np.ndarray, " n"]
    cells: Float64[np.ndarray, " n"]
    tokens: Float64[np.ndarray, " n"]
    unique_cells: Float64[np.ndarray, " n"]
    epochs: Float64[np.ndarray, " n"]
    flops: Float64[np.ndarray, " n"]
    loss: Float64[np.ndarray, " n"]
    loss_se: Float64[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.name)

    def take(self, places: np.ndarray) -> Runs:
        """The runs at these places, or where a mask is true."""
        at = np.flatnonzero(places) if places.dtype == bool else places
        arrays = {
            field.name: getattr(self, field.name)[at]
            for field in fields(self)
            if field.name not in ("name", "family")
        }
        return replace(self, name=tuple(self.name[i] for i in at), **arrays)

    def rows(self) -> list[dict[str, Any]]:
        """As in the file."""
        columns = asdict(self) | {"name": list(self.name), "family": [self.family] * len(self)}
        listed = {key: value if isinstance(value, list) else value.tolist() for key, value in columns.items()}
        rows = [dict(zip(listed, row, strict=True)) for row in zip(*listed.values(), strict=True)]
        return [row | {"loss_se": None if math.isnan(row["loss_se"]) else row["loss_se"]} for row in rows]


def read_runs(
    path: Path,
    *,
    family: str | None = None,
    only: Sequence[str] = (),
    without: Sequence[str] = (),
    drop_nan: bool = False,
) -> tuple[Runs, list[str]]:
    """Read a results file; returns the runs, and the names of those that were dropped for their loss.

    Parameters
    ----------
    path
        JSON lines.
    family
        Whose runs to take, where the file has several.
    only, without
        Names of runs to take, all if there are none, and of runs to leave out, as `fnmatch` has it.
    drop_nan
        Leave runs out whose loss is no number, instead of refusing them.

    Raises
    ------
    InputError
        No file, no runs, a line that is no run, a field that is missing or of the wrong kind, a loss that is
        no number, the same run twice, several families, a name that no run has.
    """
    rows = {
        number: checked_row(row, f"{path}:{number}") for number, row in read_json_lines(path, _MEND).items()
    }
    families = sorted({row["family"] for row in rows.values()})
    if family is not None:
        rows = {number: row for number, row in rows.items() if row["family"] == family}
        if not rows:
            raise InputError(
                path, f"has no runs of family {family!r}", f"ask for one of {', '.join(families)}"
            )
    rows = _chosen(rows, only, without, path)
    if len({row["family"] for row in rows.values()}) > 1:
        raise InputError(
            path, f"holds runs of {len(families)} families", f"add --family {'|'.join(families)}"
        )
    if not rows:
        raise InputError(path, "holds no runs", _MEND)
    lost = {number: row["name"] for number, row in rows.items() if not math.isfinite(row["loss"])}
    if lost and not drop_nan:
        problem = f"loss is no number in {_listed([f'{name} (line {n})' for n, name in lost.items()])}"
        raise InputError(path, problem, "add --drop-nan to leave them out")
    kept = {number: row for number, row in rows.items() if number not in lost}
    _check_different(kept, path)
    return runs_of(list(kept.values()), path), list(lost.values())


def _chosen(
    rows: dict[int, dict[str, Any]], only: Sequence[str], without: Sequence[str], path: Path
) -> dict[int, dict[str, Any]]:
    for flag, patterns in (("--only", only), ("--without", without)):
        for pattern in patterns:
            if not any(fnmatchcase(row["name"], pattern) for row in rows.values()):
                raise InputError(flag, f"no run of {path} is named {pattern}", "give names, * for anything")
    return {
        number: row
        for number, row in rows.items()
        if (not only or any(fnmatchcase(row["name"], pattern) for pattern in only))
        and not any(fnmatchcase(row["name"], pattern) for pattern in without)
    }


def runs_of(rows: list[dict[str, Any]], where: Path | str) -> Runs:
    """Columns of checked rows of one family.

    Raises
    ------
    InputError
        There are none.
    """
    if not rows:
        raise InputError(where, "holds no run with a loss", "train again, or give another file")
    return Runs(
        name=tuple(row["name"] for row in rows),
        family=rows[0]["family"],
        **{field: np.array([row[field] for row in rows], np.int64) for field in _WHOLE},
        **{field: np.array([row[field] for row in rows], np.float64) for field in (*_POSITIVE, "loss")},
        loss_se=np.array([math.nan if row["loss_se"] is None else row["loss_se"] for row in rows]),
    )


def checked_row(row: dict[str, Any], where: str) -> dict[str, Any]:
    """A row with a value of the right kind in each field; a loss that is no number is NaN or infinite.

    Raises
    ------
    InputError
        A field that is missing or of the wrong kind.
    """
    missing = [field.name for field in fields(Runs) if field.name not in row]
    if missing:
        raise InputError(where, f"lacks {', '.join(missing)}", _MEND)

    def refuse(field: str, problem: str, mend: str = _MEND) -> NoReturn:
        raise InputError(where, f"{field} is {reprlib.repr(row[field])}{problem}", mend)

    for field in _TEXT:
        if not isinstance(row[field], str) or not row[field].isprintable() or not row[field]:
            refuse(field, ", no name")
    for field in _WHOLE:
        if not isinstance(row[field], int) or isinstance(row[field], bool) or not 0 <= row[field] < 2**63:
            refuse(field, ", no whole number from 0 (or one of more than 63 bits)")
    numbers = {field: as_float(row[field]) for field in (*_POSITIVE, "loss", "loss_se")}
    for field in _POSITIVE:
        if not 0 < (numbers[field] or 0) < math.inf:
            refuse(field, ", no number above 0")
    if row["loss"] is None:
        numbers["loss"] = math.nan
    if (loss := numbers["loss"]) is None or loss <= 0:
        refuse("loss", "; its logarithm is fitted", "give losses above 0")
    error = numbers["loss_se"]
    if row["loss_se"] is not None and (error is None or not 0 <= error < math.inf):
        refuse("loss_se", ", no number from 0", "give one, or null")
    return row | numbers


def _check_different(rows: dict[int, dict[str, Any]], path: Path) -> None:
    """Refuse two rows of one name, or of one run; what a run cost may be counted in several ways."""
    mend = "take one of them out"
    names, same = dict[str, int](), dict[tuple[Any, ...], int]()
    for number, row in rows.items():
        name, key = row["name"], tuple(row[field] for field in _SAME)
        if (line := names.setdefault(name, number)) != number:
            raise InputError(f"{path}:{number}", f"name {name!r} stands on line {line} too", mend)
        if (line := same.setdefault(key, number)) != number:
            problem = (
                f"{name!r} is the same run as {rows[line]['name']!r} on line {line} (size, data, k and seed)"
            )
            raise InputError(f"{path}:{number}", problem, mend)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
