"""From slides to a corpus: the manifest is written last, at once, and with it the corpus is there."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import numpy as np

from scfm_jax.corpus.manifest import (
    SCHEMA,
    SLIDE,
    VOCABULARY,
    canonical_json,
    read_checked,
    sha256_bytes,
    write_manifest,
)
from scfm_jax.corpus.place import Place, remote_context
from scfm_jax.corpus.store import SlideArrays
from scfm_jax.genes import Vocabulary

_PACKAGES = ("scfm_jax", "anndata", "numpy", "scipy", "tensorstore")
_AT_ONCE = 256


def assemble(
    place: Place,
    slides: Mapping[str, str],
    vocabulary: Vocabulary,
    settings: dict[str, Any],
    files: Sequence[dict[str, Any]],
    history: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """Make slides the corpus at ``place``.

    Parameters
    ----------
    place
        Where.
    slides
        Folder of each slide, in the order of their cells, below ``place`` or a place of its own; and the
        SHA-256 of its ``slide.json``.
    vocabulary
        Of all of them.
    settings
        What the manifest says of all slides.
    files
        The report of each source.
    history
        What was done, the last thing last; see `event`.

    Returns
    -------
    The report.
    """
    folders = list(slides)
    texts = read_checked(place, [f"{folder}/{SLIDE}" for folder in folders], list(slides.values()))
    found = [json.loads(text) for text in texts]
    panels: dict[tuple[int, ...], int] = {}
    classes: dict[str, set[str]] = {}
    records = []
    for folder, text, slide in zip(folders, texts, found):
        for label, values in slide["labels"].items():
            classes.setdefault(label, set()).update(values)
        record = {
            "folder": folder,
            "panel": panels.setdefault(tuple(slide["panel"]), len(panels)),
            "checksum": sha256_bytes(text),
        }
        records.append(slide["record"] | record)
    report = {
        "n_cells": sum(record["n_cells"] for record in records),
        "n_slides": len(records),
        "n_genes": len(vocabulary),
        "files": list(files),
    }
    technologies = sorted({record["technology"] for record in records})
    sums = _technology_sums(place, records, [*panels], technologies, len(vocabulary))
    sums_name = f"technology_sums-{sha256_bytes(sums)[:16]}.npy"
    report_text, vocabulary_text = canonical_json(report), canonical_json(vocabulary.to_dict())
    report_name = f"report-{sha256_bytes(report_text)[:16]}.json"
    # Names that follow from the content: the corpus of before stays whole until its manifest is replaced.
    for name, data in ((sums_name, sums), (report_name, report_text), (VOCABULARY, vocabulary_text)):
        place.write(name, data)
    write_manifest(
        place,
        {
            "schema": SCHEMA,
            **settings,
            "n_genes": len(vocabulary),
            "vocabulary_checksum": sha256_bytes(vocabulary_text),
            "panels": [list(panel) for panel in panels],
            "labels": {label: sorted(values) for label, values in classes.items()},
            "slides": records,
            "technologies": technologies,
            "technology_sums": sums_name,
            "technology_sums_checksum": sha256_bytes(sums),
            "provenance": {
                "history": list(history),
                "report": report_name,
                "report_checksum": sha256_bytes(report_text),
            },
        },
    )
    _clear(place, {sums_name, report_name}, set(folders))
    return report


def _clear(place: Place, files: set[str], folders: set[str]) -> None:
    """Delete slides, and versions of a file, that the manifest does not name."""
    stale = set()
    for name in place.names():
        first, _, rest = name.partition("/")
        if first == "slides" and (folder := f"slides/{rest.split('/')[0]}") not in folders:
            stale.add(f"{folder}/")
        elif first.startswith(("technology_sums-", "report-")) and name not in files:
            stale.add(name)
    for name in stale:
        place.delete(name)


def event(what: str, **details: Any) -> dict[str, Any]:
    """An entry of a corpus's history: what was done, when, and with which packages."""
    return {
        "what": what,
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "packages": {name: version(name) for name in _PACKAGES},
        **details,
    }


def _technology_sums(
    place: Place,
    records: Sequence[dict[str, Any]],
    panels: Sequence[tuple[int, ...]],
    technologies: Sequence[str],
    n_genes: int,
) -> bytes:
    """Sums of scaled counts, and cells that express a gene, of each technology, as a ``.npy``."""
    sums = np.zeros((2, len(technologies), n_genes))
    context = remote_context(0)
    for first in range(0, len(records), _AT_ONCE):
        reads = []
        for record in records[first : first + _AT_ONCE]:
            panel = np.array(panels[record["panel"]])
            arrays = SlideArrays(place / record["folder"], record, n_genes, len(panel), context)
            names = ("scaled_sum", "expressing")
            arrays.open(names)
            row = technologies.index(record["technology"])
            reads.append((row, panel, arrays, [(name, arrays[name].read()) for name in names]))
        for row, panel, arrays, parts in reads:
            for kind, (name, read) in enumerate(parts):
                sums[kind, row, panel] += arrays.result(name, read)
    file = io.BytesIO()
    np.save(file, sums, allow_pickle=False)
    return file.getvalue()
