"""From files of counts to a corpus: check every file, write the slides, put them together.

The build works where the corpus will be, in ``building/`` beside the slides, and the manifest is written
last: until then there is no corpus, or still the corpus of before. A slide that is finished is marked with a
fingerprint of all that it was made from, and a later build of the same takes it over.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from scfm_jax.corpus.assemble import assemble, event
from scfm_jax.corpus.check import (
    Counted,
    CountJob,
    Outline,
    check_names,
    count,
    fingerprint_of,
    outline_sources,
    report_source,
    request_hash,
)
from scfm_jax.corpus.manifest import BUILDING, MANIFEST, SCHEMA, canonical_json, read_manifest, sha256_bytes
from scfm_jax.corpus.place import Place
from scfm_jax.corpus.reader import Corpus
from scfm_jax.corpus.sources import Source
from scfm_jax.corpus.store import StoreOptions
from scfm_jax.corpus.workers import run_jobs
from scfm_jax.corpus.write import FINISHED, WriteJob, clear_scratch, write_slides
from scfm_jax.errors import DataWarning, InputError
from scfm_jax.genes import Alignment, Orthologs, Vocabulary, align

# Slides of one file are written together up to this many non-zeros, so that small ones share a pass over it.
_ENTRIES_OF_A_JOB = 1 << 25

_STARTED = f"{BUILDING}/started"

Progress = Callable[[str, int, int], None]


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
    options: StoreOptions | None = None,
    workers: int = 1,
    scheduler: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Build a corpus.

    Parameters
    ----------
    out
        Folder to make, or a prefix of a bucket (``gs://``, ``s3://``). A build that was interrupted goes on
        when it is called again; one that is done already does nothing.
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
    options
        Codec and size of files; if not given, lz4, with larger files in a bucket than in a folder.
    workers
        Processes that share the files and slides out. They change nothing in the corpus.
    scheduler
        Address of a Dask scheduler whose workers do so, and see the same files and ``out``.
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
    place = Place(out)
    if n_neighbours < 1 or min_counts < 0:
        raise InputError(
            place, f"n_neighbours is {n_neighbours}, min_counts {min_counts}", "give at least 1 and 0"
        )
    exists = _exists(place)
    outlines = _outlines(place, sources)
    tables: dict[str, Any] = {"gene_names": gene_names, "aliases": aliases, "orthologs": orthologs}
    if vocabulary is None:
        named = [(outline.gene_names, outline.source.species) for outline in outlines]
        vocabulary = Vocabulary.from_names(named, **tables)
    settings = {
        "vocabulary": vocabulary.hash,
        "min_counts": min_counts,
        "n_neighbours": n_neighbours,
    }
    options = options or StoreOptions.suited_to(place)
    work = _Work(place, outlines, vocabulary, tables, settings, options)
    if exists:
        done = _report_of_request(place, work.request)
        if done is None:
            raise InputError(place, "it exists already", "remove it, choose another name, or add to it")
        return done
    folders, reports = work.run(workers, scheduler, progress or _tell_nobody)
    history = [event("build", request=work.request, sources=[asdict(source) for source in sources])]
    with _keeping_finished(place):
        report = assemble(place, folders, vocabulary, settings, reports, history)
    place.delete(f"{BUILDING}/")
    return report


def add_sources(
    path: str | Path,
    sources: Sequence[Source],
    *,
    gene_names: Mapping[str, str] | None = None,
    aliases: Mapping[str, str] | None = None,
    orthologs: Orthologs | None = None,
    workers: int = 1,
    scheduler: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Add the slides of files to a corpus; those that it holds are not touched and keep their cell numbers.

    Parameters
    ----------
    path
        The corpus. Its vocabulary and settings hold for the new slides.
    sources, gene_names, aliases, orthologs, workers, scheduler, progress
        As of `build_corpus`.

    Returns
    -------
    The report of the whole corpus.

    Raises
    ------
    InputError
        As of `build_corpus`; or a slide that the corpus has already.
    """
    place = Place(path)
    corpus = Corpus.open(path, cache_bytes=0)
    manifest = corpus.manifest
    taken = [slide.name for slide in corpus.slides]
    settings = {name: manifest[name] for name in ("vocabulary", "min_counts", "n_neighbours")}
    options = StoreOptions(*(manifest["slides"][-1][name] for name in ("codec", "shard_factor")))
    tables: dict[str, Any] = {"gene_names": gene_names, "aliases": aliases, "orthologs": orthologs}
    outlines = _outlines(place, sources)
    work = _Work(place, outlines, corpus.vocabulary, tables, settings, options)
    if (done := _report_of_request(place, work.request)) is not None:
        return done
    check_names(outlines, taken)
    folders, reports = work.run(workers, scheduler, progress or _tell_nobody)
    before = manifest["provenance"]["history"]
    added = event("add", request=work.request, sources=[asdict(source) for source in sources])
    with _keeping_finished(place):
        report = assemble(
            place,
            {record["folder"]: record["checksum"] for record in manifest["slides"]} | folders,
            corpus.vocabulary,
            settings,
            [*corpus.report["files"], *reports],
            [*before, added],
        )
    place.delete(f"{BUILDING}/")
    return report


