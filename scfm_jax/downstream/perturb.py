"""In-silico perturbation: change a gene in the neighbours, see what becomes of the centre's prediction.

Only that gene's tokens change. The neighbours' totals stay as they were, so that no other token and no depth
moves: a cell around which no token changes has a difference of exactly zero.

What is compared are predictions of *masked* genes, since nothing else of the decoder was ever trained. A gene
masked in the centre is masked in its neighbours too (column masking), so the changed gene itself is never
masked and has no prediction. The other genes of the panel are dealt to `passes` groups, and each group is
masked in a pass of its own, in all cells alike: the mask says nothing of a count, and every gene is predicted
once, from all but its group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import anndata
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from flax import nnx
from jaxtyping import Array, Float32, Float64, Int, Int64

from scfm_jax.corpus import Corpus
from scfm_jax.corpus.split import SplitConfig, split_cells
from scfm_jax.data.batch import TissueBatch
from scfm_jax.downstream.embed import embed_batch
from scfm_jax.downstream.in_memory import corpus_of
from scfm_jax.downstream.interpret import gene_name
from scfm_jax.downstream.metrics import block_draws
from scfm_jax.downstream.model import TrainedModel
from scfm_jax.errors import InputError
from scfm_jax.objectives.column_masking import predict_from, visible_tokens


@dataclass(frozen=True)
class Change:
    """What becomes of the gene in the neighbours.

    Attributes
    ----------
    gene
        Symbol or id.
    factor
        Multiplies the count where there is one; 0 takes the gene away.
    count
        In place of `factor`: the count that every neighbour gets, whether it expressed the gene or not.
    """

    gene: str
    factor: float = 0.0
    count: float | None = None

    def __post_init__(self) -> None:
        for name in ("factor", "count"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise InputError("perturbation", f"{name} is {value}", "give a number from 0")


@dataclass(frozen=True, eq=False)
class Perturbed:
    """Differences that a change makes, changed minus unchanged.

    Attributes
    ----------
    cells
        Cell numbers of the centres.
    genes
        Vocabulary index of each column: the panels' genes but the changed one.
    delta
        Of the predicted value, in units of log1p of scaled counts; NaN where the centre's slide did not
        measure the gene.
    changed
        Neighbours of each centre whose tokens changed.
    cosine, norm
        Of the centre's embedding (mean over its gene tokens, nothing masked): cosine similarity of after and
        before, and Euclidean length of the difference over that of the embedding before.
    """

    cells: Int64[np.ndarray, " n"]
    genes: Int64[np.ndarray, " g"]
    delta: Float32[np.ndarray, "n g"]
    changed: Int64[np.ndarray, " n"]
    cosine: Float32[np.ndarray, " n"]
    norm: Float32[np.ndarray, " n"]


def change_neighbours(
    batch: TissueBatch, gene: int, slot: Int[Array, " b"], change: Change
) -> tuple[TissueBatch, TissueBatch, Int[Array, " b"]]:
    """A batch unchanged and changed, with equal shapes, and how many neighbours of each row changed.

    Parameters
    ----------
    batch
        With nothing masked.
    gene
        Vocabulary index.
    slot
        The gene's place in each row's `decoder_genes`, -1 where it was not measured.
    change
        What becomes of it.
    """
    hit = (batch.cells > 0) & (batch.genes == gene)
    counts = batch.counts.astype(jnp.float32)
    new = jnp.where(hit, counts * change.factor if change.count is None else change.count, counts)
    changed = replace(batch, counts=new, cells=jnp.where(hit & (new == 0), -1, batch.cells))
    batch = replace(batch, counts=counts)
    touched = jnp.where(new != counts, batch.cells, -1)
    if change.count:
        neighbour = jnp.arange(1, batch.totals.shape[1])
        expressing = (hit[..., None] & (batch.cells[..., None] == neighbour)).any(1)
        lacks = ~expressing & (batch.totals[:, 1:] > 0) & (slot >= 0)[:, None]
        added = jnp.where(lacks, neighbour, -1)
        batch = _append(batch, jnp.full_like(added, -1), gene, slot, change.count)
        changed = _append(changed, added, gene, slot, change.count)
        touched = jnp.concatenate([touched, added], axis=1)
    return batch, changed, (touched > 0).sum(1)


def _append(
    batch: TissueBatch, cells: Int[Array, "b k"], gene: int, slot: Int[Array, " b"], count: float
) -> TissueBatch:
    """A token of the gene more for each of `cells`; -1 adds padding."""
    columns: dict[str, Any] = {"genes": gene, "counts": count, "slots": slot[:, None], "cells": cells}
    grown = {
        name: jnp.concatenate([getattr(batch, name), jnp.broadcast_to(column, cells.shape)], axis=1)
        for name, column in columns.items()
    }
    return replace(batch, **grown)


def perturb_neighbours(
    model: TrainedModel,
    corpus: Corpus,
    cells: Int64[np.ndarray, " n"],
    change: Change,
    *,
    passes: int = 4,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Perturbed:
    """Change a gene in the neighbours of cells.

    Parameters
    ----------
    model
        A trained run of the tissue model.
    corpus
        With the model's vocabulary.
    cells
        Cell numbers of the centres.
    change
        The gene and what becomes of it.
    passes
        Groups that the other genes are masked in. 4 masks a quarter of them at once, near the .30 of
        non-zeros that training masks.
    seed
        Of the groups.
    progress
        Called with the number of cells done and in all.

    Raises
    ------
    InputError
        A model of another family or with `published_numerics`, a gene that was not measured around the cells
        or that two species have, or fewer than two passes.
    """
    _, _, objective = model.config.tissue()
    if objective.published_numerics:
        raise InputError(model.config.name, "has published_numerics, which mask nothing", "set it to false")
    if passes < 2:
        raise InputError("passes", f"is {passes}", "give 2 or more: with 1 a cell is predicted from nothing")
    panels = [corpus.slides[slide].panel for slide in np.unique(corpus.slide_of(cells))]
    measured = np.unique(np.concatenate(panels)).astype(np.int64)
    gene = _find(corpus, change.gene, measured)
    others = measured[measured != gene]
    n_genes = len(model.vocabulary)
    # The depth tokens have no group and are never masked.
    group = np.full(n_genes + 2, -1)
    group[others] = np.random.default_rng(seed).permutation(np.arange(len(others)) % passes)
    of_gene = jnp.asarray(group)
    # Totals are given from here on, masked or not, and no longer added up from what is visible.
    given = replace(objective, normalise="published")

    @jax.jit
    def run(parameters: Any, batch: TissueBatch) -> tuple[Array, Array, Array, Array]:
        module = nnx.merge(model.graph, parameters)
        listed = batch.decoder_genes == gene
        slot = jnp.where(listed.any(1), listed.argmax(1), -1)
        before, after, changed = change_neighbours(batch, gene, slot, change)

        def answer(one: TissueBatch) -> tuple[Array, Array]:
            def one_pass(number: Array) -> Array:
                real = batch.decoder_genes >= 0
                masked = real & (of_gene[jnp.maximum(batch.decoder_genes, 0)] == number)
                totals = visible_tokens(batch, masked, objective, n_genes).totals
                scaled = replace(one, totals=totals)
                tokens = visible_tokens(scaled, masked, given, n_genes)
                said = predict_from(module, scaled, tokens, masked, given, coordinates=model.coordinates)
                return jnp.where(masked, said.value, 0)

            embedding = embed_batch(
                module, one, given, n_genes=n_genes, coordinates=model.coordinates, pooling="mean"
            )
            return jax.lax.map(one_pass, jnp.arange(passes)).sum(0), embedding

        # One compiled function for both: "no change" is exactly zero, whatever the order of its sums.
        value, embedding = jax.lax.map(answer, jax.tree.map(lambda *both: jnp.stack(both), before, after))
        return value[1] - value[0], changed, embedding[0], embedding[1]

    column = np.full(n_genes + 2, -1)
    column[others] = np.arange(len(others))
    delta = np.full((len(cells), len(others)), np.nan, np.float32)
    changed = np.empty(len(cells), np.int64)
    cosine, norm = np.empty((2, len(cells)), np.float32)
    done = 0
    for rows, batch in model.batches(corpus, cells, rates=None):
        got, changed[rows], *embedded = (np.asarray(x)[: len(rows)] for x in run(model.parameters, batch))
        assert isinstance(batch, TissueBatch)
        genes = np.asarray(batch.decoder_genes)[: len(rows)]
        row, place = np.nonzero((genes >= 0) & (column[genes] >= 0))
        delta[rows[row], column[genes[row, place]]] = got[row, place]
        cosine[rows], norm[rows] = _shift(*embedded)
        done += len(rows)
        progress(done, len(cells))
    return Perturbed(cells, others, delta, changed, cosine, norm)


def _shift(
    before: Float32[np.ndarray, "n d"], after: Float32[np.ndarray, "n d"]
) -> Float64[np.ndarray, "2 n"]:
    lengths = np.linalg.norm(before, axis=1) * np.linalg.norm(after, axis=1)
    return np.stack(
        [
            (before.astype(np.float64) * after).sum(1) / lengths,
            np.linalg.norm(after - before, axis=1) / np.linalg.norm(before, axis=1),
        ]
    )


def _find(corpus: Corpus, name: str, measured: Int64[np.ndarray, " p"]) -> int:
    ids, symbols = corpus.vocabulary.ids, corpus.vocabulary.symbols
    found = [int(gene) for gene in measured if name in (ids[gene], symbols[gene])]
    if len(found) != 1:
        problem = f"{len(found)} genes {name!r}" if found else f"{name!r} was not measured around the cells"
        raise InputError(corpus.path, problem, "give the id of a gene of the panel")
    return found[0]


def perturbation_table(
    found: Perturbed, corpus: Corpus, block: Int[np.ndarray, " n"], *, n_draws: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Mean difference by gene, over the centres around which something changed.

    Parameters
    ----------
    found
        From `perturb_neighbours`.
    corpus
        That it came from.
    block
        Spatial block of each centre: blocks are drawn again, not cells, for neighbouring cells are alike.
    n_draws, seed
        Of the bootstrap.

    Returns
    -------
    One row a gene, the largest difference first: `gene`, `delta`, `low` and `high` (95% percentile interval),
    `cells`.

    Raises
    ------
    InputError
        Nothing changed around any centre, or all that changed lies in one block.

    Warns
    -----
    DataWarning
        Below 10 blocks with changes, where intervals are too narrow.
    """
    there = found.changed > 0
    if not there.any():
        raise InputError(
            "perturbation", "no neighbour of any cell changed", "choose a gene that is expressed"
        )
    names, code = np.unique(block[there], return_inverse=True)
    if len(names) < 2:
        raise InputError("perturbation", "1 block has changed neighbours", "give smaller blocks")
    delta = found.delta[there].astype(np.float64)
    real = ~np.isnan(delta)
    within = (np.arange(len(names))[:, None] == code).astype(np.float64)
    sums, counts = within @ np.where(real, delta, 0), within @ real
    draws = block_draws(len(names), n_draws, seed)
    with np.errstate(invalid="ignore"):  # a draw of blocks that did not measure the gene
        low, high = np.nanquantile((draws @ sums) / (draws @ counts), [0.025, 0.975], axis=0)
    table = pd.DataFrame(
        {
            "gene": [gene_name(corpus, gene) for gene in found.genes],
            "delta": sums.sum(0) / counts.sum(0),
            "low": low,
            "high": high,
            "cells": real.sum(0),
        }
    )
    return table.sort_values("delta", key=np.abs, ascending=False, kind="stable", ignore_index=True)


