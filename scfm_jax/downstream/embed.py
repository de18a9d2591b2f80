"""Embeddings of cells: AnnData in, AnnData out."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import anndata
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float32, Int64

from scfm_jax import __version__
from scfm_jax.corpus import Corpus, Source, build_corpus
from scfm_jax.data.batch import SentenceBatch, TissueBatch
from scfm_jax.downstream.model import TrainedModel
from scfm_jax.downstream.outputs import check_new, written_whole
from scfm_jax.errors import InputError
from scfm_jax.models.functional import Parameters
from scfm_jax.models.heads import Pooling, pooled
from scfm_jax.models.nicheformer import Nicheformer, NicheformerConfig
from scfm_jax.models.tissue import TissueConfig, TissueModel
from scfm_jax.objectives.column_masking import ColumnMaskingConfig, encode, visible_tokens
from scfm_jax.objectives.masked_genes import MaskedGenesConfig
from scfm_jax.reserved_tokens import FIRST_GENE, PAD

PoolOver = Literal["genes", "context", "padding"]
KEYS: dict[type, str] = {TissueConfig: "X_tissue", NicheformerConfig: "X_nicheformer"}


@dataclass(frozen=True)
class EmbeddingConfig:
    """How hidden states become a cell's embedding.

    Attributes
    ----------
    pooling
        Mean or maximum over the tokens.
    over
        Tokens of the cell itself: its genes; with Nicheformer also its ``context`` tokens, or its genes and,
        as released, ``padding`` up to the longest sentence.
    layer
        Of Nicheformer's hidden states, counted from 0, or from the end as -1, -2, ...; the last if not given.
    """

    pooling: Pooling = "mean"
    over: PoolOver = "genes"
    layer: int | None = None


@dataclass(frozen=True)
class CellStates:
    """(parameters, batch) to the hidden states of its tokens, float32, and which are the cell's own (1 or 0).

    Equal ones compute the same, so that what is compiled of one serves another, with other weights.

    Attributes
    ----------
    graph
        Made by `model`, `objective` and `n_genes`.
    longest
        Of Nicheformer, the longest sentence.
    config
        Which tokens and which layer.
    """

    graph: nnx.GraphDef = field(compare=False)
    model: TissueConfig | NicheformerConfig
    objective: ColumnMaskingConfig | MaskedGenesConfig
    n_genes: int
    longest: int
    config: EmbeddingConfig

    @classmethod
    def of(cls, model: TrainedModel, config: EmbeddingConfig = EmbeddingConfig()) -> Self:
        """Those of a trained run.

        Raises
        ------
        InputError
            A choice that the model's family does not have.
        """
        run, longest = model.config, 0
        if isinstance(run.model, NicheformerConfig):
            _, sentence, _ = run.nicheformer()
            longest = sentence.length
            if config.layer is not None and not -run.model.layers <= config.layer < run.model.layers:
                raise InputError(
                    "hidden-layer",
                    f"{run.name} has no layer {config.layer}",
                    f"choose one from 0 to {run.model.layers - 1}, or from the end, -1 the last",
                )
            if config.over == "padding" and sentence.niche_neighbours:
                raise InputError(
                    run.name, "reads niches, which the released code's pooling lacks", "pool over genes"
                )
        elif config.over != "genes" or config.layer is not None:
            raise InputError(
                run.name, "pools the last layer over genes alone", "leave --over and --hidden-layer out"
            )
        return cls(model.graph, run.model, run.objective, len(model.vocabulary), longest, config)

    def __call__(
        self, parameters: Parameters, batch: Any
    ) -> tuple[Float32[jax.Array, "b s d"], Float32[jax.Array, "b s"]]:
        module = nnx.merge(self.graph, parameters)
        if isinstance(self.model, TissueConfig):
            assert isinstance(self.objective, ColumnMaskingConfig)
            coordinates = self.model.positions == "coordinates"
            return tissue_states(module, batch, self.objective, n_genes=self.n_genes, coordinates=coordinates)
        return sentence_states(module, batch, self.config, self.longest)


def tissue_states(
    module: TissueModel,
    batch: TissueBatch,
    objective: ColumnMaskingConfig,
    *,
    n_genes: int,
    coordinates: bool,
) -> tuple[Float32[jax.Array, "b s d"], Float32[jax.Array, "b s"]]:
    """Hidden states of a batch, unmasked, and which are of the centre's genes: not its depth tokens."""
    tokens = visible_tokens(batch, None, objective, n_genes)
    hidden = encode(module, batch, tokens, coordinates)
    centre = (tokens.cells == 0) & (tokens.genes < n_genes)
    return hidden.astype(jnp.float32), centre.astype(jnp.float32)


