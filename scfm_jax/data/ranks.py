"""From corpus rows to sentences of genes by rank (Nicheformer), ragged, without a Python loop over cells."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float, Int, Int32, Int64, UInt32

from scfm_jax.corpus import Corpus
from scfm_jax.corpus.context import Context as CellContext
from scfm_jax.corpus.reader import Slide
from scfm_jax.corpus.store import SCALED_TOTAL
from scfm_jax.data.batch import Array, SentenceBatch
from scfm_jax.data.masks import mask_bits, seed_words, under
from scfm_jax.data.rank_order import falling_bits, order_rows
from scfm_jax.data.technology_means import means_of_slide, usable_means
from scfm_jax.data.threads import equal_parts, in_parts
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

    def context_of(self, corpus: Corpus) -> CellContext:
        """The cells around a centre of `corpus`, of which a niche is made."""
        return CellContext(corpus, self.stored_neighbours)

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
class _Ranking:
    """Cells' genes and the numbers that they are ranked by, and how many of a cell's have room."""

    genes: Int[np.ndarray, " nnz"]
    falling: UInt32[np.ndarray, " nnz"]
    offsets: Int64[np.ndarray, " n_and_end"]
    limit: int

    def __post_init__(self) -> None:
        self.present = np.diff(self.offsets)
        self.lengths = np.minimum(self.present, self.limit)

    def tokens(self, rows: Int64[np.ndarray, " m"]) -> Int32[np.ndarray, "m w"]:
        """Tokens of chosen cells by rank; beyond a row's length they mean nothing."""
        order = order_rows(self.falling, self.offsets[rows], self.present[rows])[:, : self.limit]
        tokens = self.genes.take(order, mode="clip").astype(np.int32, copy=False)
        tokens += FIRST_GENE
        return tokens


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
        self._learning = threading.Lock()
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
        own = self._ranking(rows.genes, rows.counts, rows.offsets, slides, self.config.length - n_context)
        niche = self._niche(cells, slides)
        # Rows of a part are about equally long and are as wide as the widest; what is beyond is not moved.
        order = np.argsort(own.present, kind="stable")
        parts = [order[run] for run in equal_parts((n_context + own.present)[order])]
        widths = [
            n_context + sum(int(of.lengths[part].max(initial=0)) for of in (own, niche)) for part in parts
        ]
        ends = np.cumsum([len(part) * width for part, width in zip(parts, widths, strict=True)])
        starts = np.zeros(len(cells), np.int64)
        tokens, positions = (np.empty(ends[-1], np.int32) for _ in range(2))
        segments = np.zeros(ends[-1], np.int32)

        def write(number: int) -> tuple[np.ndarray, np.ndarray]:
            part, width, end = parts[number], widths[number], ends[number]
            span = slice(end - len(part) * width, end)
            starts[part] = np.arange(span.start, span.stop, width) if width else 0
            token, position, segment = (
                column[span].reshape(len(part), width) for column in (tokens, positions, segments)
            )
            ranked, near = own.tokens(part), niche.tokens(part)
            sentence = token[:, : n_context + ranked.shape[1]]
            sentence[:, :n_context], sentence[:, n_context:] = self._context[slides[part]], ranked
            position[:] = np.arange(width)
            masked = _places(sentence, n_context + own.lengths[part], cells[part], draw, seed, rates)
            if near.shape[1]:
                within = np.arange(near.shape[1])
                at = n_context + own.lengths[part][:, None] + within
                for block, values in ((token, near), (position, within[None]), (segment, np.ones((1, 1)))):
                    np.put_along_axis(block, at, values, axis=1)
            return masked

        masked = in_parts(write, range(len(parts)))
        number = np.zeros(len(cells), np.int64)
        number[order] = np.concatenate([of_row for of_row, _ in masked])
        first_place = np.zeros(len(cells), np.int64)
        first_place[order] = np.cumsum(number[order]) - number[order]
        return Sentences(
            tokens=Ragged(
                starts,
                n_context + own.lengths + niche.lengths,
                {"tokens": tokens, "positions": positions, "segments": segments},
            ),
            places=Ragged(first_place, number, {"places": np.concatenate([places for _, places in masked])}),
            panel=np.zeros(len(cells), np.int64),
            index=cells,
            draw=draw,
            cut=np.stack([of.present - of.lengths for of in (own, niche)], axis=1),
        )

    def know(self, slides: Int[np.ndarray, " n"]) -> None:
        """Look up context tokens and means of slides that were not read before; errors as of `read`."""
        if self._known[slides].all():
            return
        with self._learning:
            for number in slides[~self._known[slides]]:
                self._learn(int(number))

    def _learn(self, number: int) -> None:
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

    def _ranking(
        self,
        genes: Int[np.ndarray, " nnz"],
        values: Float[np.ndarray, " nnz"] | Int[np.ndarray, " nnz"],
        offsets: Int64[np.ndarray, " n_and_end"],
        slides: Int[np.ndarray, " n"],
        limit: int,
    ) -> _Ranking:
        """Genes of cells by value over technology mean, of which `limit` of a cell have room."""
        means, row, present = self.means.ravel(), self._row[slides], np.diff(offsets)
        # `order_rows` looks at as many values of each row as the longest has.
        falling = np.zeros(len(genes) + int(present.max(initial=0)), np.uint32)

        def divide(cells: slice) -> None:
            span = slice(offsets[cells.start], offsets[cells.stop])
            mean = genes[span].astype(np.int64)
            mean += np.repeat(row[cells] * self.n_genes, present[cells])
            falling[span] = falling_bits(values[span].astype(np.float64) / means.take(mean))

        in_parts(divide, equal_parts(present))
        return _Ranking(genes, falling, offsets, limit)

    def _niche(self, cells: Int64[np.ndarray, " n"], slides: Int[np.ndarray, " n"]) -> _Ranking:
        """The mean of the neighbours' scaled counts, ranked; nothing for cells without neighbours."""
        k = self.config.niche_neighbours
        if not k:
            nothing = np.zeros(0, np.uint32)
            return _Ranking(nothing, nothing, np.zeros(len(cells) + 1, np.int64), 0)
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
        return self._ranking(
            mean.indices, mean.data, mean.indptr.astype(np.int64), slides, self.config.niche_length
        )


def _places(
    tokens: Int32[np.ndarray, "m w"],
    ends: Int64[np.ndarray, " m"],
    cells: Int64[np.ndarray, " m"],
    draw: int,
    seed: int,
    mask: TokenMask | None,
) -> tuple[Int64[np.ndarray, " m"], Int32[np.ndarray, " masked"]]:
    """How many tokens of each row are masked, and their places; a row's tokens stop at its end."""
    if mask is None:
        return np.zeros(len(cells), np.int64), np.zeros(0, np.int32)
    step = np.full(len(cells), draw, np.uint32)
    bits = mask_bits(seed_words(seed), step, cells.astype(np.uint32), tokens)
    beyond = np.arange(tokens.shape[1], dtype=np.int32) >= ends[:, None].astype(np.int32)
    masked = under(bits, mask.rate) & maskable(tokens, beyond, context=mask.context)
    at = np.flatnonzero(masked)
    number = np.diff(np.searchsorted(at, np.arange(len(cells) + 1) * tokens.shape[1]))
    at -= np.repeat(np.arange(len(cells)) * tokens.shape[1], number)
    return number, at.astype(np.int32)
