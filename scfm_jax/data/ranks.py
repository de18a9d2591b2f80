"""From corpus rows to sentences of genes by rank (Nicheformer), ragged, without a Python loop over cells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.sparse as sp
from jaxtyping import Bool, Float, Int, Int32, Int64

from scfm_jax.corpus import Corpus
from scfm_jax.corpus.reader import Slide
from scfm_jax.corpus.store import SCALED_TOTAL
from scfm_jax.data.batch import Array, SentenceBatch
from scfm_jax.data.masks import seed_words, token_bits, under
from scfm_jax.data.technology_means import means_of_slide, usable_means
from scfm_jax.data.tokens import EVALUATION_STEP, Ragged
from scfm_jax.errors import InputError, check_least
from scfm_jax.reserved_tokens import (
    ASSAY_TOKENS,
    FIRST_EXTRA_ASSAY,
    FIRST_GENE,
    MODALITY_TOKENS,
    PAD,
    SPECIES_TOKENS,
)

_NEVER_MASKED = 3  # in the released code
Context = Literal["species", "assay", "modality"]


@dataclass(frozen=True)
class TokenMask:
    """What a mask takes: a share of a cell's gene tokens, with `context` of its context tokens too."""

    rate: float
    context: bool = False


@dataclass(frozen=True)
class RankConfig:
    """What a sentence holds.

    Attributes
    ----------
    length
        Most tokens of a cell's sentence, context included (published); lower ranks are cut off and counted.
    context
        Context tokens in front, in this order (published).
    extra_assays
        Assays beyond the published ones; they take the reserved tokens from 19 on, in this order.
    means
        ``exact``: a gene's technology mean as it is; NaN or negative is missing, taken as 1 and counted.
        ``published``: as the released notebooks use theirs: NaN to 0, rounded half up, 0 to 1.
    mean_files
        ``technology=file.npy``, one for each technology, or ``dissociated=file.npy`` and ``spatial=...`` for
        all that have none of their own; those of the corpus where no file is given.
    niche_neighbours
        Cells whose mean expression is the niche; 0 reads no niche.
    niche_radius
        Neighbours farther than this do not count, um; none where not given.
    niche_length
        Most tokens of a niche's sentence.
    """

    length: int = 1_500
    context: tuple[Context, ...] = ("species", "assay", "modality")
    extra_assays: tuple[str, ...] = ()
    means: Literal["exact", "published"] = "exact"
    mean_files: tuple[str, ...] = ()
    niche_neighbours: int = 0
    niche_radius: float | None = None
    niche_length: int = 256

    @property
    def stored_neighbours(self) -> int:
        """Neighbours that a corpus must hold."""
        return self.niche_neighbours

    def meaning(self) -> dict[str, object]:
        """What a trained model takes for granted of its sentences."""
        return {"context": self.context, "extra_assays": self.extra_assays, "means": self.means}

    def reader(self, corpus: Corpus) -> RankReader:
        """What reads such sentences from `corpus`."""
        return RankReader(corpus, self)

    def __post_init__(self) -> None:
        check_least(self, 0, "niche_neighbours")
        check_least(self, 1, "niche_length")
        if self.niche_radius is not None and not self.niche_radius > 0:
            raise ValueError(f"niche_radius is {self.niche_radius}, not a length in um")
        if len(set(self.context)) < len(self.context):
            raise ValueError(f"context names a field twice: {', '.join(self.context)}")
        if broken := [entry for entry in self.mean_files if not all(entry.partition("="))]:
            raise ValueError(f"mean_files cannot be read: {broken[0]!r}; write technology=file.npy")
        known = [*ASSAY_TOKENS]
        for name in self.extra_assays:
            if name.lower() in known:
                raise ValueError(f"extra_assays: {name!r} has a token already")
            known.append(name.lower())
        if self.length <= len(self.context):
            raise ValueError(
                f"length {self.length} leaves no room for genes after {len(self.context)} context tokens"
            )
        free = FIRST_GENE - FIRST_EXTRA_ASSAY
        if len(self.extra_assays) > free:
            raise ValueError(
                f"there are {free} reserved tokens for extra_assays, not {len(self.extra_assays)}"
            )


def maskable(tokens: Array, segments: Array, *, context: bool) -> Array:
    """Tokens that a mask may take, NumPy's or JAX's: the cell's genes; with `context` as released.

    That code masks context tokens too, but token 3.
    """
    return (segments == 0) & ((tokens != _NEVER_MASKED) if context else (tokens >= FIRST_GENE))


