"""A corpus, opened: its slides, and any of its cells, columns, labels and neighbours by number."""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import tensorstore as ts
from jaxtyping import Float32, Float64, Int, Int32, Int64, Shaped, UInt

from scfm_jax.corpus.block_reader import BlockReader
from scfm_jax.corpus.manifest import SLIDE, VOCABULARY, read_checked, read_manifest
from scfm_jax.corpus.place import Place
from scfm_jax.corpus.store import BLOCK, LAYOUTS, entry_layout, unpack_counts, unpack_genes
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
_DTYPES: dict[str, type] = {"x": np.float32, "y": np.float32, "source_row": np.int64}
# Slides that are read together: enough for the requests that an object store takes at once.
SLIDES_AT_ONCE = 256
# A slide, places of its cells in a request, and rows within it.
_OfSlide: TypeAlias = tuple[int, Any, Any]
# Columns that batches are made of are read by block, and kept.
_BY_BLOCK = ("x", "y", "total_matched")


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


@dataclass(frozen=True)
class Cells:
    """Expressed genes of some cells: cell i has entries ``offsets[i]`` to ``offsets[i + 1]``.

    Attributes
    ----------
    entries
        Gene and count in one number, as they are stored (`scfm_jax.corpus.store`).
    offsets
        Where each cell begins, and the end.
    """

    entries: UInt[np.ndarray, " nnz"]
    offsets: Int64[np.ndarray, " n_and_end"]

    @functools.cached_property
    def genes(self) -> Int32[np.ndarray, " nnz"]:
        """Vocabulary indices, ascending within a cell."""
        return unpack_genes(self.entries)

    @functools.cached_property
    def counts(self) -> Int32[np.ndarray, " nnz"]:
        """Raw counts."""
        return unpack_counts(self.entries)

    def rows(self, start: int, stop: int) -> Cells:
        """Cells `start` to `stop` of these: views, unpacked with the others."""
        first, last = self.offsets[start], self.offsets[stop]
        part = Cells(self.entries[first:last], self.offsets[start : stop + 1] - first)
        part.__dict__.update(genes=self.genes[first:last], counts=self.counts[first:last])
        return part


class Pool:
    """Cells whose blocks are decoded in memory; they are copied out in parts."""

    def __init__(self, index: Int64[np.ndarray, " n"], blocks: BlockReader, located: tuple[Any, ...]) -> None:
        self.index, self._blocks = index, blocks
        self._block, self._place, self._slide = located
        read = blocks.read(np.unique(self._block))
        self._views = read.views(read.find(self._block), self._place)
        self._offsets = np.concatenate([[0], np.cumsum(list(map(len, self._views)), dtype=np.int64)])

    def cells(self, start: int, stop: int) -> Cells:
        """The cells ``index[start:stop]``."""
        part = slice(start, stop)
        entries, offsets = np.concatenate(self._views[part]), self._offsets[start : stop + 1]
        offsets = offsets - offsets[0]
        located = self._block[part], self._place[part], self._slide[part]
        return Cells(self._blocks.restored(entries, offsets, *located), offsets)


