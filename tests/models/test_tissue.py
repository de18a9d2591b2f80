from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from plain_transformer import embed_value, linear, normalise, transform

from experiments import tissue_3m, tissue_60m
from scfm_jax.models.functional import abstract, count_parameters
from scfm_jax.models.tissue import TissueConfig, TissueModel
from scfm_jax.models.transformer import TransformerConfig
from scfm_jax.training.task import model_builder

N_GENES = 10
CONFIG = TissueConfig(
    encoder=TransformerConfig(layers=2, heads=2, width=16),
    decoder=TransformerConfig(layers=1, heads=1, width=8),
    bins=6,
    gene_bias=True,
)


def build(rngs: nnx.Rngs) -> TissueModel:
    return TissueModel(CONFIG, N_GENES, rngs=rngs)


def test_encode_is_value_plus_gene_through_the_encoder(randomised: Callable[..., Any]) -> None:
    graph, parameters = randomised(build, std=0.3)
    genes, lengths = np.array([[3, 7, 11, 0]]), np.array([3])
    values, positions = np.array([[1.5, 0.2, 2.3, 0.0]]), np.array([[[3, 0], [7, 1], [11, 1], [0, 0]]], float)
    mine = nnx.merge(graph, parameters).encode(*(jnp.asarray(x) for x in (genes, values, positions, lengths)))
    x = embed_value(values, parameters["value_embedding"]) + parameters["gene_embedding"]["table"][genes]
    stated = transform(x, parameters["encoder"], positions, lengths, 2)
    np.testing.assert_allclose(mine[:, :3], stated[:, :3], atol=2e-5)


def test_decode_wiring(randomised: Callable[..., Any]) -> None:
    """Encoder outputs where expressed, mask vectors where masked, the value 0 elsewhere, genes added."""
    graph, parameters = randomised(build, std=0.3)
    rng = np.random.default_rng(3)
    hidden = rng.normal(size=(2, 5, 16))
    genes = np.array([[1, 4, 5, 8, 10, 11], [0, 2, 9, 10, 11, 0]])
    # Centre tokens in any order, between tokens that are not the centre's.
    slots = np.array([[3, -1, 0, -1, 4], [-1, 4, 2, 3, -1]])
    masked = np.array([[0, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]], bool)
    lengths = np.array([6, 5])
    positions = np.stack([genes, np.zeros_like(genes)], -1).astype(float)

    value, table = parameters["value_embedding"], parameters["gene_embedding"]["table"]
    x = np.empty((2, 6, 16))
    for row in range(2):
        for place in range(6):
            if masked[row, place]:
                content = value["mask"]
            elif place in slots[row]:
                content = hidden[row, list(slots[row]).index(place)]
            else:
                content = embed_value(np.zeros(1), value)[0]
            x[row, place] = content + table[genes[row, place]]
    x = transform(linear(x, parameters["decoder_embed"]), parameters["decoder"], positions, lengths, 1)
    stated = (
        linear(normalise(x, parameters["decoder_norm"]), parameters["head"])[..., 0]
        + parameters["gene_bias"][genes]
    )

    mine = jax.jit(lambda p, *given: nnx.merge(graph, p).decode(*given))(
        parameters,
        *(jnp.asarray(x) for x in (hidden.astype(np.float32), slots, genes, masked, positions, lengths)),
    )
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(mine[row, :length], stated[row, :length], atol=2e-5)


def test_bfloat16_computes_activations_and_keeps_parameters_and_predictions_in_float32() -> None:
    config = TissueConfig(encoder=CONFIG.encoder, decoder=CONFIG.decoder, bins=6, dtype="bfloat16")
    graph, parameters, _ = abstract(lambda rngs: TissueModel(config, N_GENES, rngs=rngs))
    tokens, positions, lengths = jnp.asarray([[1, 2]]), jnp.zeros((1, 2, 2)), jnp.asarray([2])

    def run(parameters: Any) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(graph, parameters)
        hidden = model.encode(tokens, jnp.ones((1, 2)), positions, lengths)
        return hidden, model.decode(hidden, jnp.asarray([[0, 1]]), tokens, tokens < 0, positions, lengths)

    hidden, predicted = jax.eval_shape(run, parameters)
    assert (hidden.dtype, predicted.dtype) == (jnp.bfloat16, jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(parameters)} == {jnp.dtype(jnp.float32)}


def test_optional_parameters_are_there_only_where_asked() -> None:
    plain = TissueConfig(encoder=CONFIG.encoder, decoder=CONFIG.decoder, bins=6)
    _, few, _ = abstract(lambda rngs: TissueModel(plain, N_GENES, rngs=rngs))
    _, asked, _ = abstract(lambda rngs: TissueModel(CONFIG, N_GENES, dispersion=True, rngs=rngs))
    assert asked.keys() - few.keys() == {"gene_bias", "log_dispersion"}
    assert asked["gene_bias"].shape == asked["log_dispersion"].shape == (128,)


@pytest.mark.parametrize(
    ("recipe", "encoder_side", "whole"),
    [(tissue_3m, 3_294_332, 3_709_789), (tissue_60m, 47_832_700, 60_721_981)],
    ids=["3m", "60m"],
)
def test_parameters_of_the_published_sizes(recipe: Any, encoder_side: int, whole: int) -> None:
    """19,264 genes, feed-forward of 8/3 of the width (ours); the table's padding rows count."""
    _, shapes, _ = abstract(model_builder(recipe.recipe(), 19_264))
    published = {name: shapes[name] for name in ("gene_embedding", "value_embedding", "encoder")}
    assert (count_parameters(published), count_parameters(shapes)) == (encoder_side, whole)
