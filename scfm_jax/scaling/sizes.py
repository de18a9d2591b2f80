"""How large a model is, the way scaling laws count: with embeddings and without."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from scfm_jax.models.functional import abstract
from scfm_jax.training.config import RunConfig
from scfm_jax.training.task import model_builder


class Size(NamedTuple):
    """Scalars that are trained: all, and those outside of embeddings.

    Embeddings are the tables of genes, values, positions and segments, and whatever has the vocabulary as an
    axis: they grow with the panel and not with the model, and cost next to no FLOPs.
    """

    parameters: int
    without_embeddings: int


def size_of(config: RunConfig, n_genes: int) -> Size:
    """Count a recipe's parameters over a vocabulary of `n_genes`, from shapes alone."""
    _, shapes, axes = abstract(model_builder(config, n_genes))
    every = inside = 0
    names = dict(jax.tree_util.tree_leaves_with_path(axes, is_leaf=lambda node: isinstance(node, tuple)))
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        every += leaf.size
        if "vocabulary" not in names[path] and not any("embedding" in _name(key) for key in path):
            inside += leaf.size
    return Size(every, inside)


def _name(key: Any) -> str:
    return str(getattr(key, "key", key))
