"""What a cell looks at: the attention of the centre's genes to its neighbours, by cell and by gene.

Attention is where information may come from, not what it does: see `scfm_jax.downstream.perturb` for that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import anndata
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from flax import nnx
from jaxtyping import Float, Float32, Float64, Int32, Int64
from scipy import sparse

from scfm_jax.corpus import Corpus
from scfm_jax.data.batch import TissueBatch
from scfm_jax.downstream.in_memory import corpus_of
from scfm_jax.downstream.labels import MISSING, Labels, read_labels
from scfm_jax.downstream.model import TrainedModel
from scfm_jax.errors import InputError
from scfm_jax.models.attention_weights import mean_attention
from scfm_jax.objectives.column_masking import rotary_positions, visible_tokens

ALL, ITSELF, UNLABELLED = "all", "itself", "unlabelled"
DEPTH = ("(depth 1)", "(depth 2)")


@dataclass(frozen=True, eq=False)
class Attention:
    """Attention of the centre's gene tokens, mean over them and over heads, in each layer.

    Attributes
    ----------
    members
        Cell numbers of each sample, the centre first, then its neighbours, nearest first; -1 for none.
    distance
        From the centre, in um, or in the file's units where their length is not known.
    by_cell
        What each member gets; rows sum to 1.
    tokens
        Tokens of each member. A model that attends to all alike gives a member its share of them.
    groups, group_cells
        Classes of the centres, and how many centres of each were seen; one, `ALL`, without labels.
    genes
        Names: those of the panels, and the depth tokens.
    by_gene
        Mean over a group's centres of what their own token of a gene gets (0), and those of their
        neighbours (1).
    gene_share
        The share of tokens that these are.
    """

    members: Int64[np.ndarray, "n c"]
    distance: Float32[np.ndarray, "n c"]
    by_cell: Float32[np.ndarray, "l n c"]
    tokens: Int32[np.ndarray, "n c"]
    groups: list[str]
    group_cells: Int64[np.ndarray, " groups"]
    genes: list[str]
    by_gene: Float64[np.ndarray, "l groups 2 g"]
    gene_share: Float64[np.ndarray, "groups 2 g"]


def centre_attention(
    model: TrainedModel,
    corpus: Corpus,
    cells: Int64[np.ndarray, " n"],
    *,
    labels: Labels | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Attention:
    """Attention of cells of a corpus to themselves and to their neighbours, nothing masked.

    Parameters
    ----------
    model
        A trained run of the tissue model.
    corpus
        With the model's vocabulary.
    cells
        Cell numbers of the centres.
    labels
        Of every cell of the corpus: centres of one class are summed up together.
    progress
        Called with the number of cells done and in all.

    Raises
    ------
    InputError
        A model of another family, or one that attends to padding as the authors' code does; no centre with a
        label.
    """
    geometry, sample, objective = model.config.tissue()
    if geometry.attend_padding:
        raise InputError(
            model.config.name, "attends to padding, so that attention depends on the batch", "set it to false"
        )
    n_genes, k = len(model.vocabulary), sample.neighbours

    @jax.jit
    def run(parameters: Any, batch: TissueBatch) -> tuple[jax.Array, ...]:
        module = nnx.merge(model.graph, parameters)
        tokens = visible_tokens(batch, None, objective, n_genes)
        # The centre's tokens come first, and each of them is of a gene to decode.
        asks = ((tokens.cells == 0) & (tokens.genes < n_genes))[:, : batch.decoder_genes.shape[1]]
        weights = mean_attention(
            module.encoder,
            module.embed(tokens.genes, tokens.values, tokens.lengths),
            rotary_positions(batch, tokens, model.coordinates),
            tokens.lengths,
            asks,
            implementation=module.attention,
        )
        of_cell = jax.nn.one_hot(tokens.cells, k + 1)
        return (
            weights,
            jnp.einsum("lbs,bsc->lbc", weights, of_cell),
            of_cell.sum(1),
            tokens.cells,
            tokens.genes,
        )

    names, column = _gene_columns(corpus, cells)
    group = np.zeros(len(cells), np.int64) if labels is None else labels.codes[cells]
    groups = [ALL] if labels is None else labels.classes
    if not (group >= 0).any():
        raise InputError(corpus.path, "no centre has a label", "give labelled cells, or no labels")
    layers, width = geometry.encoder.layers, 2 * len(names)
    by_cell = np.empty((layers, len(cells), k + 1), np.float32)
    tokens = np.empty((len(cells), k + 1), np.int32)
    sums = np.zeros((layers + 1, len(groups) * width))
    done = 0
    for rows, batch in model.batches(corpus, cells, rates=None):
        n = len(rows)
        weights, to_cell, counted, of, genes = jax.tree.map(np.asarray, run(model.parameters, batch))
        by_cell[:, rows], tokens[rows] = to_cell[:, :n], counted[:n]
        row, place = np.nonzero((of[:n] >= 0) & (group[rows] >= 0)[:, None])
        target = group[rows][row] * width + (of[row, place] > 0) * len(names) + column[genes[row, place]]
        values = np.vstack([weights[:, row, place], 1 / tokens[rows].sum(1)[row]])
        add = sparse.csr_array((np.ones(len(row)), (np.arange(len(row)), target)), (len(row), sums.shape[1]))
        sums += values @ add
        done += n
        progress(done, len(cells))
    group_cells = np.bincount(group[group >= 0], minlength=len(groups))
    sums = sums.reshape(layers + 1, len(groups), 2, len(names)) / np.maximum(group_cells, 1)[:, None, None]
    members, _ = sample.context_of(corpus).members(cells)
    unit = np.array([slide.um_per_unit or 1.0 for slide in corpus.slides])[corpus.slide_of(cells)]
    apart = corpus.distances(cells, sample.stored_neighbours)[:, sample.stored_neighbours - k :]
    distance = np.pad(apart * unit[:, None], ((0, 0), (1, 0))).astype(np.float32)
    return Attention(
        members, distance, by_cell, tokens, groups, group_cells, names, sums[:layers], sums[layers]
    )


def _gene_columns(
    corpus: Corpus, cells: Int64[np.ndarray, " n"]
) -> tuple[list[str], Int64[np.ndarray, " g"]]:
    """Names of the genes that were measured around `cells`, and the column of every token."""
    measured = np.unique(np.concatenate([corpus.slides[s].panel for s in np.unique(corpus.slide_of(cells))]))
    n_genes = len(corpus.vocabulary)
    column = np.full(n_genes + len(DEPTH), -1)
    column[np.concatenate([measured, [n_genes, n_genes + 1]])] = np.arange(len(measured) + len(DEPTH))
    return [gene_name(corpus, gene) for gene in measured] + list(DEPTH), column


def gene_name(corpus: Corpus, gene: int) -> str:
    """A gene's symbol, or its id where it has none."""
    return corpus.vocabulary.symbols[gene] or corpus.vocabulary.ids[gene]


