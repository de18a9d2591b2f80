"""Cells of one or several files, opened for downstream work: their counts, their places and their neighbours.

A cohort's corpus has the genes of its own files, so that a baseline sees all that was measured. A model sees
the same cells through its own vocabulary, in a corpus of the model's beside it.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float32, Int64

from scfm_jax.corpus import Corpus, Source, build_corpus
from scfm_jax.downstream.model import TrainedModel
from scfm_jax.downstream.outputs import locked
from scfm_jax.errors import DataWarning, InputError
from scfm_jax.genes import Vocabulary

# The widest of the baselines' neighbourhoods.
STORED_NEIGHBOURS = 256
FEWEST_SHARED, FEW_SHARED = 0.1, 0.5


@dataclass(frozen=True, eq=False)
class Cohort:
    """Files that a task is asked of.

    Attributes
    ----------
    corpus
        Their cells over all their own genes, with 256 stored neighbours; cell numbers are this corpus's.
    folder
        Holds it, and a corpus for every other vocabulary that was asked for.
    sources, tables
        The files, and the tables that align their genes (`build_corpus`).
    """

    corpus: Corpus
    folder: Path
    sources: tuple[Source, ...]
    tables: dict[str, Any] = field(default_factory=dict)
    _seen: dict[str, tuple[Corpus, Int64[np.ndarray, " n"]]] = field(default_factory=dict, repr=False)

    @functools.cached_property
    def log_counts(self) -> sp.csr_array:
        """float32 [n, g]: log1p of counts scaled to the median depth; the genes that all slides measured.

        Genes that only some of the slides measured are left out: their zeros say nothing.
        """
        corpus = self.corpus
        shared = functools.reduce(np.intersect1d, (slide.panel for slide in corpus.slides))
        if len(shared) < 2:
            raise InputError(
                corpus.path,
                f"its files have {len(shared)} measured genes in common",
                "give gene tables that let their names meet (--gene-names, --orthologs)",
            )
        cells = corpus.cells(np.arange(corpus.n_cells))
        counts = sp.csr_array(
            (cells.counts.astype(np.float32), cells.genes, cells.offsets),
            shape=(corpus.n_cells, len(corpus.vocabulary)),
        )[:, shared]
        depth = np.maximum(np.asarray(counts.sum(1)).ravel(), 1.0)
        scale = (np.median(depth) / depth).astype(np.float32)
        return sp.csr_array(sp.diags_array(scale) @ counts).log1p().astype(np.float32)

    @functools.cached_property
    def xy(self) -> Float32[np.ndarray, "n 2"]:
        """Coordinates, in um where the unit is known, else in the file's; NaN for dissociated cells."""
        scale = np.array([slide.um_per_unit or 1.0 for slide in self.corpus.slides], np.float32)
        place = np.stack([self.corpus.column("x"), self.corpus.column("y")], axis=1)
        return place * scale[self.slide][:, None]

    @functools.cached_property
    def slide(self) -> Int64[np.ndarray, " n"]:
        """Slide of every cell."""
        return self.corpus.slide_of(np.arange(self.corpus.n_cells)).astype(np.int64)

    def neighbours(self, k: int) -> Int64[np.ndarray, "n k"]:
        """The k nearest neighbours of every cell, nearest first, -1 where there are fewer."""
        return self.corpus.neighbours(np.arange(self.corpus.n_cells), k)

    def seen_by(self, model: TrainedModel) -> tuple[Corpus, Int64[np.ndarray, " n"]]:
        """The cells in a model's vocabulary, and each cell's number there: -1 if it has no gene of them.

        What was found, or warned of, for a vocabulary is kept.

        Raises
        ------
        InputError
            The vocabulary holds under a tenth of the files' genes.

        Warns
        -----
        DataWarning
            It holds under half of them.
        """
        if model.vocabulary.hash == self.corpus.vocabulary.hash:
            return self.corpus, np.arange(self.corpus.n_cells)
        if model.vocabulary.hash not in self._seen:
            self._seen[model.vocabulary.hash] = self._aligned(model)
        return self._seen[model.vocabulary.hash]

    def _aligned(self, model: TrainedModel) -> tuple[Corpus, Int64[np.ndarray, " n"]]:
        corpus = _corpus(
            self.folder / f"vocabulary-{model.vocabulary.hash[:12]}",
            self.sources,
            model.vocabulary,
            self.tables,
        )
        _check_genes(corpus, model)
        number = np.full(self.corpus.n_cells, -1)
        place = {slide.name: slide for slide in corpus.slides}
        own, theirs = self.corpus.column("source_row"), corpus.column("source_row")
        for slide in self.corpus.slides:
            if (other := place.get(slide.name)) is None:
                continue
            rows = slice(slide.start, slide.start + slide.n_cells)
            there = theirs[other.start : other.start + other.n_cells]
            order = np.argsort(there)
            at = np.minimum(np.searchsorted(there, own[rows], sorter=order), len(there) - 1)
            found = order[at]
            number[rows] = np.where(there[found] == own[rows], other.start + found, -1)
        return corpus, number


def open_cohort(folder: Path, sources: Sequence[Source], **tables: Any) -> Cohort:
    """Open files for downstream work; their corpus is built in `folder` unless it lies there already.

    Parameters
    ----------
    folder
        Of the corpora of this cohort.
    sources
        The files; their label columns are read with them.
    tables
        `gene_names`, `aliases` and `orthologs` of `build_corpus`.

    Raises
    ------
    InputError
        Bad input, as `build_corpus` says.
    """
    return Cohort(_corpus(folder / "own", sources, None, tables), folder, tuple(sources), dict(tables))


def _corpus(
    path: Path, sources: Sequence[Source], vocabulary: Vocabulary | None, tables: dict[str, Any]
) -> Corpus:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Two processes of a suite may come to the same cohort.
    with locked(path.parent / ".lock"), warnings.catch_warnings():
        # Neighbour 256 may well be far away; lost genes are spoken of by the model's own check.
        warnings.simplefilter("ignore", DataWarning)
        build_corpus(path, sources, vocabulary=vocabulary, n_neighbours=STORED_NEIGHBOURS, **tables)
    return Corpus.open(path)


def _check_genes(corpus: Corpus, model: TrainedModel) -> None:
    for file in corpus.report["files"]:
        number = {name: of for name, of in file["genes"].items() if name.startswith("n_")}
        matched, of = number["n_matched"], sum(number.values())
        said = f"{model.config.name} knows {matched} of its {of} genes"
        if matched < FEWEST_SHARED * of:
            raise InputError(
                file["path"],
                said,
                "give gene tables that let the names meet (--gene-names, --orthologs), or another model",
            )
        if matched < FEW_SHARED * of:
            warnings.warn(f"{file['path']}: {said}", DataWarning, stacklevel=3)
