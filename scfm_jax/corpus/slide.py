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
from scfm_jax.corpus.store import (
    BLOCK,
    LAYOUTS,
    SCALED_TOTAL,
    ArrayWriter,
    StoreOptions,
    entry_layout,
    pack,
    write_array,
)


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
    folder: Path,
    content: SlideContent,
    rows: Iterable[sparse.csr_array],
    n_neighbours: int,
    options: StoreOptions,
    *,
    threads: int = -1,
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
    options
        Codec and size of files.
    threads
        Of the search for neighbours; -1 for one a core.

    Returns
    -------
    What was written to ``slide.json``: the slide's record, panel, label classes, warnings, and the checksum
    of each file.
    """
    source = content.source
    counts = _write_counts(folder, rows, content, options)
    for name in ("source_row", "total_raw", "total_matched"):
        write_array(folder, name, name, getattr(content, name), options)
    classes = {}
    # Sorted, as the keys of the record will be: an array's number is its label's place there.
    for number, (name, (codes, names)) in enumerate(sorted(content.labels.items())):
        present = np.unique(codes[codes >= 0])
        classes[name] = [names[code] for code in present]
        ranks = np.where(codes < 0, -1, np.searchsorted(present, codes))
        write_array(folder, f"label_{number}", "label", ranks, options)
    warnings = (
        [] if content.xy is None else _write_space(folder, content.xy, source, n_neighbours, options, threads)
    )
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
            **counts,
            "n_neighbours": n_neighbours if source.spatial else 0,
            "codec": options.codec,
            "shard_factor": options.shard_factor,
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


def _write_counts(
    folder: Path, rows: Iterable[sparse.csr_array], content: SlideContent, options: StoreOptions
) -> dict[str, int]:
    """Write the counts; return what the record says of them."""
    layout = entry_layout(content.n_genes)
    lengths, positions, large, nnz, done = [], [], [], 0, 0
    scaled_sum, expressing = np.zeros(content.n_genes), np.zeros(content.n_genes, np.int64)
    # How long the rows must be is known only when the last one is.
    flat = folder.with_name(f"{folder.name}.entries")
    with flat.open("wb") as file:
        for band in rows:
            scale = SCALED_TOTAL / np.maximum(content.total_matched[done : done + band.shape[0]], 1)
            scaled = band.data * np.repeat(scale, np.diff(band.indptr))
            np.add.at(scaled_sum, band.indices, scaled)  # in order, so that bands of any size give one sum
            expressing += np.bincount(band.indices, minlength=content.n_genes)
            done += band.shape[0]
            entries, overflow = pack(band.indices, band.data, layout)
            entries.tofile(file)
            positions.append(overflow + nnz)
            large.append(band.data[overflow])
            lengths.append(np.diff(band.indptr))
            nnz += band.nnz
    length = np.concatenate(lengths).astype(np.int64)
    of_block = np.add.reduceat(length, np.arange(0, len(length), BLOCK))
    longest = max(int(of_block.max()), 1)
    writer = ArrayWriter(folder, "entries", layout, options, longest)
    with flat.open("rb") as file:
        for size in of_block.tolist():
            row = np.fromfile(file, LAYOUTS[layout].dtype, size)
            writer.append(np.pad(row, (0, longest - size))[None])
    writer.close()
    flat.unlink()
    arrays = {
        "nnz": length,
        "overflow_position": np.concatenate(positions),
        "overflow_count": np.concatenate(large),
        "scaled_sum": scaled_sum[content.panel],
        "expressing": expressing[content.panel],
    }
    for name, values in arrays.items():
        write_array(folder, name, name, values, options)
    return {"nnz": nnz, "longest_block": longest, "overflow": len(arrays["overflow_position"])}


def _write_space(
    folder: Path,
    xy: Float[np.ndarray, "n 2"],
    source: Source,
    k: int,
    options: StoreOptions,
    threads: int,
) -> list[str]:
    write_array(folder, "x", "x", xy[:, 0], options)
    write_array(folder, "y", "y", xy[:, 1], options)
    limit = np.inf if source.max_radius is None else source.max_radius / (source.um_per_unit or np.nan)
    rank = min(BLOCK, k)
    neighbours = ArrayWriter(folder, "neighbours", "neighbours", options, k)
    first, last = [], []
    for found, distance in nearest(xy, k, threads=threads):
        first.append(distance[:, 0])
        last.append(distance[:, rank - 1])
        neighbours.append(np.where(distance > limit, -1, found))
    neighbours.close()
    return spacing_warnings(np.concatenate(first), np.concatenate(last), rank, source.um_per_unit)
