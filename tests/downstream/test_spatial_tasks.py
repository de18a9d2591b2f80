"""Tasks on an AnnData: the figures of a suite, truths and parts of an error by NumPy, and what fails."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy.spatial import ConvexHull, Delaunay
from scipy.spatial.distance import cdist
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from scfm_jax.corpus import Corpus, Source
from scfm_jax.downstream import suite as suite_module
from scfm_jax.downstream.cohort import Cohort, open_cohort
from scfm_jax.downstream.embed import embed_file
from scfm_jax.downstream.expression import components
from scfm_jax.downstream.finetuned import FinetuneConfig
from scfm_jax.downstream.folds import FoldsConfig, make_folds
from scfm_jax.downstream.imputation import masked_expression, predict_masked
from scfm_jax.downstream.linear import STRENGTHS
from scfm_jax.downstream.mixing import mixing as score_mixing
from scfm_jax.downstream.model import TrainedModel, open_model
from scfm_jax.downstream.spatial_tasks import composition, density, imputation, mixing
from scfm_jax.downstream.suite import run_suite
from scfm_jax.downstream.suite_comparison import compare
from scfm_jax.downstream.suite_results import Task, read_results
from scfm_jax.errors import DataWarning, InputError

pytestmark = [
    pytest.mark.usefixtures("compile_fast"),
    pytest.mark.filterwarnings("ignore::scfm_jax.errors.DataWarning"),  # few blocks, and shared discs
]

READING: dict[str, Any] = {"species": "human", "technology": "simseq", "um_per_unit": 1.0}
SPLIT = FoldsConfig(blocks=4, n_folds=2, margin=2, min_kept=0.05)
RADIUS = 30.0
SMALL: dict[str, Any] = {"min_cells": 5, "min_blocks": 2}
EMPTY = 50  # a cell of the file without a count
SUITE = """
[files.adata]
path = "adata.h5ad"
species = "human"
technology = "simseq"
um_per_unit = 1.0
labels = ["cell_type", "technology"]

[models.tiny]
run = "tiny"

[methods.probe]
way = "probe"
of = ["tiny"]
attend = true
neighbours = [2]

[methods.masking]
way = "imputation"
of = ["tiny"]
neighbours = [2]
"""
TASK = """
[tasks.{kind}]
kind = "{kind}"
files = ["adata"]
min_cells = 5
min_blocks = 2
neighbours = [0, 2]
means = [4]
choosing_margin = 2
split = {{ blocks = 4, n_folds = 2, margin = 2, min_kept = 0.05 }}
"""


@pytest.fixture(scope="module")
def model(finished: Path) -> TrainedModel:
    return open_model(finished)


@pytest.fixture(scope="module")
def tissue(corpus_path: Path) -> anndata.AnnData:
    """A slide, its rows in an order of their own, with made-up batches under a name that suites reserve."""
    slide = anndata.read_h5ad(corpus_path.parent / "slide1.h5ad")
    counts = slide.X.toarray()
    counts[EMPTY] = 0
    label = slide.obs["cell_type"].astype(str).to_numpy().astype(object)
    label[5:15] = "nan"
    label[30:33] = "rare"
    batch = np.where(np.arange(slide.n_obs) % 2, "even", "odd")
    adata = anndata.AnnData(
        counts,
        pd.DataFrame({"cell_type": label, "technology": batch}, index=slide.obs_names),
        pd.DataFrame(index=slide.var_names),
        obsm={"spatial": slide.obsm["spatial"]},
    )
    return adata[np.random.default_rng(3).permutation(adata.n_obs)].copy()


@pytest.fixture(scope="module")
def folder(tissue: anndata.AnnData, finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tissue as a file, and a suite of all three kinds whose predictions are scored, run."""
    folder = tmp_path_factory.mktemp("suite")
    tissue.write_h5ad(folder / "adata.h5ad")
    (folder / "tiny").symlink_to(finished)
    tasks = {
        "density": f"radius = {RADIUS}\ncoordinates = true\n",
        "composition": f'radius = {RADIUS}\nlabels = ["cell_type"]\n',
        "imputation": "test_cells = 40\n",
    }
    text = SUITE + "".join(
        TASK.format(kind=kind).replace("split", f"{more}split") for kind, more in tasks.items()
    )
    (folder / "suite.toml").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suite_module, "write_suite_report", lambda out: out)
        run_suite(folder / "suite.toml", folder / "out")
    return folder


