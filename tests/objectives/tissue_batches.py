"""Batches made by hand, token after token, with every masked token still in them."""

from __future__ import annotations

import numpy as np

from scfm_jax.data.batch import TissueBatch

N_GENES, CELLS = 24, 4
PANEL = np.array([0, 1, 2, 4, 5, 6, 7, 9, 10, 11, 12, 13, 15, 16, 17, 18, 20, 21, 22, 23])
WIDTH = CELLS * (len(PANEL) + 2)
UNMEASURED = np.setdiff1d(np.arange(N_GENES), PANEL)


def random_counts(n: int = 6, seed: int = 0) -> np.ndarray:
    """Raw counts [n, cells, genes]: none outside the panel."""
    counts = np.random.default_rng(seed).poisson(1.2, (n, CELLS, N_GENES)).astype(np.int32)
    counts[..., UNMEASURED] = 0
    return counts


def make_batch(
    counts: np.ndarray,
    totals: np.ndarray | None = None,
    *,
    neighbours: int = 3,
    dropped: np.ndarray | None = None,
) -> TissueBatch:
    """A batch of the first `neighbours` + 1 cells.

    `totals` are the counts' own unless given; `dropped` [n, genes]: genes that the loader left out.
    """
    n, cells = len(counts), neighbours + 1
    totals = counts.sum(-1) if totals is None else totals
    tokens = {
        name: np.full((n, WIDTH), fill, np.int32)
        for name, fill in zip(("genes", "counts", "cells", "slots"), (0, 0, -1, -1))
    }
    decoder_genes = np.full((n, len(PANEL) + 4), -1, np.int32)
    decoder_counts = decoder_genes.copy()
    for row in range(n):
        listed = [*PANEL, N_GENES, N_GENES + 1]
        decoder_genes[row, : len(listed)] = listed
        decoder_counts[row, : len(PANEL)] = counts[row, 0, PANEL]
        place = 0
        for cell in range(cells):
            for gene in [N_GENES, N_GENES + 1, *np.flatnonzero(counts[row, cell])]:
                if gene < N_GENES and dropped is not None and dropped[row, gene]:
                    continue
                count = counts[row, cell, gene] if gene < N_GENES else 0
                for name, value in zip(tokens, (gene, count, cell, listed.index(gene)), strict=True):
                    tokens[name][row, place] = value
                place += 1
    offsets = np.random.default_rng(1).normal(0, 20, (n, CELLS, 2)).astype(np.float32)
    offsets[:, 0] = 0
    return TissueBatch(
        **tokens,
        totals=totals[:, :cells].astype(np.int32),
        offsets=offsets[:, :cells],
        target_sum=np.linspace(20, 45, n).astype(np.float32),
        decoder_genes=decoder_genes,
        decoder_counts=decoder_counts,
        index=(np.arange(n) * 7 + 100).astype(np.uint32),
        draw=np.full(n, 5, np.uint32),
        weight=np.ones(n, np.float32),
    )


def by_gene(batch: TissueBatch, masked: np.ndarray) -> np.ndarray:
    """A mask over decoder places as one over genes, [n, genes]."""
    out = np.zeros((len(masked), N_GENES), bool)
    for row, place in zip(*np.nonzero(masked)):
        out[row, batch.decoder_genes[row, place]] = True
    return out
