"""LoRA against the two-path form stated in NumPy: W x and, beside it, the low-rank path."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import plain_transformer
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict

from experiments import nicheformer_49m
from scfm_jax.errors import InputError
from scfm_jax.models.functional import abstract, count_parameters
from scfm_jax.models.heads import HeadConfig, init_head
from scfm_jax.models.lora import LoraConfig, adapted, encoding, init_adapters
from scfm_jax.models.nicheformer import Nicheformer, NicheformerConfig
from scfm_jax.models.tissue import TissueConfig, TissueModel
from scfm_jax.models.transformer import TransformerConfig
from scfm_jax.training.task import model_builder

TISSUE = TissueConfig(
    encoder=TransformerConfig(layers=2, heads=2, width=16),
    decoder=TransformerConfig(layers=1, heads=1, width=8),
    bins=6,
    gene_bias=True,
)
SENTENCES = NicheformerConfig(layers=2, heads=2, width=16, hidden=24, positions=5)
CONFIG = LoraConfig(rank=3, alpha=6.0)
GENES, LENGTHS = np.array([[3, 7, 11, 0], [1, 2, 0, 0]]), np.array([3, 2])


def tissue(rngs: nnx.Rngs) -> TissueModel:
    return TissueModel(TISSUE, 10, dispersion=True, rngs=rngs)


def nicheformer(rngs: nnx.Rngs) -> Nicheformer:
    return Nicheformer(SENTENCES, 10, rngs=rngs)


@partial(jax.jit, static_argnums=0)
def hidden(graph: Any, parameters: Any) -> Any:
    """Hidden states of the real tokens of two short rows, of either family."""
    model = nnx.merge(graph, parameters)
    lengths, nothing = jnp.asarray(LENGTHS), jnp.zeros(GENES.shape, jnp.int32)
    if isinstance(model, TissueModel):
        positions = jnp.stack([jnp.asarray(GENES), nothing], -1).astype(jnp.float32)
        states = model.encode(jnp.asarray(GENES), jnp.asarray(GENES) / 5, positions, lengths)
    else:
        places = jnp.broadcast_to(jnp.arange(4), GENES.shape)
        states = model.encode(jnp.asarray(GENES) + 30, places, nothing, lengths)
    return jnp.where((jnp.arange(4) < lengths[:, None])[..., None], states, 0.0)


def drawn(adapters: Any) -> Any:
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), adapters)


@pytest.mark.parametrize("build", [tissue, nicheformer])
def test_step_0_is_the_base_bit_for_bit(randomised: Callable[..., Any], build: Any) -> None:
    graph, parameters = randomised(build, std=0.3)
    adapters = init_adapters(parameters, CONFIG, jax.random.key(0))
    start = adapted(parameters, adapters, CONFIG)
    assert jax.tree.structure(start) == jax.tree.structure(parameters)
    jax.tree.map(np.testing.assert_array_equal, start, parameters)
    np.testing.assert_array_equal(hidden(graph, start), hidden(graph, parameters))
    moved = hidden(graph, adapted(parameters, drawn(adapters), CONFIG))
    assert np.abs(moved - hidden(graph, parameters)).max() > 0.1


@pytest.mark.parametrize(("build", "stack"), [(tissue, ("encoder", "blocks")), (nicheformer, ("blocks",))])
def test_every_attention_projection_of_every_encoding_layer(
    randomised: Callable[..., Any], build: Any, stack: tuple[str, ...]
) -> None:
    _, parameters = randomised(build)
    adapters = flatten_dict(init_adapters(parameters, CONFIG, jax.random.key(0)))
    expected = {(*stack, name, part) for name in ("query", "key", "value", "output") for part in "ab"}
    assert set(adapters) == expected
    for path, leaf in adapters.items():
        assert leaf.shape == ((2, 16, 3) if path[-1] == "a" else (2, 3, 16))
    a = np.stack([leaf for path, leaf in adapters.items() if path[-1] == "a"])
    assert len(np.unique(a.round(6))) > 0.99 * a.size  # no two projections or layers begin alike
    assert a.std() == pytest.approx((3 * 16) ** -0.5, rel=0.1)
    only = flatten_dict(init_adapters(parameters, LoraConfig(targets=("value",)), jax.random.key(0)))
    assert {path[-2] for path in only} == {"value"}


def test_weights_are_the_two_paths(randomised: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The adapted model in float32 against x W + 2 (x A) B in float64; the tolerance is that of the model."""
    graph, parameters = randomised(tissue, std=0.3)
    adapters = drawn(init_adapters(parameters, CONFIG, jax.random.key(0)))
    plain = plain_transformer.linear

    def two_paths(x: np.ndarray, layer: dict[str, Any]) -> np.ndarray:
        low_rank = 6.0 / 3 * (x @ layer["a"]) @ layer["b"] if "a" in layer else 0.0
        return plain(x, layer) + low_rank

    monkeypatch.setattr(plain_transformer, "linear", two_paths)
    blocks = parameters["encoder"]["blocks"]
    beside = {name: {**blocks[name], **adapters["encoder"]["blocks"].get(name, {})} for name in blocks}
    x = plain_transformer.embed_value(GENES / 5, parameters["value_embedding"])
    x = x + parameters["gene_embedding"]["table"][GENES]
    positions = np.stack([GENES, np.zeros_like(GENES)], -1).astype(float)
    stated = plain_transformer.transform(
        x, {**parameters["encoder"], "blocks": beside}, positions, LENGTHS, 2
    )
    mine = hidden(graph, adapted(parameters, adapters, CONFIG))
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(mine[row, :length], stated[row, :length], atol=2e-5)