def attention_tables(
    found: Attention, *, labels: Labels | None = None, layer: int | None = None
) -> dict[str, pd.DataFrame]:
    """Attention as tables, each with what a model that attends to all tokens alike would give.

    Parameters
    ----------
    found
        From `centre_attention`.
    labels
        Those that it was given.
    layer
        One layer, counted from 0 or from the end; the mean over layers if not given.

    Returns
    -------
    ``by_cell``: one row a class of centres and rank (0 the centre itself), with the number of centres, the
    median distance, `attention`, `expected` and their `ratio`. ``by_gene``: the same by gene and by whose it
    is, own or the neighbours'. With labels ``by_type``: by the class of the neighbour. Within a class of
    centres `attention` and `expected` each sum to 1.

    Raises
    ------
    InputError
        No such layer.
    """
    layers = len(found.by_cell)
    if layer is not None and not -layers <= layer < layers:
        raise InputError(
            "layer", f"is {layer}, the encoder has {layers}", f"choose one from 0 to {layers - 1}"
        )
    chosen = slice(None) if layer is None else [layer]
    weights, by_gene = found.by_cell[chosen].mean(0, dtype=np.float64), found.by_gene[chosen].mean(0)
    share = found.tokens / found.tokens.sum(1, keepdims=True)
    group = np.zeros(len(weights), int) if labels is None else labels.codes[found.members[:, 0]]
    kind = np.full(found.members.shape, UNLABELLED, object)
    if labels is not None:
        names = np.array([*labels.classes, UNLABELLED], object)
        kind = np.where(found.members >= 0, names[labels.codes[found.members]], UNLABELLED)
    kind[:, 0] = ITSELF
    kinds = [ITSELF, *found.groups, UNLABELLED]
    cells, types, genes = [], [], []
    for code in np.flatnonzero(found.group_cells):
        of, name = group == code, found.groups[code]
        there = np.where(found.members[of] >= 0, found.distance[of], np.nan)
        ranks = np.flatnonzero((found.members[of] >= 0).any(0))
        cells.append(
            _rows(name, weights[of].mean(0)[ranks], share[of].mean(0)[ranks])
            .assign(rank=ranks, cells=(~np.isnan(there)).sum(0)[ranks])
            .assign(distance=np.nanmedian(there[:, ranks], axis=0))
        )
        per_kind = [[(x[of] * (kind[of] == k)).sum() / of.sum() for k in kinds] for x in (weights, share)]
        types.append(_rows(name, *map(np.array, per_kind)).assign(neighbour=kinds))
        for who, got, expected in zip(("own", "neighbours"), by_gene[code], found.gene_share[code]):
            genes.append(_rows(name, got, expected).assign(gene=found.genes, whose=who))
    tables = {"by_cell": cells, "by_gene": genes} | ({} if labels is None else {"by_type": types})
    whole = {name: pd.concat(parts) for name, parts in tables.items()}
    # What never occurs has nothing to be compared with.
    return {name: table[table["expected"] > 0].reset_index(drop=True) for name, table in whole.items()}


