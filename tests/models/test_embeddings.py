from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from plain_transformer import embed_value

from scfm_jax.models.embeddings import GeneEmbedding, ValueEmbedding, padded_size
from scfm_jax.models.functional import initialise

VALUES = np.array([[0.0, 0.4, 5.0], [2.0, 7.5, 20.0]])


def value_embedding(rngs: nnx.Rngs) -> ValueEmbedding:
    return ValueEmbedding(12, 8, init="published", init_std=0.02, rngs=rngs)


def test_values_against_numpy(randomised: Callable[..., Any]) -> None:
    graph, parameters = randomised(value_embedding)
    masked = np.array([[True, False, False], [False, False, True]])
    padding = np.array([[False, False, True], [False, False, False]])
    mine = nnx.merge(graph, parameters)(
        jnp.asarray(VALUES), masked=jnp.asarray(masked), padding=jnp.asarray(padding), dtype=jnp.float32
    )
    stated = embed_value(VALUES, parameters)
    stated[masked], stated[padding] = parameters["mask"], parameters["pad"]
    np.testing.assert_allclose(mine, stated, atol=1e-5)
    unmasked = nnx.merge(graph, parameters)(jnp.asarray(VALUES), dtype=jnp.float32)
    np.testing.assert_allclose(unmasked, embed_value(VALUES, parameters), atol=1e-5)


def test_values_are_read_in_float32_under_bfloat16(randomised: Callable[..., Any]) -> None:
    graph, parameters = randomised(value_embedding)
    # hidden = 300 scale (value - 1): bins that part values which differ by a thousandth.
    parameters["scale"] = 300 * parameters["scale"]
    parameters["shift"] = -parameters["scale"][0]
    near = np.array([[1.001, 1.003]])  # both are 1.0 in bfloat16
    mine = nnx.merge(graph, parameters)(jnp.asarray(near, jnp.float32), dtype=jnp.bfloat16)
    assert mine.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(mine, float), embed_value(near, parameters), atol=1e-2)
    rounded = np.asarray(jnp.asarray(near, jnp.bfloat16), float)
    assert np.abs(embed_value(rounded, parameters) - embed_value(near, parameters)).max() > 2e-2


@pytest.mark.parametrize(("init", "spread"), [("published", False), ("spread", True)])
def test_what_a_fresh_embedding_tells_apart(init: Any, spread: bool) -> None:
    @jax.jit
    def embed() -> jax.Array:
        fresh = ValueEmbedding(100, 16, init=init, init_std=0.02, rngs=nnx.Rngs(0))
        return fresh(jnp.asarray(VALUES), dtype=jnp.float32).reshape(-1, 16)

    embedded = np.asarray(embed())
    between = embedded.std(0).mean() / np.abs(embedded).mean()
    assert (between > 0.1) == spread


def test_published_weights_start_normal_with_zero_biases() -> None:
    build = lambda rngs: ValueEmbedding(100, 64, init="published", init_std=0.02, rngs=rngs)  # noqa: E731
    parameters = jax.jit(lambda: initialise(build, jax.random.key(0)))()
    assert not np.any(parameters["shift"]) and not np.any(parameters["mix_bias"])
    for name in ("mix", "table", "mask", "pad", "scale"):
        assert np.std(parameters[name]) == pytest.approx(0.02, rel=0.35)


@pytest.mark.parametrize("n_genes", [1, 128, 129, 19_266])
def test_gene_table_is_padded_to_128(n_genes: int) -> None:
    rows = padded_size(n_genes)
    assert rows % 128 == 0 and 0 <= rows - n_genes < 128
    table = GeneEmbedding(n_genes, 4, init_std=0.02, rngs=nnx.Rngs(0)).table
    assert table.shape == (rows, 4)


def test_genes_are_rows_of_the_table() -> None:
    embedding = GeneEmbedding(10, 4, init_std=0.02, rngs=nnx.Rngs(0))
    genes = np.array([[0, 9, 3]])
    np.testing.assert_array_equal(
        embedding(jnp.asarray(genes), jnp.float32), np.asarray(embedding.table[...])[genes]
    )
    assert embedding(jnp.asarray(genes), jnp.bfloat16).dtype == jnp.bfloat16
    assert embedding.table[...].dtype == jnp.float32
