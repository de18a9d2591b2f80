"""Batches for benchmarks of the step: random cells, tokenised and masked as the loader does; no corpus."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from scfm_jax.data.batch import SentenceBatch, TissueBatch
from scfm_jax.data.masks import MaskRates, column_mask, mask_bits, seed_words, under
from scfm_jax.models.flops import Load
from scfm_jax.models.tissue import DEPTH_TOKENS
from scfm_jax.reserved_tokens import FIRST_GENE

MULTIPLE = 128


@dataclass(frozen=True)
class Measured:
    """A batch, and how much of it is real."""

    batch: TissueBatch | SentenceBatch
    real: Load

    @property
    def padded(self) -> Load:
        return Load.padded(len(self.batch.weight), *self.batch.static_lengths)


def tissue_batch(
    rows: int,
    *,
    n_genes: int,
    neighbours: int,
    expressed: int,
    panel: int,
    whole_vocabulary: bool,
    rates: MaskRates,
    seed: int = 0,
) -> Measured:
    """Samples of a slide whose cells express `expressed` of the panel's genes on average, give or take 20%.

    Of four times the samples those of the middle lengths are taken, as a window of the loader would.
    """
    random, cells = np.random.default_rng(seed), neighbours + 1
    listed = np.sort(random.permutation(n_genes)[:panel])
    often = random.gamma(2.0, size=panel)
    share = random.normal(1.0, 0.2, (4 * rows, cells, 1)).clip(0.4, 1.6)
    chance = (often / often.mean() * expressed / panel * share).clip(0, 0.98)
    present = random.random(chance.shape) < chance
    counts = np.where(present, random.geometric(0.4, chance.shape), 0).astype(np.int32)
    index = np.arange(4 * rows, dtype=np.uint32)
    decoded = np.arange(n_genes) if whole_vocabulary else listed
    centre = np.full((4 * rows, len(decoded)), -1, np.int32)
    centre[:, np.searchsorted(decoded, listed)] = counts[:, 0]
    bits = mask_bits(seed_words(seed), np.zeros(4 * rows, np.uint32), index, decoded[None])
    masked = column_mask(bits, centre, rates)[:, np.searchsorted(decoded, listed)]
    visible = present & ~masked[:, None]
    lengths = visible.sum((1, 2)) + DEPTH_TOKENS * cells
    middle = np.sort(np.argsort(lengths)[3 * rows // 2 :][:rows])
    width = -(-int(lengths[middle].max()) // MULTIPLE) * MULTIPLE
    places = -(-(len(decoded) + DEPTH_TOKENS) // MULTIPLE) * MULTIPLE
    depth = np.arange(n_genes, n_genes + DEPTH_TOKENS)
    slot_of = np.full(n_genes + DEPTH_TOKENS, -1)
    slot_of[np.concatenate([decoded, depth])] = np.arange(len(decoded) + DEPTH_TOKENS)
    genes, values, slots = (
        np.zeros((rows, width), int),
        np.zeros((rows, width), int),
        np.full((rows, width), -1),
    )
    members = np.full((rows, width), -1)
    for row, sample in enumerate(middle):
        cell, gene = np.nonzero(visible[sample])
        own = np.concatenate([listed[gene], np.tile(depth, cells)])
        count = np.concatenate([counts[sample, cell, gene], np.zeros(DEPTH_TOKENS * cells, int)])
        cell = np.concatenate([cell, np.repeat(np.arange(cells), DEPTH_TOKENS)])
        span = slice(len(own))
        genes[row, span], values[row, span], members[row, span], slots[row, span] = (
            own,
            count,
            cell,
            slot_of[own],
        )
    decoder_genes, decoder_counts = (np.full((rows, places), -1) for _ in range(2))
    decoder_genes[:, : len(decoded) + DEPTH_TOKENS] = np.concatenate([decoded, depth])
    decoder_counts[:, : len(decoded)] = centre[middle]
    whole = (genes, values, members, slots, counts[middle].sum(-1), decoder_genes, decoder_counts)
    names = ("genes", "counts", "cells", "slots", "totals", "decoder_genes", "decoder_counts")
    batch = TissueBatch(
        **{name: part.astype(np.int32) for name, part in zip(names, whole, strict=True)},
        offsets=np.zeros((rows, cells, 2), np.float32),
        target_sum=np.full(rows, 200, np.float32),
        index=index[middle],
        draw=np.zeros(rows, np.uint32),
        weight=np.ones(rows, np.float32),
    )
    return Measured(batch, Load.real(lengths[middle], np.full(rows, len(decoded) + DEPTH_TOKENS)))


def sentence_batch(rows: int, *, n_genes: int, length: int, rate: float, seed: int = 0) -> Measured:
    """Whole sentences of `length` tokens, three of them context, each gene once."""
    random = np.random.default_rng(seed)
    tokens = FIRST_GENE + random.random((rows, n_genes)).argsort(1)[:, :length].astype(np.int32)
    tokens[:, :3] = 5, 8, 4
    index = np.arange(rows, dtype=np.uint32)
    bits = mask_bits(seed_words(seed), np.zeros(rows, np.uint32), index, tokens)
    masked = under(bits, rate) & (tokens >= FIRST_GENE)
    number = masked.sum(1)
    width = -(-length // MULTIPLE) * MULTIPLE
    places = np.full((rows, -(-int(number.max()) // MULTIPLE) * MULTIPLE), -1, np.int32)
    for row in range(rows):
        places[row, : number[row]] = np.flatnonzero(masked[row])
    padding = ((0, 0), (0, width - length))
    batch = SentenceBatch(
        tokens=np.pad(tokens, padding, constant_values=1),
        positions=np.pad(np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape), padding),
        segments=np.zeros((rows, width), np.int32),
        lengths=np.full(rows, length, np.int32),
        places=places,
        cut=np.zeros((rows, 2), np.int32),
        index=index,
        draw=np.zeros(rows, np.uint32),
        weight=np.ones(rows, np.float32),
    )
    return Measured(batch, Load.real(np.full(rows, length), number))
