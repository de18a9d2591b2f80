"""Every attention kernel against float64 NumPy, forward and gradients, in every case that it declares."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain_transformer import softmax

from scfm_jax.errors import InputError
from scfm_jax.models.attention import IMPLEMENTATIONS, Asked, attention, choose
from scfm_jax.models.attention_fused import attend_splash

ROWS, LENGTH, HEADS = 3, 200, 2
HEAD_SIZES = (16, 32, 64, 128)
LENGTHS = np.array([LENGTH, 131, 1])
SEGMENTS = np.sort(np.random.default_rng(1).integers(1, 4, (ROWS, LENGTH)), axis=1)
SEGMENTS[1, 150:] = 0
CASES = {"padded": np.where(np.arange(LENGTH) < LENGTHS[:, None], 1, 0), "packed": SEGMENTS}
# What is asked on the platform of each kernel.
PLATFORMS = {"plain": "cpu", "chunked": "cpu", "cudnn": "gpu", "splash": "tpu"}


def stated(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, segments: np.ndarray, upstream: np.ndarray
) -> tuple[np.ndarray, ...]:
    """What is mixed, and the gradients of its sum times `upstream`, sample by sample and head by head."""
    out, *gradients = (np.zeros(query.shape) for _ in range(4))
    scale = query.shape[-1] ** -0.5
    for row in range(len(query)):
        for sample in set(segments[row]) - {0}:
            of = segments[row] == sample
            for head in range(query.shape[2]):
                q, k, v, up = (x[row, of, head] for x in (query, key, value, upstream))
                weights = softmax(q @ k.T * scale)
                out[row, of, head] = weights @ v
                of_weights = up @ v.T
                of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdims=True)) * scale
                for gradient, found in zip(gradients, (of_scores @ k, of_scores.T @ q, weights.T @ up)):
                    gradient[row, of, head] = found
    return out, *gradients


def kernel(name: str, case: str) -> Callable[..., jax.Array]:
    """(query, key, value) to what the kernel mixes; splash step by step, where no TPU is."""
    rows: dict[str, Any] = (
        {"lengths": jnp.asarray(LENGTHS)} if case == "padded" else {"segments": jnp.asarray(SEGMENTS)}
    )
    if name == "splash":
        return partial(attend_splash, **{"lengths": None, **rows}, interpret=jax.default_backend() != "tpu")
    return partial(attention, **rows, implementation=name)


def declared() -> list[Any]:
    chosen = []
    for name, way in IMPLEMENTATIONS.items():
        dtype = jnp.bfloat16 if name == "cudnn" else jnp.float32
        absent = name == "cudnn" and jax.default_backend() != "gpu"
        skip = [pytest.mark.skipif(absent, reason="cuDNN runs on NVIDIA GPUs")]
        for case in CASES:
            for size in HEAD_SIZES:
                if way.lacks(Asked(PLATFORMS[name], dtype, size, case == "packed")) is None:
                    marks = skip if name == "cudnn" else []
                    chosen.append(
                        pytest.param(name, case, size, dtype, marks=marks, id=f"{name}-{case}-{size}")
                    )
    return chosen


@pytest.mark.parametrize(("name", "case", "size", "dtype"), declared())
def test_forward_and_gradients(name: str, case: str, size: int, dtype: Any) -> None:
    random, segments = np.random.default_rng(size), CASES[case]
    # Numbers that bfloat16 holds, so that only what the kernel rounds itself is seen.
    arrays = [
        np.asarray(jnp.asarray(random.normal(size=(ROWS, LENGTH, HEADS, size)), jnp.bfloat16), np.float64)
        for _ in range(4)
    ]
    real = (segments > 0)[..., None, None]
    upstream = arrays[3] * real  # no loss looks at padding

    def weighted(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = kernel(name, case)(q, k, v).astype(jnp.float32)
        return (out * upstream).sum(), out

    given = [jnp.asarray(x, dtype) for x in arrays[:3]]
    gradients, out = jax.jit(jax.grad(weighted, argnums=(0, 1, 2), has_aux=True))(*given)
    plain_out, *plain_gradients = stated(*arrays[:3], segments, upstream)
    tolerance = 2e-6 if dtype == jnp.float32 else 8e-3
    assert np.isfinite(out).all()
    assert relative(np.asarray(out, np.float64) * real, plain_out) < tolerance
    for mine, plain in zip(gradients, plain_gradients, strict=True):
        assert relative(np.asarray(mine, np.float64), plain) < 2 * tolerance


def relative(mine: np.ndarray, plain: np.ndarray) -> float:
    return float(np.linalg.norm(mine - plain) / np.linalg.norm(plain))


@pytest.mark.parametrize("name", ["splash", "cudnn"])
def test_a_row_without_keys_gives_zeros_and_no_gradient(name: str) -> None:
    if name == "cudnn" and jax.default_backend() != "gpu":
        pytest.skip("cuDNN runs on NVIDIA GPUs")
    dtype = jnp.bfloat16 if name == "cudnn" else jnp.float32
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 128, 1, 16)), dtype)
    lengths = jnp.asarray([128, 0])
    attend = partial(attend_splash, interpret=True) if name == "splash" else IMPLEMENTATIONS["cudnn"].attend
    weighted = lambda x: (attend(x, x, x, lengths).astype(jnp.float32) ** 2).sum()  # noqa: E731
    value, gradient = jax.value_and_grad(weighted)(x)
    assert np.isfinite(value) and np.isfinite(gradient[0]).all() and np.any(gradient[0])
    assert not np.any(gradient[1])


@pytest.mark.parametrize(
    ("name", "asked", "reason"),
    [
        (
            "cudnn",
            Asked("cpu", jnp.bfloat16, 64),
            "runs on NVIDIA GPUs, and this is a cpu; choose plain or chunked",
        ),
        (
            "cudnn",
            Asked("gpu", jnp.float32, 64),
            "computes in bfloat16 or float16, and model.dtype is float32",
        ),
        (
            "cudnn",
            Asked("gpu", jnp.bfloat16, 256),
            "takes heads of 8, 16, ... 128 features, and these have 256",
        ),
        ("cudnn", Asked("gpu", jnp.bfloat16, 64, packed=True), "goes by lengths, and the rows are packed"),
        ("chunked", Asked("cpu", jnp.float32, 64, packed=True), "goes by lengths, .*; choose plain"),
        ("splash", Asked("gpu", jnp.bfloat16, 64), "runs on TPUs, and this is a gpu"),
    ],
)
def test_what_cannot_be_done_is_an_error_with_the_reason(name: Any, asked: Asked, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        choose(name, asked)


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        (Asked("cpu", jnp.float32, 64), "chunked"),
        (Asked("cpu", jnp.float32, 64, packed=True), "plain"),
        (Asked("gpu", jnp.bfloat16, 64), "cudnn"),
        (Asked("gpu", jnp.float32, 64), "plain"),
        (Asked("tpu", jnp.bfloat16, 64), "splash"),
        (Asked("tpu", jnp.bfloat16, 64, packed=True), "splash"),
    ],
)
def test_auto_is_the_platforms(asked: Asked, name: str) -> None:
    assert choose("auto", asked) == name
