"""From files of counts to a corpus: check every file, write the slides, put them together.

The build works where the corpus will be, in ``building/`` beside the slides, and the manifest is written
last: until then there is no corpus, or still the corpus of before. A slide that is finished is marked with a
fingerprint of all that it was made from, and a later build of the same takes it over.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scfm_jax.corpus.assemble import assemble, event
from scfm_jax.corpus.building import COUNTED, clear_scratch, only_build
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
from scfm_jax.corpus.manifest import BUILDING, MANIFEST, SCHEMA, canonical_json, sha256_bytes
from scfm_jax.corpus.place import Place
from scfm_jax.corpus.reader import Corpus
from scfm_jax.corpus.sources import Source
from scfm_jax.corpus.store import StoreOptions
from scfm_jax.corpus.workers import run_jobs
from scfm_jax.corpus.write import WriteJob, write_slides
from scfm_jax.errors import DataWarning, InputError
from scfm_jax.genes import Alignment, Orthologs, Vocabulary, align

# Slides of one file are written together up to this many non-zeros, so that small ones share a pass over it.
_ENTRIES_OF_A_JOB = 1 << 25

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
        Bad input, found before a slide is written; or another build of it is at work.

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
    outlines = _outlines(place, sources)
    tables = _Tables(gene_names, aliases, orthologs)
    if vocabulary is None:
        named = [(outline.gene_names, outline.source.species) for outline in outlines]
        vocabulary = Vocabulary.from_names(named, **vars(tables))
    settings = {"vocabulary": vocabulary.hash, "min_counts": min_counts, "n_neighbours": n_neighbours}
    work = _Work(place, outlines, vocabulary, tables, settings, options or StoreOptions.suited_to(place))
    with only_build(place):
        if place.names(MANIFEST):
            done = work.done(Corpus.open(out, cache_bytes=0))
            if done is None:
                raise InputError(place, "it exists already", "remove it, choose another name, or add to it")
            return done
        return work.finish(None, workers, scheduler, progress or _tell_nobody)


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
    Corpus.open(path, cache_bytes=0)  # before anything is made there
    outlines = _outlines(place, sources)
    with only_build(place):
        corpus = Corpus.open(path, cache_bytes=0)
        manifest = corpus.manifest
        settings = {name: manifest[name] for name in ("vocabulary", "min_counts", "n_neighbours")}
        options = StoreOptions(*(manifest["slides"][-1][name] for name in ("codec", "shard_factor")))
        tables = _Tables(gene_names, aliases, orthologs)
        work = _Work(place, outlines, corpus.vocabulary, tables, settings, options)
        if (done := work.done(corpus)) is not None:
            return done
        check_names(outlines, [slide.name for slide in corpus.slides])
        return work.finish(corpus, workers, scheduler, progress or _tell_nobody)


@dataclass(frozen=True)
class _Tables:
    """What genes are aligned by."""

    gene_names: Mapping[str, str] | None
    aliases: Mapping[str, str] | None
    orthologs: Orthologs | None


class _Work:
    """What is to be read and written for some sources."""

    def __init__(
        self,
        place: Place,
        outlines: Sequence[Outline],
        vocabulary: Vocabulary,
        tables: _Tables,
        settings: dict[str, Any],
        options: StoreOptions,
    ) -> None:
        self._place, self._outlines, self._vocabulary = place, outlines, vocabulary
        self._settings, self._options = settings, options
        self._alignments: list[Alignment] = [
            align(outline.gene_names, vocabulary, species=outline.source.species, **vars(tables))
            for outline in outlines
        ]
        made_with = {**settings, "schema": SCHEMA, "options": asdict(options)}
        self._fingerprints = [
            fingerprint_of(outline, alignment, made_with)
            for outline, alignment in zip(outlines, self._alignments)
        ]
        self._request = request_hash(self._fingerprints)

    def done(self, corpus: Corpus) -> dict[str, Any] | None:
        """The report of a corpus, if it holds already what is asked for."""
        history = corpus.manifest["provenance"]["history"]
        asked = [number for number, entry in enumerate(history) if entry.get("request") == self._request]
        if not asked or any(entry["what"] == "remove" for entry in history[asked[-1] :]):
            return None
        self._place.delete(f"{BUILDING}/")  # what is left where it was killed at the very end
        return corpus.report

    def finish(
        self, corpus: Corpus | None, workers: int, scheduler: str | None, tell: Progress
    ) -> dict[str, Any]:
        """Write the slides, behind those of `corpus` if there is one, and return the report of all."""
        folders, reports = self._run(workers, scheduler, tell)
        history: list[dict[str, Any]] = []
        if corpus is not None:
            records = corpus.manifest["slides"]
            folders = {record["folder"]: record["checksum"] for record in records} | folders
            reports = [*corpus.report["files"], *reports]
            history = corpus.manifest["provenance"]["history"]
        sources = [asdict(outline.source) for outline in self._outlines]
        what = event("add" if corpus else "build", request=self._request, sources=sources)
        report = assemble(self._place, folders, self._vocabulary, self._settings, reports, [*history, what])
        self._place.delete(f"{BUILDING}/")
        return report

    def _run(
        self, workers: int, scheduler: str | None, tell: Progress
    ) -> tuple[dict[str, str], list[dict[str, Any]]]:
        """Write the slides; return their folders with their checksums, and the report of each source."""
        total = 2 * sum(outline.n_cells for outline in self._outlines)
        done = 0
        clear_scratch(self._place)
        counted: dict[int, Counted] = {}
        for number, result in self._counted(workers, scheduler):
            counted[number] = result
            done += self._outlines[number].n_cells
            tell(f"checked {Path(self._outlines[number].source.path).name}", done, total)
        reports = []
        for number, (outline, alignment) in enumerate(zip(self._outlines, self._alignments)):
            report, warned = report_source(outline, counted[number], alignment, self._settings["min_counts"])
            reports.append(report)
            _warn(report, outline.source.path, warned)
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

    def _counted(self, workers: int, scheduler: str | None) -> Iterator[tuple[int, Counted]]:
        """Each source's number and counts: as an earlier build found them in the same file, or read."""
        names = [f"{COUNTED}/{request_hash([fingerprint])}" for fingerprint in self._fingerprints]
        jobs: dict[int, CountJob] = {}
        for number, data in enumerate(self._place.read_all(names)):
            if (known := Counted.from_bytes(data)) is not None:
                yield number, known
                continue
            source, target = self._outlines[number].source.absolute(), self._alignments[number].target
            jobs[number] = CountJob(source, target, self._settings["min_counts"])
        numbers = list(jobs)
        for job, result in run_jobs(count, list(jobs.values()), workers=workers, scheduler=scheduler):
            self._place.write(names[numbers[job]], result.to_bytes())
            yield numbers[job], result

    def _writes(self, counted: dict[int, Counted], alone: bool) -> tuple[list[int], list[WriteJob]]:
        """The source that each job belongs to, and the jobs, in the order of the slides.

        What is taken from `counted` is removed there.
        """
        owners, jobs = [], []
        for number, (outline, alignment) in enumerate(zip(self._outlines, self._alignments)):
            found = counted.pop(number)
            # A file that is not stored by cell is read whole for each job: so it gets one.
            entries = found.entries_of_slide
            group = (entries.cumsum() - 1) // _ENTRIES_OF_A_JOB if found.by_cell else entries * 0
            order = np.argsort(found.section, kind="stable")
            ends = np.searchsorted(found.section[order], np.arange(len(entries) + 1))
            for value in dict.fromkeys(group[np.diff(ends) > 0].tolist()):
                sections = np.flatnonzero((group == value) & (np.diff(ends) > 0)).tolist()
                rows = np.sort(order[ends[sections[0]] : ends[sections[-1] + 1]])
                owners.append(number)
                jobs.append(
                    WriteJob(
                        place=self._place.absolute,
                        source=outline.source.absolute(),
                        target=alignment.target,
                        sections={section: outline.slides[section] for section in sections},
                        rows=rows.astype(np.int32),
                        totals=found.cells[:, rows],
                        fingerprint=self._fingerprints[number],
                        n_genes=len(self._vocabulary),
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


def _warn(report: dict[str, Any], where: str, found: Sequence[str]) -> None:
    for text in found:
        report["warnings"].append(f"{where}: {text}")
        warnings.warn(report["warnings"][-1], DataWarning, stacklevel=3)
