"""The embedding of a run as one serialised function, weights inside, for programs without this package."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import export
from jaxtyping import Array, Float, Int

from scfm_jax.data.batch import SentenceBatch, TissueBatch
from scfm_jax.downstream.embed import EmbeddingConfig, embed_batch, embed_sentences
from scfm_jax.downstream.model import TrainedModel, open_model
from scfm_jax.export.card import model_card
from scfm_jax.export.folder import CARD, write_beside
from scfm_jax.export.weights import FAMILIES, beside, new_path
from scfm_jax.models.functional import abstract, count_parameters
from scfm_jax.models.nicheformer import NicheformerConfig
from scfm_jax.training.task import model_builder

FUNCTION, INPUTS, GENES = "embed.stablehlo", "inputs.json", "vocabulary.json"
Shapes = dict[str, tuple[tuple[Any, ...], Any]]


def export_embedding(run: Path, folder: Path, *, licence: str = "unknown") -> int:
    """Write ``embed.stablehlo``, what it takes, the genes, and a model card.

    AIDO.Tissue: the function takes ``genes``, ``counts`` and ``cells`` (int32, batch x length: the tokens of
    a cell and its neighbours with two depth tokens a cell, as `SampleReader` makes them; ``cells`` is -1 at
    padding, on the right), ``totals`` (int32, batch x cells), ``offsets`` (float32, batch x cells x 2, um)
    and ``target_sum`` (float32, batch). Nicheformer: ``tokens``, ``positions`` and ``segments`` (int32, batch
    x length, as `RankReader` makes them from ``vocab.json``, ``scfm_jax.json`` and ``technology_means/``) and
    ``lengths`` (int32, batch). Both give float32, batch x width:
    the mean over the cell's genes. Batch and length are symbolic. It attends plainly: memory grows with the
    square of the length.

    Returns
    -------
    Parameters inside.
    """
    model = open_model(run)
    config, n_genes = model.config, len(model.vocabulary)
    plain = dataclasses.replace(config, model=dataclasses.replace(config.model, attention="plain"))
    graph, _, _ = abstract(model_builder(plain, n_genes))
    rows, length = export.symbolic_shape("b, s")
    ranks = isinstance(config.model, NicheformerConfig)
    embed, shapes = (_of_sentences if ranks else _of_tissue)(model, graph, rows, length)
    function = export.export(jax.jit(embed), platforms=("cpu", "cuda", "tpu"))(
        *(jax.ShapeDtypeStruct(*shape) for shape in shapes.values())
    )
    described = {
        name: {"shape": [str(size) for size in shape], "dtype": jnp.dtype(kind).name}
        for name, (shape, kind) in shapes.items()
    }
    inside = count_parameters(model.parameters)
    card = model_card(run, model.step, n_genes, licence, inside, model.hash, FAMILIES[type(config.model)])
    with new_path(folder) as scratch:
        scratch.mkdir()
        (scratch / FUNCTION).write_bytes(function.serialize())
        (scratch / INPUTS).write_text(json.dumps(described, indent=2) + "\n")
        model.vocabulary.save(scratch / GENES)
        if ranks:
            vocab, own, means = beside(run, config, model.vocabulary, None)
            write_beside(scratch, vocab=vocab, own=own, means=means)
        (scratch / CARD).write_text(card)
    return inside


def _of_tissue(
    model: TrainedModel, graph: nnx.GraphDef, rows: Any, length: Any
) -> tuple[Callable[..., Array], Shapes]:
    n_genes = len(model.vocabulary)
    _, sample, objective = model.config.tissue()
    cells = sample.neighbours + 1

    def embed(
        genes: Int[Array, "b s"],
        counts: Int[Array, "b s"],
        cell: Int[Array, "b s"],
        totals: Int[Array, "b c"],
        offsets: Float[Array, "b c 2"],
        target_sum: Float[Array, " b"],
    ) -> Float[Array, "b d"]:
        nothing = jnp.zeros((genes.shape[0], 1), jnp.int32) - 1
        number = jnp.zeros(genes.shape[0], jnp.uint32)
        batch = TissueBatch(
            genes=genes,
            counts=counts,
            cells=cell,
            slots=jnp.full_like(genes, -1),
            totals=totals,
            offsets=offsets,
            target_sum=target_sum,
            decoder_genes=nothing,
            decoder_counts=nothing,
            index=number,
            draw=number,
            weight=jnp.ones(genes.shape[0]),
        )
        return embed_batch(
            nnx.merge(graph, model.parameters),
            batch,
            objective,
            n_genes=n_genes,
            coordinates=model.coordinates,
            pooling="mean",
        )

    return embed, {
        "genes": ((rows, length), jnp.int32),
        "counts": ((rows, length), jnp.int32),
        "cells": ((rows, length), jnp.int32),
        "totals": ((rows, cells), jnp.int32),
        "offsets": ((rows, cells, 2), jnp.float32),
        "target_sum": ((rows,), jnp.float32),
    }


def _of_sentences(
    model: TrainedModel, graph: nnx.GraphDef, rows: Any, length: Any
) -> tuple[Callable[..., Array], Shapes]:
    _, sentence, _ = model.config.nicheformer()

    def embed(
        tokens: Int[Array, "b s"],
        positions: Int[Array, "b s"],
        segments: Int[Array, "b s"],
        lengths: Int[Array, " b"],
    ) -> Float[Array, "b d"]:
        number = jnp.zeros(tokens.shape[0], jnp.uint32)
        batch = SentenceBatch(
            tokens=tokens,
            positions=positions,
            segments=segments,
            lengths=lengths,
            places=jnp.zeros((tokens.shape[0], 1), jnp.int32) - 1,
            cut=jnp.zeros((tokens.shape[0], 2), jnp.int32),
            index=number,
            draw=number,
            weight=jnp.ones(tokens.shape[0]),
        )
        return embed_sentences(nnx.merge(graph, model.parameters), batch, EmbeddingConfig(), sentence.length)

    return embed, {
        "tokens": ((rows, length), jnp.int32),
        "positions": ((rows, length), jnp.int32),
        "segments": ((rows, length), jnp.int32),
        "lengths": ((rows,), jnp.int32),
    }
