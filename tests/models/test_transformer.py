from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from plain_transformer import transform

from scfm_jax.models.functional import initialise
from scfm_jax.models.stack import RematName, StackConfig
from scfm_jax.models.transformer import Transformer, TransformerConfig

CONFIG = TransformerConfig(layers=3, heads=2, width=16)
LENGTHS = np.array([6, 3])


def build(
    config: TransformerConfig = CONFIG, *, remat: RematName = "none"
) -> Callable[[nnx.Rngs], Transformer]:
    return lambda rngs: Transformer(config, init_std=0.02, compute=StackConfig(jnp.float32, remat), rngs=rngs)


def inputs() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(2, 6, 16)), rng.integers(0, 30, (2, 6, 2)).astype(float)


def run(graph: Any, parameters: Any, x: Any, positions: Any) -> jax.Array:
    return nnx.merge(graph, parameters)(
        jnp.asarray(x, jnp.float32), jnp.asarray(positions), jnp.asarray(LENGTHS), implementation="plain"
    )


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        dataclasses.replace(CONFIG, layers=2, hidden=20, norm="layer", use_bias=False),
    ],
    ids=["published", "layer norm, no biases"],
)
def test_scan_equals_a_loop_over_layers(randomised: Callable[..., Any], config: TransformerConfig) -> None:
    graph, parameters = randomised(build(config), std=0.3)
    x, positions = inputs()
    mine = jax.jit(run)(graph, parameters, x, positions)
    stated = transform(x, parameters, positions, LENGTHS, config.heads)
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(mine[row, :length], stated[row, :length], atol=2e-5)


def test_layers_differ_after_init() -> None:
    blocks = jax.jit(lambda: initialise(build(), jax.random.key(0)))()["blocks"]
    for name in ("query", "key", "value", "output", "gate", "up", "down"):
        kernel = np.asarray(blocks[name]["kernel"])
        assert len(kernel) == CONFIG.layers
        assert all((kernel[i] != kernel[j]).all() for i in range(3) for j in range(i))
    assert (blocks["query"]["kernel"] != blocks["key"]["kernel"]).all()


def test_recomputed_layers_give_the_same_gradients(randomised: Callable[..., Any]) -> None:
    x, positions = inputs()
    gradients = []
    for remat in typing.get_args(RematName):
        graph, parameters = randomised(build(remat=remat), std=0.3)
        squares = lambda p, graph=graph: (run(graph, p, x, positions) ** 2).sum()  # noqa: E731
        text = str(jax.make_jaxpr(jax.grad(squares))(parameters))
        assert ("remat" in text or "checkpoint" in text) == (remat != "none")
        gradients.append(jax.jit(jax.grad(squares))(parameters))
    for recomputed in gradients[1:]:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), gradients[0], recomputed
        )


def test_padding_changes_no_real_output(randomised: Callable[..., Any]) -> None:
    graph, parameters = randomised(build(), std=0.3)
    x, positions = inputs()
    other, elsewhere = x.copy(), positions.copy()
    other[1, 3:], elsewhere[1, 3:] = 100.0, 7.0
    forward = jax.jit(run)
    mine, changed = forward(graph, parameters, x, positions), forward(graph, parameters, other, elsewhere)
    np.testing.assert_array_equal(mine[0], changed[0])
    np.testing.assert_array_equal(mine[1, :3], changed[1, :3])
    assert (mine[1, 3:] != changed[1, 3:]).any()


def test_width_must_give_heads_of_four_quarters() -> None:
    with pytest.raises(ValueError, match="multiple of 4 x heads"):
        TransformerConfig(layers=1, heads=3, width=16)


@pytest.mark.parametrize(("width", "hidden"), [(64, 176), (128, 344), (512, 1368)])
def test_feed_forward_is_eight_thirds_rounded_up(width: int, hidden: int) -> None:
    assert TransformerConfig(layers=1, heads=1, width=width).feed_forward == hidden
