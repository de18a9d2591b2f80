"""Bidirectional attention: one function, a list of implementations that say what they can do, no guessing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from scfm_jax.errors import InputError
from scfm_jax.models.attention_fused import attend_cudnn, attend_splash
from scfm_jax.models.attention_plain import attend_chunks, attend_pairs
from scfm_jax.models.sharding import by_shard, platform

AttentionName = Literal["auto", "plain", "chunked", "cudnn", "splash"]


@dataclass(frozen=True)
class Asked:
    """What an implementation is to do.

    Attributes
    ----------
    platform
        ``cpu``, ``gpu`` or ``tpu``.
    dtype
        Of queries, keys and values.
    head_size
        Features of a head.
    packed
        Whether rows hold several samples, told apart by segments, rather than one and padding.
    """

    platform: str
    dtype: Any
    head_size: int
    packed: bool = False


@dataclass(frozen=True)
class Implementation:
    """A way to compute attention.

    Attributes
    ----------
    attend
        (query, key, value, lengths, segments=None) to what is mixed, all ``batch length heads size``.
    lacks
        What is asked to the reason why it cannot be done, or None.
    """

    attend: Callable[..., Array]
    lacks: Callable[[Asked], str | None]


def choose(name: AttentionName, asked: Asked) -> AttentionName:
    """The implementation that `name` stands for: itself, or the platform's where it is ``auto``.

    Raises
    ------
    InputError
        It does not exist, or cannot do what is asked.
    """
    if name == "auto":
        name = _of_platform(asked)
    if name not in IMPLEMENTATIONS:
        known = ", ".join(["auto", *IMPLEMENTATIONS])
        raise InputError("model.attention", f"is {name!r}", f"choose one of {known}")
    if reason := IMPLEMENTATIONS[name].lacks(asked):
        able = [other for other, way in IMPLEMENTATIONS.items() if not way.lacks(asked)]
        raise InputError(
            "model.attention", f"{name} {reason}", f"choose {' or '.join(able)}, or auto for the platform's"
        )
    return name


def _of_platform(asked: Asked) -> AttentionName:
    """The fastest that can do what is asked; `scfm train` says which it is."""
    fused: dict[str, AttentionName] = {"cpu": "chunked", "gpu": "cudnn", "tpu": "splash"}
    name = fused.get(asked.platform, "plain")
    return "plain" if IMPLEMENTATIONS[name].lacks(asked) else name


def attention(
    query: Float[Array, "b q h d"],
    key: Float[Array, "b s h d"],
    value: Float[Array, "b s h d"],
    lengths: Int[Array, " b"] | None = None,
    *,
    segments: Int[Array, "b s"] | None = None,
    implementation: AttentionName,
) -> Float[Array, "b q h d"]:
    """Scaled dot-product attention over right-padded or packed rows; the softmax is in float32.

    Parameters
    ----------
    query, key, value
        Projections, any float dtype that the implementation takes.
    lengths
        Real tokens of each row: every query sees the first `lengths` keys of its row. What comes out of a
        query that is padding is undefined, and zero in a row of length 0.
    segments
        In place of lengths, the sample that each token of a packed row belongs to, counted from 1; 0 is
        padding. A query sees the keys of its own sample.
    implementation
        ``plain`` holds the scores of all pairs. ``chunked``, for CPUs, keeps those of 256 queries at a time:
        memory grows with the length and not with its square. ``cudnn`` is the fused kernel of NVIDIA GPUs
        (half precision, lengths), ``splash`` that of TPUs. ``auto`` is `choose`'s choice for the mesh's
        platform, or JAX's default one.

    Raises
    ------
    InputError
        The implementation cannot do what is asked.
    """
    if (lengths is None) == (segments is None):
        raise ValueError("give lengths or segments")
    asked = Asked(platform(), query.dtype, query.shape[-1], packed=segments is not None)
    attend = IMPLEMENTATIONS[choose(implementation, asked)].attend
    rows = ("batch", None, "heads", None)
    if lengths is not None:
        return by_shard(attend, (query, key, value, lengths), (rows, rows, rows, ("batch",)), out=rows)
    assert segments is not None
    return by_shard(
        lambda query, key, value, segments: attend(query, key, value, None, segments),
        (query, key, value, segments),
        (rows, rows, rows, ("batch", None)),
        out=rows,
    )


def _by_head(attend: Callable[..., Array], mask: Callable[..., Array]) -> Callable[..., Array]:
    """An implementation over ``batch heads length size``."""

    def attend_rows(
        query: Array, key: Array, value: Array, lengths: Any, segments: Array | None = None
    ) -> Array:
        by_head = (x.swapaxes(1, 2) for x in (query, key, value))
        return attend(*by_head, mask(key, lengths, segments)).swapaxes(1, 2)

    return attend_rows


def _real(key: Array, lengths: Any, segments: Array | None) -> Array:
    return jnp.arange(key.shape[1]) < lengths[:, None]


def _visible(key: Array, lengths: Any, segments: Array | None) -> Array:
    if segments is None:
        return _real(key, lengths, None)[:, None]
    return (segments[:, :, None] == segments[:, None]) & (segments[:, None] > 0)


def _segments_lack(asked: Asked) -> str | None:
    return "goes by lengths, and the rows are packed" if asked.packed else None


def _cudnn_lacks(asked: Asked) -> str | None:
    if asked.platform != "gpu":
        return f"runs on NVIDIA GPUs, and this is a {asked.platform}"
    if jnp.dtype(asked.dtype) not in (jnp.bfloat16, jnp.float16):
        return f"computes in bfloat16 or float16, and model.dtype is {jnp.dtype(asked.dtype).name}"
    if asked.head_size % 8 or asked.head_size > 128:
        return f"takes heads of 8, 16, ... 128 features, and these have {asked.head_size}"
    return _segments_lack(asked)


def _splash_lacks(asked: Asked) -> str | None:
    return None if asked.platform == "tpu" else f"runs on TPUs, and this is a {asked.platform}"


IMPLEMENTATIONS: dict[AttentionName, Implementation] = {
    "plain": Implementation(_by_head(attend_pairs, _visible), lambda asked: None),
    "chunked": Implementation(_by_head(attend_chunks, _real), _segments_lack),
    "cudnn": Implementation(attend_cudnn, _cudnn_lacks),
    "splash": Implementation(attend_splash, _splash_lacks),
}
