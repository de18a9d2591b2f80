"""From AnnData files to a corpus: check every file, then write slide after slide, and put it in place.

The build works in ``OUT.partial``. A slide that is finished there is marked with a fingerprint of all that it
was made from, and a later build of the same corpus takes it over. Only a whole corpus is renamed to ``OUT``.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from scfm_jax.corpus.counts_file import CountsFile, Totals
from scfm_jax.corpus.manifest import (
    PARTIAL_SUFFIX,
    REPORT,
    SCHEMA,
    SLIDE,
    VOCABULARY,
    canonical_json,
    sha256_bytes,
    sha256_file,
    write_manifest,
)
from scfm_jax.corpus.neighbours import hilbert_order
from scfm_jax.corpus.slide import SlideContent, slide_folder, write_slide
from scfm_jax.corpus.sources import Source
from scfm_jax.corpus.spool import Spool
from scfm_jax.corpus.store import OVERFLOW
from scfm_jax.errors import DataWarning, InputError
from scfm_jax.genes import Alignment, Orthologs, Vocabulary, align

_SHUFFLE_SEED = 0
_FINISHED = "finished"
_SPOOL = "spool"
_MOST_LOST = 0.10

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class _Checked:
    """A source that has been read once and found good."""

    source: Source
    target: Int[np.ndarray, " n_source_genes"]
    totals: Totals
    fingerprint: dict[str, Any]
    report: dict[str, Any]


def build_corpus(
    out: str | Path,
    sources: Sequence[Source],
    *,
    vocabulary: Vocabulary | None = None,
    gene_names: Mapping[str, str] | None = None,
    aliases: Mapping[str, str] | None = None,
    orthologs: Orthologs | None = None,
    min_counts: int = 1,
    n_neighbours: int = 64,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Build a corpus from AnnData files.

    Parameters
    ----------
    out
        Folder to make. It appears only when the corpus is whole; until then there is ``OUT.partial``, from
        which an interrupted build goes on.
    sources
        The files. A file with several sections gives a slide ``<stem>/<section>`` for each, any other one
        slide ``<stem>``; the stem is the file's, or the source's name.
    vocabulary
        The genes to align to; ``None`` builds it from the files.
    gene_names, aliases, orthologs
        Tables for the alignment (see `scfm_jax.genes.align`).
    min_counts
        Cells with fewer counts over vocabulary genes are dropped, and reported.
    n_neighbours
        Neighbours stored for each spatial cell: the nearest kept cells of its section.
    progress
        Called with what was just done and with how many of how many cells are done; every cell counts twice,
        checked and written.

    Returns
    -------
    The report: totals, and for each file its genes by outcome, the share of counts lost with those unmatched,
    features excluded, cells dropped and why, the slides it became and the warnings. It is also kept in the
    corpus.

    Raises
    ------
    InputError
        Bad input, found before anything is written.

    Warns
    -----
    DataWarning
        Over 10% of a file's counts lie in unmatched genes, or its space looks odd (see `spacing_warnings`).

    Notes
    -----
    Memory does not grow with the counts of a file, only by some tens of bytes for each of its cells.
    """
    out = Path(out)
    if not sources:
        raise InputError(out, "no source file is given", "give at least one .h5ad, .zarr or 10x .h5 file")
    if n_neighbours < 1 or min_counts < 0:
        raise InputError(
            out, f"n_neighbours is {n_neighbours}, min_counts {min_counts}", "give at least 1 and 0"
        )
    if out.exists():
        raise InputError(out, "it exists already", "remove it or choose another name")
    tell = progress or (lambda what, done, total: None)
    names, n_source_cells = _check_structure(sources)
    tables: dict[str, Any] = {"gene_names": gene_names, "aliases": aliases, "orthologs": orthologs}
    if vocabulary is None:
        vocabulary = Vocabulary.from_names([(n, s.species) for n, s in zip(names, sources)], **tables)
    done, total = 0, 2 * sum(n_source_cells)
    settings = {
        "schema": SCHEMA,
        "vocabulary": vocabulary.hash,
        "min_counts": min_counts,
        "n_neighbours": n_neighbours,
    }
    checked = []
    for source, genes, n_cells in zip(sources, names, n_source_cells):
        checked.append(
            _check_counts(source, align(genes, vocabulary, species=source.species, **tables), settings)
        )
        done += n_cells
        tell(f"checked {Path(source.path).name}", done, total)
    partial = out.with_name(out.name + PARTIAL_SUFFIX)
    with _keeping_finished(partial):
        slides: dict[str, dict[str, Any]] = {}
        for file, n_cells in zip(checked, n_source_cells):
            for folder, slide in _write_slides(partial, file, len(vocabulary), settings):
                slides[folder] = slide
                tell(f"wrote {slide['record']['name']}", done + slide["record"]["n_cells"], total)
                done += slide["record"]["n_cells"]
                n_cells -= slide["record"]["n_cells"]
            done += n_cells
        report = _finish(partial, slides, checked, vocabulary, settings)
        partial.rename(out)
    tell("corpus is whole", total, total)
    return report


