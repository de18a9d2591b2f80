from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain_transformer import attend, softmax

from scfm_jax.errors import InputError
from scfm_jax.models.attention import attention

IMPLEMENTATIONS = ("plain", "chunked")


def projections(batch: int, queries: int, keys: int, heads: int, size: int) -> list[np.ndarray]:
    """Queries, keys, values and the gradient of the output."""
    rng = np.random.default_rng(0)
    return [rng.normal(size=(batch, n, heads, size)) for n in (queries, keys, keys, queries)]


def attend_gradients(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, lengths: np.ndarray, upstream: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Gradients of sum(output * upstream), by the chain rule on paper."""
    scale = query.shape[-1] ** -0.5
    gradients = tuple(np.zeros(x.shape) for x in (query, key, value))
    for row, length in enumerate(lengths):
        for head in range(query.shape[2]):
            if not length:
                continue
            q, k, v = query[row, :, head], key[row, :length, head], value[row, :length, head]
            weights = softmax(q @ k.T * scale)
            of_weights = upstream[row, :, head] @ v.T
            of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdims=True)) * scale
            gradients[0][row, :, head] = of_scores @ k
            gradients[1][row, :length, head] = of_scores.T @ q
            gradients[2][row, :length, head] = weights.T @ upstream[row, :, head]
    return gradients


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("queries", "keys", "lengths"),
    [
        pytest.param(7, 7, [7, 3, 1], id="short rows"),
        pytest.param(5, 9, [9, 4, 0], id="a row without keys"),
        pytest.param(1030, 40, [40, 17, 0], id="several chunks of queries"),
    ],
)
def test_forward_and_gradients(implementation: str, queries: int, keys: int, lengths: list[int]) -> None:
    *inputs, upstream = projections(3, queries, keys, 2, 4)
    given = [jnp.asarray(x, jnp.float32) for x in inputs]

    def weighted(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = attention(q, k, v, jnp.asarray(lengths), implementation=implementation)
        return (out * upstream).sum(), out

    gradients, out = jax.jit(jax.grad(weighted, argnums=(0, 1, 2), has_aux=True))(*given)
    np.testing.assert_allclose(out, attend(*inputs, np.array(lengths)), atol=2e-6)
    for mine, plain in zip(gradients, attend_gradients(*inputs, np.array(lengths), upstream), strict=True):
        np.testing.assert_allclose(mine, plain, atol=2e-5 * max(1, np.abs(plain).max()))
    for row in np.flatnonzero(np.array(lengths) == 0):
        assert not np.any(out[row])
        assert not any(np.any(gradient[row]) for gradient in gradients)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_stands_at_the_padding_is_not_seen(implementation: str) -> None:
    query, key, value, _ = (jnp.asarray(x, jnp.float32) for x in projections(2, 6, 6, 1, 4))
    lengths = jnp.asarray([6, 2])
    attend_to = jax.jit(lambda k, v: attention(query, k, v, lengths, implementation=implementation))
    out, other = attend_to(key, value), attend_to(key.at[1, 2:].set(1e4), value.at[1, 2:].set(-1e4))
    np.testing.assert_array_equal(out, other)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_keeps_its_softmax_in_float32(implementation: str) -> None:
    query, key, value, _ = (jnp.asarray(x, jnp.bfloat16) for x in projections(1, 5, 300, 1, 8))
    out = attention(query, key, value, jnp.asarray([300]), implementation=implementation)
    assert out.dtype == jnp.bfloat16
    exact = attend(*(np.asarray(x, np.float64) for x in (query, key, value)), np.array([300]))
    # 300 weights that were summed in bfloat16 would be off by several times this.
    np.testing.assert_allclose(np.asarray(out, np.float64), exact, atol=4e-3)


def test_unknown_implementation_is_an_error() -> None:
    x = jnp.zeros((1, 2, 1, 4))
    with pytest.raises(InputError, match=r"model.attention: is 'fast'; choose one of auto, plain, chunked"):
        attention(x, x, x, jnp.asarray([2]), implementation="fast")


@pytest.mark.parametrize(("implementation", "least", "most"), [("chunked", 3.5, 4.5), ("plain", 12, 18)])
def test_memory_of_four_times_the_length(implementation: str, least: float, most: float) -> None:
    """What XLA plans for forward and backward: linear in the length by chunks, else its square."""

    def planned(length: int) -> int:
        def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            lengths = jnp.full(1, length - 1)
            return (attention(q, k, v, lengths, implementation=implementation) ** 2).sum()

        shape = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(shape, shape, shape).compile()
        return int(compiled.memory_analysis().temp_size_in_bytes)

    assert least < planned(8_192) / planned(2_048) < most
