"""The published blocks stated a second time, in NumPy, float64 and loops: what the models are held to."""

from __future__ import annotations

from typing import Any

import numpy as np


def softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def attend(query: np.ndarray, key: np.ndarray, value: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """softmax(q k' / sqrt(d)) v over the first `length` keys of each row; [b, s, h, d]."""
    out = np.zeros(query.shape, np.float64)
    for row, length in enumerate(lengths):
        for head in range(query.shape[2]):
            if length:
                k, v = key[row, :length, head], value[row, :length, head]
                out[row, :, head] = softmax(query[row, :, head] @ k.T / np.sqrt(query.shape[-1])) @ v
    return out


def turn(x: np.ndarray, positions: np.ndarray, base: float = 10_000.0) -> np.ndarray:
    """Rotary positions, pair by pair: [b, s, h, d] with two coordinates a token."""
    out = np.empty(x.shape, np.float64)
    half = x.shape[-1] // 2
    for coordinate in range(2):
        start = coordinate * half
        for pair in range(half // 2):
            one, two = start + pair, start + pair + half // 2
            angle = (positions[..., coordinate] * base ** (-2 * pair / half))[..., None]
            out[..., one] = x[..., one] * np.cos(angle) - x[..., two] * np.sin(angle)
            out[..., two] = x[..., two] * np.cos(angle) + x[..., one] * np.sin(angle)
    return out


def normalise(x: np.ndarray, parameters: dict[str, Any], epsilon: float = 1e-5) -> np.ndarray:
    """RMSNorm, or LayerNorm where there is a bias."""
    bias = 0.0
    if "bias" in parameters:
        x, bias = x - x.mean(-1, keepdims=True), parameters["bias"]
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * parameters["scale"] + bias


def linear(x: np.ndarray, parameters: dict[str, Any]) -> np.ndarray:
    return x @ parameters["kernel"] + parameters.get("bias", 0.0)


def transform(
    x: np.ndarray, parameters: dict[str, Any], positions: np.ndarray, lengths: np.ndarray, heads: int
) -> np.ndarray:
    """Pre-norm attention and SwiGLU, layer after layer, then the final norm."""
    blocks = parameters["blocks"]
    for layer in range(len(blocks["query"]["kernel"])):
        of_layer = {
            name: {part: array[layer] for part, array in inner.items()} for name, inner in blocks.items()
        }
        y = normalise(x, of_layer["attention_norm"])
        query, key, value = (
            linear(y, of_layer[name]).reshape(*x.shape[:2], heads, -1) for name in ("query", "key", "value")
        )
        mixed = attend(turn(query, positions), turn(key, positions), value, lengths)
        x = x + linear(mixed.reshape(x.shape), of_layer["output"])
        y = normalise(x, of_layer["feed_forward_norm"])
        gate = linear(y, of_layer["gate"])
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(y, of_layer["up"]), of_layer["down"])
    return normalise(x, parameters["norm"])


def embed_value(value: np.ndarray, parameters: dict[str, Any]) -> np.ndarray:
    """A soft mixture of bins, one scalar after another."""
    out = np.empty((*value.shape, parameters["table"].shape[1]))
    for place in np.ndindex(*value.shape):
        hidden = value[place] * parameters["scale"][0] + parameters["shift"]
        hidden = np.where(hidden > 0, hidden, 0.1 * hidden)
        logits = hidden + hidden @ parameters["mix"] + parameters["mix_bias"]
        out[place] = softmax(logits) @ parameters["table"]
    return out
