"""The manifest of a corpus: canonical JSON, the checksums that cover every file, and the corpus hash.

Checksums form a tree, so that the manifest stays small at any size: the manifest holds the checksum of each
slide's ``slide.json``, which holds those of the slide's array files.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from scfm_jax.errors import InputError

SCHEMA = 2
MANIFEST = "manifest.json"
VOCABULARY = "vocabulary.json"
REPORT = "report.json"
SLIDE = "slide.json"
PARTIAL_SUFFIX = ".partial"

# How the corpus came to be says nothing of what is in it: two builds of the same cells have the same hash.
_NOT_HASHED = ("provenance", "hash", "checksum")


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


def corpus_hash(manifest: dict[str, Any]) -> str:
    """Return the SHA-256 of what a manifest says of the corpus's content, provenance left out."""
    return sha256_bytes(canonical_json({k: v for k, v in manifest.items() if k not in _NOT_HASHED}))


def manifest_checksum(manifest: dict[str, Any]) -> str:
    """Return the SHA-256 of the whole manifest but its own checksum."""
    return sha256_bytes(canonical_json({k: v for k, v in manifest.items() if k != "checksum"}))


def write_manifest(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Add hash and checksum to ``manifest``, write it to ``folder`` and return what was written."""
    manifest = {**manifest, "hash": corpus_hash(manifest)}
    manifest["checksum"] = manifest_checksum(manifest)
    (folder / MANIFEST).write_bytes(canonical_json(manifest))
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read and check the manifest of the corpus in ``folder``.

    Raises
    ------
    InputError
        No corpus there, an unfinished one, a manifest that is damaged, or one of a newer schema.
    """
    path = folder / MANIFEST
    if not path.is_file():
        unfinished = folder.with_name(folder.name + PARTIAL_SUFFIX).is_dir()
        mend = (
            "its build did not finish: run it again"
            if unfinished
            else "give a folder that `scfm corpus build` made"
        )
        raise InputError(folder, f"no {MANIFEST} there, so no corpus", mend)
    try:
        manifest = json.loads(path.read_bytes())
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
    if manifest.get("hash") != corpus_hash(manifest):
        raise InputError(
            path, "hash does not fit the rest of the manifest, so it was changed", "build the corpus again"
        )
    return manifest
