"""Is a corpus whole: every byte of every file against the checksums that its build wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from scfm_jax.corpus.manifest import (
    MANIFEST,
    SLIDE,
    VOCABULARY,
    canonical_json,
    manifest_checksum,
    read_manifest,
    sha256_bytes,
)
from scfm_jax.corpus.place import Place
from scfm_jax.corpus.workers import n_cores
from scfm_jax.errors import InputError


def verify_corpus(path: str | Path) -> list[str]:
    """Compare every file of a corpus with its checksum.

    Parameters
    ----------
    path
        The corpus.

    Returns
    -------
    One line for each file that is missing, changed, or none of the slide's, with the slide it belongs to;
    empty where the corpus is whole.

    Raises
    ------
    InputError
        There is no manifest to compare with, or it is of another schema.
    """
    place = Place(path)
    try:
        manifest = read_manifest(place)
    except InputError as error:
        if place.read(MANIFEST) is not None and "schema is" not in error.problem:
            return [str(error)]
        raise
    problems = []
    if place.read(MANIFEST) != canonical_json({**manifest, "checksum": manifest_checksum(manifest)}):
        problems.append(f"{place / MANIFEST}: changed since it was written")
    provenance = manifest["provenance"]
    for name, checksum in (
        (VOCABULARY, manifest["vocabulary_checksum"]),
        (provenance["report"], provenance["report_checksum"]),
        (manifest["technology_sums"], manifest["technology_sums_checksum"]),
    ):
        problems += _compare(place, name, checksum, "")
    with ThreadPoolExecutor(n_cores()) as pool:
        records = manifest["slides"]
        for found in pool.map(lambda record: _slide_problems(place / record["folder"], record), records):
            problems += found
    return problems


def _slide_problems(folder: Place, record: dict[str, Any]) -> list[str]:
    try:
        return list(_verify_slide(folder, record))
    except InputError as error:
        return [f"{error} (slide {record['name']})"]


def _verify_slide(folder: Place, record: dict[str, Any]) -> Iterator[str]:
    belongs = f" (slide {record['name']})"
    # The list of files is worth nothing where it is itself damaged.
    text = folder.read(SLIDE)
    if text is None or sha256_bytes(text) != record["checksum"]:
        yield from _compare(folder, SLIDE, record["checksum"], belongs)
        return
    files: dict[str, str] = json.loads(text)["files"]
    for name, checksum in files.items():
        yield from _compare(folder, name, checksum, belongs)
    for name in folder.names():
        if name not in files and name != SLIDE:
            yield f"{folder / name}{belongs}: none of its files"


def _compare(folder: Place, name: str, checksum: str, belongs: str) -> Iterator[str]:
    try:
        data = folder.read(name)
    except InputError as error:
        yield f"{error}{belongs}"
        return
    if data is None:
        yield f"{folder / name}{belongs}: missing"
    elif sha256_bytes(data) != checksum:
        yield f"{folder / name}{belongs}: changed since it was written"
