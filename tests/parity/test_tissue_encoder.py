"""The encoder of AIDO.Tissue against the authors' own, from the same weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import GEOMETRIES, Geometry, authors
from flax import nnx

from scfm_jax.export.tissue import from_published, tissue_config, to_published
from scfm_jax.models.functional import abstract
from scfm_jax.models.rotary import rotary_tables
from scfm_jax.models.tissue import TissueModel

LENGTH, ROWS = 64, 2  # the authors' kernel wants a multiple of 16


def relative(mine: Any, theirs: Any) -> float:
    """Norm of the difference over the norm."""
    stated = theirs.detach().numpy() if isinstance(theirs, torch.Tensor) else np.asarray(theirs)
    return float(np.linalg.norm(np.asarray(mine) - stated) / np.linalg.norm(stated))


def inputs(geometry: Geometry, seed: int = 0) -> dict[str, np.ndarray]:
    """Rows without padding: distinct genes in each cell, depth tokens at its end."""
    random, cells = np.random.default_rng(seed), 4
    per_cell = LENGTH // cells
    genes = np.empty((ROWS, LENGTH), np.int64)
    for row in range(ROWS):
        for cell in range(cells):
            own = np.sort(random.choice(geometry.genes, per_cell - 2, replace=False))
            depth = [geometry.genes, geometry.genes + 1]
            genes[row, cell * per_cell : (cell + 1) * per_cell] = [*own, *depth]
    values = random.uniform(0.05, 6, genes.shape).astype(np.float32)
    number = np.broadcast_to(np.repeat(np.arange(cells), per_cell), genes.shape)
    return {"genes": genes, "values": values, "cells": number}


def ours(geometry: Geometry, theirs: torch.nn.Module, **changes: Any) -> tuple[Any, Any]:
    """Graph and parameters: the authors' on the encoder's side, zeros in the decoder."""
    config, n_genes = tissue_config(geometry.config().to_dict(), 1, "config.json")
    config = replace(config, attention="plain", **changes)
    assert n_genes == geometry.genes
    graph, shapes, _ = abstract(lambda rngs: TissueModel(config, n_genes, rngs=rngs))
    tensors = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    published = from_published(tensors, config)
    parameters = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    for name, tree in published.items():
        assert jax.tree.map(jnp.shape, tree) == jax.tree.map(jnp.shape, parameters[name])
    return graph, {**parameters, **jax.tree.map(jnp.asarray, published)}


def run_theirs(model: torch.nn.Module, values: np.ndarray, positions: np.ndarray) -> Any:
    return model(
        input_ids=torch.as_tensor(values),
        position_ids=torch.as_tensor(positions.transpose(0, 2, 1).copy()),
        output_hidden_states=True,
    )


def test_hidden_states_of_every_layer(geometry: Geometry) -> None:
    theirs, given = geometry.build(), inputs(geometry)
    positions = np.stack([given["genes"], given["cells"]], -1)
    with torch.no_grad():
        said = run_theirs(theirs, given["values"], positions)
    graph, parameters = ours(geometry, theirs)
    lengths, turned = np.full(ROWS, LENGTH), positions.astype(np.float32)

    @jax.jit
    def run(parameters: Any) -> tuple[Any, Any, Any]:
        model = nnx.merge(graph, parameters)
        embedded = model.embed(given["genes"], given["values"], lengths)
        _, layers = model.encoder.layers(embedded, turned, lengths, implementation="plain", keep=True)
        return embedded, layers, model.encode(given["genes"], given["values"], turned, lengths)

    embedded, layers, final = run(parameters)
    assert len(said.hidden_states) == geometry.layers + 1
    assert relative(embedded, said.hidden_states[0]) < 1e-5
    for layer in range(geometry.layers - 1):  # the last of theirs is normed
        assert relative(layers[layer], said.hidden_states[layer + 1]) < 1e-5, layer
    assert relative(final, said.last_hidden_state) < 1e-5


def test_gradient_of_every_parameter(geometry: Geometry) -> None:
    theirs, given = geometry.build(1), inputs(geometry, 1)
    positions = np.stack([given["genes"], given["cells"]], -1)
    upstream = np.random.default_rng(2).normal(size=(ROWS, LENGTH, geometry.width)).astype(np.float32)
    said = run_theirs(theirs, given["values"], positions).last_hidden_state
    (said * torch.as_tensor(upstream)).sum().backward()
    graph, parameters = ours(geometry, theirs)

    @jax.jit
    @jax.grad
    def gradient(parameters: Any) -> Any:
        final = nnx.merge(graph, parameters).encode(
            given["genes"], given["values"], positions.astype(np.float32), np.full(ROWS, LENGTH)
        )
        return (final * upstream).sum()

    config, n_genes = tissue_config(geometry.config().to_dict(), 1, "config.json")
    mine = to_published(gradient(parameters), config, n_genes)
    expected = {
        name: np.zeros(parameter.shape) if parameter.grad is None else parameter.grad.numpy()
        for name, parameter in theirs.named_parameters()
    }
    whole = np.sqrt(sum((x.astype(np.float64) ** 2).sum() for x in expected.values()))
    assert {name for name in mine if not name.endswith("inv_freq")} == set(expected)
    for name, stated in expected.items():
        size = max(np.linalg.norm(stated), 1e-6 * whole)
        assert np.linalg.norm(mine[name] - stated) / size < 1e-4, name


def test_rotary_of_both_halves() -> None:
    """Cosines and sines of the gene axis and of the cell axis, as their module caches them."""
    size, longest = 64, 19_266
    rotary = authors("cellspatialfoundation.positional_embeddings").RotaryEmbedding(
        size // 2, base=10_000, precision=torch.bfloat16
    )
    stated = [table[:, 0].numpy() for table in rotary(torch.zeros(1), seq_len=longest)]
    positions = np.stack([np.arange(longest), np.arange(longest)[::-1]], -1)[None].astype(np.float32)
    for mine, table in zip(rotary_tables(positions, size), stated, strict=True):
        np.testing.assert_allclose(mine[0, :, 0, : size // 2], table, atol=2e-7)
        np.testing.assert_allclose(mine[0, :, 0, size // 2 :], table[::-1], atol=2e-7)


def test_value_embedding_with_mask_and_pad(geometry: Geometry) -> None:
    theirs = geometry.build(3)
    values = np.random.default_rng(3).uniform(0, 8, (3, 16)).astype(np.float32)
    masked, padding = np.zeros((2, 3, 16), bool)
    masked[0, 3:6], padding[1, 10:] = True, True
    marked = np.where(masked, -1, np.where(padding, -2, values)).astype(np.float32)
    with torch.no_grad():
        stated = theirs.gene_embedding(torch.as_tensor(marked)[..., None])
    graph, parameters = ours(geometry, theirs)
    embed = nnx.merge(graph, parameters).value_embedding
    assert relative(embed(values, masked=masked, padding=padding, dtype=jnp.float32), stated) < 1e-5


@pytest.mark.parametrize("axis", ["x", "y"])
def test_coordinates(axis: str) -> None:
    """Coordinate mode turns by x and y; the authors look the gene table up at x, so x are the genes here."""
    geometry = Geometry("xy", layers=2, heads=2, width=32, hidden=88, bins=10)
    theirs, given = geometry.build(4), inputs(geometry, 4)
    y = np.random.default_rng(5).integers(0, 300, given["genes"].shape)
    positions = np.stack([given["genes"], y if axis == "y" else np.zeros_like(y)], -1)
    with torch.no_grad():
        said = run_theirs(theirs, given["values"], positions).last_hidden_state
    graph, parameters = ours(geometry, theirs)
    final = nnx.merge(graph, parameters).encode(
        given["genes"], given["values"], positions.astype(np.float32), np.full(ROWS, LENGTH)
    )
    assert relative(final, said) < 1e-5


@pytest.mark.parametrize("geometry", GEOMETRIES[:1], ids=["3m"])
def test_padding_that_is_seen(geometry: Geometry) -> None:
    """Under `attend_padding`, padding is a key of logit 0 with a value of its own, as in the authors' code.

    Their code knows padding by the position 19,266, whatever the vocabulary.
    """
    theirs, given = geometry.build(6), inputs(geometry, 6)
    lengths = np.array([LENGTH, LENGTH - 20])
    padding = np.arange(LENGTH) >= lengths[:, None]
    marked = np.stack([np.where(padding, 19_266, given[name]) for name in ("genes", "cells")], -1)
    with torch.no_grad():
        said = run_theirs(theirs, np.where(padding, -2, given["values"]).astype(np.float32), marked)
    graph, parameters = ours(geometry, theirs, attend_padding=True)
    positions = np.stack([given["genes"], given["cells"]], -1).astype(np.float32)
    final = nnx.merge(graph, parameters).encode(given["genes"], given["values"], positions, lengths)
    for row, length in enumerate(lengths):
        assert relative(final[row, :length], said.last_hidden_state[row, :length]) < 1e-5
