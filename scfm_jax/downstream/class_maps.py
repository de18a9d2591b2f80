"""Class maps: the classes of files that were labelled apart, as classes that they share.

A map is a TOML file with one table a side (a file, or files whose labels were named alike)::

    classes = ["Astrocyte", "Oligodendrocyte"]     # the shared classes, in their order
    about = "whose map it is, and from where"      # optional

    [merfish]
    left_out = ["Ambiguous"]                       # optional: classes that become no class
    [merfish.classes]
    Astrocyte = ["Astrocyte"]
    Oligodendrocyte = ["OD Mature 1", "OD Mature 2"]

A side need not have all shared classes. It must say of every class of its labels what becomes of it.
"""

from __future__ import annotations

import tomllib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scfm_jax.errors import InputError


@dataclass(frozen=True)
class ClassMap:
    """One side of a class map.

    Attributes
    ----------
    where
        The file and the side, for messages.
    classes
        All shared classes, in their order; this side may lack some.
    to
        Each class of the labels to its shared class, or to None where it is left out.
    """

    where: str
    classes: tuple[str, ...]
    to: dict[str, str | None]

    @property
    def reached(self) -> tuple[str, ...]:
        """The shared classes that this side has."""
        return tuple(name for name in self.classes if name in self.to.values())

    def check(self, known: Collection[str], *, missing: Collection[str] = ()) -> None:
        """Raise InputError unless the map knows just the classes in `known`; it need not know `missing`."""
        unknown = [name for name in self.to if name not in known]
        if unknown:
            there = ", ".join(sorted(known))
            raise InputError(
                self.where,
                f"maps {_quoted(unknown)}, which the labels lack",
                f"take it out or mend its name: there are {there}",
            )
        unmapped = sorted(set(known) - set(self.to) - set(missing))
        if unmapped:
            raise InputError(
                self.where,
                f"says nothing of {_quoted(unmapped)}",
                "add it to a class, or to left_out",
            )


def shared_classes(*sides: ClassMap) -> list[str]:
    """The classes that every side has, in the order of the first: on them a model can be carried over.

    Raises
    ------
    InputError
        Under two.
    """
    shared = [name for name in sides[0].reached if all(name in side.reached for side in sides)]
    if len(shared) < 2:
        raise InputError(
            " and ".join(side.where for side in sides),
            f"share {_quoted(shared) or 'no class'}",
            "give maps with two classes in common",
        )
    return shared


def read_class_map(path: str | Path, side: str) -> ClassMap:
    """Read one side of a class map.

    Parameters
    ----------
    path
        The TOML file.
    side
        Name of its table.

    Raises
    ------
    InputError
        A file that cannot be read or has no such side, a field that is unknown or mistyped, a class that is
        not among the shared ones, or a class of the labels that is named twice.
    """
    try:
        tables = tomllib.loads(Path(path).read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(path, f"it cannot be read as TOML ({error})", "give a class map") from None
    classes = _texts(path, "classes", tables.pop("classes", None))
    if not isinstance(tables.pop("about", ""), str):
        raise InputError(path, "field 'about' is no text", "say whose map it is, or leave it out")
    if side not in tables:
        there = ", ".join(tables) or "none"
        raise InputError(path, f"has no side {side!r}", f"use one of its sides: {there}")
    where, table = f"{path} [{side}]", tables[side]
    if not isinstance(table, dict) or not isinstance(table.get("classes"), dict):
        raise InputError(where, "has no table of classes", f"add [{side}.classes]")
    if unknown := set(table) - {"classes", "left_out"}:
        raise InputError(where, f"unknown field {_quoted(unknown)}", "use classes and left_out")
    to: dict[str, str | None] = {}
    for name, members in [*table["classes"].items(), (None, table.get("left_out", []))]:
        if name is not None and name not in classes:
            raise InputError(where, f"{name!r} is none of the shared classes", "add it to classes")
        for member in _texts(where, name or "left_out", members):
            if member in to:
                raise InputError(where, f"{member!r} is named twice", "name it once")
            to[member] = name
    return ClassMap(where, classes, to)


def _texts(where: object, field: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise InputError(where, f"field {field!r} is {value!r}", "give a list of names")
    if len(set(value)) < len(value):
        raise InputError(where, f"field {field!r} names a class twice", "name it once")
    return tuple(value)


def _quoted(names: Collection[str]) -> str:
    return ", ".join(repr(name) for name in sorted(names))
