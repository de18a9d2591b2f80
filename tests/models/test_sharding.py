"""Which activations are split, by which names: read from what is traced on a mesh of one device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

from scfm_jax.models.functional import abstract
from scfm_jax.models.nicheformer import Nicheformer, NicheformerConfig
from scfm_jax.models.sharding import Split, constrain, split_by
from scfm_jax.models.stack import StackConfig
from scfm_jax.models.transformer import Transformer, TransformerConfig

NAMES = ("data", "fsdp", "tensor")
AXES = {"batch": ("data", "fsdp"), "heads": ("tensor",), "mlp": ("tensor",), "vocabulary": ("tensor",)}
ONE = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), NAMES, axis_types=(AxisType.Auto,) * 3)
SHARDS = ("data", "fsdp")


def test_without_a_mesh_nothing_is_said() -> None:
    x = jnp.ones((2, 3))
    assert constrain(x, "batch", None) is x


def test_what_the_mesh_does_not_divide_is_not_split() -> None:
    mesh: Any = AbstractMesh((2, 2, 4), NAMES, axis_types=(AxisType.Auto,) * 3)
    split = Split(mesh, AXES)
    assert split.spec((8, 5, 8), ("batch", None, "heads")) == PartitionSpec(SHARDS, None, "tensor")
    assert split.spec((6, 5, 8), ("batch", None, "heads")) == PartitionSpec(None, None, "tensor")
    assert split.spec((8, 5, 6), ("batch", None, "heads")) == PartitionSpec(SHARDS, None, None)


def test_a_wrong_number_of_names_is_an_error() -> None:
    with split_by(Split(ONE, AXES)), pytest.raises(ValueError, match="names 1 axes of an array of shape"):
        constrain(jnp.ones((2, 3)), "batch")


def constraints(function: Callable[..., Any], *arguments: Any) -> set[tuple[tuple[int, ...], PartitionSpec]]:
    """Shapes and splits of every constraint in what is traced, in scans and backward passes too."""

    def inside(jaxpr: Any) -> Iterator[tuple[tuple[int, ...], PartitionSpec]]:
        for equation in jaxpr.eqns:
            if equation.primitive.name == "sharding_constraint":
                yield equation.invars[0].aval.shape, equation.params["sharding"].spec
            for value in equation.params.values():
                if hasattr(value, "jaxpr"):
                    yield from inside(value.jaxpr)
                elif hasattr(value, "eqns"):
                    yield from inside(value)

    with split_by(Split(ONE, AXES)):
        return set(inside(jax.make_jaxpr(jax.grad(function))(*arguments).jaxpr))


def test_rows_and_feed_forward_of_the_transformer_are_split() -> None:
    config = TransformerConfig(layers=2, heads=2, width=16, hidden=24)
    compute = StackConfig(jnp.float32, "dots")
    graph, shapes, _ = abstract(lambda rngs: Transformer(config, init_std=0.1, compute=compute, rngs=rngs))
    x = jnp.ones((4, 6, 16))

    def run(parameters: Any, x: Any) -> jax.Array:
        model = nnx.merge(graph, parameters)
        return model(x, jnp.ones((4, 6, 2)), jnp.full(4, 6), implementation="plain").sum()

    assert constraints(run, shapes, x) == {
        ((4, 6, 16), PartitionSpec(SHARDS, None, None)),
        ((24, 24), PartitionSpec(SHARDS, "tensor")),
    }


def test_logits_and_tables_of_nicheformer_are_split_and_whole() -> None:
    config = NicheformerConfig(layers=2, heads=2, width=16, hidden=24, positions=6, attention="plain")
    graph, shapes, _ = abstract(lambda rngs: Nicheformer(config, 98, rngs=rngs))
    tokens = jnp.ones((4, 6), jnp.int32)

    def run(parameters: Any, tokens: Any) -> jax.Array:
        model = nnx.merge(graph, parameters)
        return model.logits(model.encode(tokens, tokens, tokens, jnp.full(4, 6))).max(-1).sum()

    assert constraints(run, shapes, tokens) == {
        ((4, 6, 16), PartitionSpec(SHARDS, None, None)),
        ((24, 24), PartitionSpec(SHARDS, "tensor")),
        ((4, 6, 128), PartitionSpec(SHARDS, None, "tensor")),
        ((256, 16), PartitionSpec(None, None)),
        ((6, 16), PartitionSpec(None, None)),
    }
