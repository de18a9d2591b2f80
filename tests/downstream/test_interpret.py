"""Attention by cell and by gene: against NumPy, the block itself, and a model that attends to all alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import anndata
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from scfm_jax.corpus import Corpus
from scfm_jax.downstream.annotate import neighbours_of
from scfm_jax.downstream.interpret import (
    ITSELF,
    Attention,
    attention_tables,
    centre_attention,
    explain_attention,
)
from scfm_jax.downstream.labels import Labels
from scfm_jax.downstream.model import TrainedModel, open_model
from scfm_jax.errors import InputError
from scfm_jax.models.attention_weights import mean_attention
from scfm_jax.models.rotary import rotary_tables
from scfm_jax.models.stack import StackConfig
from scfm_jax.models.transformer import Transformer, TransformerConfig

LENGTHS = jnp.array([7, 4])


def stack(heads: int) -> Transformer:
    config = TransformerConfig(layers=3, heads=heads, width=8)
    return Transformer(config, init_std=0.5, compute=StackConfig(jnp.float32), rngs=nnx.Rngs(0))


def tokens(seed: int = 0) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(2, 7, 8)), jnp.float32), jnp.asarray(rng.uniform(0, 9, (2, 7, 2)))


def layer(transformer: Transformer, number: int) -> Any:
    graph, parameters = nnx.split(transformer.blocks)
    return nnx.merge(graph, jax.tree.map(lambda leaf: leaf[number], parameters))


def asker(transformer: Transformer) -> Callable[..., np.ndarray]:
    """(x, positions, asks) to `mean_attention`, compiled once."""
    return jax.jit(
        lambda x, positions, asks: mean_attention(
            transformer, x, positions, LENGTHS, asks, implementation="plain"
        )
    )


def test_the_first_layer_is_the_softmax_of_its_equation():
    transformer, (x, _) = stack(2), tokens()
    block, asks = layer(transformer, 0), np.array([[True, False, True], [False, True, False]])
    # At position 0 the rotation is none.
    got = asker(transformer)(x, jnp.zeros((2, 7, 2)), asks)
    y = np.asarray(x, np.float64)
    y = y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-5) * np.asarray(block.attention_norm.scale[...])
    query, key = (
        (y @ np.asarray(linear.kernel[...], np.float64) + np.asarray(linear.bias[...])).reshape(2, 7, 2, 4)
        for linear in (block.query, block.key)
    )
    for row, length in enumerate(LENGTHS.tolist()):
        expected = np.zeros(7)
        for head in range(2):
            for place in np.flatnonzero(asks[row]):
                score = np.exp(key[row, :length, head] @ query[row, place, head] / 2)
                expected[:length] += score / score.sum() / 2 / asks[row].sum()
        np.testing.assert_allclose(got[0, row], expected, atol=1e-6)


def test_values_mixed_by_the_weights_are_what_the_block_adds():
    transformer, (through, positions) = stack(1), tokens()
    # Without its feed-forward a block adds its attention alone.
    transformer.blocks.down.kernel[...] *= 0
    transformer.blocks.down.bias[...] *= 0
    tables = rotary_tables(positions, transformer.head_size)
    ask = asker(transformer)
    got = [ask(through, positions, np.eye(3, dtype=bool)[[n, n]]) for n in range(3)]
    for number in range(3):
        block = layer(transformer, number)
        values = block.value(block.attention_norm(through))
        after = block(through, tables, LENGTHS, "plain")
        for place in range(3):
            mixed = jnp.einsum("bs,bsd->bd", got[place][number], values)
            np.testing.assert_allclose(block.output(mixed), (after - through)[:, place], atol=1e-5)
        through = after


def test_without_positions_the_order_of_the_others_is_nothing():
    ask, (x, _) = asker(stack(2)), tokens()
    asks, order = np.ones((2, 2), bool), np.array([0, 1, 3, 2, 4, 6, 5])
    still = jnp.zeros((2, 7, 2))
    got = ask(x, still, asks)[:, :1]
    np.testing.assert_allclose(ask(x[:, order], still, asks)[:, :1], got[..., order], atol=1e-6)
    assert np.abs(got[..., order] - got).max() > 1e-3


@pytest.fixture(scope="module")
def model(finished) -> TrainedModel:
    return open_model(finished)


@pytest.fixture(scope="module")
def uniform(model: TrainedModel) -> TrainedModel:
    """The model with every query zero, which attends to all tokens alike."""
    parameters = jax.tree.map(lambda leaf: leaf, model.parameters)
    query = parameters["encoder"]["blocks"]["query"]
    parameters["encoder"]["blocks"]["query"] = {name: leaf * 0 for name, leaf in query.items()}
    return dataclasses.replace(model, parameters=parameters)


@pytest.fixture(scope="module")
def corpus(corpus_path) -> Corpus:
    return Corpus.open(corpus_path)


@pytest.fixture(scope="module")
def labels(corpus: Corpus) -> Labels:
    codes = np.random.default_rng(0).integers(-1, 2, corpus.n_cells)
    return Labels(codes, ["p", "q"], {}, int((codes < 0).sum()))


CELLS = np.random.default_rng(1).permutation(np.arange(160, 320))


def test_members_are_those_that_the_samples_hold(model, corpus):
    sample = dataclasses.replace(model.config.tissue()[1], skip_nearest=2)
    data = dataclasses.replace(model.config.data, sample=sample)
    later = dataclasses.replace(model, config=dataclasses.replace(model.config, data=data))
    found = centre_attention(later, corpus, CELLS[:8])
    np.testing.assert_array_equal(found.members[:, 1:], corpus.neighbours(CELLS[:8], 4)[:, 2:])
    places = np.stack([corpus.column("x"), corpus.column("y")], axis=1)[found.members]
    apart = np.linalg.norm(places - places[:, :1], axis=-1)
    np.testing.assert_allclose(found.distance, apart, rtol=1e-5)
    assert neighbours_of(later, None) == 2


@pytest.fixture(scope="module")
def found(model: TrainedModel, corpus: Corpus, labels: Labels) -> Attention:
    return centre_attention(model, corpus, CELLS, labels=labels)


def test_every_table_sums_to_one(found, corpus, labels):
    np.testing.assert_allclose(found.by_cell.sum(-1), 1, rtol=1e-5)
    assert found.by_cell.shape == (2, len(CELLS), 3)
    np.testing.assert_array_equal(found.members[:, 1:], corpus.neighbours(CELLS, 2))
    for where in (None, 0, -1):
        tables = attention_tables(found, labels=labels, layer=where)
        assert set(tables) == {"by_cell", "by_gene", "by_type"}
        for table in tables.values():
            sums = table.groupby("centre")[["attention", "expected"]].sum()
            assert set(sums.index) == {"p", "q"}
            np.testing.assert_allclose(sums, 1, rtol=1e-5)


def test_the_tables_are_the_same_attention(found, labels):
    tables = attention_tables(found, labels=labels, layer=1)
    for code, name in enumerate("pq"):
        of_class = {key: value[value["centre"] == name] for key, value in tables.items()}
        of = labels.codes[CELLS] == code
        by_cell = of_class["by_cell"].set_index("rank")
        np.testing.assert_allclose(by_cell["attention"], found.by_cell[1, of].mean(0), rtol=1e-5)
        assert (by_cell["cells"] == of.sum()).all()
        assert by_cell["distance"].is_monotonic_increasing and by_cell["distance"][0] == 0
        np.testing.assert_allclose(by_cell["distance"][2], np.median(found.distance[of, 2]), rtol=1e-6)
        whose = of_class["by_gene"].groupby("whose")["attention"].sum()
        np.testing.assert_allclose(whose["own"], by_cell["attention"][0], rtol=1e-5)
        by_type = of_class["by_type"].set_index("neighbour")["attention"]
        np.testing.assert_allclose(by_type[ITSELF], by_cell["attention"][0], rtol=1e-5)
        to_q = (labels.codes[found.members[of, 1:]] == 1) * found.by_cell[1, of, 1:]
        np.testing.assert_allclose(by_type["q"], to_q.sum() / of.sum(), rtol=1e-5)


def test_what_is_expected_is_the_share_of_tokens(found, corpus, labels):
    read = corpus.cells(found.members.ravel())
    sizes = np.diff(read.offsets).reshape(found.members.shape) + 2
    np.testing.assert_array_equal(found.tokens, sizes)
    tables = attention_tables(found, labels=labels)
    gene = int(np.bincount(read.genes).argmax())
    name = corpus.vocabulary.symbols[gene] or corpus.vocabulary.ids[gene]
    of = np.flatnonzero(labels.codes[CELLS] == 0)
    share = []
    for sample in of:
        near = corpus.cells(found.members[sample, 1:])
        share.append((near.genes == gene).sum() / sizes[sample].sum())
    rows = tables["by_gene"].set_index(["centre", "whose", "gene"])
    np.testing.assert_allclose(rows.loc[("p", "neighbours", name), "expected"], np.mean(share), rtol=1e-6)


def test_a_model_without_queries_attends_to_all_tokens_alike(uniform, found, corpus, labels):
    alike = centre_attention(uniform, corpus, CELLS, labels=labels)
    share = found.tokens / found.tokens.sum(1, keepdims=True)
    np.testing.assert_allclose(alike.by_cell, np.broadcast_to(share, alike.by_cell.shape), rtol=1e-5)
    for table in attention_tables(alike, labels=labels).values():
        np.testing.assert_allclose(table["ratio"], 1, rtol=1e-4)
    assert (attention_tables(found, labels=labels)["by_cell"]["ratio"] - 1).abs().max() > 1e-3


def test_neither_batch_nor_order_changes_it(model, corpus, found):
    data = dataclasses.replace(model.config.data, batch_size=3)
    small = dataclasses.replace(model, config=dataclasses.replace(model.config, data=data))
    again = centre_attention(small, corpus, CELLS[10::-1])
    np.testing.assert_allclose(again.by_cell[:, ::-1], found.by_cell[:, :11], rtol=1e-4, atol=1e-6)


def test_an_anndata_gets_the_tables_in_place(model, corpus_path, found, tmp_path):
    adata = anndata.read_h5ad(corpus_path.parent / "slide1.h5ad")
    settings: dict[str, Any] = {"species": "human", "technology": "simseq", "um_per_unit": 1.0}
    explain_attention(adata, model, label="cell_type", layer=-1, **settings)
    adata.write_h5ad(tmp_path / "out.h5ad")
    uns = anndata.read_h5ad(tmp_path / "out.h5ad").uns
    assert {"attention_by_cell", "attention_by_gene", "attention_by_type"} <= set(uns)
    assert set(uns["attention_by_cell"]["centre"]) == set(adata.obs["cell_type"])
    here = uns["attention_by_cell"].assign(of=lambda t: t["attention"] * t["cells"]).groupby("rank")
    np.testing.assert_allclose(here["of"].sum() / here["cells"].sum(), found.by_cell[-1].mean(0), rtol=1e-4)


def test_bad_input(model, corpus, found, run_with_niche):
    with pytest.raises(InputError, match="the encoder has 2; choose one from 0 to 1"):
        attention_tables(found, layer=2)
    none = Labels(np.full(corpus.n_cells, -1), ["p", "q"], {}, corpus.n_cells)
    with pytest.raises(InputError, match="no centre has a label"):
        centre_attention(model, corpus, CELLS, labels=none)
    with pytest.raises(InputError, match="no run of AIDO"):
        centre_attention(open_model(run_with_niche), corpus, CELLS)
    geometry = dataclasses.replace(model.config.model, attend_padding=True)
    padded = dataclasses.replace(model, config=dataclasses.replace(model.config, model=geometry))
    with pytest.raises(InputError, match="attends to padding"):
        centre_attention(padded, corpus, CELLS)
