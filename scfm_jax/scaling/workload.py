"""The batch that a run works through, from typical cells and without a corpus: as shapes, and as a load."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import jax
import jax.numpy as jnp
import numpy as np

from scfm_jax.data.batch import Batch, SentenceBatch, TissueBatch
from scfm_jax.errors import InputError
from scfm_jax.models.flops import Load
from scfm_jax.models.tissue import DEPTH_TOKENS, TissueConfig
from scfm_jax.training.config import RunConfig

# Genes of the published vocabularies (Nicheformer's 20,340 classes hold 30 reserved tokens).
_TISSUE_GENES, _NICHEFORMER_GENES = 19_264, 20_310
# The fullest row of a batch has about so many standard deviations more masked places than the mean.
_FULLEST = 4


@dataclass(frozen=True)
class Cells:
    """What is not in a recipe, because a corpus would say it.

    Attributes
    ----------
    expressed
        Genes of a cell that are not zero (tissue).
    panel
        Genes that a slide measured, for a decoder that runs over the panel (tissue).
    vocabulary
        Genes of the vocabulary; 0 is the published one of the family.
    """

    expressed: int = 150
    panel: int = 377
    vocabulary: int = 0

    def __post_init__(self) -> None:
        for name, least in (("expressed", 1), ("panel", 1), ("vocabulary", 0)):
            if getattr(self, name) < least:
                raise InputError(f"--{name}", f"{getattr(self, name)} is no number of genes", "give more")


@dataclass(frozen=True)
class Workload:
    """A step's batch.

    Attributes
    ----------
    rows
        Samples, over all devices.
    first, second
        Static lengths: encoder tokens, and decoded genes or masked places; see `Batch.static_lengths`.
    cells
        Of a tissue sample: the centre and its neighbours.
    n_genes
        Genes of the vocabulary.
    """

    rows: int
    first: int
    second: int
    cells: int
    n_genes: int

    @property
    def load(self) -> Load:
        """Padding included."""
        return Load.padded(self.rows, self.first, self.second)

    def batch(self, family: type) -> Batch:
        """The batch of a model `family` as shapes and dtypes."""

        def of(dtype: type[np.generic], *shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((self.rows, *shape), dtype)

        integers, floats, words = jnp.int32, jnp.float32, jnp.uint32
        each = {"index": of(words), "draw": of(words), "weight": of(floats)}
        if family is TissueConfig:
            tokens = {name: of(integers, self.first) for name in ("genes", "counts", "cells", "slots")}
            return TissueBatch(
                **tokens,
                totals=of(integers, self.cells),
                offsets=of(floats, self.cells, 2),
                target_sum=of(floats),
                decoder_genes=of(integers, self.second),
                decoder_counts=of(integers, self.second),
                **each,
            )
        tokens = {name: of(integers, self.first) for name in ("tokens", "positions", "segments")}
        return SentenceBatch(
            **tokens, lengths=of(integers), places=of(integers, self.second), cut=of(integers, 2), **each
        )


def make_workload(config: RunConfig, cells: Cells) -> Workload:
    """The longest batch that `config` makes of such cells: before the mask takes its tissue tokens."""

    def rung(length: float) -> int:
        return ceil(length / config.data.length_multiple) * config.data.length_multiple

    rows = config.data.batch_size
    if isinstance(config.model, TissueConfig):
        _, sample, _ = config.tissue()
        n_genes, together = cells.vocabulary or _TISSUE_GENES, sample.neighbours + 1
        decoded = n_genes if sample.decoder == "vocabulary" else min(cells.panel, n_genes)
        first = rung(together * (min(cells.expressed, n_genes) + DEPTH_TOKENS))
        return Workload(rows, first, rung(decoded + DEPTH_TOKENS), together, n_genes)
    _, sentence, objective = config.nicheformer()
    n_genes, length = cells.vocabulary or _NICHEFORMER_GENES, sentence.length
    deviation = (length * objective.rate * (1 - objective.rate)) ** 0.5
    places = min(length * objective.rate + _FULLEST * deviation, length)
    niche = sentence.niche_length if sentence.niche_neighbours else 0
    return Workload(rows, rung(length + niche), rung(places), 0, n_genes)