def perturb(
    adata: anndata.AnnData,
    model: TrainedModel,
    change: Change,
    *,
    key_added: str = "perturbation",
    blocks: int = 8,
    passes: int = 4,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
    **source: Any,
) -> None:
    """Change a gene in every cell's neighbours, in silico; what comes of it is added to `adata`, in place.

    Adds ``uns["perturbation"]``, the table of `perturbation_table` over ``blocks x blocks`` blocks a slide;
    ``obs["perturbation_changed"]``, the changed neighbours of each cell, and ``obs["perturbation_cosine"]``,
    the similarity of its embedding to what it was (-1 and NaN for cells without counts).

    Parameters
    ----------
    adata
        Raw counts, ``obsm["spatial"]``.
    model
        A trained run of the tissue model.
    change
        The gene and what becomes of it.
    key_added
        In place of ``perturbation``.
    passes, seed
        As in `perturb_neighbours`.
    source
        How to read `adata`: `species` and `technology`, and what else `Source` takes.

    Raises
    ------
    InputError
        As `perturb_neighbours` and `perturbation_table`, or cells that cannot be read.

    Warns
    -----
    DataWarning
        As `perturbation_table`.
    """
    with corpus_of(adata, model, **source) as corpus:
        cells = np.arange(corpus.n_cells)
        found = perturb_neighbours(model, corpus, cells, change, passes=passes, seed=seed, progress=progress)
        block = split_cells(corpus, SplitConfig(blocks=blocks, n_folds=2, margin=0, min_kept=0)).block
        adata.uns[key_added] = perturbation_table(found, corpus, block, seed=seed)
        rows = corpus.column("source_row")
    for name, values, missing in (("changed", found.changed, -1), ("cosine", found.cosine, np.nan)):
        everywhere = np.full(adata.n_obs, missing, values.dtype)
        everywhere[rows] = values
        adata.obs[f"{key_added}_{name}"] = everywhere
