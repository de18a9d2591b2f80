"""Which genes are masked: a pure function of (seed, step, cell, gene), the same in NumPy and in JAX.

One uniform number belongs to every sample and gene, from the counter-based generator Threefry-2x32 (Salmon et
al., SC 2011). It depends neither on the number of neighbours nor on padding, row or packing, so that models
that see different context are scored on the same masked genes, and the loader knows what the jitted loss will
mask.
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
            x1 = ((x1 << np.uint32(rotation)) | (x1 >> np.uint32(32 - rotation))) ^ x0
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
        Vocabulary indices.
    """
    return token_bits(seed, step, cell, gene)[0]


def token_bits(
    seed: UInt32[Words, 2],
    step: UInt32[Words, " n"],
    cell: UInt32[Words, " n"],
    gene: Integer[Words, "n g"],
    *,
    stream: int = 0,
) -> tuple[UInt32[Words, "n g"], UInt32[Words, "n g"]]:
    """Two independent words of each (sample, gene), and others for each `stream`; see `mask_bits`."""
    sample = threefry2x32((seed[:1], seed[1:]), (step, cell))
    genes = gene.astype(np.uint32)
    counter = (genes, (genes ^ genes) + np.uint32(stream))
    return threefry2x32((sample[0][:, None], sample[1][:, None]), counter)


def host_mask_bits(
    seed: UInt32[np.ndarray, 2],
    step: UInt32[np.ndarray, " n"],
    cell: UInt32[np.ndarray, " n"],
    gene: Integer[np.ndarray, "n g"],
) -> UInt32[np.ndarray, "n g"]:
    """`mask_bits` in less time, for NumPy alone: in place, and without what only the second word needs."""
    key = [word[:, None] for word in threefry2x32((seed[:1], seed[1:]), (step, cell))]
    schedule = (*key, key[0] ^ key[1] ^ _PARITY)
    rotations = [rotation for group in range(5) for rotation in _ROTATIONS[group % 2]]
    # Before the first round the second word is the same for all genes.
    x0 = gene.astype(np.uint32)
    x0 += key[0] + key[1]
    x1 = x0 ^ (key[1] << np.uint32(rotations[0]) | key[1] >> np.uint32(32 - rotations[0]))
    spare = np.empty_like(x0)
    for done, rotation in enumerate(rotations[1:-1], 2):
        x0 += x1
        np.left_shift(x1, np.uint32(rotation), out=spare)
        x1 >>= np.uint32(32 - rotation)
        x1 |= spare
        x1 ^= x0
        group, within = divmod(done, 4)
        if not within:
            x0 += schedule[group % 3]
            x1 += schedule[(group + 1) % 3] + np.uint32(group)
    x0 += x1
    x0 += schedule[5 % 3]
    return x0


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
