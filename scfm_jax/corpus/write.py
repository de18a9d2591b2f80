"""Writing the slides of one source: the unit of work that processes and clusters share out.

A slide is made in a folder of its own and put in place when it is whole; a marker with a fingerprint of all
that it was made from says so. So a job may be killed at any moment and run again.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from scfm_jax.corpus.check import slide_names
from scfm_jax.corpus.counts_file import CountsFile, Totals
from scfm_jax.corpus.manifest import BUILDING, SLIDE, canonical_json, sha256_bytes
from scfm_jax.corpus.neighbours import hilbert_order
from scfm_jax.corpus.place import Place
from scfm_jax.corpus.slide import SlideContent, slide_folder, write_slide
from scfm_jax.corpus.sources import Source
from scfm_jax.corpus.spool import Spool
from scfm_jax.corpus.store import StoreOptions

_SHUFFLE_SEED = 0
FINISHED = f"{BUILDING}/finished"
_SCRATCH = "scratch"


@dataclass(frozen=True)
class WriteJob:
    """Some slides of a source that was checked.

    ``sections`` are their numbers; ``threads`` those of the search for neighbours.
    """

    place: str
    source: Source
    target: Int[np.ndarray, " n_source_genes"]
    totals: Totals
    sections: tuple[int, ...]
    fingerprint: dict[str, Any]
    n_genes: int
    min_counts: int
    n_neighbours: int
    options: StoreOptions
    threads: int


def write_slides(job: WriteJob) -> list[tuple[str, dict[str, Any]]]:
    """Write slides, or take over those that are finished; return each one's folder and ``slide.json``."""
    place = Place(job.place)
    with contextlib.closing(CountsFile(job.source)) as file, _scratch(place) as scratch:
        contents = list(_contents(file, job))
        marks = [canonical_json(job.fingerprint | {"slide": content.name}) for content in contents]
        done = [_finished_slide(place, content.name, mark) for content, mark in zip(contents, marks)]
        waiting = [number for number, slide in enumerate(done) if slide is None]
        if waiting:
            pieces = [contents[number].source_row for number in waiting]
            spool = Spool(scratch / "spool", pieces, job.totals.cell_entries, job.n_genes)
            spool.fill(file.entries(np.sort(np.concatenate(pieces))), job.target)
        for piece, number in enumerate(waiting):
            name, folder = contents[number].name, scratch / "slide"
            folder.mkdir()
            done[number] = write_slide(
                folder,
                contents[number],
                spool.rows(piece),
                job.n_neighbours,
                job.options,
                threads=job.threads,
            )
            _put_in_place(place, folder, slide_folder(name))
            place.write(_marker(name), marks[number] + _seal(done[number]))
    return [(slide_folder(content.name), slide) for content, slide in zip(contents, done) if slide]


def clear_scratch(place: Place) -> None:
    """Remove what killed jobs left behind."""
    if place.is_local:
        shutil.rmtree(place.path / BUILDING / _SCRATCH, ignore_errors=True)


def _contents(file: CountsFile, job: WriteJob) -> Iterator[SlideContent]:
    labels = {name: file.label(name) for name in file.source.labels}
    kept = job.totals.cell_matched >= job.min_counts
    names = slide_names(file)
    for number in job.sections:
        rows = np.flatnonzero(kept & (file.section_of == number))
        if not len(rows):
            continue
        if file.coordinates is None:
            rows = np.random.default_rng(_SHUFFLE_SEED).permutation(rows)
        else:
            rows = rows[hilbert_order(file.coordinates[rows])]
        yield SlideContent(
            name=names[number],
            section=file.sections[number],
            source=file.source,
            n_genes=job.n_genes,
            panel=np.unique(job.target[job.target >= 0]),
            source_row=rows,
            total_raw=job.totals.cell_raw[rows],
            total_matched=job.totals.cell_matched[rows],
            xy=None if file.coordinates is None else file.coordinates[rows],
            labels={label: (codes[rows], classes) for label, (codes, classes) in labels.items()},
        )


@contextlib.contextmanager
def _scratch(place: Place) -> Iterator[Path]:
    """A folder that goes when the job ends: beside the slides, to be moved, or anywhere, to be uploaded."""
    parent = place.path / BUILDING / _SCRATCH if place.is_local else None
    if parent:
        parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def _put_in_place(place: Place, made: Path, folder: str) -> None:
    place.delete(f"{folder}/")
    if place.is_local:
        (place.path / folder).parent.mkdir(parents=True, exist_ok=True)
        made.rename(place.path / folder)
    else:
        (place / folder).upload(made)
        shutil.rmtree(made)


def _marker(name: str) -> str:
    return f"{FINISHED}/{Path(slide_folder(name)).name}.json"


def _finished_slide(place: Place, name: str, mark: bytes) -> dict[str, Any] | None:
    marker, slide = place.read_all([_marker(name), f"{slide_folder(name)}/{SLIDE}"])
    whole = marker is not None and slide is not None and marker == mark + sha256_bytes(slide).encode()
    return json.loads(slide) if whole and slide is not None else None


def _seal(slide: dict[str, Any] | None) -> bytes:
    """What tells a ``slide.json`` that a crash of the machine cut short."""
    return sha256_bytes(canonical_json(slide)).encode()