class _Work:
    """What is to be read and written for some sources."""

    def __init__(
        self,
        place: Place,
        outlines: Sequence[Outline],
        vocabulary: Vocabulary,
        tables: dict[str, Any],
        settings: dict[str, Any],
        options: StoreOptions,
    ) -> None:
        self._place, self._outlines, self._n_genes = place, outlines, len(vocabulary)
        self._settings, self._options = settings, options
        self._alignments: list[Alignment] = [
            align(outline.gene_names, vocabulary, species=outline.source.species, **tables)
            for outline in outlines
        ]
        made_with = {**settings, "schema": SCHEMA, "options": asdict(options)}
        self._fingerprints = [
            fingerprint_of(outline, alignment, made_with)
            for outline, alignment in zip(outlines, self._alignments)
        ]
        self.request = request_hash(self._fingerprints)

    def run(
        self, workers: int, scheduler: str | None, tell: Progress
    ) -> tuple[dict[str, str], list[dict[str, Any]]]:
        """Write the slides; return their folders with their checksums, and the report of each source."""
        total = 2 * sum(outline.n_cells for outline in self._outlines)
        done = 0
        jobs = [
            CountJob(outline.source.absolute(), alignment.target, self._settings["min_counts"])
            for outline, alignment in zip(self._outlines, self._alignments)
        ]
        counted: dict[int, Counted] = {}
        for number, result in run_jobs(count, jobs, workers=workers, scheduler=scheduler):
            counted[number] = result
            done += self._outlines[number].n_cells
            tell(f"checked {Path(self._outlines[number].source.path).name}", done, total)
        reports = []
        for number, (outline, alignment) in enumerate(zip(self._outlines, self._alignments)):
            report, warned = report_source(outline, counted[number], alignment, self._settings["min_counts"])
            reports.append(report)
            _warn(report, outline.source.path, warned)
        with _keeping_finished(self._place):
            clear_scratch(self._place)
            self._place.write(_STARTED, self.request.encode())
            owners, writes = self._writes(counted, workers == 1 and scheduler is None)
            written: dict[int, list[tuple[str, dict[str, Any]]]] = {}
            for number, slides in run_jobs(write_slides, writes, workers=workers, scheduler=scheduler):
                written[number] = slides
                done += sum(slide["record"]["n_cells"] for _, slide in slides)
                tell(f"wrote {', '.join(slide['record']['name'] for _, slide in slides)}", done, total)
        folders: dict[str, str] = {}
        for report in reports:
            report["slides"] = []
        for number, owner in enumerate(owners):
            for folder, slide in written[number]:
                folders[folder] = sha256_bytes(canonical_json(slide))
                reports[owner]["slides"].append(slide["record"]["name"])
                _warn(reports[owner], slide["record"]["name"], slide["warnings"])
        tell("every slide is written", total, total)
        return folders, reports

    def _writes(self, counted: dict[int, Counted], alone: bool) -> tuple[list[int], list[WriteJob]]:
        """The source that each job belongs to, and the jobs, in the order of the slides."""
        owners, jobs = [], []
        for number, (outline, alignment) in enumerate(zip(self._outlines, self._alignments)):
            entries = counted[number].entries_of_slide
            # A file that is not stored by cell is read whole for each job: so it gets one.
            group = (entries.cumsum() - 1) // _ENTRIES_OF_A_JOB if counted[number].by_cell else entries * 0
            for value in dict.fromkeys(group.tolist()):
                sections = tuple(s for s in range(len(entries)) if group[s] == value)
                owners.append(number)
                jobs.append(
                    WriteJob(
                        place=self._place.absolute,
                        source=outline.source.absolute(),
                        target=alignment.target,
                        totals=counted[number].totals,
                        sections=sections,
                        fingerprint=self._fingerprints[number],
                        n_genes=self._n_genes,
                        min_counts=self._settings["min_counts"],
                        n_neighbours=self._settings["n_neighbours"],
                        options=self._options,
                        threads=-1 if alone else 1,
                    )
                )
        return owners, jobs


def _tell_nobody(what: str, done: int, total: int) -> None:
    pass


def _outlines(place: Place, sources: Sequence[Source]) -> list[Outline]:
    if not sources:
        raise InputError(place, "no source file is given", "give at least one .h5ad, .zarr or 10x .h5 file")
    outlines = outline_sources(sources)
    check_names(outlines)
    return outlines


def _exists(place: Place) -> bool:
    """Whether a corpus is there.

    Raises
    ------
    InputError
        Something else is.
    """
    mend = "remove it or choose another name"
    if place.is_local and place.path.exists() and not place.path.is_dir():
        raise InputError(place, "it exists already", mend)
    if place.read(MANIFEST) is not None:
        return True
    if place.names() and not place.names(f"{BUILDING}/"):
        raise InputError(place, "it exists already and is no corpus", mend)
    return False


def _report_of_request(place: Place, request: str) -> dict[str, Any] | None:
    """The report of the corpus, if it holds what is asked for."""
    history = read_manifest(place)["provenance"]["history"]
    asked = [number for number, entry in enumerate(history) if entry.get("request") == request]
    if not asked or any(entry["what"] == "remove" for entry in history[asked[-1] :]):
        return None
    place.delete(f"{BUILDING}/")  # what is left where it was killed at the very end
    return Corpus.open(str(place), cache_bytes=0).report


@contextlib.contextmanager
def _keeping_finished(place: Place) -> Iterator[None]:
    """Leave nothing behind a failed build but finished slides."""
    if place.is_local:
        place.path.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        clear_scratch(place)
        if not place.names(f"{FINISHED}/") and place.read(MANIFEST) is None:
            # A slide may be in place, or half uploaded, and not yet marked.
            place.delete("slides/")
        if not place.names(f"{FINISHED}/"):
            place.delete(f"{BUILDING}/")
            if place.is_local:
                with contextlib.suppress(OSError):
                    place.path.rmdir()
        raise


def _warn(report: dict[str, Any], where: str, found: Sequence[str]) -> None:
    for text in found:
        report["warnings"].append(f"{where}: {text}")
        warnings.warn(report["warnings"][-1], DataWarning, stacklevel=3)
