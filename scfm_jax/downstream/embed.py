"""Embeddings of cells: AnnData in, AnnData out."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import anndata
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float32, Int64

from scfm_jax import __version__
from scfm_jax.corpus import Corpus, Source, build_corpus
from scfm_jax.data.batch import TissueBatch
from scfm_jax.downstream.model import TrainedModel, pooled
from scfm_jax.errors import InputError
from scfm_jax.models.tissue import TissueModel
from scfm_jax.objectives.column_masking import ColumnMaskingConfig, encode, visible_tokens

Pooling = Literal["mean", "max"]


def embed_batch(
    module: TissueModel,
    batch: TissueBatch,
    objective: ColumnMaskingConfig,
    *,
    n_genes: int,
    coordinates: bool,
    pooling: Pooling,
) -> Float32[jax.Array, "b d"]:
    """Embeddings of the centres of a batch: their gene tokens pooled, unmasked, without depth tokens."""
    tokens = visible_tokens(batch, None, objective, n_genes)
    hidden = encode(module, batch, tokens, coordinates)
    centre = (tokens.cells == 0) & (tokens.genes < n_genes)
    return pooled(hidden.astype(jnp.float32), centre.astype(jnp.float32), pooling)


def embed_cells(
    model: TrainedModel,
    corpus: Corpus,
    cells: Int64[np.ndarray, " n"],
    *,
    pooling: Pooling = "mean",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Float32[np.ndarray, "n d"]:
    """Embeddings of cells of a corpus, as `embed_batch` makes them.

    Parameters
    ----------
    model
        A trained run.
    corpus
        With the model's vocabulary.
    cells
        Cell numbers.
    pooling
        Over the centre's gene tokens.
    progress
        Called with the number of cells done and in all.
    """

    @jax.jit
    def run(parameters: Any, batch: TissueBatch) -> jax.Array:
        return embed_batch(
            nnx.merge(model.graph, parameters),
            batch,
            model.config.objective,
            n_genes=len(model.vocabulary),
            coordinates=model.coordinates,
            pooling=pooling,
        )

    embedded = np.empty((len(cells), model.config.model.encoder.width), np.float32)
    done = 0
    for rows, batch in model.batches(corpus, cells, rates=None):
        embedded[rows] = np.asarray(run(model.parameters, batch))[: len(rows)]
        done += len(rows)
        progress(done, len(cells))
    return embedded


def embed_file(
    model: TrainedModel,
    source: Source,
    out: Path,
    *,
    pooling: Pooling = "mean",
    key_added: str = "X_tissue",
    progress: Callable[[int, int], None] = lambda done, total: None,
    **alignment: Any,
) -> dict[str, Any]:
    """Copy an h5ad file with the embedding of every cell in ``obsm[key_added]``, in the file's own order.

    What was used stands in ``uns[key_added]``. Cells without a count of a known gene get NaN. A cell's
    embedding depends on its own tissue only (its section gives its neighbours and the median depth), not on
    the other sections, on batches, or on the order of rows.

    Parameters
    ----------
    model
        A trained run.
    source
        The file and how to read it.
    out
        A new file.
    alignment
        `gene_names`, `aliases`, `orthologs` of `build_corpus`.

    Returns
    -------
    What was written to ``uns``, with the report on genes.

    Raises
    ------
    InputError
        Bad input, or an existing output.
    """
    if out.exists():
        raise InputError(out, "exists already", "name another output or remove it")
    if not out.parent.is_dir():
        raise InputError(out, "its folder does not exist", "make it first")
    with tempfile.TemporaryDirectory() as scratch:
        report = build_corpus(
            Path(scratch) / "corpus",
            [source],
            vocabulary=model.vocabulary,
            n_neighbours=max(model.config.data.sample.neighbours, 1),
            **alignment,
        )
        corpus = Corpus.open(Path(scratch) / "corpus")
        embedded = embed_cells(model, corpus, np.arange(corpus.n_cells), pooling=pooling, progress=progress)
        rows = corpus.column("source_row")
    adata = anndata.read_h5ad(source.path)
    everywhere = np.full((adata.n_obs, embedded.shape[1]), np.nan, np.float32)
    everywhere[rows] = embedded
    adata.obsm[key_added] = everywhere
    record = {
        "model": model.config.name,
        "model_hash": model.hash,
        "step": model.step,
        "vocabulary_hash": model.vocabulary.hash,
        "pooling": pooling,
        "neighbours": model.config.data.sample.neighbours,
        "normalise": model.config.objective.normalise,
        "target_sum": model.config.objective.target_sum,
        "source": {name: value for name, value in asdict(source).items() if value is not None},
        "cells_embedded": len(rows),
        "cells_without_counts": adata.n_obs - len(rows),
        "scfm_jax": __version__,
    }
    adata.uns[key_added] = {**record, "source": str(record["source"])}
    partial = out.with_name(out.name + ".partial")
    try:
        adata.write_h5ad(partial)
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    return {**record, "build": report}
