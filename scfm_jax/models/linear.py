"""Linear layers whose axes have logical names."""

from __future__ import annotations

from flax import nnx
from jaxtyping import DTypeLike


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
