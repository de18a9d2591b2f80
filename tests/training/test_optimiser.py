from __future__ import annotations

import dataclasses

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType

from scfm_jax.models.functional import abstract
from scfm_jax.models.tissue import TissueConfig, TissueModel
from scfm_jax.models.transformer import TransformerConfig
from scfm_jax.training.config import OptimiserConfig
from scfm_jax.training.mesh import replicated
from scfm_jax.training.optimiser import learning_rate, make_optimiser
from scfm_jax.training.step import state_shardings

EIGHT = AbstractMesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
SCHEDULE = OptimiserConfig(steps=100, warmup_steps=1, initial_rate=0.1, peak_rate=0.2, epsilon=1e-3)


def test_adamw_against_numpy() -> None:
    """Two steps: clipping by the global norm, moments, decay of matrices only, stacked or not."""
    config = dataclasses.replace(SCHEDULE, weight_decay=0.3, clip=0.5)
    names = {
        "matrix": ("layers", "embed", "mlp"),
        "norm": ("layers", "embed"),
        "table": ("vocabulary", "embed"),
    }
    shapes = {"matrix": (2, 3, 4), "norm": (2, 3), "table": (5, 3)}
    rng = np.random.default_rng(0)
    x = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    optimiser = make_optimiser(config, names)
    mine = jax.tree.map(jax.numpy.asarray, x)
    moments = optimiser.init(mine)
    first, second = ({name: np.zeros(shape) for name, shape in shapes.items()} for _ in range(2))
    for step, (rate, size) in enumerate([(0.1, 1.0), (0.2, 0.01)], 1):
        gradient = {name: size * rng.normal(size=shape) for name, shape in shapes.items()}
        updates, moments = jax.jit(optimiser.update)(jax.tree.map(jax.numpy.asarray, gradient), moments, mine)
        mine = jax.tree.map(lambda a, b: a + b, mine, updates)
        norm = np.sqrt(sum((g**2).sum() for g in gradient.values()))
        assert (norm > 0.5) == (step == 1)
        for name in shapes:
            g = gradient[name] * min(1, 0.5 / norm)
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.95 * second[name] + 0.05 * g**2
            unbiased = first[name] / (1 - 0.9**step), second[name] / (1 - 0.95**step)
            decay = 0.0 if name == "norm" else 0.3
            x[name] = x[name] - rate * (unbiased[0] / (np.sqrt(unbiased[1]) + 1e-3) + decay * x[name])
    for name in shapes:
        np.testing.assert_allclose(mine[name], x[name], rtol=1e-5, atol=1e-6)


def test_muon_against_numpy() -> None:
    """Each layer's update is nearly orthogonal on its own (Jordan 2024); the rest moves under Nadam."""
    config = dataclasses.replace(SCHEDULE, name="muon", weight_decay=0.3, clip=1e9)
    names = {
        "stacked": ("layers", "embed", "mlp"),
        "single": ("embed", None),
        "norm": ("layers", "embed"),
        "table": ("vocabulary", "embed"),
    }
    shapes = {"stacked": (2, 6, 4), "single": (6, 3), "norm": (2, 6), "table": (5, 6)}
    rng = np.random.default_rng(0)
    x, gradient = ({name: rng.normal(size=shape) for name, shape in shapes.items()} for _ in range(2))

    optimiser = make_optimiser(config, names)
    mine, slope = (jax.tree.map(jax.numpy.asarray, tree) for tree in (x, gradient))
    moved = jax.jit(optimiser.update)(slope, optimiser.init(mine), mine)[0]
    for name in ("norm", "table"):
        ahead = gradient[name] * (0.9 * 0.1 / (1 - 0.9**2) + 1)
        np.testing.assert_allclose(moved[name], -0.1 * ahead / (np.abs(gradient[name]) + 1e-3), rtol=1e-4)
    for name, matrices in {"stacked": 2, "single": 1}.items():
        rows, columns = shapes[name][-2:]
        layers = [np.reshape(tree[name], (matrices, rows, columns)) for tree in (gradient, x, moved)]
        for slope, weight, update in zip(*layers, strict=True):
            y = slope / np.linalg.norm(slope)
            for _ in range(5):
                square = y @ y.T
                y = 3.4445 * y + (-4.7750 * square + 2.0315 * square @ square) @ y
            expected = -0.1 * (0.2 * np.sqrt(max(rows, columns)) * y + 0.3 * weight)
            np.testing.assert_allclose(update, expected, rtol=2e-3, atol=1e-4)
            singular = np.linalg.svd(y, compute_uv=False)
            assert singular.min() > 0.6 and singular.max() < 1.3


