"""The batch that crosses from the host to the device."""

from __future__ import annotations

from typing import Any, TypeAlias, TypeVar, dataclass_transform

import chex
import numpy as np
from jaxtyping import Float, Int, UInt32

Array: TypeAlias = Any  # NumPy's on the host, JAX's on the device
T = TypeVar("T")


@dataclass_transform(frozen_default=True, kw_only_default=True)
def _batch(fields: type[T]) -> type[T]:
    """A chex dataclass that type checkers see as one."""
    return chex.dataclass(fields, frozen=True)


@_batch
class TissueBatch:
    """Fixed-shape samples: a centre cell and its k nearest neighbours, ``c = k + 1`` cells, the centre first.

    Attributes
    ----------
    genes
        Vocabulary index of each token; the two indices after the last gene are the depth tokens.
    counts
        Raw count; 0 at depth tokens and padding.
    cells
        Which cell of the sample a token belongs to: 0 the centre, 1 the nearest neighbour; -1 is padding.
    slots
        Place of the token's gene in `decoder_genes`; -1 where it has none.
    totals
        Total count of each cell over the vocabulary's genes; 0 where there is no such neighbour.
    offsets
        x and y of each cell relative to the centre, in um.
    target_sum
        Median total of the sample's slide.
    decoder_genes
        Genes to decode, right-padded with -1: the slide's panel (or the whole vocabulary) and the depth
        tokens.
    decoder_counts
        The centre's raw count of each of them; -1 where it was not measured, at depth tokens and at padding.
    index
        The centre's number in the corpus.
    draw
        The step of the mask.
    weight
        1 for a real sample, 0 for one that fills the last batch of an evaluation.
    """

    genes: Int[Array, "b s"]
    counts: Int[Array, "b s"]
    cells: Int[Array, "b s"]
    slots: Int[Array, "b s"]
    totals: Int[Array, "b c"]
    offsets: Float[Array, "b c 2"]
    target_sum: Float[Array, " b"]
    decoder_genes: Int[Array, "b p"]
    decoder_counts: Int[Array, "b p"]
    index: UInt32[Array, " b"]
    draw: UInt32[Array, " b"]
    weight: Float[Array, " b"]

    @property
    def static_lengths(self) -> tuple[int, int]:
        """Columns of the encoder's tokens and of the decoded genes."""
        return self.genes.shape[1], self.decoder_genes.shape[1]

    @property
    def real(self) -> tuple[int, int]:
        """How many of both, over all rows, are not padding; on the host."""
        return int(np.sum(self.cells >= 0)), int(np.sum(self.decoder_genes >= 0))


@_batch
class SentenceBatch:
    """Fixed-shape sentences: a cell's context tokens and its genes by rank, then its niche's genes by rank.

    Attributes
    ----------
    tokens
        Reserved tokens below 30, genes from 30 onwards; 1 is padding, on the right.
    positions
        Rank in the cell's sentence, or in the niche's.
    segments
        0 for the cell, 1 for its niche.
    lengths
        Real tokens of each row.
    places
        Places of the masked tokens, -1 at padding: as many columns as any row has.
    cut
        Genes of the cell, and of its niche, that their sentences had no room for.
    index
        The cell's number in the corpus.
    draw
        The step of the mask.
    weight
        1 for a real sample, 0 for one that fills the last batch of an evaluation.
    """

    tokens: Int[Array, "b s"]
    positions: Int[Array, "b s"]
    segments: Int[Array, "b s"]
    lengths: Int[Array, " b"]
    places: Int[Array, "b m"]
    cut: Int[Array, "b 2"]
    index: UInt32[Array, " b"]
    draw: UInt32[Array, " b"]
    weight: Float[Array, " b"]

    @property
    def static_lengths(self) -> tuple[int, int]:
        """Columns of the tokens and of the masked places."""
        return self.tokens.shape[1], self.places.shape[1]

    @property
    def real(self) -> tuple[int, int]:
        """How many of both, over all rows, are not padding; on the host."""
        return int(np.sum(self.lengths)), int(np.sum(self.places >= 0))


Batch: TypeAlias = TissueBatch | SentenceBatch
