"""Which genes are masked: a pure function of (seed, step, cell, gene), the same in NumPy and in JAX.

One uniform number belongs to every sample and gene: Threefry-2x32 (Salmon et al., SC 2011) makes a key of
(seed, step, cell), and MurmurHash3 (Appleby, 2011) under that key mixes the gene, in a fifth of the time that
Threefry would take for every gene. The number depends neither on how many neighbours there are nor on
padding, row or packing, so that models that see different context are scored on the same masked genes, and
the loader knows what the jitted loss will mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Bool, Int, Integer, UInt32

Words: TypeAlias = Any  # uint32 arrays, NumPy's or JAX's

_PARITY = np.uint32(0x1BD11BDA)
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def threefry2x32(key: tuple[Words, Words], counter: tuple[Words, Words]) -> tuple[Words, Words]:
    """Twenty rounds of Threefry-2x32 over uint32 arrays that broadcast together, NumPy's or JAX's."""
    schedule = (key[0], key[1], key[0] ^ key[1] ^ _PARITY)
    x0, x1 = counter[0] + schedule[0], counter[1] + schedule[1]
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            x0 = x0 + x1
            x1 = _rotated(x1, rotation) ^ x0
        x0 = x0 + schedule[(group + 1) % 3]
        x1 = x1 + (schedule[(group + 2) % 3] + np.uint32(group + 1))
    return x0, x1


def mask_bits(
    seed: UInt32[Words, 2],
    step: UInt32[Words, " n"],
    cell: UInt32[Words, " n"],
    gene: Integer[Words, "n g"],
) -> UInt32[Words, "n g"]:
    """The uniform 32 bits of each (sample, gene).

    Parameters
    ----------
    seed
        Two words; `jax.random.key_data` of a key.
    step
        When the sample was drawn. Evaluation keeps it constant.
    cell
        The centre's number in the corpus.
    gene
        Vocabulary indices, each sample's own or one row for all.
    """
    return murmur3(gene, _sample_words(seed, step, cell, 0)[0][:, None])


def token_bits(
    seed: UInt32[Words, 2],
    step: UInt32[Words, " n"],
    cell: UInt32[Words, " n"],
    gene: Integer[Words, "n g"],
    *,
    stream: int = 0,
) -> tuple[UInt32[Words, "n g"], UInt32[Words, "n g"]]:
    """Two independent words of each (sample, gene), and others for each `stream`; see `mask_bits`."""
    first, second = (word[:, None] for word in _sample_words(seed, step, cell, stream))
    return murmur3(gene, first), murmur3(gene, second)


def _sample_words(
    seed: UInt32[Words, 2], step: UInt32[Words, " n"], cell: UInt32[Words, " n"], stream: int
) -> tuple[Words, Words]:
    sample = threefry2x32((seed[:1], seed[1:]), (step, cell))
    counter = np.full(1, stream, np.uint32), np.zeros(1, np.uint32)
    return threefry2x32(sample, counter)


def murmur3(word: Integer[Words, "*n"], seed: UInt32[Words, "*n"]) -> UInt32[Words, "*n"]:
    """MurmurHash3 (x86, 32 bits) of one 32-bit word under a seed; the arrays broadcast together."""
    mixed = _rotated(word.astype(np.uint32) * np.uint32(0xCC9E2D51), 15) * np.uint32(0x1B873593)
    hashed = _rotated(seed ^ mixed, 13) * np.uint32(5) + np.uint32(0xE6546B64)
    hashed = hashed ^ np.uint32(4)  # bytes in a word
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        hashed = (hashed ^ (hashed >> np.uint32(shift))) * np.uint32(factor)
    return hashed ^ (hashed >> np.uint32(16))


def _rotated(x: Words, left: int) -> Words:
    return (x << np.uint32(left)) | (x >> np.uint32(32 - left))


def under(bits: UInt32[Words, "n g"], rate: float) -> Bool[Words, "n g"]:
    """Whether uniform bits fall under a rate: ``bits < rate * 2**32``."""
    return bits < np.uint32(min(round(rate * 2**32), 2**32 - 1))


@dataclass(frozen=True)
class MaskRates:
    """Shares of a centre's measured genes that are masked: of those with counts, and of those without."""

    nonzero: float
    zero: float


def column_mask(
    bits: UInt32[Words, "n g"], counts: Int[Words, "n g"], rates: MaskRates
) -> Bool[Words, "n g"]:
    """Masked where the bits fall under the rate of the centre's count.

    Parameters
    ----------
    bits
        From `mask_bits`.
    counts
        The centre's counts; -1 where the gene was not measured, which is never masked.
    rates
        See `under`.
    """
    return ((counts > 0) & under(bits, rates.nonzero)) | ((counts == 0) & under(bits, rates.zero))


def seed_words(seed: int) -> UInt32[np.ndarray, 2]:
    """The two words that `jax.random.key(seed)` holds."""
    return np.array([0, seed], np.uint32)