@pytest.fixture(scope="module")
def done(tissue: anndata.AnnData, model: TrainedModel) -> anndata.AnnData:
    adata, settings = tissue.copy(), {**READING, "split": SPLIT}
    predicted = {**settings, "radius": RADIUS, "means": (4,)}
    density(adata, model, coordinates_alone=True, **predicted)
    composition(adata, model, "cell_type", **SMALL, **predicted)
    imputation(adata, model, test_cells=40, **settings)
    return adata


@pytest.fixture(scope="module")
def cohort(folder: Path) -> Cohort:
    return open_cohort(folder / "cohort", [Source(str(folder / "adata.h5ad"), **READING)])


@pytest.fixture(scope="module")
def corpus(cohort: Cohort) -> Corpus:
    return cohort.corpus


@pytest.fixture(scope="module")
def embedded(folder: Path, model: TrainedModel) -> anndata.AnnData:
    """The tissue with the embedding that `scfm embed` gives."""
    embed_file(model, Source(str(folder / "adata.h5ad"), **READING), folder / "embedded.h5ad")
    return anndata.read_h5ad(folder / "embedded.h5ad")


def untouched(adata: anndata.AnnData) -> bool:
    return (list(adata.obs), list(adata.obsm), dict(adata.uns)) == (
        ["cell_type", "technology"],
        ["spatial"],
        {},
    )


def task_of(folder: Path, kind: str) -> Task:
    return next(task for task in read_results(folder / "out") if task.name == kind)


@pytest.mark.parametrize("kind", ["density", "composition", "imputation"])
def test_every_figure_is_the_suites(folder, done, kind):
    task, record = task_of(folder, kind), done.uns[kind]
    found, own = compare(task), {"imputation": "masking of tiny"}.get(kind, "probe of tiny")
    said = {own: record["scores"], **record["baselines"]}
    assert set(said) == {method.name for method in task.methods}
    for method, interval in zip(task.methods, found.pooled, strict=True):
        assert said[method.name][task.primary] == pytest.approx(dict(interval._asdict()), rel=1e-6)
    assert found.best_baseline.name == record["best_baseline"]
    difference = record["differences"][record["best_baseline"]][task.primary]
    sign = 1 if task.higher_is_better else -1
    assert found.verdict.interval.value == pytest.approx(sign * difference["value"], rel=1e-6)
    ends = sorted(sign * difference[end] for end in ("low", "high"))
    assert ends == pytest.approx(list(found.verdict.interval[1:]), rel=1e-6)
    rows = [json.loads(line) for line in (folder / "out" / "results.jsonl").read_text().splitlines()]
    table = record["folds"].replace({"method": {"imputation of model": own, "probe of model": own}})
    table = table.set_index(["fold", "method"])
    for row in (row for row in rows if row["task"] == kind):
        of_row = table.loc[row["fold"], row["method"]]
        assert (of_row["training_cells"], of_row["test_cells"]) == (row["n_train"], row["n_test"])
        assert of_row[list(row["scores"])].to_dict() == pytest.approx(row["scores"], rel=1e-6, nan_ok=True)


@pytest.mark.parametrize("kind", ["density", "composition"])
def test_predictions_of_test_cells_are_the_suites(folder, done, corpus, kind):
    (method,) = (each for each in task_of(folder, kind).methods if each.name == "probe of tiny")
    of, rows = (done.obsm if kind == "composition" else done.obs), corpus.column("source_row")
    truth, said, fold = np.asarray(of[kind]), np.asarray(of[f"{kind}_predicted"]), done.obs[f"{kind}_fold"]
    assert truth.dtype == said.dtype == np.float32
    for row in method.rows:
        held = np.load(folder / "out" / row["predictions"])
        cells = rows[held["cells"]]
        assert (fold.iloc[cells] == row["fold"]).all()
        np.testing.assert_array_equal(truth[cells], held["truth"])
        np.testing.assert_allclose(said[cells], held["predicted"], atol=1e-5)
    whole = lambda values: np.isfinite(values.reshape(len(values), -1)).all(1)  # noqa: E731
    empty = done.obs_names == f"slide1-{EMPTY}"
    np.testing.assert_array_equal(whole(said), ~empty)
    np.testing.assert_array_equal(fold.isna(), empty)
    np.testing.assert_array_equal(fold == "", ~whole(truth) & ~empty)
    assert (fold == "").sum() > 3 and done.uns[kind]["cells_unknown"] == 1


