"""Samples packed into rows, or grouped by the length that survives the mask: which asks for fewer FLOPs.

    python tools/bench_packing.py experiments/tissue_60m.py --corpus CORPUS [--any.field value ...]

By file of the corpus: one window of training samples. Grouped, as the loader does: batches of like lengths,
each padded to its rung. Packed: each batch of the same window in random order, first fit decreasing into rows
of one length, the best of several. A packed row costs its length squared in attention, as the fused kernels
skip no block for segments; in brackets what it would cost if they skipped all.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from jaxtyping import Int64

from scfm_jax.corpus import Corpus
from scfm_jax.corpus.split import split_cells
from scfm_jax.data.loader import Loader, Reader, order_by_length
from scfm_jax.errors import InputError
from scfm_jax.models.flops import Load, forward_flops
from scfm_jax.training.config import RunConfig, load_recipe, override

ROWS = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0)  # times the longest sample


@dataclass
class Arguments:
    """Compare packing with grouping for a recipe. Any field of the recipe is a flag."""

    recipe: Annotated[Path, tyro.conf.Positional]


def packed_rows(lengths: Int64[np.ndarray, " n"], room: int) -> int:
    """Rows of `room` tokens that first fit decreasing needs."""
    left: list[int] = []
    for length in np.sort(lengths)[::-1]:
        place = next((row for row, free in enumerate(left) if free >= length), None)
        if place is None:
            left.append(room - length)
        else:
            left[place] -= length
    return len(left)


def main(arguments: Arguments, overrides: list[str]) -> None:
    config = override(load_recipe(arguments.recipe), overrides, str(arguments.recipe))
    corpus = Corpus.open(config.corpus)
    train = np.asarray(split_cells(corpus, config.split).is_train)
    slides = corpus.slide_of(np.arange(corpus.n_cells))
    print(
        f"{'file':<44}{'tokens':>8}{'grouped':>10}{'packed':>9}{'packed FLOPs / grouped':>25}"
        f"{'(skipping)':>12}{'row':>7}"
    )
    for source in sorted({slide.source for slide in corpus.slides}):
        chosen = np.array([slide.source == source for slide in corpus.slides])
        compare(source, config, corpus, np.flatnonzero(train & chosen[slides]))


def compare(source: str, config: RunConfig, corpus: Corpus, cells: Int64[np.ndarray, " n"]) -> None:
    data, n_genes = config.data, len(corpus.vocabulary)
    loader = Loader(corpus, cells, data, seed=1, rates=config.objective.rates)
    reader: Reader = data.sample.reader(corpus)
    samples = reader.read(
        np.random.default_rng(0).permutation(cells)[: data.window * data.batch_size],
        draw=0,
        seed=1,
        rates=config.objective.rates,
    )
    lengths = samples.tokens.lengths
    batches = lengths[order_by_length(samples)][: len(lengths) // data.batch_size * data.batch_size]
    batches = batches.reshape(-1, data.batch_size)

    def flops(load: Load) -> float:
        parts = forward_flops(config.model, n_genes, replace(load, second_tokens=0, second_pairs=0))
        return sum(parts.values())

    grouped = [Load.padded(len(row), loader.ladders[0].rung(int(row.max())), 0) for row in batches]
    of_grouped = sum(map(flops, grouped))
    shuffled = np.random.default_rng(1).permutation(batches.ravel()).reshape(batches.shape)
    found = []
    for times in ROWS:
        room = -(-int(times * lengths.max()) // data.length_multiple) * data.length_multiple
        rows = [packed_rows(row, room) for row in shuffled]
        dense = [Load.padded(number, room, 0) for number in rows]
        pairs = float((shuffled.astype(np.float64) ** 2).sum())
        skipping = sum(flops(replace(load, pairs=0)) for load in dense) + flops(Load(0, 0, pairs, 0, 0))
        found.append((sum(map(flops, dense)), skipping, room, lengths.sum() / (sum(rows) * room)))
    best = min(found)
    fill = lengths.sum() / sum(load.tokens for load in grouped)
    print(
        f"{source:<44}{lengths.mean():8.0f}{fill:10.1%}{best[3]:9.1%}{best[0] / of_grouped:25.2f}"
        f"{min(row[1] for row in found) / of_grouped:12.2f}{best[2]:7}",
        flush=True,
    )


if __name__ == "__main__":
    try:
        main(*tyro.cli(Arguments, return_unknown_args=True))
    except InputError as error:
        print(f"bench_packing: {error}", file=sys.stderr)
        sys.exit(2)