class Corpus:
    """A corpus on disk, read lazily. Open one with `Corpus.open`.

    Cells are numbered 0 to ``n_cells``, slide after slide. All methods may be called from several threads. A
    corpus can be pickled (it is opened anew); it does not survive a fork.

    Attributes
    ----------
    path
        Its folder, or its prefix in a bucket.
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
    cache_bytes, entry_bytes
        Memory for decoded cells, and what a non-zero takes of it.
    slide_starts
        First cell of each slide, and ``n_cells`` at the end.
    """

    def __init__(
        self, place: Place, manifest: dict[str, Any], vocabulary: Vocabulary, cache_bytes: int
    ) -> None:
        self.path, self.manifest, self.vocabulary = str(place), manifest, vocabulary
        self._place = place
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
        self.cache_bytes = cache_bytes
        self.entry_bytes = np.dtype(LAYOUTS[entry_layout(len(vocabulary))].dtype).itemsize
        self._blocks = BlockReader(place, manifest, len(vocabulary), cache_bytes)
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
        place = Place(path)
        manifest = read_manifest(place)
        try:
            vocabulary = Vocabulary.from_dict(json.loads(place.read(VOCABULARY) or b""))
        except ValueError as error:
            raise InputError(
                place / VOCABULARY, f"it cannot be read ({error})", "build the corpus again"
            ) from None
        if vocabulary.hash != manifest["vocabulary"]:
            raise InputError(place / VOCABULARY, "its hash is not the manifest's", "build the corpus again")
        return cls(place, manifest, vocabulary, cache_bytes)

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(Corpus.open, cache_bytes=self.cache_bytes), (self.path,)

    @functools.cached_property
    def report(self) -> dict[str, Any]:
        """The report of the build (see `build_corpus`)."""
        provenance = self.manifest["provenance"]
        (text,) = read_checked(self._place, [provenance["report"]], [provenance["report_checksum"]])
        return json.loads(text)

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the labels carried along from any file."""
        return tuple(self.manifest["labels"])

    def slide_of(self, index: Int[np.ndarray, " n"]) -> Int32[np.ndarray, " n"]:
        """Return the number of each cell's slide."""
        return (np.searchsorted(self.slide_starts, self._checked(index), side="right") - 1).astype(np.int32)

    def block_of(self, index: Int[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """Return the block of `BLOCK` that each cell is stored in, numbered over the corpus."""
        return self._located(self._checked(index))[0]

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
        return Cells(*self._blocks.entries(*self._located(index)))

    def pool(self, index: Int[np.ndarray, " n"]) -> Pool:
        """Read the blocks of many cells at once, past the cache: for cells that are needed once.

        Parameters
        ----------
        index
            Cell numbers, in any order.

        Raises
        ------
        IndexError
            A number outside the corpus.
        """
        index = self._checked(index)
        return Pool(index, self._blocks, self._located(index))

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
        if index is not None and name in _BY_BLOCK:
            return self._by_block(name, index).astype(_DTYPES.get(name, np.int32), copy=False)
        dtype = _DTYPES.get(name, np.int32)
        missing = np.nan if name in ("x", "y") else 0
        n = self.n_cells if index is None else len(index)
        out: Shaped[np.ndarray, " n"] = np.full(n, missing, dtype)
        there = [slide.spatial or name not in ("x", "y") for slide in self.slides]
        for part in self._by_slide(index):
            stored = {slide: _COLUMNS[name] for slide, *_ in part if there[slide]}
            for _, rows, values in self._read(part, stored):
                out[rows] = values
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
        for part in self._by_slide(index):
            self._read_labels([slide for slide, *_ in part])
            found = {slide: self._labels[slide][name] for slide, *_ in part if name in self._labels[slide]}
            stored = {slide: f"label_{number}" for slide, (number, _) in found.items()}
            for slide, rows, values in self._read(part, stored):
                out[rows] = found[slide][1][values]
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
        index = self._checked(index)
        block, place, slide = self._located(index)
        if self._checked_k(k) == 0:
            return np.empty((len(index), 0), np.int64)
        found = self._blocks.rows("neighbours", block, place)[:, :k].astype(np.int64)
        return np.where(found >= 0, found + self.slide_starts[slide][:, None], -1)

    def distances(self, index: Int[np.ndarray, " n"], k: int) -> Float32[np.ndarray, "n k"]:
        """Distances to the ``k`` nearest neighbours, in the file's units, infinite where there is none.

        Raises
        ------
        InputError
            ``k`` is more than was stored.
        """
        near = self.neighbours(index, k)
        apart = [
            self._by_block(axis, np.maximum(near, 0).ravel()).reshape(near.shape)
            - self._by_block(axis, index)[:, None]
            for axis in ("x", "y")
        ]
        return np.where(near >= 0, np.hypot(*apart), np.inf).astype(np.float32)

    def technology_means(self, technology: str) -> Float64[np.ndarray, " n_genes"]:
        """Mean of each gene over a technology's cells that express it, of counts scaled to 10,000 a cell.

        Returns
        -------
        NaN where no cell does.
        """
        if technology not in self.manifest["technologies"]:
            return np.full(len(self.vocabulary), np.nan)
        number = self.manifest["technologies"].index(technology)
        scaled_sum, expressing = self._technology_sums[:, number]
        return np.divide(scaled_sum, expressing, out=np.full(len(expressing), np.nan), where=expressing > 0)

    @functools.cached_property
    def _technology_sums(self) -> Float64[np.ndarray, "2 technologies n_genes"]:
        names, checksums = ([self.manifest[f"technology_sums{end}"]] for end in ("", "_checksum"))
        (data,) = read_checked(self._place, names, checksums)
        return np.load(io.BytesIO(data), allow_pickle=False)

    def _by_block(self, name: str, index: Int[np.ndarray, " n"]) -> Shaped[np.ndarray, " n"]:
        block, place, _ = self._located(self._checked(index))
        return self._blocks.rows(name, block, place)

    def _located(
        self, index: Int64[np.ndarray, " n"]
    ) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"], Int32[np.ndarray, " n"]]:
        """Block of each cell, its place there, and its slide."""
        slide = self.slide_of(index)
        block, place = np.divmod(index - self.slide_starts[slide], BLOCK)
        return block + self._blocks.first_block[slide], place, slide

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

    def _by_slide(self, index: Int[np.ndarray, " n"] | None) -> Iterator[list[_OfSlide]]:
        """Split a request by slide, some slides at a time."""
        if index is None:
            for first in range(0, len(self.slides), SLIDES_AT_ONCE):
                yield [
                    (number, slice(slide.start, slide.start + slide.n_cells), slice(None))
                    for number, slide in enumerate(self.slides[first : first + SLIDES_AT_ONCE], first)
                ]
            return
        slide_of = self.slide_of(index)
        order = np.argsort(slide_of, kind="stable")
        present, starts = np.unique(slide_of[order], return_index=True)
        parts = list(zip(present.tolist(), np.split(order, starts[1:])))
        for first in range(0, len(parts), SLIDES_AT_ONCE):
            yield [
                (slide, rows, index[rows] - self.slide_starts[slide])
                for slide, rows in parts[first : first + SLIDES_AT_ONCE]
            ]

    def _read(
        self, part: Sequence[_OfSlide], stored: Mapping[int, str]
    ) -> Iterator[tuple[int, Any, Shaped[np.ndarray, " rows"]]]:
        """Read the array that `stored` names of each slide, at once: slide, places in the request, rows."""
        arrays = self._blocks.arrays(list(stored))
        with ts.Batch() as batch:
            reads = [
                (slide, rows, arrays[slide][stored[slide]][local].read(batch=batch))
                for slide, rows, local in part
                if slide in stored
            ]
        for slide, rows, read in reads:
            yield slide, rows, arrays[slide].result(stored[slide], read)

    def _read_labels(self, slides: Sequence[int]) -> None:
        """Keep what slides have of labels: the array's number and the corpus's code of each slide code.

        The last code is for -1.
        """
        records = {slide: self.manifest["slides"][slide] for slide in slides if slide not in self._labels}
        names = [f"{record['folder']}/{SLIDE}" for record in records.values()]
        texts = read_checked(self._place, names, [record["checksum"] for record in records.values()])
        for slide, text in zip(records, texts, strict=True):
            self._labels[slide] = {
                name: (
                    number,
                    np.array([*np.searchsorted(self.manifest["labels"][name], values), -1], np.int32),
                )
                for number, (name, values) in enumerate(json.loads(text)["labels"].items())
            }


_SHOWN = ("name", "source", "section", "species", "technology", "tissue", "modality", "spatial")


def corpus_info(corpus: Corpus) -> dict[str, Any]:
    """Describe a corpus from its manifest alone, ready for JSON."""
    slides = []
    for slide, record in zip(corpus.slides, corpus.manifest["slides"]):
        slides.append(
            {name: record[name] for name in (*_SHOWN, "um_per_unit", "n_cells")}
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
