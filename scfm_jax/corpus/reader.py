"""A corpus, opened: its slides, and any of its cells, columns, labels and neighbours by number."""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
from jaxtyping import Float32, Float64, Int, Int32, Int64, Shaped

from scfm_jax.corpus.blocks import BlockRing, Blocks, gather
from scfm_jax.corpus.manifest import REPORT, SLIDE, VOCABULARY, read_manifest
from scfm_jax.corpus.store import BLOCK, LAYOUTS, SlideArrays, gene_layout
from scfm_jax.errors import InputError
from scfm_jax.genes import Vocabulary

_COLUMNS = {
    "x": "x",
    "y": "y",
    "total_raw": "total_raw",
    "total_matched": "total_matched",
    "n_genes": "nnz",
    "source_row": "source_row",
}
_RING_SHARE = 0.75


@dataclass(frozen=True, eq=False)
class Slide:
    """A piece of tissue, or of a suspension: cells of one section of one file.

    Parameters
    ----------
    name
        Unique in the corpus.
    source, section
        Name of the file, and the section's value there ("" where none was given).
    species, technology, tissue
        As declared for the file; the tissue may be "".
    modality
        ``"spatial"`` or ``"dissociated"``: what the technology measures, with coordinates or without.
    spatial
        Whether its cells have coordinates and neighbours.
    start, n_cells
        Its cells are ``start`` to ``start + n_cells`` of the corpus.
    panel
        Vocabulary indices of the genes measured there, ascending; a gene outside it is not zero but unknown.
    um_per_unit
        Length of a coordinate unit in µm, or ``None``.
    median_total
        Median over its cells of the counts over vocabulary genes.
    """

    name: str
    source: str
    section: str
    species: str
    technology: str
    tissue: str
    modality: str
    spatial: bool
    start: int
    n_cells: int
    panel: Int32[np.ndarray, " p"]
    um_per_unit: float | None
    median_total: float


@dataclass
class Cells:
    """Expressed genes of some cells: cell i has ``genes[offsets[i] : offsets[i + 1]]``, ascending."""

    genes: Int32[np.ndarray, " nnz"]
    counts: Int32[np.ndarray, " nnz"]
    offsets: Int64[np.ndarray, " n_and_end"]


@dataclass(frozen=True)
class _SlideIndex:
    """What must be in memory to read a slide's blocks."""

    arrays: SlideArrays
    block_starts: Int64[np.ndarray, " blocks_and_end"]
    overflow_position: Int64[np.ndarray, " m"]
    overflow_count: Int32[np.ndarray, " m"]


