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
from jaxtyping import Int, Int32

from scfm_jax.corpus.building import FINISHED, SCRATCH
from scfm_jax.corpus.counts_file import CountsFile
from scfm_jax.corpus.manifest import BUILDING, SLIDE, canonical_json, sha256_bytes
from scfm_jax.corpus.neighbours import hilbert_order
from scfm_jax.corpus.place import Place
from scfm_jax.corpus.slide import SlideContent, slide_folder, write_slide
from scfm_jax.corpus.sources import Source
from scfm_jax.corpus.spool import Spool
from scfm_jax.corpus.store import StoreOptions

_SHUFFLE_SEED = 0


@dataclass(frozen=True)
class WriteJob:
    """Some slides of a source that was checked.

    ``sections`` are their numbers and names; ``rows`` their kept cells, ascending, and ``totals`` what was
    counted of these: over all genes, over those with a target, and non-zeros with a target. ``threads`` are
    those of the search for neighbours.
    """

    place: str
    source: Source
    target: Int[np.ndarray, " n_source_genes"]
    sections: dict[int, str]
    rows: Int32[np.ndarray, " kept"]
    totals: Int32[np.ndarray, "3 kept"]
    fingerprint: dict[str, Any]
    n_genes: int
    n_neighbours: int
    options: StoreOptions
    threads: int


def write_slides(job: WriteJob) -> list[tuple[str, dict[str, Any]]]:
    """Write slides, or take over those that are finished; return each one's folder and ``slide.json``."""
    place = Place(job.place)
    marks = {name: canonical_json(job.fingerprint | {"slide": name}) for name in job.sections.values()}
    done = _finished_slides(place, marks)
    waiting = {section: name for section, name in job.sections.items() if name not in done}
    if waiting:
        with contextlib.closing(CountsFile(job.source)) as file, _scratch(place) as scratch:
            section_of = file.section_of[job.rows]
            places = [_order(file, job.rows, np.flatnonzero(section_of == section)) for section in waiting]
            pieces = [job.rows[of_slide] for of_slide in places]
            entries = job.totals[2, np.concatenate(places)]
            spool = Spool(scratch / "spool", pieces, entries, file.matrix.shape[0], job.n_genes)
            spool.fill(file.entries(np.sort(np.concatenate(pieces))), job.target)
            labels = {name: file.label(name) for name in file.source.labels}
            for piece, (section, name) in enumerate(waiting.items()):
                folder = scratch / "slide"
                folder.mkdir()
                done[name] = write_slide(
                    folder,
                    _content(file, job, labels, section, places[piece]),
                    spool.rows(piece),
                    job.n_neighbours,
                    job.options,
                    threads=job.threads,
                )
                _put_in_place(place, folder, slide_folder(name))
                place.write(_marker(name), marks[name] + _seal(done[name]))
    return [(slide_folder(name), done[name]) for name in job.sections.values()]


def _order(
    file: CountsFile, rows: Int32[np.ndarray, " kept"], of_slide: Int[np.ndarray, " n"]
) -> Int[np.ndarray, " n"]:
    """The places `of_slide` among `rows`, in the order in which the slide is stored."""
    if file.coordinates is None:
        return np.random.default_rng(_SHUFFLE_SEED).permutation(of_slide)
    return of_slide[hilbert_order(file.coordinates[rows[of_slide]])]


def _content(
    file: CountsFile,
    job: WriteJob,
    labels: dict[str, tuple[Int[np.ndarray, " cells"], list[str]]],
    section: int,
    of_slide: Int[np.ndarray, " n"],
) -> SlideContent:
    rows = job.rows[of_slide]
    return SlideContent(
        name=job.sections[section],
        section=file.sections[section],
        source=file.source,
        n_genes=job.n_genes,
        panel=np.unique(job.target[job.target >= 0]),
        source_row=rows,
        total_raw=job.totals[0, of_slide],
        total_matched=job.totals[1, of_slide],
        xy=None if file.coordinates is None else file.coordinates[rows],
        labels={label: (codes[rows], classes) for label, (codes, classes) in labels.items()},
    )


@contextlib.contextmanager
def _scratch(place: Place) -> Iterator[Path]:
    """A folder that goes when the job ends: beside the slides, to be moved, or anywhere, to be uploaded."""
    parent = place.path / BUILDING / SCRATCH if place.is_local else None
    if parent:
        parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def _put_in_place(place: Place, made: Path, folder: str) -> None:
    if not place.is_local:
        place.delete(f"{folder}/")
        (place / folder).upload(made)
        shutil.rmtree(made)
        return
    target = place.path / folder
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        # Moved and not deleted, so that what lies there is whole at any moment.
        target.rename(made.with_name(f"replaced-{target.name}"))
    made.rename(target)


def _marker(name: str) -> str:
    return f"{FINISHED}/{Path(slide_folder(name)).name}.json"


def _finished_slides(place: Place, marks: dict[str, bytes]) -> dict[str, dict[str, Any]]:
    """The ``slide.json`` of the slides that are there and made from what their mark says."""
    read = place.read_all(
        [path for name in marks for path in (_marker(name), f"{slide_folder(name)}/{SLIDE}")]
    )
    return {
        name: json.loads(slide)
        for (name, mark), marker, slide in zip(marks.items(), read[::2], read[1::2], strict=True)
        if slide is not None and marker == mark + sha256_bytes(slide).encode()
    }


def _seal(slide: dict[str, Any]) -> bytes:
    """What tells a ``slide.json`` that a crash of the machine cut short."""
    return sha256_bytes(canonical_json(slide)).encode()