def _check_structure(sources: Sequence[Source]) -> tuple[list[list[str]], list[int]]:
    names, n_cells = [], []
    owner: dict[str, str] = {}
    for source in sources:
        with contextlib.closing(CountsFile(source)) as file:
            names.append(file.gene_names)
            n_cells.append(len(file.obs))
            for label in source.labels:
                file.label(label)
            for slide in _slide_names(file):
                if slide in owner:
                    mend = "give one of them a name, or give it once"
                    raise InputError(source.path, f"slide {slide!r} would come from {owner[slide]} too", mend)
                owner[slide] = source.path
    return names, n_cells


def _check_counts(source: Source, alignment: Alignment, settings: dict[str, Any]) -> _Checked:
    if not (alignment.target >= 0).any():
        mend = "check the species, or give a table of gene names, aliases or orthologs, or another vocabulary"
        raise InputError(source.path, "var_names: no gene is in the vocabulary", mend)
    with contextlib.closing(CountsFile(source)) as file:
        totals = file.totals(alignment.target)
        found = file.warnings()
        layer, excluded, state = file.layer, file.excluded, file.fingerprint()
    n_cells = len(totals.cell_matched)
    empty = int((totals.cell_matched == 0).sum())
    dropped = int((totals.cell_matched < settings["min_counts"]).sum())
    if dropped == n_cells:
        mend = "lower min_counts, or leave the file out"
        raise InputError(
            source.path, f"{layer}: no cell has {settings['min_counts']} counts in the vocabulary", mend
        )
    if totals.cell_entries.max() > OVERFLOW:
        mend = f"use a vocabulary of at most {OVERFLOW} genes"
        raise InputError(
            source.path, f"{layer}: a cell has {totals.cell_entries.max()} expressed genes", mend
        )
    genes = alignment.report(totals.gene)
    if genes["share_lost"] > _MOST_LOST:
        found.append(f"{genes['share_lost']:.1%} of counts are lost with genes outside the vocabulary")
    report = {
        "path": source.path,
        "layer": layer,
        "n_cells": n_cells,
        "n_kept": n_cells - dropped,
        "dropped": {"no counts": min(empty, dropped), "under min_counts": max(dropped - empty, 0)},
        "excluded": excluded,
        "genes": genes,
        "warnings": [],
    }
    _warn(report, source.path, found)
    fingerprint = {
        **settings,
        "source": asdict(source) | {"path": str(Path(source.path).resolve())},
        "state": state,
        "target": sha256_bytes(np.ascontiguousarray(alignment.target).tobytes()),
    }
    return _Checked(source, alignment.target, totals, fingerprint, report)


def _slide_names(file: CountsFile) -> list[str]:
    """Name the slide of each section of a file."""
    stem = file.source.stem
    return [f"{stem}/{section}" if len(file.sections) > 1 else stem for section in file.sections]


