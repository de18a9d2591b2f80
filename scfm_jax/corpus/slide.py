"""Writing one slide: its arrays and its ``slide.json``."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

from scfm_jax.corpus.manifest import SLIDE, canonical_json, sha256_bytes, sha256_file
from scfm_jax.corpus.neighbours import nearest, spacing_warnings
from scfm_jax.corpus.sources import Source
from scfm_jax.corpus.store import BLOCK, OVERFLOW, SCALED_TOTAL, ArrayWriter, gene_layout, write_array


@dataclass(frozen=True)
class SlideContent:
    """What one slide is to hold, its cells in the order in which they are stored.

    ``panel`` holds the vocabulary indices measured, ascending; ``labels`` codes and classes of each label.
    """

    name: str
    section: str
    source: Source
    n_genes: int
    panel: Int[np.ndarray, " p"]
    source_row: Int[np.ndarray, " n"]
    total_raw: Int[np.ndarray, " n"]
    total_matched: Int[np.ndarray, " n"]
    xy: Float[np.ndarray, "n 2"] | None
    labels: dict[str, tuple[Int[np.ndarray, " n"], list[str]]]


def slide_folder(name: str) -> str:
    """Return the folder of the slide ``name``: the same whatever other slides the corpus holds."""
    return f"slides/{re.sub(r'[^A-Za-z0-9._-]', '_', name)[:64]}-{sha256_bytes(name.encode())[:8]}"


def write_slide(
    folder: Path, content: SlideContent, rows: Iterable[sparse.csr_array], n_neighbours: int
) -> dict[str, Any]:
    """Write a slide's arrays and then its ``slide.json``.

    Parameters
    ----------
    folder
        Where; it is made.
    content
        Everything but the counts.
    rows
        The counts, cells x vocabulary, in bands of successive cells.
    n_neighbours
        Neighbours stored for each cell of a spatial slide.

    Returns
    -------
    What was written to ``slide.json``: the slide's record, panel, label classes, warnings, and the checksum
    of each file.
    """
    source = content.source
    nnz = _write_counts(folder, rows, content)
    write_array(folder, "source_row", "source_row", content.source_row)
    write_array(folder, "total_raw", "total_raw", content.total_raw)
    write_array(folder, "total_matched", "total_matched", content.total_matched)
    classes = {}
    # Sorted, as the keys of the record will be: an array's number is its label's place there.
    for number, (name, (codes, names)) in enumerate(sorted(content.labels.items())):
        present = np.unique(codes[codes >= 0])
        classes[name] = [names[code] for code in present]
        write_array(
            folder, f"label_{number}", "label", np.where(codes < 0, -1, np.searchsorted(present, codes))
        )
    warnings = [] if content.xy is None else _write_space(folder, content.xy, source, n_neighbours)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    slide = {
        "record": {
            "name": content.name,
            "source": Path(source.path).name,
            "section": content.section,
            "species": source.species,
            "technology": source.technology,
            "tissue": source.tissue,
            "modality": source.modality or ("spatial" if source.spatial else "dissociated"),
            "spatial": source.spatial,
            # 1 and 1.0 are one length, and must give one hash.
            "um_per_unit": None if source.um_per_unit is None else float(source.um_per_unit),
            "n_cells": len(content.source_row),
            "nnz": nnz,
            "median_total": float(np.median(content.total_matched)),
            "bytes": sum(path.stat().st_size for path in files),
        },
        "panel": content.panel.tolist(),
        "labels": classes,
        "warnings": warnings,
        "files": {path.relative_to(folder).as_posix(): sha256_file(path) for path in files},
    }
    (folder / SLIDE).write_bytes(canonical_json(slide))
    return slide


def _write_counts(folder: Path, rows: Iterable[sparse.csr_array], content: SlideContent) -> int:
    genes, counts = (
        ArrayWriter(folder, "genes", gene_layout(content.n_genes)),
        ArrayWriter(folder, "counts", "counts"),
    )
    lengths, positions, overflow, nnz, done = [], [], [], 0, 0
    scaled_sum, expressing = np.zeros(content.n_genes), np.zeros(content.n_genes, np.int64)
    for band in rows:
        scale = SCALED_TOTAL / np.maximum(content.total_matched[done : done + band.shape[0]], 1)
        scaled = band.data * np.repeat(scale, np.diff(band.indptr))
        np.add.at(scaled_sum, band.indices, scaled)  # in order, so that bands of any size give one sum
        expressing += np.bincount(band.indices, minlength=content.n_genes)
        done += band.shape[0]
        genes.append(band.indices)
        counts.append(np.minimum(band.data, OVERFLOW))
        large = np.flatnonzero(band.data >= OVERFLOW)
        positions.append(large + nnz)
        overflow.append(band.data[large])
        lengths.append(np.diff(band.indptr))
        nnz += band.nnz
    genes.close()
    counts.close()
    length = np.concatenate(lengths)
    starts = np.concatenate([[0], np.cumsum(length, dtype=np.int64)])
    write_array(folder, "nnz", "nnz", length)
    write_array(folder, "block_starts", "block_starts", np.append(starts[:-1:BLOCK], nnz))
    write_array(folder, "overflow_position", "overflow_position", np.concatenate(positions))
    write_array(folder, "overflow_count", "overflow_count", np.concatenate(overflow))
    write_array(folder, "scaled_sum", "scaled_sum", scaled_sum[content.panel])
    write_array(folder, "expressing", "expressing", expressing[content.panel])
    return nnz


def _write_space(folder: Path, xy: Float[np.ndarray, "n 2"], source: Source, k: int) -> list[str]:
    write_array(folder, "x", "x", xy[:, 0])
    write_array(folder, "y", "y", xy[:, 1])
    limit = np.inf if source.max_radius is None else source.max_radius / (source.um_per_unit or np.nan)
    rank = min(BLOCK, k)
    neighbours = ArrayWriter(folder, "neighbours", "neighbours", k)
    distances = ArrayWriter(folder, "distances", "distances", k)
    first, last = [], []
    for found, distance in nearest(xy, k):
        first.append(distance[:, 0])
        last.append(distance[:, rank - 1])
        beyond = distance > limit
        neighbours.append(np.where(beyond, -1, found))
        distances.append(np.where(beyond, np.inf, distance))
    neighbours.close()
    distances.close()
    return spacing_warnings(np.concatenate(first), np.concatenate(last), rank, source.um_per_unit)
