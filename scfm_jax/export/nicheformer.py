"""Nicheformer's published tensors, name by name, and ours.

The names are those of the Lightning checkpoint; the Hugging Face folder has ``nicheformer.`` in front. Torch
keeps query, key and value of a layer in one matrix, outputs first; here they are three, inputs first, and
layers are stacked.
"""

from __future__ import annotations

import numpy as np

from scfm_jax.models.embeddings import padded_size
from scfm_jax.models.functional import Parameters
from scfm_jax.models.nicheformer import RESERVED_TOKENS, SPARE_ROWS, NicheformerConfig

TOKENS, POSITIONS, HEAD = "embeddings.weight", "positional_embedding.weight", "classifier_head"
_PROJECTIONS = ("query", "key", "value")
_LINEAR = {"output": "self_attn.out_proj", "up": "linear1", "down": "linear2"}
_NORMS = {"attention_norm": "norm1", "feed_forward_norm": "norm2"}
_INPUTS = "self_attn.in_proj"


def from_published(tensors: dict[str, np.ndarray], config: NicheformerConfig, n_genes: int) -> Parameters:
    """Parameters of `Nicheformer`, float32, from tensors by their names without a prefix."""
    wide = {name: np.asarray(tensor, np.float32) for name, tensor in tensors.items()}
    n_tokens = n_genes + RESERVED_TOKENS
    rows, classes = padded_size(n_tokens + SPARE_ROWS), padded_size(n_tokens)

    def each_layer(name: str) -> np.ndarray:
        return np.stack([wide[f"encoder.layers.{layer}.{name}"] for layer in range(config.layers)])

    blocks: Parameters = {}
    weights, biases = each_layer(f"{_INPUTS}_weight"), each_layer(f"{_INPUTS}_bias")
    for place, name in enumerate(_PROJECTIONS):
        part = slice(place * config.width, (place + 1) * config.width)
        blocks[name] = {"kernel": weights[:, part].swapaxes(1, 2), "bias": biases[:, part]}
    for ours, theirs in _LINEAR.items():
        blocks[ours] = {
            "kernel": each_layer(f"{theirs}.weight").swapaxes(1, 2),
            "bias": each_layer(f"{theirs}.bias"),
        }
    for ours, theirs in _NORMS.items():
        blocks[ours] = {"scale": each_layer(f"{theirs}.weight"), "bias": each_layer(f"{theirs}.bias")}
    return {
        "token_embedding": {"table": _padded(wide[TOKENS], rows)},
        "position_embedding": wide[POSITIONS],
        "blocks": blocks,
        "head": {
            "kernel": _padded(wide[f"{HEAD}.weight"], classes).T,
            "bias": _padded(wide[f"{HEAD}.bias"], classes),
        },
    }


def to_published(parameters: Parameters, config: NicheformerConfig, n_genes: int) -> dict[str, np.ndarray]:
    """Float32 tensors by their published names: the inverse of `from_published`."""
    n_tokens = n_genes + RESERVED_TOKENS
    head = {name: np.asarray(leaf) for name, leaf in parameters["head"].items()}
    tensors = {
        TOKENS: np.asarray(parameters["token_embedding"]["table"])[: n_tokens + SPARE_ROWS],
        POSITIONS: np.asarray(parameters["position_embedding"]),
        f"{HEAD}.weight": np.ascontiguousarray(head["kernel"].T[:n_tokens]),
        f"{HEAD}.bias": head["bias"][:n_tokens],
    }
    blocks = parameters["blocks"]
    for layer in range(config.layers):
        start = f"encoder.layers.{layer}."

        def own(name: str, part: str, layer: int = layer) -> np.ndarray:
            leaf = np.asarray(blocks[name][part])[layer]
            return np.ascontiguousarray(leaf.T if part == "kernel" else leaf)

        tensors[f"{start}{_INPUTS}_weight"] = np.concatenate([own(name, "kernel") for name in _PROJECTIONS])
        tensors[f"{start}{_INPUTS}_bias"] = np.concatenate([own(name, "bias") for name in _PROJECTIONS])
        for ours, theirs in _LINEAR.items():
            tensors[f"{start}{theirs}.weight"] = own(ours, "kernel")
            tensors[f"{start}{theirs}.bias"] = own(ours, "bias")
        for ours, theirs in _NORMS.items():
            tensors[f"{start}{theirs}.weight"] = own(ours, "scale")
            tensors[f"{start}{theirs}.bias"] = own(ours, "bias")
    return tensors


def _padded(rows: np.ndarray, size: int) -> np.ndarray:
    return np.concatenate([rows, np.zeros((size - len(rows), *rows.shape[1:]), np.float32)])