def test_density_is_a_count_within_the_hull_and_is_said_of_all_other_cells(done, embedded, model):
    there = np.flatnonzero(done.obs_names != f"slide1-{EMPTY}")
    xy = done.obsm["spatial"][there]
    others = (cdist(xy, xy) <= RADIUS).sum(1) - 1
    ring = RADIUS * np.stack([f(np.linspace(0, 2 * np.pi, 1441)) for f in (np.cos, np.sin)], axis=1)
    hull = Delaunay(xy[ConvexHull(xy).vertices])
    inside = (hull.find_simplex(xy[:, None] + ring) >= 0).all(1)
    truth = np.where(inside, np.log1p(others / (np.pi * RADIUS**2) * 1000), np.nan)
    np.testing.assert_allclose(done.obs["density"].to_numpy()[there], truth, rtol=1e-5)
    # Where there is no truth, a ridge regression of the embedding on all cells that have one.
    x = embedded.obsm["X_tissue"][there]
    x = StandardScaler().fit(x[inside]).transform(x)
    fits = [Ridge(1 / c).fit(x[inside], truth[inside]).predict(x[~inside]) for c in STRENGTHS]
    got = done.obs["density_predicted"].to_numpy()[there][~inside]
    assert min(np.abs(fit - got).max() for fit in fits) < 1e-4
    record = done.uns["density"]
    assert record["target"]["cells"] == {
        "scored": inside.sum(),
        "border": (~inside).sum(),
        "without_coordinates": 0,
    }
    assert record["unit"] == "log1p(cells per 1,000 µm²)" and record["way"] == "probe"
    assert (record["model"], record["model_hash"], record["neighbours"]) == ("tiny", model.hash, 2)


def test_composition_is_shares_of_the_labels_around_and_a_file_holds_all(done, tmp_path):
    done.write_h5ad(tmp_path / "done.h5ad")
    done = anndata.read_h5ad(tmp_path / "done.h5ad")
    record = done.uns["composition"]
    xy, label = done.obsm["spatial"], done.obs["cell_type"].to_numpy()
    seen = done.obs_names != f"slide1-{EMPTY}"
    near = (cdist(xy, xy) <= RADIUS) & ~np.eye(len(xy), dtype=bool)
    counts = np.stack([near[:, seen & (label == name)].sum(1) for name in record["classes"]], axis=1)
    total = counts.sum(1)
    scored = seen & (total >= 5)
    truth = np.where(scored[:, None], counts / np.maximum(total, 1)[:, None], np.nan)
    np.testing.assert_allclose(done.obsm["composition"], truth, rtol=1e-6)
    np.testing.assert_allclose(done.obsm["composition_predicted"][seen].sum(1), 1, rtol=1e-5)
    assert (*record["left_out"], *record["left_out_cells"]) == ("rare", 3)
    assert record["cells_without_label"] == 13
    assert {"mean composition", "composition by own type", "predicted types of the cells around"} < set(
        record["baselines"]
    )


def test_discs_that_hold_training_cells_are_counted_and_warned_of(tissue, done, corpus, model):
    rows = corpus.column("source_row")
    truth, xy = done.obs["density"].to_numpy()[rows], tissue.obsm["spatial"][rows]
    shared = []
    for fold in make_folds(corpus, SPLIT).folds:
        train, test = (cells[np.isfinite(truth[cells])] for cells in (fold.train, fold.test))
        shared.append((cdist(xy[test], xy[train]) <= RADIUS).any(1))
    shared = np.concatenate(shared)
    assert 0.1 < shared.mean() < 1
    assert done.uns["density"]["target"]["shared_discs"] == pytest.approx(shared.mean())
    told = (
        rf"^adata: the discs of {shared.sum()} of {len(shared)} test cells .* hold training cells: radius 30"
    )

    def stop(line: str) -> None:
        raise InterruptedError

    adata = tissue.copy()
    with pytest.warns(DataWarning, match=told), pytest.raises(InterruptedError):
        density(adata, model, radius=RADIUS, split=SPLIT, report=stop, **READING)
    assert untouched(adata)


