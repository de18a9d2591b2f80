"""JSON that may be damaged or come from anywhere: read, or told in one line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from scfm_jax.errors import InputError


def read_json(path: Path, mend: str) -> Any:
    """What a JSON file says.

    Raises
    ------
    InputError
        It cannot be read, or is no JSON.
    """
    return _parsed(_text(path, mend), path, mend)


def read_json_lines(path: Path, mend: str) -> dict[int, dict[str, Any]]:
    """The objects of a file of JSON lines, by the number of their line; empty lines are passed over.

    Raises
    ------
    InputError
        It cannot be read, or a line is no JSON object.
    """
    rows = {}
    for number, line in enumerate(_text(path, mend).splitlines(), start=1):
        if line.strip():
            rows[number] = _parsed(line, f"{path}:{number}", mend)
            if not isinstance(rows[number], dict):
                raise InputError(f"{path}:{number}", "is no JSON object", mend)
    return rows


def as_float(value: object) -> float | None:
    """A number as a float, infinite where it is too large for one; None for all that is no number."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _text(path: Path, mend: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(path, f"cannot be read ({error})", mend) from error


def _parsed(text: str, where: object, mend: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # too many digits, too deep
        raise InputError(where, f"is no JSON ({getattr(error, 'msg', error)})", mend) from error
