"""Heads: from the hidden states of a cell's tokens to what is said of the cell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from scfm_jax.errors import check_least
from scfm_jax.models.functional import Parameters

Pooling = Literal["mean", "max"]
HeadName = Literal["linear", "max_linear", "mean_tanh"]


@dataclass(frozen=True)
class HeadConfig:
    """How a cell's tokens become an answer.

    Attributes
    ----------
    kind
        ``linear``: mean over the tokens, Linear. ``max_linear``: maximum, Linear (AIDO.Tissue).
        ``mean_tanh``: mean, Linear, tanh, dropout, Linear (the LoRA study of Nicheformer).
    hidden
        Of ``mean_tanh``, features between its two layers; None is the model's width.
    dropout
        Of ``mean_tanh``, share of these that training drops.
    """

    kind: HeadName = "linear"
    hidden: int | None = None
    dropout: float = 0.1

    def __post_init__(self) -> None:
        check_least(self, 0, "dropout")
        if self.hidden is not None:
            check_least(self, 1, "hidden")
        if self.dropout >= 1:
            raise ValueError(f"dropout is {self.dropout}, not below 1")

    @property
    def pooling(self) -> Pooling:
        return "max" if self.kind == "max_linear" else "mean"


def pooled(
    hidden: Float32[Array, "b s d"], chosen: Float32[Array, "b s"], pooling: Pooling
) -> Float32[Array, "b d"]:
    """Mean or maximum of the `chosen` tokens (1 or 0); zeros for a row without any."""
    if pooling == "max":
        highest = jnp.where(chosen[..., None] > 0, hidden, -jnp.inf).max(1)
        return jnp.where(chosen.sum(1, keepdims=True) > 0, highest, 0.0)
    return (hidden * chosen[..., None]).sum(1) / jnp.maximum(chosen.sum(1, keepdims=True), 1.0)


def init_head(config: HeadConfig, width: int, outputs: int, key: jax.Array) -> Parameters:
    """Parameters of a head: normal kernels of variance 1 / in, zero biases.

    Parameters
    ----------
    width
        Features of a token.
    outputs
        Numbers that are said of a cell.
    """

    def linear(inputs: int, outputs: int, key: jax.Array) -> Parameters:
        kernel = jax.random.normal(key, (inputs, outputs), jnp.float32) / inputs**0.5
        return {"kernel": kernel, "bias": jnp.zeros(outputs, jnp.float32)}

    if config.kind != "mean_tanh":
        return {"out": linear(width, outputs, key)}
    first, second = jax.random.split(key)
    hidden = config.hidden or width
    return {"inner": linear(width, hidden, first), "out": linear(hidden, outputs, second)}


def apply_head(
    head: Parameters, config: HeadConfig, features: Float[Array, "b d"], key: jax.Array | None = None
) -> Float[Array, "b o"]:
    """What a head says of cells.

    Parameters
    ----------
    head
        From `init_head`.
    features
        Hidden states of a cell's tokens, `pooled` as ``config.pooling`` says.
    key
        Of the dropout; without one nothing is dropped.
    """

    def linear(layer: Parameters, x: Float[Array, "b i"]) -> Float[Array, "b o"]:
        return x @ layer["kernel"] + layer["bias"]

    if config.kind == "mean_tanh":
        features = jnp.tanh(linear(head["inner"], features))
        if key is not None:
            kept = jax.random.bernoulli(key, 1 - config.dropout, features.shape)
            features = jnp.where(kept, features / (1 - config.dropout), 0.0)
    return linear(head["out"], features)


def unstandardised(head: Parameters, mean: Float[Array, " d"], spread: Float[Array, " d"]) -> Parameters:
    """The head that says of features what `head` says of ``(features - mean) / spread``."""
    first = "inner" if "inner" in head else "out"
    kernel = head[first]["kernel"] / spread[:, None]
    return {**head, first: {"kernel": kernel, "bias": head[first]["bias"] - mean @ kernel}}
