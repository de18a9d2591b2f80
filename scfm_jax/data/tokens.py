"""From corpus rows to the tokens of tissue samples, ragged, without a Python loop over cells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float32, Int32, Int64, UInt32

from scfm_jax.corpus import Corpus
from scfm_jax.data.batch import TissueBatch
from scfm_jax.data.masks import MaskRates, column_mask, mask_bits, seed_words
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
    """

    neighbours: int = 16
    decoder: Literal["panel", "vocabulary"] = "panel"
    panel_limit: int = 2_048

    def __post_init__(self) -> None:
        check_least(self, 0, "neighbours", "panel_limit")

    @property
    def stored_neighbours(self) -> int:
        """Neighbours that a corpus must hold."""
        return self.neighbours

    def meaning(self) -> dict[str, object]:
        """What a trained model takes for granted of its samples; none here: values come with the tokens."""
        return {}

    def reader(self, corpus: Corpus) -> SampleReader:
        """What reads such samples from `corpus`."""
        return SampleReader(corpus, self)


@dataclass
class Ragged:
    """Rows of different lengths behind one another in flat columns."""

    starts: Int64[np.ndarray, " n"]
    lengths: Int64[np.ndarray, " n"]
    columns: dict[str, Int32[np.ndarray, " total"]]

    def pad(self, rows: Int64[np.ndarray, " b"], width: int, fill: dict[str, int]) -> dict[str, np.ndarray]:
        """Chosen rows as arrays [b, width], each column padded with its `fill`.

        Raises
        ------
        ValueError
            A row is longer; nothing is ever cut off.
        """
        if self.lengths[rows].max() > width:
            raise ValueError(f"{self.lengths[rows].max()} values do not fit a width of {width}")
        steps = np.arange(width)
        real = steps < self.lengths[rows, None]
        source = np.where(real, self.starts[rows, None] + steps, 0)
        return {
            name: np.where(real, column[source] if len(column) else 0, fill[name]).astype(np.int32)
            for name, column in self.columns.items()
        }


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
        More neighbours than the corpus stores, or a corpus of over 2**32 - 1 cells.
    """

    def __init__(self, corpus: Corpus, config: SampleConfig) -> None:
        if config.neighbours > corpus.n_neighbours:
            stored = f"the corpus stores {corpus.n_neighbours} a cell"
            raise InputError(
                corpus.path,
                f"data.sample.neighbours is {config.neighbours}, {stored}",
                f"ask for {corpus.n_neighbours} or fewer, or build the corpus with more",
            )
        if corpus.n_cells >= 2**32:
            raise InputError(corpus.path, "has over 4 billion cells, too many for 32-bit numbers", "split it")
        self.corpus, self.config = corpus, config
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
        self._slot_tables = [self._slot_table(genes) for genes, _ in self._decoders]

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
        members = np.concatenate(
            [centres[:, None], corpus.neighbours(centres, self.config.neighbours)], axis=1
        )
        present = members >= 0
        unique, inverse = np.unique(members[present], return_inverse=True)
        where = np.zeros(members.shape, np.int64)
        where[present] = inverse
        sample, cell = np.nonzero(present)
        tokens = self._cell_tokens(unique, inverse, sample, cell)
        index, steps = centres.astype(np.uint32), np.full(n, draw, np.uint32)
        slides = corpus.slide_of(centres)
        decoder, masked_tokens = self._decode_places(tokens, slides, index, steps, seed, rates)
        kept = {name: column[~masked_tokens] for name, column in tokens.items()}
        lengths = np.bincount(kept.pop("sample"), minlength=n)
        totals = np.where(present, corpus.column("total_matched", unique)[where], 0).astype(np.int32)
        return Samples(
            tokens=Ragged(np.cumsum(lengths) - lengths, lengths, kept),
            decoder=decoder,
            panel=self._panel_of_slide[slides],
            totals=totals,
            offsets=self._offsets(unique, where, present, slides),
            target_sum=self._median_total[slides],
            index=index,
            draw=steps,
        )

    def _cell_tokens(
        self, unique: np.ndarray, inverse: np.ndarray, sample: np.ndarray, cell: np.ndarray
    ) -> dict[str, np.ndarray]:
        """The expressed genes and two depth tokens of every cell of every sample, in that order."""
        rows = self.corpus.cells(unique)
        expressed = np.diff(rows.offsets)[inverse]
        ends = np.cumsum(expressed + 2)
        starts = ends - expressed - 2
        total = int(ends[-1]) if len(ends) else 0
        of_cell = np.repeat(np.arange(len(inverse)), expressed + 2)
        within = np.arange(total) - starts[of_cell]
        beyond = within - expressed[of_cell]
        is_gene = beyond < 0
        source = (rows.offsets[inverse][of_cell] + within)[is_gene]
        genes, counts = (self.n_genes + beyond).astype(np.int32), np.zeros(total, np.int32)
        genes[is_gene], counts[is_gene] = rows.genes[source], rows.counts[source]
        return {
            "genes": genes,
            "counts": counts,
            "cells": cell[of_cell].astype(np.int32),
            "sample": sample[of_cell],
        }

    def _decode_places(
        self,
        tokens: dict[str, np.ndarray],
        slides: np.ndarray,
        index: np.ndarray,
        steps: np.ndarray,
        seed: int,
        rates: MaskRates | None,
    ) -> tuple[Ragged, np.ndarray]:
        """What each sample decodes; adds the column of slots to `tokens` and says which tokens are masked."""
        panel_of_sample = self._panel_of_slide[slides]
        starts, lengths = (np.zeros(len(slides), np.int64) for _ in range(2))
        genes, counts, filled = [], [], 0
        slots = np.full(len(tokens["genes"]), -1, np.int32)
        masked_tokens = np.zeros(len(slots), bool)
        for panel in np.unique(panel_of_sample):
            rows = np.flatnonzero(panel_of_sample == panel)
            listed, unmeasured = self._decoders[panel]
            row_of_sample = np.full(len(slides), -1)
            row_of_sample[rows] = np.arange(len(rows))
            here = np.flatnonzero(row_of_sample[tokens["sample"]] >= 0)
            row, slot = row_of_sample[tokens["sample"][here]], self._slot_tables[panel][tokens["genes"][here]]
            own = (tokens["cells"][here] == 0) & (tokens["genes"][here] < self.n_genes)
            table = np.tile(unmeasured, (len(rows), 1))
            table[row[own], slot[own]] = tokens["counts"][here][own]
            masked = np.zeros(table.shape, bool)
            if rates is not None:
                # In parts that a core's cache holds: a whole transcriptome takes a quarter of the time.
                for part in np.array_split(np.arange(len(rows)), -(-table.size // 2**16)):
                    here_genes = np.broadcast_to(listed, table[part].shape)
                    bits = mask_bits(seed_words(seed), steps[rows[part]], index[rows[part]], here_genes)
                    masked[part] = column_mask(bits, table[part], rates)
            masked_tokens[here] = masked[row, slot]
            keep = np.ones(table.shape, bool)
            if self.config.decoder == "panel" and len(listed) > self.config.panel_limit:
                keep = (table != 0) | masked
                slot = np.where(keep, np.cumsum(keep, axis=1) - 1, -1)[row, slot]
            slots[here] = slot
            lengths[rows] = keep.sum(1)
            starts[rows] = filled + np.cumsum(lengths[rows]) - lengths[rows]
            filled += int(lengths[rows].sum())
            genes.append(np.broadcast_to(listed, table.shape)[keep])
            counts.append(table[keep])
        tokens["slots"] = slots
        columns = {"genes": np.concatenate(genes), "counts": np.concatenate(counts)}
        return Ragged(starts, lengths, columns), masked_tokens

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

    def _slot_table(self, genes: np.ndarray) -> np.ndarray:
        table = np.full(self.n_genes + 2, -1, np.int32)
        table[genes] = np.arange(len(genes))
        return table

    def _offsets(
        self, unique: np.ndarray, where: np.ndarray, present: np.ndarray, slides: np.ndarray
    ) -> Float32[np.ndarray, "n c 2"]:
        scale = np.array([slide.um_per_unit or 1.0 for slide in self.corpus.slides], np.float32)[slides]
        place = np.stack([self.corpus.column(axis, unique) for axis in ("x", "y")], axis=-1)[where]
        offsets = (place - place[:, :1]) * scale[:, None, None]
        return np.where(present[..., None] & np.isfinite(offsets), offsets, 0).astype(np.float32)