def test_imputation_is_the_models_error_on_masked_genes_by_numpy(done, cohort, model):
    rows, record = cohort.corpus.column("source_row"), done.uns["imputation"]
    error, fold = done.obs["imputation_error"].to_numpy()[rows], done.obs["imputation_fold"].to_numpy()[rows]
    tested = np.flatnonzero([isinstance(name, str) for name in fold])
    assert len(tested) == record["cells_scored"] == 80
    _, _, objective = model.config.tissue()
    corpus, number = cohort.seen_by(model)
    cells = masked_expression(corpus, number[tested], objective, seed=0)
    said, target, mask = predict_masked(model.with_neighbours(2), corpus, cells.cells, cells.panel, seed=0)
    assert (mask == cells.mask).all() and (cells.values[mask] == pytest.approx(target[mask], abs=1e-5))
    squared, weight = np.where(mask, (cells.values - said) ** 2, 0), mask.astype(float)
    expected = np.where(mask.any(1), squared.sum(1) / np.maximum(mask.sum(1), 1), np.nan)
    np.testing.assert_allclose(error[tested], expected, rtol=1e-4)
    assert np.isnan(np.delete(error, tested)).all()
    weight[cells.counts > 0] /= objective.nonzero_rate
    weight[cells.counts == 0] /= objective.zero_rate
    scores = record["scores"]
    for part, of_part in (("", mask), ("_nonzero", mask & (cells.counts > 0)), ("_inverse_rate", weight)):
        value = scores[f"squared_error{part}"]
        assert value["value"] == pytest.approx((squared * of_part).sum() / of_part.sum(), rel=1e-4)
        assert value["low"] < value["value"] < value["high"]
    ratio = (
        scores["squared_error"]["value"] / record["baselines"]["weighted gene mean"]["squared_error"]["value"]
    )
    assert scores["skill"]["value"] == pytest.approx(1 - ratio, rel=1e-5)
    assert scores["skill"]["low"] < scores["skill"]["value"] < scores["skill"]["high"]
    assert record["expectation"].startswith("over masked entries (0.3 of non-zeros, 0.03 of zeros)")


def test_a_model_can_be_trained_for_a_task(tissue, model):
    adata, said = tissue.copy(), []
    settings = FinetuneConfig(epochs=1, batch_size=32)
    split = FoldsConfig(by="random", blocks=4, n_folds=2, margin=0)
    with pytest.warns(DataWarning, match="adata: neighbours of test cells are trained on"):
        density(
            adata,
            model,
            radius=RADIUS,
            way="head",
            neighbours=0,
            split=split,
            settings=settings,
            key_added="crowd",
            report=said.append,
            **READING,
        )
    record = adata.uns["crowd"]
    assert record["leaking"] and record["way"] == record["settings"]["way"] == "head"
    assert set(adata.obs["crowd_fold"].dropna()) == {"0", "1", ""}
    assert np.isfinite(adata.obs["crowd_predicted"]).sum() == 159
    names = {"training median", "training mean", "own expression", "distance to neighbour 10"}
    names.add("own expression + means of 10, 64, 256")
    assert set(record["baselines"]) == set(record["differences"]) == names
    assert len(said) == 2 * 6 and said[-1].startswith("fold 1: head of model: mae ")


def test_mixing_of_a_model_and_of_its_embedding_are_one(tissue, embedded, cohort, model, tmp_path):
    adata, settings = tissue.copy(), {**READING, **SMALL, "batch": "technology", "means": ()}
    mixing(adata, model, "cell_type", **settings)
    adata.obsm["mine"] = embedded.obsm["X_tissue"]
    mixing(adata, "mine", "cell_type", neighbours=2, key_added="again", **settings)
    adata.write_h5ad(tmp_path / "mixed.h5ad")
    first, again = (anndata.read_h5ad(tmp_path / "mixed.h5ad").uns[key] for key in ("mixing", "again"))
    rows = cohort.corpus.column("source_row")
    label, batch = (tissue.obs[name].to_numpy()[rows] for name in ("cell_type", "technology"))
    kept = np.isin(label, first["classes"])
    assert 100 < kept.sum() < 160
    x = embedded.obsm["X_tissue"][rows][kept]
    expected = score_mixing(x, batch[kept].astype(str), label[kept].astype(str))
    assert first["scores"] == pytest.approx(expected) and again["scores"] == pytest.approx(expected)
    assert (first["embedding"], again["embedding"]) == ("embedding of model", "mine")
    own = components(cohort, np.flatnonzero(kept))[kept]
    expected = score_mixing(own, batch[kept].astype(str), label[kept].astype(str))
    for record in (first, again):
        assert set(record["baselines"]) == {"own expression", "own expression + mean of 2"}
        assert record["baselines"]["own expression"] == pytest.approx(expected, rel=1e-4)
    assert "model_hash" in first and "model_hash" not in again