@pytest.mark.parametrize("build", [tissue, nicheformer])
def test_gradients(randomised: Callable[..., Any], build: Any) -> None:
    """With G the gradient of a kernel, that of A is s G B' and that of B is s A' G; what only serves
    pretraining has none."""
    graph, parameters = randomised(build, std=0.3)
    adapters = drawn(init_adapters(parameters, CONFIG, jax.random.key(0)))

    def loss(parameters: Any) -> jax.Array:
        return (hidden(graph, parameters) ** 3).sum()

    @jax.jit
    def gradients(factors: Any) -> Any:
        of_weights = jax.grad(loss)(adapted(parameters, factors, CONFIG))
        return of_weights, jax.grad(lambda factors: loss(adapted(parameters, factors, CONFIG)))(factors)

    of_weights, of_factors = gradients(adapters)
    used = {name for name, part in of_weights.items() if any(np.any(leaf) for leaf in jax.tree.leaves(part))}
    assert used == set(encoding(parameters))
    kernels, factors = flatten_dict(of_weights), flatten_dict(adapters)
    for path, gradient in flatten_dict(of_factors).items():
        kernel = np.asarray(kernels[*path[:-1], "kernel"], np.float64)
        a, b = (np.asarray(factors[*path[:-1], part], np.float64) for part in "ab")
        if path[-1] == "a":
            stated = 2 * np.einsum("lio,lro->lir", kernel, b)
        else:
            stated = 2 * np.einsum("lir,lio->lro", a, kernel)
        np.testing.assert_allclose(gradient, stated, rtol=1e-4, atol=1e-4 * np.abs(stated).max())


def test_under_one_and_a_half_per_cent_of_nicheformer() -> None:
    _, shapes, _ = abstract(model_builder(nicheformer_49m.recipe(), 20_310))

    def trained(key: jax.Array) -> Any:
        head = init_head(HeadConfig("linear"), 512, 16, key)
        return init_adapters(shapes, LoraConfig(), key), head

    adapters, head = jax.eval_shape(trained, jax.random.key(0))
    assert count_parameters(adapters) == 12 * 4 * 8 * (512 + 512)
    assert count_parameters(head) == 512 * 16 + 16
    share = (count_parameters(adapters) + count_parameters(head)) / count_parameters(shapes)
    assert 0.005 < share < 0.015


def test_a_target_that_no_parameter_has(randomised: Callable[..., Any]) -> None:
    _, parameters = randomised(tissue)
    with pytest.raises(InputError, match=r"no projection 'proj'; choose from .*down, gate, key"):
        init_adapters(parameters, LoraConfig(targets=("query", "proj")), jax.random.key(0))
    with pytest.raises(ValueError, match="rank is 0"):
        LoraConfig(rank=0)
