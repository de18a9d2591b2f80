"""Layers stacked and scanned, so that compile time does not grow with depth, and what is kept of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import jax
from flax import nnx
from jaxtyping import Array, Float

from scfm_jax.models.sharding import constrain

RematName = Literal["none", "dots", "full"]
Layer = TypeVar("Layer", bound=nnx.Module)

# Primitives of the fused attention kernels, whose outputs are as dear as those of matrix products.
_KERNELS = ("dot_product_attention_fwd_wrapper", "dot_product_attention_fwd", "pallas_call")


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
    remat: RematName,
    keep: bool = False,
) -> tuple[Float[Array, "b s d"], Float[Array, "l b s d"] | None]:
    """Send `x` through stacked layers.

    Parameters
    ----------
    blocks
        From `stacked`.
    call
        (one layer, x) to x.
    remat
        What the backward pass computes again: ``none``; ``dots`` everything but matrix products and
        attention; ``full`` all of each layer, from its input.
    keep
        Also return the output of every layer.
    """
    graph, parameters = nnx.split(blocks)

    def layer(x: Array, parameters: nnx.State) -> tuple[Array, Array | None]:
        x = constrain(call(nnx.merge(graph, parameters), x), "batch", None, None)
        return x, x if keep else None

    return jax.lax.scan(_recomputed(layer, remat), constrain(x, "batch", None, None), parameters)


def _recomputed(layer: Callable[..., Any], remat: RematName) -> Callable[..., Any]:
    if remat == "none":
        return layer
    # Inside a scan nothing can be merged with the forward pass: the barriers against that cost time.
    policy = _dots_and_kernels if remat == "dots" else None
    return jax.checkpoint(layer, policy=policy, prevent_cse=False)


def _dots_and_kernels(primitive: Any, *inputs: Any, **parameters: Any) -> bool:
    dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return primitive.name in _KERNELS or bool(dots(primitive, *inputs, **parameters))