def crowd(adata: anndata.AnnData, model: TrainedModel, **more: Any) -> None:
    density(adata, model, **{**READING, "radius": RADIUS, "split": SPLIT, **more})


def around(adata: anndata.AnnData, model: TrainedModel, **more: Any) -> None:
    settings = {**READING, **SMALL, "label": "cell_type", "radius": RADIUS, "split": SPLIT, **more}
    composition(adata, model, **settings)


def masked(adata: anndata.AnnData, model: TrainedModel, **more: Any) -> None:
    imputation(adata, model, **{**READING, "split": SPLIT, **more})


def mixed(adata: anndata.AnnData, model: TrainedModel, **more: Any) -> None:
    settings = {**READING, **SMALL, "label": "cell_type", "batch": "technology", **more}
    mixing(adata, settings.pop("of", model), **settings)


@pytest.mark.parametrize(
    ("task", "more", "told"),
    [
        (crowd, {"radius": -1}, "adata, radius: is -1 µm; give a positive one"),
        (crowd, {"radius": 500}, "adata: no cell lies farther than 500 µm from its slide's border"),
        (crowd, {"um_per_unit": None}, "adata: slide adata has no um_per_unit, and the radius is in µm"),
        (crowd, {"neighbours": 300}, "adata: 300 neighbours are asked for, and 0 to 256 are stored; give a"),
        (crowd, {"way": "linear"}, "way: 'linear' is none; use one of probe, mean, neighbourhood"),
        (crowd, {"split": FoldsConfig()}, "adata: margin 64 .* lower margin"),
        (crowd, {"split": FoldsConfig(by="slides")}, "adata: split.by slides finds one group"),
        (crowd, {"key_added": "a/b"}, "adata: cannot keep predictions as 'a/b'; give another key_added"),
        (around, {"key_added": "spatial"}, "adata: cannot keep predictions as 'spatial'"),
        (around, {"key_added": "cell_type"}, "adata: cannot keep predictions as 'cell_type'"),
        (around, {"label": "region"}, "adata: obs has no column 'region'; use one of cell_type, technology"),
        (around, {"min_cells": 500}, "adata: label 'cell_type' has no class in 500 cells"),
        (around, {"radius": 1}, "adata: no cell has 5 labelled neighbours within 1"),
        (masked, {"test_cells": 0}, "adata: test_cells is 0, not a number from 1"),
        (mixed, {"batch": "donor"}, "adata: obs has no column 'donor'"),
        (mixed, {"of": "X_none"}, "adata: obsm has no 'X_none'; use one of spatial, or give a model"),
        (mixed, {"label": "technology", "batch": "cell_type", "min_cells": 500}, "adata: label 'technology'"),
    ],
)
def test_bad_input_is_one_line_and_leaves_the_adata_as_it_is(tissue, model, task, more, told):
    adata = tissue.copy()
    with pytest.raises(InputError, match=told) as error:
        task(adata, model, **more)
    assert "\n" not in str(error.value) and untouched(adata)


def test_models_that_cannot_be_asked_are_refused(tissue, model, ranks, monkeypatch):
    adata, niche = tissue.copy(), replace(model, config=ranks)
    with pytest.raises(InputError, match=r"adata, ranks: is no run of AIDO\.Tissue"):
        masked(adata, niche)
    told = (
        "adata, ranks: cannot read 0 neighbours, it was made for 3; its sentence has a niche: give 1 or more"
    )
    with pytest.raises(InputError, match=told):
        crowd(adata, niche, way="mean", means=())
    sample = replace(ranks.data.sample, niche_neighbours=0)
    off = replace(ranks, model=replace(ranks.model, niche=False), data=replace(ranks.data, sample=sample))
    with pytest.raises(
        InputError, match="its sentence has no niche: give 0, or use a way that embeds cells al"
    ):
        replace(model, config=off).with_neighbours(2)
    strange = tissue.copy()
    strange.var_names = [
        f"other{number}" if number > 1 else name for number, name in enumerate(adata.var_names)
    ]
    with pytest.raises(InputError, match="adata: tiny knows 2 of its 22 genes; give gene tables"):
        crowd(strange, model)
    monkeypatch.setattr(TrainedModel, "coordinates", True)
    with pytest.raises(InputError, match="adata, task density: model reads the coordinates of its 2 neigh"):
        crowd(adata, model, means=())
    assert untouched(adata) and untouched(strange)
