"""Linear layers with logical names, and several of one input as one matrix product."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float


def make_linear(
    inputs: int,
    outputs: int,
    names: tuple[str | None, str | None],
    *,
    use_bias: bool,
    init_std: float,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
) -> nnx.Linear:
    """A Linear with normal weights, zero biases and the logical `names` of its two axes."""
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=nnx.initializers.normal(init_std),
        kernel_metadata={"logical": names},
        bias_metadata={"logical": names[1:]},
        rngs=rngs,
    )


def project_together(x: Float[Array, "n d"], *layers: nnx.Linear) -> list[Float[Array, "n e"]]:
    """What each of several Linear layers of the same sizes makes of `x`, in one matrix product.

    The kernels are stacked between their two axes, so that a mesh that splits their outputs splits the
    product in the same way.
    """
    dtype = layers[0].dtype or x.dtype
    kernel = jnp.stack([layer.kernel[...].astype(dtype) for layer in layers], axis=1)
    made = jnp.einsum("nd,dce->nce", x.astype(dtype), kernel)
    biases = [layer.bias[...].astype(dtype) for layer in layers if layer.bias is not None]
    if biases:
        made += jnp.stack(biases)
    return [made[:, place] for place in range(len(layers))]
