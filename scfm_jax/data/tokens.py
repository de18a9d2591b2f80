"""From corpus rows to the tokens of tissue samples, ragged, without a Python loop over cells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float32, Int32, Int64, UInt32

from scfm_jax.corpus import Corpus
from scfm_jax.corpus.context import Context
from scfm_jax.data.batch import TissueBatch
from scfm_jax.data.masks import MaskRates, column_mask, mask_bits, seed_words
from scfm_jax.data.threads import equal_parts, in_parts
from scfm_jax.errors import InputError, check_least

EVALUATION_STEP = 2**32 - 1


@dataclass(frozen=True)
class SampleConfig:
    """What a sample holds.

    Attributes
    ----------
    neighbours
        k, the nearest neighbours beside the centre; 0 is allowed.
    decoder
        ``panel`` decodes the genes that the slide measured; ``vocabulary`` all genes (published), of which
        only measured ones are masked.
    panel_limit
        With ``panel``: a slide that measured more genes than this (a whole transcriptome) has only the
        centre's expressed genes and the masked ones decoded.
    skip_nearest
        A control: the nearest so many neighbours are left out, and the next k are taken.
    exchanged_within
        A control: labels of the corpus. A neighbour keeps its place, but its tokens and its total are those
        of another cell of the slide with the same classes (see `Context`). Such cells lie anywhere in the
        slide: without a cache that holds it, each costs a read.
    """

    neighbours: int = 16
    decoder: Literal["panel", "vocabulary"] = "panel"
    panel_limit: int = 2_048
    skip_nearest: int = 0
    exchanged_within: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_least(self, 0, "neighbours", "panel_limit", "skip_nearest")

    @property
    def stored_neighbours(self) -> int:
        """Neighbours that a corpus must hold."""
        return self.neighbours + self.skip_nearest if self.neighbours else 0

    def meaning(self) -> dict[str, object]:
        """What a trained model takes for granted of its samples: which neighbours it learnt from."""
        return {"skip_nearest": self.skip_nearest, "exchanged_within": self.exchanged_within}

    def context_of(self, corpus: Corpus) -> Context:
        """The cells around a centre of `corpus`.

        Raises
        ------
        InputError
            More neighbours than the corpus stores, or a label that it lacks.
        """
        stored = corpus.n_neighbours
        if self.stored_neighbours > stored:
            skipped = f" after {self.skip_nearest} skipped (skip_nearest)" if self.skip_nearest else ""
            raise InputError(
                corpus.path,
                f"data.sample.neighbours is {self.neighbours}{skipped}, the corpus stores {stored} a cell",
                f"ask for {stored} or fewer{' in all' if skipped else ''}, or build the corpus with more",
            )
        return Context(
            corpus,
            self.neighbours,
            skip_nearest=self.skip_nearest,
            exchanged_within=self.exchanged_within,
        )

    def reader(self, corpus: Corpus) -> SampleReader:
        """What reads such samples from `corpus`."""
        return SampleReader(corpus, self)


def _runs(starts: Int64[np.ndarray, " n"], lengths: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " total"]:
    """Indices of runs of values, run behind run."""
    at = np.arange(lengths.sum())
    at += np.repeat(starts - np.cumsum(lengths) + lengths, lengths)
    return at


def _distinct(
    members: Int64[np.ndarray, "n c"],
) -> tuple[Int64[np.ndarray, " u"], Int64[np.ndarray, "n c"]]:
    """The cells among `members`, each once, and the place of each member there; 0 where there is none."""
    present = members >= 0
    unique, inverse = np.unique(members[present], return_inverse=True)
    where = np.zeros(members.shape, np.int64)
    where[present] = inverse
    return unique, where


@dataclass
class Ragged:
    """Rows of different lengths in flat columns, in any order; what lies between rows means nothing."""

    starts: Int64[np.ndarray, " n"]
    lengths: Int64[np.ndarray, " n"]
    columns: dict[str, Int32[np.ndarray, " total"]]

    def flat(self) -> tuple[Int64[np.ndarray, " real"], dict[str, Int32[np.ndarray, " real"]]]:
        """The row of each value, and the columns, row behind row with nothing between."""
        row, at = np.repeat(np.arange(len(self.lengths)), self.lengths), _runs(self.starts, self.lengths)
        return row, {name: column[at] for name, column in self.columns.items()}

    def pad(self, rows: Int64[np.ndarray, " b"], width: int, fill: dict[str, int]) -> dict[str, np.ndarray]:
        """Chosen rows as arrays [b, width], each column padded with its `fill`.

        Raises
        ------
        ValueError
            A row is longer; nothing is ever cut off.
        """
        if self.lengths[rows].max() > width:
            raise ValueError(f"{self.lengths[rows].max()} values do not fit a width of {width}")
        padded = {name: np.empty((len(rows), width), np.int32) for name in self.columns}
        spans = [
            (start, start + length)
            for start, length in zip(self.starts[rows].tolist(), self.lengths[rows].tolist())
        ]
        for name, column in self.columns.items():
            for row, (start, stop) in zip(padded[name], spans, strict=True):
                row[: stop - start] = column[start:stop]
                row[stop - start :] = fill[name]
        return padded


@dataclass
class Samples:
    """Samples before they are padded.

    `tokens` has genes, counts, cells and slots, `decoder` genes and counts; `panel` numbers the distinct gene
    lists of the corpus; the rest is as in `TissueBatch`.
    """

    tokens: Ragged
    decoder: Ragged
    panel: Int64[np.ndarray, " n"]
    totals: Int32[np.ndarray, "n c"]
    offsets: Float32[np.ndarray, "n c 2"]
    target_sum: Float32[np.ndarray, " n"]
    index: UInt32[np.ndarray, " n"]
    draw: UInt32[np.ndarray, " n"]

    @property
    def lengths(self) -> Int64[np.ndarray, "n 2"]:
        """Of each sample, tokens and decoded genes."""
        return np.stack([self.tokens.lengths, self.decoder.lengths], axis=1)

    def collate(
        self, rows: Int64[np.ndarray, " b"], length: int, decoder_length: int, size: int
    ) -> TissueBatch:
        """Chosen samples as a batch of `size` rows; rows that are missing repeat the first with weight 0."""
        weight = (np.arange(size) < len(rows)).astype(np.float32)
        rows = np.concatenate([rows, np.repeat(rows[:1], size - len(rows))])
        tokens = self.tokens.pad(rows, length, {"genes": 0, "counts": 0, "cells": -1, "slots": -1})
        decoder = self.decoder.pad(rows, decoder_length, {"genes": -1, "counts": -1})
        return TissueBatch(
            **tokens,
            decoder_genes=decoder["genes"],
            decoder_counts=decoder["counts"],
            totals=self.totals[rows],
            offsets=self.offsets[rows],
            target_sum=self.target_sum[rows],
            index=self.index[rows],
            draw=self.draw[rows],
            weight=weight,
        )


@dataclass
class _CellTokens:
    """Tokens of distinct cells, behind one another: expressed genes and two depth tokens each.

    `slots` are places in the list of genes that the cell's slide decodes.
    """

    starts: Int64[np.ndarray, " n"]
    lengths: Int64[np.ndarray, " n"]
    genes: Int32[np.ndarray, " total"]
    counts: Int32[np.ndarray, " total"]
    slots: Int64[np.ndarray, " total"]


class SampleReader:
    """Reads centres and their neighbours from a corpus as `Samples`.

    Parameters
    ----------
    corpus
        Open corpus.
    config
        What a sample holds.

    Raises
    ------
    InputError
        More neighbours than the corpus stores, a label that it lacks, or a corpus of over 2**32 - 1 cells.
    """

    def __init__(self, corpus: Corpus, config: SampleConfig) -> None:
        if corpus.n_cells >= 2**32:
            raise InputError(corpus.path, "has over 4 billion cells, too many for 32-bit numbers", "split it")
        self.corpus, self.config, self._context = corpus, config, config.context_of(corpus)
        self.n_genes = len(corpus.vocabulary)
        self._median_total = np.array([slide.median_total for slide in corpus.slides], np.float32)
        # Slides that measured the same genes share one list and one look-up table.
        self._panels: list[Int32[np.ndarray, " p"]] = []
        by_content: dict[bytes, int] = {}
        self._panel_of_slide = np.empty(len(corpus.slides), np.int64)
        for place, slide in enumerate(corpus.slides):
            content = np.asarray(slide.panel, np.int32)
            panel = by_content.setdefault(content.tobytes(), len(self._panels))
            if panel == len(self._panels):
                self._panels.append(content)
            self._panel_of_slide[place] = panel
        self._decoders = [self._decoder_list(panel) for panel in self._panels]
        self._slot_tables = np.full((len(self._panels), self.n_genes + 2), -1, np.int64)
        for table, (genes, _) in zip(self._slot_tables, self._decoders, strict=True):
            table[genes] = np.arange(len(genes))

    @property
    def longest(self) -> tuple[int, int]:
        """Upper bounds of the tokens and of the decoded genes of a sample."""
        genes = max(len(panel) for panel in self._panels)
        return (self.config.neighbours + 1) * (genes + 2), max(len(genes) for genes, _ in self._decoders)

    def read(
        self,
        centres: Int64[np.ndarray, " n"],
        *,
        draw: int = EVALUATION_STEP,
        seed: int = 0,
        rates: MaskRates | None = None,
    ) -> Samples:
        """Samples around `centres`, without the tokens that the mask of (seed, draw) removes.

        Parameters
        ----------
        centres
            Cell numbers.
        draw
            Step of the mask, the same for all samples.
        seed
            Of the mask.
        rates
            None masks nothing.
        """
        centres = np.asarray(centres, np.int64)
        n, corpus = len(centres), self.corpus
        places, shown = self._context.members(centres)
        present = shown >= 0
        unique, where = _distinct(shown)
        standing = (unique, where) if shown is places else _distinct(places)
        slides = corpus.slide_of(centres)
        cells = self._cell_tokens(unique)
        index = centres.astype(np.uint32)
        panel = self._panel_of_slide[slides]
        room = np.where(present, cells.lengths[where], 0).sum(1)
        parts = self._parts(panel, room)
        ends = np.cumsum([room[part].sum() for part in parts])
        columns = {name: np.empty(ends[-1], np.int32) for name in ("genes", "counts", "cells", "slots")}
        starts, lengths, decoded = (np.zeros(n, np.int64) for _ in range(3))

        def write(number: int) -> tuple[np.ndarray, np.ndarray]:
            """Tokens and decoded genes of a part's samples."""
            part, start = parts[number], ends[number] - room[parts[number]].sum()
            listed, unmeasured = self._decoders[panel[part[0]]]
            table = self._counts(cells, where[part, 0], unmeasured)
            masked = np.zeros(table.shape, bool)
            if rates is not None:
                step = np.full(len(part), draw, np.uint32)
                bits = mask_bits(seed_words(seed), step, index[part], listed[None])
                masked = column_mask(bits, table, rates)
            row, cell = np.nonzero(present[part])
            member = where[part][row, cell]
            at = _runs(cells.starts[member], cells.lengths[member])
            place = cells.slots.take(at)
            place += np.repeat(np.arange(0, table.size, len(listed)), room[part])
            survivors = np.flatnonzero(~masked.take(place))
            at = at.take(survivors)
            number_of = np.diff(np.searchsorted(survivors, np.cumsum(cells.lengths[member])), prepend=0)
            lengths[part] = np.bincount(row, number_of, len(part))
            starts[part] = start + np.cumsum(lengths[part]) - lengths[part]
            span = slice(start, start + len(at))
            np.take(cells.genes, at, out=columns["genes"][span], mode="clip")
            np.take(cells.counts, at, out=columns["counts"][span], mode="clip")
            columns["cells"][span] = np.repeat(cell.astype(np.int32), number_of)
            if self.config.decoder == "vocabulary" or len(listed) <= self.config.panel_limit:
                columns["slots"][span] = cells.slots.take(at)
                decoded[part] = len(listed)
                return np.tile(listed, len(part)), table.ravel()
            keep = (table != 0) | masked
            decoded[part] = np.count_nonzero(keep, axis=1)
            kept = np.flatnonzero(keep)
            slots = np.full(table.size, -1, np.int32)
            slots[kept] = _runs(np.zeros(len(part), np.int64), decoded[part])
            columns["slots"][span] = slots.take(place.take(survivors))
            return listed.take(kept % len(listed)), table.take(kept)

        lists = in_parts(write, range(len(parts)))
        order = np.concatenate(parts)
        first_decoded = np.zeros(n, np.int64)
        first_decoded[order] = np.cumsum(decoded[order]) - decoded[order]
        totals = np.where(present, corpus.column("total_matched", unique)[where], 0).astype(np.int32)
        return Samples(
            tokens=Ragged(starts, lengths, columns),
            decoder=Ragged(
                first_decoded,
                decoded,
                {name: np.concatenate(of) for name, of in zip(("genes", "counts"), zip(*lists), strict=True)},
            ),
            panel=panel,
            totals=totals,
            offsets=self._offsets(*standing, present, slides),
            target_sum=self._median_total[slides],
            index=index,
            draw=np.full(n, draw, np.uint32),
        )

    def _cell_tokens(self, cells: Int64[np.ndarray, " n"]) -> _CellTokens:
        rows = self.corpus.cells(cells)
        lengths = np.diff(rows.offsets) + 2
        ends = np.cumsum(lengths)
        starts, total = ends - lengths, int(lengths.sum())
        genes, counts, slots = np.empty(total, np.int32), np.zeros(total, np.int32), np.empty(total, np.int64)
        table = self._panel_of_slide[self.corpus.slide_of(cells)] * (self.n_genes + 2)

        def write(run: slice) -> None:
            span = slice(int(starts[run.start]), int(ends[run.stop - 1]))
            values = slice(int(rows.offsets[run.start]), int(rows.offsets[run.stop]))
            depth = ends[run, None] - [2, 1]
            genes[depth] = self.n_genes, self.n_genes + 1
            expressed = np.ones(span.stop - span.start, bool)
            expressed[depth - span.start] = False
            genes[span][expressed], counts[span][expressed] = rows.genes[values], rows.counts[values]
            slots[span] = self._slot_tables.take(genes[span] + np.repeat(table[run], lengths[run]))

        in_parts(write, equal_parts(lengths))
        return _CellTokens(starts, lengths, genes, counts, slots)

    def _parts(
        self, panel: Int64[np.ndarray, " n"], room: Int64[np.ndarray, " n"]
    ) -> list[Int64[np.ndarray, " m"]]:
        """Samples of one panel each, so many that a part nearly fits a core's cache."""
        parts = []
        for number in np.unique(panel):
            rows = np.flatnonzero(panel == number)
            sizes = room[rows] + len(self._decoders[number][0])
            parts += [rows[run] for run in equal_parts(sizes)]
        return parts

    def _counts(
        self, cells: _CellTokens, centres: Int64[np.ndarray, " m"], unmeasured: Int32[np.ndarray, " p"]
    ) -> Int32[np.ndarray, "m p"]:
        """Counts of the genes to decode in some of `cells`; -1 is not measured."""
        table = np.tile(unmeasured, (len(centres), 1))
        expressed = cells.lengths[centres] - 2
        at = _runs(cells.starts[centres], expressed)
        table[np.repeat(np.arange(len(centres)), expressed), cells.slots[at]] = cells.counts[at]
        return table

    def _decoder_list(self, panel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The genes to decode, depth tokens last, and a row of counts: 0 if measured, else -1."""
        measured = np.full(self.n_genes + 2, -1, np.int32)
        measured[panel] = 0
        depth = np.arange(self.n_genes, self.n_genes + 2, dtype=np.int32)
        if self.config.decoder == "panel":
            genes = np.concatenate([panel, depth])
        else:
            genes = np.arange(self.n_genes + 2, dtype=np.int32)
        return genes, measured[genes]

    def _offsets(
        self, unique: np.ndarray, where: np.ndarray, present: np.ndarray, slides: np.ndarray
    ) -> Float32[np.ndarray, "n c 2"]:
        scale = np.array([slide.um_per_unit or 1.0 for slide in self.corpus.slides], np.float32)[slides]
        place = np.stack([self.corpus.column(axis, unique) for axis in ("x", "y")], axis=-1)[where]
        offsets = (place - place[:, :1]) * scale[:, None, None]
        return np.where(present[..., None] & np.isfinite(offsets), offsets, 0).astype(np.float32)
