"""Maps of tissue and embeddings: each cell in the colour of what it is, is said to be, or is wrong by."""

from __future__ import annotations

import json

import matplotlib.image
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from synthetic_suite import METHODS, Suite

from scfm_jax.downstream.drawing import class_colour
from scfm_jax.downstream.suite_figures import draw_training
from scfm_jax.downstream.suite_maps import ABSENT, WRONG, draw_maps, paint, project
from scfm_jax.downstream.suite_results import read_results
from scfm_jax.errors import InputError


def test_maps_colour_cells_by_what_is_true_said_and_wrong(tmp_path):
    suite = Suite(tmp_path)
    suite.task("region", "classes", [("own", "baseline", None, 1.0)])
    (task,) = read_results(suite.write())
    pooled = task.pooled(task.methods[0])
    some = pooled._replace(cells=pooled.cells[::2], truth=pooled.truth[::2], by_seed=[pooled.by_seed[0][::2]])
    (row, _) = draw_maps(task, task.tissue(), task.methods[0], some, f"{tmp_path}/region")
    truth, predicted, error = (matplotlib.image.imread(drawing.path)[..., :3] for drawing in row)
    shown = [[area(image, class_colour(code)) for code in range(4)] for image in (truth, predicted)]
    assert np.argsort(shown[0]).tolist() == np.argsort(np.bincount(suite.niche[suite.slide == 0])).tolist()
    assert min(shown[1]) > 300
    assert area(truth, ABSENT) < 300 < 3 * 300 < area(predicted, ABSENT)
    assert area(truth, WRONG) == 0 < area(error, WRONG)
    here = suite.slide[some.cells] == 0
    wrong = (some.by_seed[0].argmax(1) != some.truth)[here].mean()
    assert row[2].caption == f"{wrong:.1%} of {here.sum()} tested cells are wrong."
    suite.slide[:] = 0
    on_one = task.tissue()._replace(slide=suite.slide)
    perfect = some._replace(by_seed=[np.eye(4, dtype=np.float32)[some.truth]])
    (row,) = draw_maps(task, on_one, task.methods[0], perfect, f"{tmp_path}/perfect")
    right = matplotlib.image.imread(row[2].path)[..., :3]
    assert area(right, WRONG) < 0.2 * area(error, WRONG)  # the legend's
    with pytest.raises(InputError, match=r"region\.npz: 'xy' has 900 rows, and cell 900 is predicted"):
        draw_maps(task, task.tissue(), task.methods[0], pooled._replace(cells=pooled.cells + 1), "x")


def area(image, colour):
    return int((np.abs(image - to_rgb(colour)).max(-1) < 0.02).sum())


def test_of_many_classes_the_commonest_have_colours_of_their_own(tmp_path):
    suite = Suite(tmp_path)
    suite.task("region", "classes", [], classes=[f"type {i}" for i in range(49)])
    suite.task("depth", "value", METHODS[:1])
    task = read_results(suite.write())[0]
    truth = np.repeat(np.arange(49), np.arange(49) + 1)
    painted = paint(task, truth, np.append(np.arange(49), -1))
    own = painted.colours[34:49]
    assert len(np.unique(own, axis=0)) == 15
    assert len(np.unique(painted.colours[:34], axis=0)) == 1
    labels = [handle.get_label() for handle in painted.handles]
    assert labels == [*(f"type {i}" for i in range(34, 49)), "other (34 classes)", "no label"]
    assert tuple(painted.colours[-1]) == to_rgb(ABSENT)


def test_projection_is_that_of_the_singular_values(monkeypatch):
    monkeypatch.setattr("scfm_jax.downstream.suite_maps.find_spec", lambda name: None)
    x = np.random.default_rng(0).normal(size=(200, 6)) * [5, 3, 1, 1, 1, 1]
    xy, axes = project(x.astype(np.float32))
    u, s, _ = np.linalg.svd(x - x.mean(0), full_matrices=False)
    np.testing.assert_allclose(np.abs(xy), np.abs(u[:, :2] * s[:2]), atol=1e-4)
    shares = s**2 / (s**2).sum()
    assert axes == (f"PC 1 ({shares[0]:.0%})", f"PC 2 ({shares[1]:.0%})")


def test_training_without_validation_has_no_panel_for_it(tmp_path):
    suite = Suite(tmp_path, n=200)
    suite.task("region", "classes", METHODS[-1:], seeds=(0,))
    (task,) = read_results(suite.write())
    assert draw_training(task, tmp_path / "none.png") is None
    (tmp_path / "history").mkdir()
    heights = []
    for validation in (0.5, None):
        rows = [{"epoch": epoch, "loss": 1 / epoch, "validation": validation} for epoch in (1, 2)]
        name = suite.rows[0]["predictions"].replace("predictions", "history").replace(".npz", ".json")
        (tmp_path / name).write_text(json.dumps(rows))
        image = matplotlib.image.imread(draw_training(task, tmp_path / "training.png").path)
        axes = (np.abs(image[..., :3] - to_rgb("#8a939b")).max(-1) < 0.02).sum(0).max()  # the left spines
        heights.append((image.shape[0], axes))
    assert heights[0][0] > 1.5 * heights[1][0]
    assert heights[0][1] > 1.5 * heights[1][1]
