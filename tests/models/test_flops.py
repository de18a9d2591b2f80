"""Counts from shapes against XLA's cost analysis of the models themselves, scans unrolled.

XLA counts everything: norms, softmax, rotary turns, activations and, backwards, the scatter into the gene
table. Those are a few operations a feature or a score, where products are hundreds, so that at the sizes here
its count is above ours by less than a hundredth, and never below; a part left out would show.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from scfm_jax.models.flops import Load, forward_flops, training_flops
from scfm_jax.models.functional import abstract
from scfm_jax.models.nicheformer import Nicheformer, NicheformerConfig
from scfm_jax.models.tissue import TissueConfig, TissueModel
from scfm_jax.models.transformer import TransformerConfig

# 98 genes and 30 reserved tokens fill the rows of Nicheformer's head: the padded head is the unpadded one.
ROWS, TOKENS, PLACES, GENES = 3, 96, 64, 98
LOAD = Load.padded(ROWS, TOKENS, PLACES)
TISSUE = TissueConfig(
    encoder=TransformerConfig(layers=3, heads=1, width=256),
    decoder=TransformerConfig(layers=2, heads=1, width=192, hidden=320),
    attention="plain",
    unroll=3,
)
NICHEFORMER = NicheformerConfig(layers=3, heads=1, width=256, hidden=384, attention="plain", unroll=3)


def ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def run_tissue(
    model: TissueModel, genes: Any, values: Any, positions: Any, lengths: Any, decoded: Any
) -> jax.Array:
    hidden = model.encode(genes, values, positions, lengths)
    where = positions[:, :PLACES]
    return model.decode(hidden, genes, decoded, decoded > 3, where, lengths).sum()


def run_nicheformer(model: Nicheformer, tokens: Any, lengths: Any, places: Any) -> jax.Array:
    hidden = model.encode(tokens, tokens, tokens, lengths)
    return model.logits(jnp.take_along_axis(hidden, places[..., None], axis=1)).max(-1).sum()


FAMILIES: dict[str, tuple[Any, Callable[[nnx.Rngs], nnx.Module], Callable[..., jax.Array], tuple[Any, ...]]]
FAMILIES = {
    "tissue": (
        TISSUE,
        lambda rngs: TissueModel(TISSUE, GENES, rngs=rngs),
        run_tissue,
        (
            ints(ROWS, TOKENS),
            floats(ROWS, TOKENS),
            floats(ROWS, TOKENS, 2),
            ints(ROWS),
            ints(ROWS, PLACES),
        ),
    ),
    "nicheformer": (
        NICHEFORMER,
        lambda rngs: Nicheformer(NICHEFORMER, GENES, rngs=rngs),
        run_nicheformer,
        (ints(ROWS, TOKENS), ints(ROWS), ints(ROWS, PLACES)),
    ),
}


def counted_by_xla(function: Callable[..., Any], *arguments: Any) -> float:
    text = jax.jit(function).lower(*arguments)
    assert "while" not in text.as_text()
    return text.cost_analysis()["flops"]


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_and_backward_are_what_xla_counts(family: str) -> None:
    config, build, run, arguments = FAMILIES[family]
    graph, shapes, _ = abstract(build)

    def forward(parameters: Any, *arguments: Any) -> jax.Array:
        return run(nnx.merge(graph, parameters), *arguments)

    stated = sum(forward_flops(config, GENES, LOAD).values())
    assert 1 < counted_by_xla(forward, shapes, *arguments) / stated < 1.01
    both = counted_by_xla(jax.value_and_grad(forward), shapes, *arguments)
    assert 1 < both / training_flops(config, GENES, LOAD) < 1.01


def test_published_nicheformer_by_hand() -> None:
    """12 layers, 512 wide, 1,024 inside, 20,310 genes, one sentence of 1,500 tokens, 225 masked."""
    parts = forward_flops(NicheformerConfig(), 20_310, Load.padded(1, 1_500, 225))
    assert parts["layers"] == 1_500 * 12 * 2 * (4 * 512 * 512 + 2 * 512 * 1_024)
    assert parts["attention"] == 12 * 4 * 1_500**2 * 512
    assert parts["head"] == 225 * 2 * 512 * 20_340
    assert parts["embedding"] == 0


def test_published_tissue_by_hand() -> None:
    """Encoder 12 x 512, decoder 4 x 512, feed-forward 1,368; 5,000 tokens, 19,266 decoded places."""
    stack = TransformerConfig(layers=12, heads=8, width=512)
    model = TissueConfig(encoder=stack, decoder=replace(stack, layers=4))
    parts = forward_flops(model, 19_264, Load.padded(2, 5_000, 19_266))
    layer = 2 * (4 * 512 * 512 + 3 * 512 * 1_368)
    assert parts["layers"] == 2 * (12 * layer * 5_000 + 4 * layer * 19_266)
    assert parts["attention"] == 2 * 4 * 512 * (12 * 5_000**2 + 4 * 19_266**2)
    assert parts["head"] == 2 * 2 * 512 * 19_266
    assert parts["embedding"] == 2 * 2 * (5_000 * (100 + 100**2 + 100 * 512) + 19_266 * 512 * 512)


def test_loads_add_up() -> None:
    first, second = np.array([5, 9, 2]), np.array([3, 3, 7])
    whole = Load.real(first, second)
    assert whole == Load(3, 16, 110, 13, 67)
    assert Load.padded(3, 4, 2) == Load.real([4] * 3, [2] * 3)
    singles = [Load.real(first[i : i + 1], second[i : i + 1]) for i in range(3)]
    assert singles[0] + singles[1] + singles[2] == whole
    assert training_flops(TISSUE, GENES, whole) == pytest.approx(
        sum(training_flops(TISSUE, GENES, single) for single in singles)
    )
