"""Reading every source once before anything is written: its structure, then all its counts."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Int32, Int64

from scfm_jax.corpus.counts_file import CountsFile
from scfm_jax.corpus.manifest import canonical_json, sha256_bytes
from scfm_jax.corpus.sources import Source
from scfm_jax.corpus.store import MOST_EXPRESSED
from scfm_jax.errors import InputError
from scfm_jax.genes import Alignment

_MOST_LOST = 0.10


@dataclass(frozen=True)
class Outline:
    """What a source's structure says: its genes, cells and the names of its slides."""

    source: Source
    gene_names: list[str]
    n_cells: int
    slides: list[str]
    fingerprint: dict[str, Any]


@dataclass(frozen=True)
class CountJob:
    """A source whose counts are to be checked; ``target`` is the vocabulary index of each gene, or -1."""

    source: Source
    target: Int[np.ndarray, " n_source_genes"]
    min_counts: int


@dataclass(frozen=True)
class Counted:
    """A source whose counts are good.

    ``cells`` holds its totals over all genes and over those with a target, and the non-zeros with a target;
    ``section`` the number of each cell's section, -1 where it is dropped; ``gene`` the counts of each gene;
    ``entries_of_slide`` the non-zeros of the kept cells of each section. ``excluded`` counts features that
    are no genes, by their type; ``by_cell`` says whether the counts can be read a cell at a time.
    """

    cells: Int32[np.ndarray, "3 cells"]
    section: Int32[np.ndarray, " cells"]
    gene: Int64[np.ndarray, " genes"]
    entries_of_slide: Int64[np.ndarray, " sections"]
    layer: str
    warnings: list[str]
    excluded: dict[str, int]
    by_cell: bool

    def to_bytes(self) -> bytes:
        """All of it, behind its SHA-256."""
        file = io.BytesIO()
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        arrays = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
        others = {name: value for name, value in values.items() if name not in arrays}
        np.savez(file, allow_pickle=False, others=np.array(json.dumps(others)), **arrays)
        return sha256_bytes(file.getvalue()).encode() + file.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes | None) -> Counted | None:
        """What `to_bytes` gave; None where it is not whole."""
        if data is None or sha256_bytes(data[64:]).encode() != data[:64]:
            return None
        with np.load(io.BytesIO(data[64:]), allow_pickle=False) as kept:
            arrays = {name: kept[name] for name in kept.files}
        return cls(**json.loads(str(arrays.pop("others"))), **arrays)


def outline_sources(sources: Sequence[Source]) -> list[Outline]:
    """Check the structure of every source.

    Raises
    ------
    InputError
        A file that cannot be read, or a field that it lacks.
    """
    outlines = []
    for source in sources:
        with contextlib.closing(CountsFile(source)) as file:
            for label in source.labels:
                file.label(label)
            fingerprint = {
                "source": asdict(source) | {"path": str(Path(source.path).resolve())},
                "state": file.fingerprint(),
            }
            outlines.append(Outline(source, file.gene_names, len(file.obs), slide_names(file), fingerprint))
    return outlines


def check_names(outlines: Sequence[Outline], taken: Iterable[str] = ()) -> None:
    """Check that every slide has a name of its own.

    Raises
    ------
    InputError
        Two sources give a slide of one name, or one is among the names ``taken``.
    """
    owner = dict.fromkeys(taken, "this corpus")
    for outline in outlines:
        path = outline.source.path
        for slide in outline.slides:
            if slide in owner:
                mend = "give one of them a name, or give it once"
                raise InputError(path, f"slide {slide!r} would come from {owner[slide]} too", mend)
            owner[slide] = path


def slide_names(file: CountsFile) -> list[str]:
    """Name the slide of each section of a file."""
    stem = file.source.stem
    return [f"{stem}/{section}" if len(file.sections) > 1 else stem for section in file.sections]


def fingerprint_of(outline: Outline, alignment: Alignment, settings: dict[str, Any]) -> dict[str, Any]:
    """All that the slides of a source are made from."""
    target = sha256_bytes(np.ascontiguousarray(alignment.target).tobytes())
    return {**settings, **outline.fingerprint, "target": target}


def request_hash(fingerprints: Sequence[dict[str, Any]]) -> str:
    """What a build was asked for, as one number: the same request gives the same corpus."""
    return sha256_bytes(canonical_json(list(fingerprints)))


def count(job: CountJob) -> Counted:
    """Read all counts of a source.

    Raises
    ------
    InputError
        Counts that are not raw, no gene in the vocabulary, or no cell that is kept.
    """
    source = job.source
    if not (job.target >= 0).any():
        mend = "check the species, or give a table of gene names, aliases or orthologs, or another vocabulary"
        raise InputError(source.path, "var_names: no gene is in the vocabulary", mend)
    with contextlib.closing(CountsFile(source)) as file:
        totals = file.totals(job.target)
        warnings, excluded = file.warnings(), file.excluded
        layer, by_cell = file.layer, file.matrix.format == "csr"
        kept = totals.cell_matched >= job.min_counts
        section = np.where(kept, file.section_of, -1).astype(np.int32)
        entries_of_slide = np.bincount(
            file.section_of[kept], totals.cell_entries[kept], len(file.sections)
        ).astype(np.int64)
    if not kept.any():
        mend = "lower min_counts, or leave the file out"
        raise InputError(source.path, f"{layer}: no cell has {job.min_counts} counts in the vocabulary", mend)
    if totals.cell_entries.max() > MOST_EXPRESSED:
        mend = f"use a vocabulary of at most {MOST_EXPRESSED} genes"
        raise InputError(
            source.path, f"{layer}: a cell has {totals.cell_entries.max()} expressed genes", mend
        )
    cells = np.stack([totals.cell_raw, totals.cell_matched, totals.cell_entries])
    return Counted(cells, section, totals.gene, entries_of_slide, layer, warnings, excluded, by_cell)


def report_source(
    outline: Outline, counted: Counted, alignment: Alignment, min_counts: int
) -> tuple[dict[str, Any], list[str]]:
    """What the report says of a source, and what is to be warned of."""
    _, matched, _ = counted.cells
    empty = int((matched == 0).sum())
    dropped = int((matched < min_counts).sum())
    genes = alignment.report(counted.gene)
    warnings = list(counted.warnings)
    if genes["share_lost"] > _MOST_LOST:
        warnings.append(f"{genes['share_lost']:.1%} of counts are lost with genes outside the vocabulary")
    report = {
        "path": outline.source.path,
        "layer": counted.layer,
        "n_cells": outline.n_cells,
        "n_kept": outline.n_cells - dropped,
        "dropped": {"no counts": min(empty, dropped), "under min_counts": max(dropped - empty, 0)},
        "excluded": counted.excluded,
        "genes": genes,
        "warnings": [],
    }
    return report, warnings
