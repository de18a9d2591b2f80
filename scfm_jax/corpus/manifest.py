"""The manifest of a corpus: canonical JSON, the checksums that cover every file, and the corpus hash.

Checksums form a tree, so that the manifest stays small at any size: the manifest holds the checksum of each
slide's ``slide.json``, which holds those of the slide's array files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scfm_jax.corpus.place import Place
from scfm_jax.errors import InputError

SCHEMA = 3
MANIFEST = "manifest.json"
VOCABULARY = "vocabulary.json"
SLIDE = "slide.json"
# What a build keeps until it is done; a folder that holds it and no manifest is an unfinished corpus.
BUILDING = "building"

# How the corpus came to be, and where its slides lie, says nothing of what is in it: two builds of the same
# cells have the same hash.
_NOT_HASHED = ("provenance", "hash", "checksum")
_NOT_HASHED_OF_SLIDE = ("folder",)


def canonical_json(value: Any) -> bytes:
    """Serialise to the one byte string for ``value``: sorted keys, no spaces, UTF-8, finite numbers."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def sha256_bytes(data: bytes) -> str:
    """Return the SHA-256 of ``data`` in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's content in hexadecimal, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_checked(place: Place, names: Sequence[str], checksums: Sequence[str]) -> list[bytes]:
    """Read objects that must be what they were.

    Raises
    ------
    InputError
        One is missing, or its SHA-256 is another.
    """
    texts: list[bytes] = []
    for name, checksum, text in zip(names, checksums, place.read_all(names), strict=True):
        if text is None or sha256_bytes(text) != checksum:
            problem = "it is missing" if text is None else "it was changed since it was written"
            raise InputError(
                place / name, problem, "restore it: scfm corpus verify names all that is damaged"
            )
        texts.append(text)
    return texts


def corpus_hash(manifest: dict[str, Any]) -> str:
    """Return the SHA-256 of what a manifest says of the corpus's content, provenance left out."""
    content = {k: v for k, v in manifest.items() if k not in _NOT_HASHED}
    content["slides"] = [
        {k: v for k, v in record.items() if k not in _NOT_HASHED_OF_SLIDE} for record in manifest["slides"]
    ]
    return sha256_bytes(canonical_json(content))


def manifest_checksum(manifest: dict[str, Any]) -> str:
    """Return the SHA-256 of the whole manifest but its own checksum."""
    return sha256_bytes(canonical_json({k: v for k, v in manifest.items() if k != "checksum"}))


def write_manifest(place: Place, manifest: dict[str, Any]) -> dict[str, Any]:
    """Add hash and checksum to ``manifest``, write it to ``place`` and return what was written."""
    manifest = {**manifest, "hash": corpus_hash(manifest)}
    manifest["checksum"] = manifest_checksum(manifest)
    place.write(MANIFEST, canonical_json(manifest))
    return manifest


def _hash_fits(manifest: dict[str, Any]) -> bool:
    try:
        return manifest["hash"] == corpus_hash(manifest)
    except (KeyError, AttributeError, TypeError):
        return False


def read_manifest(place: Place) -> dict[str, Any]:
    """Read and check the manifest of the corpus at ``place``.

    Raises
    ------
    InputError
        No corpus there, an unfinished one, a manifest that is damaged, or one of a newer schema.
    """
    path, data = place / MANIFEST, place.read(MANIFEST)
    if data is None:
        mend = (
            "its build did not finish: run it again"
            if place.names(BUILDING)
            else "give what `scfm corpus build` made"
        )
        raise InputError(place, f"no {MANIFEST} there, so no corpus", mend)
    try:
        manifest = json.loads(data)
        schema = manifest["schema"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(path, f"the manifest cannot be read ({error})", "build the corpus again") from None
    if schema > SCHEMA:
        raise InputError(
            path,
            f"schema is {schema}, this scfm_jax reads up to {SCHEMA}",
            "upgrade scfm_jax to read this corpus",
        )
    if schema < SCHEMA:
        raise InputError(path, f"schema is {schema}, this scfm_jax reads {SCHEMA}", "build the corpus again")
    if not _hash_fits(manifest):
        raise InputError(
            path, "hash does not fit the rest of the manifest, so it was changed", "build the corpus again"
        )
    return manifest
