"""What goes into a corpus: one ``Source`` a file, from flags or from a ``sources.toml``."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeGuard

from scfm_jax.errors import InputError


@dataclass(frozen=True)
class Source:
    """One file of cells and how to read it.

    Parameters
    ----------
    path
        An ``.h5ad`` file, a ``.zarr`` folder of AnnData or SpatialData, or a 10x ``.h5`` file.
    species
        ``"human"``, ``"mouse"`` or another lower-case name.
    technology
        Name of the technology, such as ``"merfish"``.
    layer
        Where the raw counts lie: ``"X"``, ``"raw"`` or the name of a layer. ``None`` takes the first of
        ``X``, ``layers["counts"]`` and ``raw`` that holds raw counts.
    spatial
        ``False`` for dissociated cells, which have no coordinates and no neighbours.
    coordinates
        Key of ``obsm`` whose first two columns are x and y, or the names of two columns of ``obs``.
    section
        Column of ``obs`` that tells pieces of tissue apart; neighbours never cross it. Each value becomes a
        slide.
    labels
        Columns of ``obs`` to carry along as class labels.
    um_per_unit
        Length of one coordinate unit in µm; ``None`` where it is not known.
    max_radius
        Greatest distance of a neighbour, in µm; it needs ``um_per_unit``. ``None`` sets no limit.
    tissue
        Name of the tissue, for sampling weights.
    modality
        ``"spatial"`` or ``"dissociated"``: what the technology measures. If "", `spatial` says it; but a
        subsample of a section has no neighbours, and is of a spatial modality all the same.
    table
        Name of the table in a SpatialData folder; it may be left out where there is one only.
    cells
        The table of cells of a 10x file, where it does not lie beside it under its usual name.
    name
        Name of the slide, in place of the file's stem.

    Raises
    ------
    InputError
        A blank species, technology or name, a length that is not positive, or ``max_radius`` without
        ``um_per_unit``.
    """

    path: str
    species: str
    technology: str
    layer: str | None = None
    spatial: bool = True
    coordinates: str | tuple[str, str] = "spatial"
    section: str | None = None
    labels: tuple[str, ...] = ()
    um_per_unit: float | None = None
    max_radius: float | None = None
    tissue: str = ""
    modality: Literal["", "spatial", "dissociated"] = ""
    table: str | None = None
    cells: str | None = None
    name: str | None = None

    @property
    def stem(self) -> str:
        """What the names of its slides begin with."""
        return self.name or Path(self.path).stem

    def absolute(self) -> Source:
        """The same, for a process in another working directory."""
        cells = None if self.cells is None else str(Path(self.cells).absolute())
        return replace(self, path=str(Path(self.path).absolute()), cells=cells)

    def __post_init__(self) -> None:
        for name in ("species", "technology", "name"):
            value = getattr(self, name)
            if value is not None and (not value.strip() or "/" in value):
                raise InputError(self.path, f"{name} is {value!r}", f"name the {name}, without a slash")
        if self.modality not in ("", "spatial", "dissociated"):
            raise InputError(
                self.path, f"modality is {self.modality!r}", "give spatial or dissociated, or leave it out"
            )
        for name in ("um_per_unit", "max_radius"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise InputError(self.path, f"{name} is {value}", f"give a positive {name} or leave it out")
        if self.max_radius is not None and self.um_per_unit is None:
            raise InputError(
                self.path, "max_radius is in µm but um_per_unit is not known", "give um_per_unit too"
            )


def read_sources(toml_path: str | Path) -> list[Source]:
    """Read a ``sources.toml``: one ``[[source]]`` table a file, with the fields of `Source`.

    Parameters
    ----------
    toml_path
        The file. Relative paths in it start from its folder.

    Raises
    ------
    InputError
        The file cannot be read, has no source, or a source has an unknown, missing or mistyped field.
    """
    toml_path = Path(toml_path)
    try:
        tables = tomllib.loads(toml_path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(toml_path, f"it cannot be read as TOML ({error})", "give a sources.toml") from None
    entries = tables.get("source")
    if not isinstance(entries, list) or not entries or set(tables) != {"source"}:
        found = ", ".join(sorted(tables)) or "nothing"
        raise InputError(
            toml_path, f"it holds {found}", "give one [[source]] table for each file, and nothing else"
        )
    return [
        source_from_table(f"{toml_path} [[source]] {number}", toml_path.parent, entry)
        for number, entry in enumerate(entries, 1)
    ]


def source_from_table(where: str, folder: Path, table: dict[str, Any]) -> Source:
    """A source from a table of a TOML file in `folder`; `where` names the table in messages."""
    known = [field.name for field in fields(Source)]
    for name in table:
        if name not in known:
            raise InputError(where, f"unknown field {name!r}", f"use one of {', '.join(known)}")
    for name in ("path", "species", "technology"):
        if name not in table:
            raise InputError(where, f"field {name!r} is missing", f"add {name} = ...")
    for name, value in table.items():
        if not _fits(name, value):
            raise InputError(where, f"field {name!r} is {value!r}", f"give {_EXPECTED[name]}")
    read: dict[str, Any] = {
        n: tuple(value) if isinstance(value, list) else value for n, value in table.items()
    }
    for name in {"path", "cells"} & set(read):
        read[name] = str(folder / read[name])
    return Source(**read)


_TEXT, _NUMBER = "a text", "a number"
_EXPECTED = {
    **dict.fromkeys(("path", "species", "technology", "layer", "section", "tissue"), _TEXT),
    **dict.fromkeys(("table", "cells", "name"), _TEXT),
    "modality": "spatial or dissociated",
    **dict.fromkeys(("um_per_unit", "max_radius"), _NUMBER),
    "spatial": "true or false",
    "coordinates": "a key of obsm or two columns of obs",
    "labels": "a list of columns of obs",
}


def _fits(name: str, value: object) -> bool:
    if name == "spatial":
        return isinstance(value, bool)
    if _EXPECTED[name] == _NUMBER:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if name == "labels":
        return _is_texts(value)
    if name == "coordinates":
        return isinstance(value, str) or (_is_texts(value) and len(value) == 2)
    return isinstance(value, str)


def _is_texts(value: object) -> TypeGuard[Sequence[str]]:
    return (
        isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(v, str) for v in value)
    )