def _write_slides(
    partial: Path, checked: _Checked, n_genes: int, settings: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Write the slides of one source, or take over those that are finished."""
    with contextlib.closing(CountsFile(checked.source)) as file:
        contents = [c for c in _contents(file, checked, n_genes, settings["min_counts"]) if len(c.source_row)]
        checked.report["slides"] = [content.name for content in contents]
        fingerprints = [checked.fingerprint | {"slide": content.name} for content in contents]
        finished = [_finished_slide(partial, c.name, f) for c, f in zip(contents, fingerprints)]
        waiting = [number for number, slide in enumerate(finished) if slide is None]
        if waiting:
            pieces = [contents[number].source_row for number in waiting]
            spool = Spool(partial / _SPOOL, pieces, checked.totals.cell_entries, n_genes)
            spool.fill(file.entries(), checked.target)
        for number, content in enumerate(contents):
            slide, folder = finished[number], slide_folder(content.name)
            if slide is None:
                shutil.rmtree(partial / folder, ignore_errors=True)
                (partial / folder).mkdir(parents=True)
                rows = spool.rows(waiting.index(number))
                slide = write_slide(partial / folder, content, rows, settings["n_neighbours"])
                _mark_finished(partial, content.name, fingerprints[number])
            _warn(checked.report, content.name, slide["warnings"])
            yield folder, slide
    shutil.rmtree(partial / _SPOOL, ignore_errors=True)


def _contents(file: CountsFile, checked: _Checked, n_genes: int, min_counts: int) -> Iterator[SlideContent]:
    labels = {name: file.label(name) for name in file.source.labels}
    totals = checked.totals
    kept = totals.cell_matched >= min_counts
    for number, name in enumerate(_slide_names(file)):
        rows = np.flatnonzero(kept & (file.section_of == number))
        if file.coordinates is None:
            rows = np.random.default_rng(_SHUFFLE_SEED).permutation(rows)
        else:
            rows = rows[hilbert_order(file.coordinates[rows])]
        yield SlideContent(
            name=name,
            section=file.sections[number],
            source=file.source,
            n_genes=n_genes,
            panel=np.unique(checked.target[checked.target >= 0]),
            source_row=rows,
            total_raw=totals.cell_raw[rows],
            total_matched=totals.cell_matched[rows],
            xy=None if file.coordinates is None else file.coordinates[rows],
            labels={label: (codes[rows], classes) for label, (codes, classes) in labels.items()},
        )


def _marker(partial: Path, name: str) -> Path:
    return partial / _FINISHED / f"{Path(slide_folder(name)).name}.json"


def _mark_finished(partial: Path, name: str, fingerprint: dict[str, Any]) -> None:
    marker = _marker(partial, name)
    marker.parent.mkdir(exist_ok=True)
    draft = marker.with_suffix(".draft")
    draft.write_bytes(canonical_json(fingerprint))
    draft.rename(marker)


def _finished_slide(partial: Path, name: str, fingerprint: dict[str, Any]) -> dict[str, Any] | None:
    marker = _marker(partial, name)
    if marker.exists() and marker.read_bytes() == canonical_json(fingerprint):
        return json.loads((partial / slide_folder(name) / SLIDE).read_bytes())
    marker.unlink(missing_ok=True)
    return None


@contextlib.contextmanager
def _keeping_finished(partial: Path) -> Iterator[None]:
    """Leave nothing behind a failed build but finished slides."""
    shutil.rmtree(partial / _SPOOL, ignore_errors=True)
    partial.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        shutil.rmtree(partial / _SPOOL, ignore_errors=True)
        if not any((partial / _FINISHED).glob("*.json")):
            shutil.rmtree(partial)
        raise


def _warn(report: dict[str, Any], where: str, found: list[str]) -> None:
    for text in found:
        report["warnings"].append(f"{where}: {text}")
        warnings.warn(report["warnings"][-1], DataWarning, stacklevel=2)


def _finish(
    partial: Path,
    slides: dict[str, dict[str, Any]],
    checked: list[_Checked],
    vocabulary: Vocabulary,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Write vocabulary, report and manifest, and remove what the corpus does not need."""
    for path in (partial / "slides").iterdir():
        if f"slides/{path.name}" not in slides:
            shutil.rmtree(path)
    vocabulary.save(partial / VOCABULARY)
    panels: dict[tuple[int, ...], int] = {}
    classes: dict[str, set[str]] = {}
    records = []
    for folder, slide in slides.items():
        panel = panels.setdefault(tuple(slide["panel"]), len(panels))
        for label, values in slide["labels"].items():
            classes.setdefault(label, set()).update(values)
        records.append(
            slide["record"]
            | {"folder": folder, "panel": panel, "checksum": sha256_file(partial / folder / SLIDE)}
        )
    report = {
        "n_cells": sum(record["n_cells"] for record in records),
        "n_slides": len(records),
        "n_genes": len(vocabulary),
        "files": [file.report for file in checked],
    }
    (partial / REPORT).write_bytes(canonical_json(report))
    packages = ("scfm_jax", "anndata", "numpy", "scipy", "tensorstore")
    write_manifest(
        partial,
        {
            **settings,
            "n_genes": len(vocabulary),
            "vocabulary_checksum": sha256_file(partial / VOCABULARY),
            "panels": [list(panel) for panel in panels],
            "labels": {label: sorted(values) for label, values in classes.items()},
            "slides": records,
            "provenance": {
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "packages": {name: version(name) for name in packages},
                "sources": [asdict(file.source) for file in checked],
                "report_checksum": sha256_file(partial / REPORT),
            },
        },
    )
    shutil.rmtree(partial / _FINISHED)
    return report
