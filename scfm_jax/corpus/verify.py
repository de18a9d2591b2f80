"""Is a corpus whole: every byte of every file against the checksums that its build wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from scfm_jax.corpus.manifest import (
    MANIFEST,
    REPORT,
    SLIDE,
    VOCABULARY,
    canonical_json,
    manifest_checksum,
    read_manifest,
    sha256_file,
)
from scfm_jax.errors import InputError


def verify_corpus(path: str | Path) -> list[str]:
    """Compare every file of a corpus with its checksum.

    Parameters
    ----------
    path
        Folder of the corpus.

    Returns
    -------
    One line for each file that is missing or changed, with the slide it belongs to; empty where the corpus is
    whole.

    Raises
    ------
    InputError
        There is no manifest to compare with, or it is of a newer schema.
    """
    path = Path(path)
    try:
        manifest = read_manifest(path)
    except InputError as error:
        if (path / MANIFEST).is_file() and "upgrade" not in error.mend:
            return [str(error)]
        raise
    problems = []
    if (path / MANIFEST).read_bytes() != canonical_json(
        {**manifest, "checksum": manifest_checksum(manifest)}
    ):
        problems.append(f"{path / MANIFEST}: changed since it was written")
    problems += _compare(path / VOCABULARY, manifest["vocabulary_checksum"], "")
    problems += _compare(path / REPORT, manifest["provenance"]["report_checksum"], "")
    for record in manifest["slides"]:
        problems += _verify_slide(path / record["folder"], record)
    return problems


def _verify_slide(folder: Path, record: dict[str, Any]) -> list[str]:
    belongs = f" (slide {record['name']})"
    # The list of files is worth nothing where it is itself damaged.
    if problems := _compare(folder / SLIDE, record["checksum"], belongs):
        return problems
    files: dict[str, str] = json.loads((folder / SLIDE).read_bytes())["files"]
    return [
        problem for name, checksum in files.items() for problem in _compare(folder / name, checksum, belongs)
    ]


def _compare(file: Path, checksum: str, belongs: str) -> list[str]:
    if not file.is_file():
        return [f"{file}{belongs}: missing"]
    return [] if sha256_file(file) == checksum else [f"{file}{belongs}: changed since it was written"]