def rank_rows(
    values: Float[np.ndarray, "n w"], genes: Int[np.ndarray, "n w"], real: Bool[np.ndarray, "n w"]
) -> Int64[np.ndarray, "n w"]:
    """Genes of each row by value, highest first, ties by index; what is not real comes last, as -1.

    Values are compared in float32: one number holds value and gene, so that a row is sorted at once. Negative
    values (the published means hold some) come after the positive ones.
    """
    bits = values.astype(np.float32).view(np.uint32)
    # Bits of positive floats rise with the value, those of negative ones fall.
    falling = np.where(bits >> 31, bits, ~bits & np.uint32(0x7FFFFFFF))
    key = falling.astype(np.uint64) << np.uint64(32) | genes.astype(np.uint64)
    key = np.sort(np.where(real, key, np.uint64(2**64 - 1)), axis=1)
    ranked = (key & np.uint64(0xFFFFFFFF)).astype(np.int64)
    return np.where(np.arange(values.shape[1]) < real.sum(1, keepdims=True), ranked, -1)


@dataclass
class Sentences:
    """Sentences before they are padded; the counterpart of `Samples`.

    `tokens` has tokens, positions and segments; `places` the places of masked tokens; `cut` counts the genes
    beyond the longest sentence, of each cell and of its niche.
    """

    tokens: Ragged
    places: Ragged
    panel: Int64[np.ndarray, " n"]
    index: Int64[np.ndarray, " n"]
    draw: int
    cut: Int64[np.ndarray, "n 2"]

    @property
    def lengths(self) -> Int64[np.ndarray, "n 2"]:
        """Of each sentence, tokens and masked places."""
        return np.stack([self.tokens.lengths, self.places.lengths], axis=1)

    def collate(self, rows: Int64[np.ndarray, " b"], length: int, places: int, size: int) -> SentenceBatch:
        """Chosen sentences as a batch of `size` rows; missing rows repeat the first with weight 0."""
        weight = (np.arange(size) < len(rows)).astype(np.float32)
        rows = np.concatenate([rows, np.repeat(rows[:1], size - len(rows))])
        return SentenceBatch(
            **self.tokens.pad(rows, length, {"tokens": PAD, "positions": 0, "segments": 0}),
            lengths=self.tokens.lengths[rows].astype(np.int32),
            **self.places.pad(rows, places, {"places": -1}),
            cut=self.cut[rows].astype(np.int32),
            index=self.index[rows].astype(np.uint32),
            draw=np.full(size, self.draw, np.uint32),
            weight=weight,
        )