def test_muon_takes_every_matrix_of_a_model_but_its_gene_table() -> None:
    small = TransformerConfig(layers=2, heads=1, width=8)
    config = TissueConfig(encoder=small, decoder=small)
    _, shapes, names = abstract(lambda rngs: TissueModel(config, 20, rngs=rngs))
    optimiser = make_optimiser(dataclasses.replace(SCHEDULE, name="muon"), names)
    state = jax.eval_shape(optimiser.init, shapes)
    momentum = state[1].inner_states["muon"].inner_state[0].mu
    taken = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(momentum)}
    matrices = {
        jax.tree_util.keystr(path)
        for path, name in jax.tree_util.tree_leaves_with_path(names, is_leaf=lambda x: isinstance(x, tuple))
        if len([axis for axis in name if axis != "layers"]) == 2 and set(name) != {None}
    }
    assert taken == matrices - {"['gene_embedding']['table']"}
    assert len(taken) == 2 * 7 + 3


def test_moments_lie_beside_their_parameters() -> None:
    names = {"deep": {"matrix": ("embed", "mlp")}, "matrix": ("mlp", "embed"), "norm": ("embed",)}
    shapes = {
        "deep": {"matrix": jax.ShapeDtypeStruct((4, 8), np.float32)},
        "matrix": jax.ShapeDtypeStruct((8, 4), np.float32),
        "norm": jax.ShapeDtypeStruct((4,), np.float32),
    }
    for name, moments in {"adamw": 2 * 3, "muon": 2 + 2 * 1}.items():
        optimiser = make_optimiser(dataclasses.replace(SCHEDULE, name=name), names)
        state = state_shardings(EIGHT, optimiser, shapes, names)
        parameters = zip(jax.tree.leaves(shapes), jax.tree.leaves(state["parameters"]), strict=True)
        of_shape = {leaf.shape: place for leaf, place in parameters}
        assert len({place.spec for place in of_shape.values()}) == len(shapes)
        found = 0
        leaves = jax.tree.leaves(jax.eval_shape(optimiser.init, shapes))
        for leaf, place in zip(leaves, jax.tree.leaves(state["optimiser"]), strict=True):
            if leaf.shape in of_shape:
                assert place == of_shape[leaf.shape]
                found += 1
            else:
                assert place == replicated(EIGHT)
        assert found == moments


def test_the_published_schedule_of_nicheformer() -> None:
    """A cosine from step 0 over the whole schedule, times a line, never below the final rate."""
    config = OptimiserConfig(
        steps=50, schedule_steps=1_000, schedule="product", peak_rate=7e-4, final_rate=1e-5, warmup_steps=40
    )
    steps = np.arange(0, 1_200, 7)
    stated = 7e-4 * (1 + np.cos(np.pi * np.minimum(steps, 1_000) / 1_000)) / 2 * np.minimum(steps / 40, 1)
    said = jax.vmap(learning_rate(config))(jax.numpy.asarray(steps))
    np.testing.assert_allclose(said, np.maximum(stated, 1e-5), rtol=1e-5)


def test_everything_decays_where_asked() -> None:
    names = {"matrix": ("embed", "mlp"), "norm": ("embed",)}
    ones = {"matrix": jax.numpy.ones((2, 3)), "norm": jax.numpy.ones(2)}
    zeros = jax.tree.map(jax.numpy.zeros_like, ones)
    for decay, shrinks in (("matrices", 0.0), ("all", -0.1 * 0.3)):
        optimiser = make_optimiser(dataclasses.replace(SCHEDULE, weight_decay=0.3, decay=decay), names)
        updates, _ = optimiser.update(zeros, optimiser.init(ones), ones)
        np.testing.assert_allclose(updates["matrix"], -0.1 * 0.3, rtol=1e-6)
        np.testing.assert_allclose(updates["norm"], shrinks, rtol=1e-6)
