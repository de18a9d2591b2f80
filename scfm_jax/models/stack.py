"""Layers stacked and scanned, so that compile time does not grow with depth, and what is kept of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import jax
from flax import nnx
from jaxtyping import Array, DTypeLike, Float

from scfm_jax.models.sharding import constrain, platform

RematName = Literal["none", "dots", "full"]
Layer = TypeVar("Layer", bound=nnx.Module)

_STACKED_MATRIX = 3  # axes
_UNROLL = {"gpu": 12}
# Primitives of the fused attention kernels, whose outputs are as dear as those of matrix products.
_KERNELS = ("dot_product_attention_fwd_wrapper", "dot_product_attention_fwd", "pallas_call")


@dataclass(frozen=True)
class StackConfig:
    """How a stack of layers is computed; nothing here changes what.

    Attributes
    ----------
    dtype
        Of activations, and of matrices as they are multiplied.
    remat
        What the backward pass computes again: ``none``; ``dots`` everything but matrix products and
        attention; ``full`` all of each layer, from its input.
    unroll
        Layers that are compiled as one turn of the loop; 0 is 12 on a GPU and 1 elsewhere. Between two turns
        a GPU copies all that the backward pass needs, which costs it 12 to 25% of its speed; a TPU's compiler
        takes minutes for what is unrolled.
    """

    dtype: DTypeLike
    remat: RematName = "none"
    unroll: int = 0


def stacked(layers: int, build: Callable[[nnx.Rngs], Layer], rngs: nnx.Rngs) -> Layer:
    """`layers` modules as one, whose parameters have a leading axis; each is drawn from keys of its own."""

    @nnx.split_rngs(splits=layers)
    @nnx.vmap(in_axes=0, out_axes=0)
    def stack(rngs: nnx.Rngs) -> Layer:
        return build(rngs)

    return stack(rngs)


def scan_layers(
    blocks: Layer,
    call: Callable[[Layer, Array], Array],
    x: Float[Array, "b s d"],
    *,
    config: StackConfig,
    keep: bool = False,
) -> tuple[Float[Array, "b s d"], Float[Array, "l b s d"] | None]:
    """Send `x` through stacked layers.

    Parameters
    ----------
    blocks
        From `stacked`.
    call
        (one layer, x) to x.
    config
        How.
    keep
        Also return the output of every layer.
    """
    graph, parameters = nnx.split(blocks)
    # Cast once: what is sliced a layer at a time, and gathered from other devices, is then half as large.
    parameters = jax.tree.map(
        lambda leaf: leaf.astype(config.dtype) if leaf.ndim >= _STACKED_MATRIX else leaf, parameters
    )

    def layer(x: Array, parameters: nnx.State) -> tuple[Array, Array | None]:
        x = constrain(call(nnx.merge(graph, parameters), x), "batch", None, None)
        return x, x if keep else None

    return jax.lax.scan(
        _recomputed(layer, config.remat),
        constrain(x, "batch", None, None),
        parameters,
        unroll=min(config.unroll or _UNROLL.get(platform(), 1), len(jax.tree.leaves(parameters)[0])),
    )


def _recomputed(layer: Callable[..., Any], remat: RematName) -> Callable[..., Any]:
    if remat == "none":
        return layer
    # Inside a scan nothing can be merged with the forward pass: the barriers against that cost time.
    policy = _dots_and_kernels if remat == "dots" else None
    return jax.checkpoint(layer, policy=policy, prevent_cse=False)


def _dots_and_kernels(primitive: Any, *inputs: Any, **parameters: Any) -> bool:
    dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return primitive.name in _KERNELS or bool(dots(primitive, *inputs, **parameters))