@dataclass
class _Ranked:
    """Tokens of genes in the order of their ranks: `lengths` of them for each cell, behind one another."""

    tokens: Int32[np.ndarray, " total"]
    lengths: Int64[np.ndarray, " n"]
    cut: Int64[np.ndarray, " n"]

    def flat(self) -> tuple[Int64[np.ndarray, " total"], Int32[np.ndarray, " total"]]:
        """The cell of each token, and the tokens."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths), self.tokens


class RankReader:
    """Reads cells from a corpus as `Sentences`.

    Parameters
    ----------
    corpus
        Open corpus.
    config
        What a sentence holds.

    Raises
    ------
    InputError
        More neighbours than the corpus stores.
    """

    # Values of a part that is sorted at once: what a core's cache holds.
    _PART = 2**16

    def __init__(self, corpus: Corpus, config: RankConfig) -> None:
        if config.niche_neighbours > corpus.n_neighbours:
            raise InputError(
                corpus.path,
                f"data.sample.niche_neighbours is {config.niche_neighbours}, "
                f"the corpus stores {corpus.n_neighbours}",
                f"ask for {corpus.n_neighbours} or fewer, or build the corpus with more",
            )
        self.corpus, self.config, self.n_genes = corpus, config, len(corpus.vocabulary)
        n_slides = len(corpus.slides)
        self._known = np.zeros(n_slides, bool)
        self._context = np.zeros((n_slides, len(config.context)), np.int32)
        self._technologies: list[tuple[str, str]] = []
        self._row = np.zeros(n_slides, np.int64)
        self.means = np.ones((0, self.n_genes))
        self._spatial = np.array([slide.spatial for slide in corpus.slides])
        self._um = np.array([slide.um_per_unit or np.nan for slide in corpus.slides])

    @property
    def longest(self) -> tuple[int, int]:
        """Upper bounds of tokens and of masked places."""
        niche = self.config.niche_length if self.config.niche_neighbours else 0
        return self.config.length + niche, self.config.length

    def read(
        self,
        cells: Int64[np.ndarray, " n"],
        *,
        draw: int = EVALUATION_STEP,
        seed: int = 0,
        rates: TokenMask | None = None,
    ) -> Sentences:
        """Sentences of `cells`, with the places that the mask of (seed, draw) takes.

        Parameters
        ----------
        cells
            Cell numbers.
        draw
            Step of the mask, the same for all.
        seed
            Of the mask.
        rates
            None masks nothing.

        Raises
        ------
        InputError
            A slide with an assay or species that has no token, means of another vocabulary, or a radius and a
            slide whose unit is not known.
        """
        cells = np.asarray(cells, np.int64)
        slides, n_context = self.corpus.slide_of(cells), len(self.config.context)
        self.know(np.unique(slides))
        rows = self.corpus.cells(cells)
        own = self._ranked(rows.genes, rows.counts, rows.offsets, slides, self.config.length - n_context)
        niche = self._niche(cells, slides)
        parts = [
            (np.repeat(np.arange(len(cells)), n_context), self._context[slides].ravel(), 0, 0),
            (*own.flat(), n_context, 0),
            (*niche.flat(), 0, 1),
        ]
        lengths = n_context + own.lengths + niche.lengths
        starts = np.cumsum(lengths) - lengths
        columns = {
            name: np.empty(int(lengths.sum()), np.int32) for name in ("tokens", "positions", "segments")
        }
        before = np.zeros(len(cells), np.int64)
        for (sample, tokens, first, segment), count in zip(
            parts, (np.full(len(cells), n_context), own.lengths, niche.lengths), strict=True
        ):
            within = np.arange(len(sample)) - np.repeat(np.cumsum(count) - count, count)
            at = starts[sample] + before[sample] + within
            columns["tokens"][at], columns["segments"][at] = tokens, segment
            columns["positions"][at] = within + first
            before += count
        tokens = Ragged(starts, lengths, columns)
        return Sentences(
            tokens=tokens,
            places=self._places(tokens, cells, draw, seed, rates),
            panel=np.zeros(len(cells), np.int64),
            index=cells,
            draw=draw,
            cut=np.stack([own.cut, niche.cut], axis=1),
        )

    def know(self, slides: Int[np.ndarray, " n"]) -> None:
        """Look up context tokens and means of slides that were not read before; errors as of `read`."""
        for number in slides[~self._known[slides]]:
            slide = self.corpus.slides[number]
            self._context[number] = self._context_of(slide)
            technology = slide.technology, slide.modality
            if technology not in self._technologies:
                means = usable_means(
                    means_of_slide(self.corpus, slide, self.config.mean_files), self.config.means
                )
                self.means = np.concatenate([self.means, means[None]])
                self._technologies.append(technology)
            self._row[number] = self._technologies.index(technology)
            self._known[number] = True

    def _context_of(self, slide: Slide) -> list[int]:
        extra = {name.lower(): FIRST_EXTRA_ASSAY + n for n, name in enumerate(self.config.extra_assays)}
        tables: dict[Context, tuple[str, dict[str, int], str]] = {
            "species": (slide.species, SPECIES_TOKENS, "leave 'species' out of data.sample.context"),
            "assay": (
                slide.technology,
                {**ASSAY_TOKENS, **extra},
                "add it to data.sample.extra_assays, or leave 'assay' out of data.sample.context",
            ),
            "modality": (slide.modality, MODALITY_TOKENS, ""),
        }
        tokens = []
        for field in self.config.context:
            said, table, mend = tables[field]
            if said.lower() not in table:
                known = ", ".join(table)
                raise InputError(
                    self.corpus.path,
                    f"slide {slide.name!r}: the {field} {said!r} has no token (there are {known})",
                    mend,
                )
            tokens.append(table[said.lower()])
        return tokens

    def _ranked(
        self,
        genes: Int[np.ndarray, " nnz"],
        values: Float[np.ndarray, " nnz"] | Int[np.ndarray, " nnz"],
        offsets: Int64[np.ndarray, " n_and_end"],
        slides: Int[np.ndarray, " n"],
        limit: int,
    ) -> _Ranked:
        """Tokens by value over technology mean, highest first, at most `limit` of each cell."""
        present = np.diff(offsets)
        lengths = np.minimum(present, limit)
        starts = np.cumsum(lengths) - lengths
        tokens = np.empty(int(lengths.sum()), np.int32)
        for rows in self._parts(present):
            real = np.arange(present[rows].max()) < present[rows, None]
            at = np.where(real, offsets[rows, None] + np.arange(real.shape[1]), 0)
            gene = genes[at]
            value = values[at] / self.means[self._row[slides[rows]][:, None], gene]
            ranked = rank_rows(value, gene, real)[:, :limit]
            kept = ranked >= 0
            to = starts[rows, None] + np.arange(ranked.shape[1])
            tokens[to[kept]] = ranked[kept] + FIRST_GENE
        return _Ranked(tokens, lengths, present - lengths)

    def _parts(self, lengths: Int64[np.ndarray, " n"]) -> list[Int64[np.ndarray, " m"]]:
        """Rows of about equal length, so many that a part fits a cache; rows of length 0 are in none."""
        order = np.argsort(lengths, kind="stable")
        order = order[lengths[order] > 0]
        if not len(order):
            return []
        pieces = -(-int(lengths[order].sum()) // self._PART)
        return np.array_split(order, max(pieces, 1))

    def _niche(self, cells: Int64[np.ndarray, " n"], slides: Int[np.ndarray, " n"]) -> _Ranked:
        """The mean of the neighbours' scaled counts, ranked; nothing for cells without neighbours."""
        k = self.config.niche_neighbours
        if not k:
            nothing = np.zeros(len(cells), np.int64)
            return _Ranked(np.zeros(0, np.int32), nothing, nothing)
        near = self.corpus.neighbours(cells, k)
        if self.config.niche_radius is not None:
            unknown = slides[self._spatial[slides] & np.isnan(self._um[slides])]
            if len(unknown):
                raise InputError(
                    self.corpus.path,
                    "data.sample.niche_radius is in um but the unit of "
                    f"{self.corpus.slides[unknown[0]].name!r} is not known",
                    "build with --um-per-unit, or set niche_neighbours alone",
                )
            distance = self.corpus.distances(cells, k) * self._um[slides][:, None]
            near = np.where(distance <= self.config.niche_radius, near, -1)
        sample, _ = np.nonzero(near >= 0)
        members, inverse = np.unique(near[near >= 0], return_inverse=True)
        rows = self.corpus.cells(members)
        scale = SCALED_TOTAL / np.maximum(self.corpus.column("total_matched", members), 1)
        scaled = sp.csr_array(
            (rows.counts * np.repeat(scale, np.diff(rows.offsets)), rows.genes, rows.offsets),
            shape=(len(members), self.n_genes),
        )
        present = np.bincount(sample, minlength=len(cells))
        average = sp.csr_array(
            (
                np.repeat(1 / np.maximum(present, 1), present),
                inverse,
                np.concatenate([[0], np.cumsum(present)]),
            ),
            shape=(len(cells), len(members)),
        )
        mean = sp.csr_array(average @ scaled)
        mean.sort_indices()
        return self._ranked(
            mean.indices, mean.data, mean.indptr.astype(np.int64), slides, self.config.niche_length
        )

    def _places(
        self, tokens: Ragged, cells: Int64[np.ndarray, " n"], draw: int, seed: int, mask: TokenMask | None
    ) -> Ragged:
        """Places of the tokens that are masked."""
        number = np.zeros(len(cells), np.int64)
        found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        if mask is None:
            return Ragged(number, number, {"places": np.zeros(0, np.int32)})
        for rows in self._parts(tokens.lengths):
            length = int(tokens.lengths[rows].max())
            part = tokens.pad(rows, length, {"tokens": PAD, "positions": 0, "segments": 1})
            step = np.full(len(rows), draw, np.uint32)
            bits, _ = token_bits(seed_words(seed), step, cells[rows].astype(np.uint32), part["tokens"])
            masked = under(bits, mask.rate) & maskable(part["tokens"], part["segments"], context=mask.context)
            number[rows] = masked.sum(1)
            row, place = np.nonzero(masked)
            found.append((rows[row], place, masked.cumsum(1)[row, place] - 1))
        starts, places = np.cumsum(number) - number, np.empty(int(number.sum()), np.int32)
        for row, place, within in found:
            places[starts[row] + within] = place
        return Ragged(starts, number, {"places": places})
