from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from scfm_jax.models.functional import abstract, count_parameters, initialise
from scfm_jax.models.tissue import TissueConfig, TissueModel
from scfm_jax.models.transformer import TransformerConfig

SMALL = TransformerConfig(layers=2, heads=1, width=16)
CONFIG = TissueConfig(encoder=SMALL, decoder=SMALL, bins=8)


def build(rngs: nnx.Rngs) -> TissueModel:
    return TissueModel(CONFIG, 20, dispersion=True, rngs=rngs)


FRESH = jax.jit(lambda seed: initialise(build, jax.random.key(seed)))


def flat(tree: Any) -> dict[str, Any]:
    is_leaf = lambda node: isinstance(node, tuple)  # noqa: E731
    return {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    }


def test_one_name_for_every_axis() -> None:
    _, shapes, names = abstract(build)
    shapes, names = flat(shapes), flat(names)
    assert shapes.keys() == names.keys()
    for path, shape in shapes.items():
        assert len(names[path]) == shape.ndim, path
        assert (names[path][:1] == ("layers",)) == ("blocks" in path), path
        assert ("vocabulary" in names[path]) == (128 in shape.shape), (
            path
        )  # 20 genes and 2 depth tokens, padded
    assert names["['encoder']['blocks']['query']['kernel']"] == ("layers", "embed", "heads")
    assert names["['encoder']['blocks']['down']['kernel']"] == ("layers", "mlp", "embed")
    assert names["['gene_embedding']['table']"] == ("vocabulary", "embed")


def test_shapes_are_those_of_fresh_parameters() -> None:
    _, shapes, _ = abstract(build)
    fresh = FRESH(0)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), fresh) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), shapes
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(fresh)} == {np.dtype(np.float32)}
    assert (
        count_parameters(fresh) == count_parameters(shapes) == sum(np.size(x) for x in jax.tree.leaves(fresh))
    )


def test_round_trip_through_a_module() -> None:
    graph, _, _ = abstract(build)
    fresh = FRESH(0)
    back = nnx.to_pure_dict(nnx.split(nnx.merge(graph, fresh))[1])
    jax.tree.map(np.testing.assert_array_equal, fresh, back)


def test_the_key_decides() -> None:
    first, again, other = map(FRESH, (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert (first["gene_embedding"]["table"] != other["gene_embedding"]["table"]).all()


# On paper: a layer holds 4 (w + 1) w of attention, 3 w f + 2 f + w of feed-forward, 2 w of norms.
@pytest.mark.parametrize(("layers", "heads", "width", "feed_forward"), [(4, 2, 128, 344), (12, 8, 512, 1368)])
def test_published_sizes(layers: int, heads: int, width: int, feed_forward: int) -> None:
    config = TissueConfig(
        encoder=TransformerConfig(layers=layers, heads=heads, width=width),
        decoder=TransformerConfig(layers=2, heads=heads, width=width),
    )
    _, shapes, _ = abstract(lambda rngs: TissueModel(config, 19_264, rngs=rngs))
    layer = 4 * (width + 1) * width + 3 * width * feed_forward + 2 * feed_forward + width + 2 * width
    genes = 19_328 * width  # 19,267 rows, padded
    values = 100 + 100 + 100 * 100 + 100 + 100 * width + 2 * width
    ends = 4 * width + (width + 1) * width + width + 1
    assert count_parameters(shapes) == genes + values + (layers + 2) * layer + ends
