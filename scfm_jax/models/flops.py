"""Model FLOPs of a training step: what the mathematics asks for, whatever a compiler or a kernel makes of it.

XLA's own figures are of no use here: they count a scanned body once and a custom kernel as nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from jaxtyping import Int

from scfm_jax.models.nicheformer import NicheformerConfig
from scfm_jax.models.tissue import TissueConfig
from scfm_jax.models.transformer import TransformerConfig
from scfm_jax.reserved_tokens import RESERVED_TOKENS

# A multiply-add is two operations. The backward pass has two products (of the input and of the weight) for
# each of the forward pass.
_PRODUCT, _FORWARD_AND_BACKWARD = 2, 3


@dataclass(frozen=True)
class Load:
    """What a model has to work through, as sums over a batch; loads add up.

    Attributes
    ----------
    rows
        Samples.
    tokens, pairs
        Of the encoder: tokens, and (query, key) pairs, each row's length squared.
    second_tokens, second_pairs
        Of AIDO.Tissue's decoder: decoded genes, and their pairs. Of Nicheformer: masked places, whose tokens
        the head scores; it has no second pairs.
    """

    rows: float
    tokens: float
    pairs: float
    second_tokens: float
    second_pairs: float

    @classmethod
    def padded(cls, rows: int, first: int, second: int) -> Load:
        """Of `rows` rows whose static lengths are `first` and `second`, padding included."""
        return cls(rows, rows * first, rows * first**2, rows * second, rows * second**2)

    @classmethod
    def real(
        cls,
        first: Sequence[int] | Int[np.ndarray, " b"],
        second: Sequence[int] | Int[np.ndarray, " b"],
    ) -> Load:
        """Of rows that have so many real tokens, and so many real places, each."""
        one, two = np.asarray(first, np.float64), np.asarray(second, np.float64)
        return cls(len(one), one.sum(), (one**2).sum(), two.sum(), (two**2).sum())

    def scaled(self, times: float) -> Load:
        """Of so many times as much."""
        return Load(*(getattr(self, item.name) * times for item in fields(self)))

    def __add__(self, other: Load) -> Load:
        return Load(*(getattr(self, item.name) + getattr(other, item.name) for item in fields(self)))


def training_flops(model: TissueConfig | NicheformerConfig, n_genes: int, load: Load) -> float:
    """Floating-point operations of one step, forward and backward: three times the forward pass.

    Counted are the matrix products and they alone: projections, feed-forward, attention over every pair of a
    row (it is bidirectional), the matrices of the value embedding, and the heads. A gather is no operation,
    and what a policy recomputes was counted already. The vocabulary is the unpadded one.

    Parameters
    ----------
    model
        Sizes.
    n_genes
        Genes of the vocabulary; Nicheformer's head scores its reserved tokens too.
    load
        The batch, by padded or by real lengths.
    """
    return _FORWARD_AND_BACKWARD * sum(forward_flops(model, n_genes, load).values())


def forward_flops(model: TissueConfig | NicheformerConfig, n_genes: int, load: Load) -> dict[str, float]:
    """Operations of a forward pass by part: ``embedding``, ``layers``, ``attention`` (of pairs), ``head``."""
    if isinstance(model, NicheformerConfig):
        of_layer = 4 * model.width**2 + 2 * model.width * model.hidden
        multiplied = {
            "embedding": 0.0,
            "layers": load.tokens * model.layers * of_layer,
            "attention": load.pairs * model.layers * 2 * model.width,
            "head": load.second_tokens * model.width * (n_genes + RESERVED_TOKENS),
        }
    else:
        wide, narrow, bins = model.encoder, model.decoder, model.bins
        multiplied = {
            "embedding": load.tokens * (bins + bins**2 + bins * wide.width)
            + load.second_tokens * wide.width * narrow.width,
            "layers": load.tokens * _of_token(wide) + load.second_tokens * _of_token(narrow),
            "attention": load.pairs * _of_pair(wide) + load.second_pairs * _of_pair(narrow),
            "head": load.second_tokens * narrow.width,
        }
    return {part: _PRODUCT * times for part, times in multiplied.items()}


def _of_token(stack: TransformerConfig) -> int:
    """Multiplications that a token costs in a stack: four projections and SwiGLU's three."""
    return stack.layers * (4 * stack.width**2 + 3 * stack.width * stack.feed_forward)


def _of_pair(stack: TransformerConfig) -> int:
    """Multiplications that a (query, key) pair costs: in its score, and of its value."""
    return stack.layers * 2 * stack.width