class Corpus:
    """A corpus on disk, read lazily. Open one with `Corpus.open`.

    Cells are numbered 0 to ``n_cells``, slide after slide. All methods may be called from several threads. A
    corpus can be pickled (it is opened anew); it does not survive a fork.

    Attributes
    ----------
    path
        Its folder.
    hash
        SHA-256 of its content: equal for equal corpora, wherever they lie.
    manifest
        The manifest as read.
    vocabulary
        Its genes.
    slides
        Its slides, in the order of their cells.
    n_cells, n_neighbours
        Number of cells, and of neighbours stored for each.
    slide_starts
        First cell of each slide, and ``n_cells`` at the end.
    """

    def __init__(
        self, path: Path, manifest: dict[str, Any], vocabulary: Vocabulary, cache_bytes: int
    ) -> None:
        self.path, self.manifest, self.vocabulary = str(path), manifest, vocabulary
        self.hash: str = manifest["hash"]
        self.n_neighbours: int = manifest["n_neighbours"]
        records = manifest["slides"]
        sizes = np.array([record["n_cells"] for record in records], np.int64)
        self.slide_starts: Int64[np.ndarray, " n_slides_and_end"] = np.concatenate([[0], np.cumsum(sizes)])
        self.n_cells = int(self.slide_starts[-1])
        panels = [np.array(panel, np.int32) for panel in manifest["panels"]]
        self.slides = tuple(
            Slide(
                **{
                    field: record[field]
                    for field in Slide.__dataclass_fields__
                    if field not in ("start", "panel")
                },
                start=int(start),
                panel=panels[record["panel"]],
            )
            for record, start in zip(records, self.slide_starts)
        )
        self._technology_means: dict[str, Float64[np.ndarray, " n_genes"]] = {}
        self._cache_bytes = cache_bytes
        ring_bytes = int(cache_bytes * _RING_SHARE)
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": cache_bytes - ring_bytes}})
        self._first_block = np.concatenate([[0], np.cumsum(-(-sizes // BLOCK))])
        self._gene_dtype = np.dtype(LAYOUTS[gene_layout(len(vocabulary))].dtype)
        nnz = sum(record["nnz"] for record in records)
        self._ring = BlockRing(int(self._first_block[-1]), nnz, self._gene_dtype, ring_bytes)
        self._lock = threading.Lock()
        self._indexes: dict[int, _SlideIndex] = {}
        self._labels: dict[int, dict[str, tuple[int, Int32[np.ndarray, " classes"]]]] = {}

    @classmethod
    def open(cls, path: str | Path, *, cache_bytes: int = 1 << 30) -> Corpus:
        """Open a corpus; no cell is read.

        Parameters
        ----------
        path
            Its folder.
        cache_bytes
            Memory for decoded cells. A cache never changes a result.

        Raises
        ------
        InputError
            No whole corpus there, or one of a newer schema.
        """
        path = Path(path)
        manifest = read_manifest(path)
        try:
            vocabulary = Vocabulary.from_dict(json.loads((path / VOCABULARY).read_bytes()))
        except (OSError, ValueError) as error:
            raise InputError(
                path / VOCABULARY, f"it cannot be read ({error})", "build the corpus again"
            ) from None
        if vocabulary.hash != manifest["vocabulary"]:
            raise InputError(path / VOCABULARY, "its hash is not the manifest's", "build the corpus again")
        return cls(path, manifest, vocabulary, cache_bytes)

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(Corpus.open, cache_bytes=self._cache_bytes), (self.path,)

    @functools.cached_property
    def report(self) -> dict[str, Any]:
        """The report of the build (see `build_corpus`)."""
        return json.loads((Path(self.path) / REPORT).read_bytes())

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the labels carried along from any file."""
        return tuple(self.manifest["labels"])

    def slide_of(self, index: Int[np.ndarray, " n"]) -> Int32[np.ndarray, " n"]:
        """Return the number of each cell's slide."""
        return (np.searchsorted(self.slide_starts, self._checked(index), side="right") - 1).astype(np.int32)

    def cells(self, index: Int[np.ndarray, " n"]) -> Cells:
        """Read the expressed genes of cells.

        Parameters
        ----------
        index
            Cell numbers, in any order; repeats are allowed.

        Returns
        -------
        One row for each entry of ``index``, in its order; vocabulary indices ascending within a row.

        Raises
        ------
        IndexError
            A number outside the corpus.
        """
        index = self._checked(index)
        slide = self.slide_of(index)
        block, place = np.divmod(index - self.slide_starts[slide], BLOCK)
        block += self._first_block[slide]
        with self._lock:
            slots = self._ring.find(block)
            here = slots >= 0
            if here.all():
                return Cells(*self._ring.take(slots, place))
            found = self._ring.take(slots[here], place[here])
        # Read without the lock: what was found is copied already, so another thread may push it out.
        missing, at = np.unique(block[~here], return_inverse=True)
        read = self._read_blocks(missing)
        with self._lock:
            self._ring.put(read)
        genes, counts, offsets = found
        starts, stops = np.empty(len(index), np.int64), np.empty(len(index), np.int64)
        starts[here], stops[here] = offsets[:-1], offsets[1:]
        starts[~here] = read.starts[at, place[~here]] + len(genes)
        stops[~here] = read.starts[at, place[~here] + 1] + len(genes)
        return Cells(
            *gather(np.concatenate([genes, read.genes]), np.concatenate([counts, read.counts]), starts, stops)
        )

    def column(self, name: str, index: Int[np.ndarray, " n"] | None = None) -> Shaped[np.ndarray, " n"]:
        """Read a column of cells.

        Parameters
        ----------
        name
            ``"x"`` and ``"y"`` (float32, the file's own units, NaN for dissociated cells), ``"total_raw"``
            and ``"total_matched"`` (int32, counts over all genes of the file and over those in the
            vocabulary), ``"n_genes"`` (int32, expressed vocabulary genes) or ``"source_row"`` (int64, row in
            the file).
        index
            Cell numbers; ``None`` for all.

        Raises
        ------
        InputError
            No such column.
        """
        if name not in _COLUMNS:
            raise InputError(self.path, f"no column {name!r}", f"use one of {', '.join(_COLUMNS)}")
        dtype = np.dtype(np.int32 if name == "n_genes" else LAYOUTS[name].dtype)
        missing = np.nan if name in ("x", "y") else 0
        out = np.full(self.n_cells if index is None else len(index), missing, dtype)
        reads = [
            (rows, self._index(slide).arrays[_COLUMNS[name]][local].read())
            for slide, rows, local in self._by_slide(index)
            if self.slides[slide].spatial or name not in ("x", "y")
        ]
        for rows, values in reads:
            out[rows] = values.result()
        return out

    def labels(
        self, name: str, index: Int[np.ndarray, " n"] | None = None
    ) -> tuple[Int32[np.ndarray, " n"], tuple[str, ...]]:
        """Read a label of cells.

        Parameters
        ----------
        name
            One of `label_names`.
        index
            Cell numbers; ``None`` for all.

        Returns
        -------
        Codes, -1 where the label is missing, and the classes they stand for, one list for the whole corpus.

        Raises
        ------
        InputError
            No such label.
        """
        if name not in self.manifest["labels"]:
            there = ", ".join(self.label_names) or "none: build the corpus with --labels"
            raise InputError(self.path, f"no label {name!r}", f"use one of {there}")
        out = np.full(self.n_cells if index is None else len(index), -1, np.int32)
        for slide, rows, local in self._by_slide(index):
            if name in (labels := self._slide_labels(slide)):
                number, classes = labels[name]
                codes = self._index(slide).arrays[f"label_{number}"][local].read().result()
                out[rows] = classes[codes]
        return out, tuple(self.manifest["labels"][name])

    def neighbours(self, index: Int[np.ndarray, " n"], k: int) -> Int64[np.ndarray, "n k"]:
        """Read the ``k`` nearest neighbours of cells within their slide.

        Returns
        -------
        Cell numbers, nearest first, -1 where there are fewer.

        Raises
        ------
        InputError
            ``k`` is more than was stored.
        """
        out = np.full((len(index), self._checked_k(k)), -1, np.int64)
        for rows, slide, found in self._neighbour_rows("neighbours", index, k):
            out[rows] = np.where(found >= 0, found + self.slide_starts[slide], -1)
        return out

    def distances(self, index: Int[np.ndarray, " n"], k: int) -> Float32[np.ndarray, "n k"]:
        """Read distances to the ``k`` nearest neighbours, in the file's units, infinite where there is none.

        Raises
        ------
        InputError
            ``k`` is more than was stored.
        """
        out = np.full((len(index), self._checked_k(k)), np.inf, np.float32)
        for rows, _, found in self._neighbour_rows("distances", index, k):
            out[rows] = found
        return out

    def technology_means(self, technology: str) -> Float64[np.ndarray, " n_genes"]:
        """Mean of each gene over a technology's cells that express it, of counts scaled to 10,000 a cell.

        Returns
        -------
        NaN where no cell does.
        """
        if technology not in self._technology_means:
            self._technology_means[technology] = self._read_technology_means(technology)
        return self._technology_means[technology].copy()

    def _read_technology_means(self, technology: str) -> Float64[np.ndarray, " n_genes"]:
        scaled_sum, expressing = np.zeros(len(self.vocabulary)), np.zeros(len(self.vocabulary))
        for number, slide in enumerate(self.slides):
            if slide.technology == technology:
                arrays = self._index(number).arrays
                scaled_sum[slide.panel] += arrays["scaled_sum"].read().result()
                expressing[slide.panel] += arrays["expressing"].read().result()
        return np.divide(scaled_sum, expressing, out=np.full(len(expressing), np.nan), where=expressing > 0)

    def _neighbour_rows(
        self, name: str, index: Int[np.ndarray, " n"], k: int
    ) -> Iterator[tuple[Any, int, Shaped[np.ndarray, "rows k"]]]:
        reads = [
            (rows, slide, self._index(slide).arrays[name][local, :k].read())
            for slide, rows, local in self._by_slide(index)
            if self.slides[slide].spatial
        ]
        for rows, slide, found in reads:
            yield rows, slide, found.result()

    def _checked(self, index: Int[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        index = np.asarray(index, np.int64)
        if index.size and not 0 <= index.min() <= index.max() < self.n_cells:
            raise IndexError(
                f"cells are numbered 0 to {self.n_cells - 1}, not {index.min()} to {index.max()}"
            )
        return index

    def _checked_k(self, k: int) -> int:
        if not 0 <= k <= self.n_neighbours:
            stored = f"the corpus stores {self.n_neighbours} neighbours"
            raise InputError(
                self.path, f"k is {k}, {stored}", "use a smaller k, or build it with a larger n_neighbours"
            )
        return k

    def _by_slide(self, index: Int[np.ndarray, " n"] | None) -> Iterator[tuple[int, Any, Any]]:
        """Split a request by slide: slide, places in the request, rows in the slide."""
        if index is None:
            for slide, (start, stop) in enumerate(zip(self.slide_starts, self.slide_starts[1:])):
                yield slide, slice(start, stop), slice(None)
            return
        slide_of = self.slide_of(index)
        order = np.argsort(slide_of, kind="stable")
        present, starts = np.unique(slide_of[order], return_index=True)
        for slide, rows in zip(present.tolist(), np.split(order, starts[1:])):
            yield slide, rows, index[rows] - self.slide_starts[slide]

    def _folder(self, slide: int) -> Path:
        return Path(self.path) / self.manifest["slides"][slide]["folder"]

    def _index(self, slide: int) -> _SlideIndex:
        if slide not in self._indexes:
            arrays = SlideArrays(self._folder(slide), self._context)
            small = ("block_starts", "overflow_position", "overflow_count")
            arrays.open([*small, "genes", "counts", "nnz"])
            reads = [arrays[name].read() for name in small]
            self._indexes[slide] = _SlideIndex(arrays, *(read.result() for read in reads))
        return self._indexes[slide]

    def _slide_labels(self, slide: int) -> dict[str, tuple[int, Int32[np.ndarray, " classes"]]]:
        """From label to its array's number and the corpus's code of each slide code; the last is for -1."""
        if slide not in self._labels:
            classes = json.loads((self._folder(slide) / SLIDE).read_bytes())["labels"]
            self._labels[slide] = {
                name: (
                    number,
                    np.array([*np.searchsorted(self.manifest["labels"][name], values), -1], np.int32),
                )
                for number, (name, values) in enumerate(classes.items())
            }
        return self._labels[slide]

    def _read_blocks(self, numbers: Int64[np.ndarray, " blocks"]) -> Blocks:
        """Read blocks, given ascending, in one batch: a request an array for each run of blocks."""
        slide_of = np.searchsorted(self._first_block, numbers, side="right") - 1
        new_run = (np.diff(numbers, prepend=-2) != 1) | (np.diff(slide_of, prepend=-1) != 0)
        first = np.flatnonzero(new_run)
        last = np.append(first[1:], len(numbers)) - 1
        reads = []
        with ts.Batch() as batch:
            for slide, start, stop in zip(slide_of[first].tolist(), numbers[first], numbers[last] + 1):
                index = self._index(slide)
                start, stop = start - self._first_block[slide], stop - self._first_block[slide]
                values = slice(int(index.block_starts[start]), int(index.block_starts[stop]))
                cells = slice(int(start * BLOCK), int(min(stop * BLOCK, self.slides[slide].n_cells)))
                arrays = index.arrays
                parts = [
                    arrays[name][of].read(batch=batch)
                    for name, of in (("nnz", cells), ("genes", values), ("counts", values))
                ]
                reads.append((index, values, parts))
        lengths, genes, counts = [], [], []
        for index, values, (nnz, gene, count) in reads:
            lengths.append(np.pad(nnz.result().astype(np.int64), (0, -len(nnz.result()) % BLOCK)))
            genes.append(gene.result())
            counts.append(_with_overflow(index, values.start, count.result()))
        length = np.concatenate(lengths)
        ends = np.cumsum(length).reshape(-1, BLOCK)
        starts = np.concatenate([ends[:, :1] - length[::BLOCK, None], ends], axis=1)
        return Blocks(numbers, starts, np.concatenate(genes), np.concatenate(counts))


def _with_overflow(
    index: _SlideIndex, start: int, counts: Shaped[np.ndarray, " m"]
) -> Int32[np.ndarray, " m"]:
    """Put back the counts that did not fit 16 bits; ``start`` is the first one's place in the slide."""
    counts = counts.astype(np.int32)
    first, last = np.searchsorted(index.overflow_position, [start, start + len(counts)])
    counts[index.overflow_position[first:last] - start] = index.overflow_count[first:last]
    return counts


def corpus_info(corpus: Corpus) -> dict[str, Any]:
    """Describe a corpus from its manifest alone, ready for JSON."""
    slides = []
    for slide, record in zip(corpus.slides, corpus.manifest["slides"]):
        shown = (
            "name",
            "source",
            "section",
            "species",
            "technology",
            "tissue",
            "modality",
            "spatial",
            "um_per_unit",
            "n_cells",
        )
        slides.append(
            {name: record[name] for name in shown}
            | {"panel_size": len(slide.panel), "median_counts": slide.median_total, "bytes": record["bytes"]}
        )
    return {
        "path": corpus.path,
        "hash": corpus.hash,
        "schema": corpus.manifest["schema"],
        "n_cells": corpus.n_cells,
        "n_genes": len(corpus.vocabulary),
        "n_neighbours": corpus.n_neighbours,
        "bytes": sum(slide["bytes"] for slide in slides),
        "labels": corpus.manifest["labels"],
        "slides": slides,
    }