def sentence_states(
    module: Nicheformer, batch: SentenceBatch, config: EmbeddingConfig, length: int
) -> tuple[Float32[jax.Array, "b s d"], Float32[jax.Array, "b s"]]:
    """Hidden states of a batch of Nicheformer, unmasked, and which are pooled over; `length` is the longest
    sentence's."""
    tokens, positions, segments = batch.tokens, batch.positions, batch.segments
    if config.over == "padding":
        tokens = jnp.pad(tokens, ((0, 0), (0, length - tokens.shape[1])), constant_values=PAD)
        positions, segments = jnp.broadcast_to(jnp.arange(length), tokens.shape), jnp.zeros_like(tokens)
    real = jnp.arange(tokens.shape[1]) < batch.lengths[:, None]
    chosen = {
        "genes": real & (segments == 0) & (tokens >= FIRST_GENE),
        "context": real & (segments == 0),
        "padding": (tokens >= FIRST_GENE) | (tokens == PAD),
    }[config.over]
    hidden = module.encode(tokens, positions, segments, batch.lengths, layer=config.layer)
    return hidden.astype(jnp.float32), chosen.astype(jnp.float32)


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
    states = tissue_states(module, batch, objective, n_genes=n_genes, coordinates=coordinates)
    return pooled(*states, pooling)


def embed_sentences(
    module: Nicheformer, batch: SentenceBatch, config: EmbeddingConfig, length: int
) -> Float32[jax.Array, "b d"]:
    """Embeddings of the cells of a batch of Nicheformer, unmasked; `length` is the longest sentence's."""
    return pooled(*sentence_states(module, batch, config, length), config.pooling)


def embed_cells(
    model: TrainedModel,
    corpus: Corpus,
    cells: Int64[np.ndarray, " n"],
    *,
    config: EmbeddingConfig = EmbeddingConfig(),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Float32[np.ndarray, "n d"]:
    """Embeddings of cells of a corpus, pooled from `CellStates`.

    Parameters
    ----------
    model
        A trained run.
    corpus
        With the model's vocabulary.
    cells
        Cell numbers.
    config
        How hidden states become embeddings.
    progress
        Called with the number of cells done and in all.

    Raises
    ------
    InputError
        A choice that the model's family does not have.
    """
    embed = _compiled(CellStates.of(model, config))
    embedded = np.empty((len(cells), model.width), np.float32)
    done = 0
    for rows, batch in model.batches(corpus, cells, rates=None):
        embedded[rows] = np.asarray(embed(model.parameters, batch))[: len(rows)]
        done += len(rows)
        progress(done, len(cells))
    return embedded


@functools.lru_cache(maxsize=16)
def _compiled(states: CellStates) -> Callable[[Parameters, Any], jax.Array]:
    return jax.jit(lambda parameters, batch: pooled(*states(parameters, batch), states.config.pooling))


def _normalisation(model: TrainedModel) -> dict[str, Any]:
    """What counts became before the model saw them."""
    if isinstance(model.config.model, NicheformerConfig):
        return {"technology_means": model.config.nicheformer()[1].means}
    _, _, objective = model.config.tissue()
    return {"normalise": objective.normalise, "target_sum": objective.target_sum}


def embed_file(
    model: TrainedModel,
    source: Source,
    out: Path,
    *,
    config: EmbeddingConfig = EmbeddingConfig(),
    key_added: str | None = None,
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
    config
        How hidden states become embeddings.
    key_added
        ``X_tissue`` or ``X_nicheformer``, by the model's family, if not given.
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
    key_added = key_added or KEYS[type(model.config.model)]
    check_new(out)
    if "/" in key_added or key_added == source.coordinates:
        raise InputError(out, f"cannot keep an embedding as obsm[{key_added!r}]", "give another --key-added")
    if Path(source.path).exists() and Path(source.path).suffix != ".h5ad":
        raise InputError(source.path, "embeddings go into a copy of an .h5ad file", "write it as .h5ad first")
    with tempfile.TemporaryDirectory() as scratch:
        report = build_corpus(
            Path(scratch) / "corpus",
            [source],
            vocabulary=model.vocabulary,
            n_neighbours=max(model.config.data.sample.stored_neighbours, 1),
            **alignment,
        )
        corpus = Corpus.open(Path(scratch) / "corpus")
        try:
            embedded = embed_cells(model, corpus, np.arange(corpus.n_cells), config=config, progress=progress)
        except InputError as error:
            if error.where != corpus.path:
                raise
            raise InputError(source.path, error.problem, error.mend) from error
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
        **{name: value for name, value in asdict(config).items() if value is not None},
        "neighbours": model.neighbours,
        "dtype": model.config.model.dtype,
        **_normalisation(model),
        "source": {name: value for name, value in asdict(source).items() if value is not None},
        "cells_embedded": len(rows),
        "cells_without_counts": adata.n_obs - len(rows),
        "scfm_jax": __version__,
    }
    adata.uns[key_added] = {**record, "source": str(record["source"])}
    with written_whole(out) as partial:
        adata.write_h5ad(partial)
    return {**record, "key": key_added, "build": report}