def _rows(centre: str, attention: Float[np.ndarray, " r"], expected: Float[np.ndarray, " r"]) -> pd.DataFrame:
    ratio = np.divide(attention, expected, out=np.full(len(expected), np.nan), where=expected > 0)
    return pd.DataFrame({"centre": centre, "attention": attention, "expected": expected, "ratio": ratio})


def explain_attention(
    adata: anndata.AnnData,
    model: TrainedModel,
    *,
    label: str | None = None,
    layer: int | None = None,
    key_added: str = "attention",
    missing: Sequence[str] = MISSING,
    progress: Callable[[int, int], None] = lambda done, total: None,
    **source: Any,
) -> None:
    """Add the tables of `attention_tables` to ``adata.uns``, in place.

    Adds ``uns["attention_by_cell"]``, ``uns["attention_by_gene"]`` and, with `label`,
    ``uns["attention_by_type"]``; `key_added` replaces the first word.

    Parameters
    ----------
    adata
        Raw counts, ``obsm["spatial"]``.
    model
        A trained run of the tissue model.
    label, missing
        Column of ``obs`` by whose classes centres and neighbours are told apart, and what counts as no class.
    layer
        As in `attention_tables`.
    source
        How to read `adata`: `species` and `technology`, and what else `Source` takes.

    Raises
    ------
    InputError
        As `centre_attention`, or cells that cannot be read.
    """
    with corpus_of(adata, model, **source) as corpus:
        labels = None
        if label is not None:
            of_rows = read_labels(adata, label, missing=missing, where="adata")
            labels = replace(of_rows, codes=of_rows.codes[corpus.column("source_row")])
        found = centre_attention(model, corpus, np.arange(corpus.n_cells), labels=labels, progress=progress)
        for name, table in attention_tables(found, labels=labels, layer=layer).items():
            adata.uns[f"{key_added}_{name}"] = table
