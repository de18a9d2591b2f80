"""Probes and fine-tuning of an AnnData: who answers for whom, what it scores, and where it is put."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import jax
import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from sklearn.preprocessing import StandardScaler

from scfm_jax.corpus import Corpus, Source, build_corpus
from scfm_jax.downstream.annotate import finetune, open_file, probe
from scfm_jax.downstream.class_maps import ClassMap
from scfm_jax.downstream.cross_fitting import LabelConfig
from scfm_jax.downstream.embed import embed_file
from scfm_jax.downstream.finetuned import FinetuneConfig
from scfm_jax.downstream.folds import FoldsConfig, make_folds
from scfm_jax.downstream.in_memory import corpus_of
from scfm_jax.downstream.linear import STRENGTHS
from scfm_jax.downstream.model import TrainedModel, open_model
from scfm_jax.errors import DataWarning, InputError

READING: dict[str, Any] = {"species": "human", "technology": "simseq", "um_per_unit": 1.0}
SPLIT = FoldsConfig(blocks=4, n_folds=3, margin=2)
MISSING = ("nan", "None", "NA", "Ambiguous")
SETTINGS: dict[str, Any] = {
    **READING,
    "split": SPLIT,
    "missing": MISSING,
    "min_cells": 5,
    "min_blocks": 2,
}
KEY = "cell_type_probe"
# Cells of the slide: without a count; with counts of a gene that the model does not know alone.
EMPTY, UNKNOWN = 50, 60


@pytest.fixture(scope="module", autouse=True)
def compile_fast() -> Iterator[None]:
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def model(finished: Path) -> TrainedModel:
    return open_model(finished)


@pytest.fixture(scope="module")
def tissue(corpus_path: Path) -> anndata.AnnData:
    """A slide, its rows in an order of their own, where some cells lack a label and one class is small."""
    slide = anndata.read_h5ad(corpus_path.parent / "slide1.h5ad")
    label = slide.obs["cell_type"].astype(str).to_numpy().astype(object)
    label[5:25] = "Ambiguous"
    label[30:33] = "rare"
    label[40] = np.nan
    counts = np.hstack([slide.X.toarray(), np.zeros((slide.n_obs, 1), np.float32)])
    counts[[EMPTY, UNKNOWN]] = 0
    counts[UNKNOWN, -1] = 7
    adata = anndata.AnnData(
        counts,
        pd.DataFrame({"cell_type": label}, index=slide.obs_names),
        pd.DataFrame(index=[*slide.var_names, "no gene of the model"]),
        obsm={"spatial": slide.obsm["spatial"]},
    )
    return adata[np.random.default_rng(3).permutation(adata.n_obs)].copy()


@dataclass
class Stored:
    """The tissue as a file, with what tells which fit may answer for which row."""

    path: Path
    corpus: Corpus
    rows: np.ndarray
    code: np.ndarray  # of every cell of the corpus

    def folds(self, split: FoldsConfig = SPLIT) -> list[tuple[str, np.ndarray, np.ndarray]]:
        """Name, training and test cells, all labelled; last those of the fit on all, and no label."""
        known = np.flatnonzero(self.code >= 0)
        found = [
            (fold.name, np.intersect1d(fold.train, known), np.intersect1d(fold.test, known))
            for fold in make_folds(self.corpus, split).folds
        ]
        return [*found, ("", known, np.flatnonzero(self.code < 0))]


@pytest.fixture(scope="module")
def stored(tissue: anndata.AnnData, tmp_path_factory: pytest.TempPathFactory) -> Stored:
    folder = tmp_path_factory.mktemp("stored")
    path = folder / "tissue.h5ad"
    tissue.write_h5ad(path)
    build_corpus(folder / "corpus", [Source(str(path), name="adata", **READING)], n_neighbours=4)
    corpus = Corpus.open(folder / "corpus")
    rows = corpus.column("source_row")
    classes = [f"type{number}" for number in range(6)]
    names = tissue.obs["cell_type"].to_numpy()[rows]
    code = np.array([classes.index(name) if name in classes else -1 for name in names])
    return Stored(path, corpus, rows, code)


@pytest.fixture(scope="module")
def probed(tissue: anndata.AnnData, model: TrainedModel) -> anndata.AnnData:
    adata = tissue.copy()
    assert probe(adata, model, "cell_type", **SETTINGS) is None  # type: ignore[func-returns-value]
    return adata


def embedding(model: TrainedModel, stored: Stored, folder: Path) -> np.ndarray:
    """Of every cell of the stored corpus, by `embed_file`."""
    embed_file(model, Source(str(stored.path), **READING), folder / "embedded.h5ad")
    return anndata.read_h5ad(folder / "embedded.h5ad").obsm["X_tissue"][stored.rows]


def regressed(x: np.ndarray, code: np.ndarray, train: np.ndarray, test: np.ndarray) -> list[np.ndarray]:
    """Probabilities by scikit-learn at each strength that may be chosen; a missing row is the mean's."""
    missing = ~np.isfinite(x).all(1)
    x = np.where(missing[:, None], x[train[~missing[train]]].mean(0), x)
    scaler = StandardScaler().fit(x[train])
    fits = (
        LogisticRegression(C=c, max_iter=2000).fit(scaler.transform(x[train]), code[train]) for c in STRENGTHS
    )
    return [fit.predict_proba(scaler.transform(x[test])) for fit in fits]


def test_a_cell_is_answered_for_by_scikit_learn_on_other_cells(probed, stored, model, tmp_path):
    x = embedding(model, stored, tmp_path)
    got = probed.obsm[f"{KEY}_probabilities"][stored.rows]
    assert got.dtype == np.float32 and got.shape == (159, 6)
    fold = probed.obs[f"{KEY}_fold"].to_numpy()[stored.rows]
    seen, truth, said = np.isfinite(x).all(1), [], []
    for name, train, test in stored.folds():
        asked = seen[test]
        assert asked.sum() > 15 and (fold[test[asked]] == name).all()
        answers = regressed(x, stored.code, train, test)
        error = [np.abs(answer[asked] - got[test[asked]]).max() for answer in answers]
        assert min(error) < 1e-4
        if name:
            truth.append(stored.code[test])
            said.append(answers[int(np.argmin(error))].argmax(1))
    truth, said = np.concatenate(truth), np.concatenate(said)
    record = probed.uns[KEY]
    assert record["cells_scored"] == len(truth)
    assert record["scores"]["accuracy"]["value"] == pytest.approx(accuracy_score(truth, said))
    macro_f1 = record["scores"]["macro_f1"]
    assert macro_f1["value"] == pytest.approx(f1_score(truth, said, average="macro"))
    assert macro_f1["low"] < macro_f1["value"] < macro_f1["high"]


def test_the_likeliest_class_or_none_stands_in_obs(probed, tissue, tmp_path):
    probed.write_h5ad(tmp_path / "out.h5ad")
    out = anndata.read_h5ad(tmp_path / "out.h5ad")
    assert out.obs_names.equals(tissue.obs_names) and (out.X == tissue.X).all()
    record, said = out.uns[KEY], out.obs[KEY]
    none = out.obs_names.isin([f"slide1-{EMPTY}", f"slide1-{UNKNOWN}"])
    probabilities = out.obsm[f"{KEY}_probabilities"]
    np.testing.assert_array_equal(said.isna(), none)
    np.testing.assert_array_equal(out.obs[f"{KEY}_fold"].isna(), none)
    np.testing.assert_array_equal(np.isnan(probabilities).all(1), none)
    np.testing.assert_allclose(probabilities[~none].sum(1), 1, rtol=1e-5)
    np.testing.assert_array_equal(said[~none], record["classes"][probabilities[~none].argmax(1)])
    label = out.obs["cell_type"]
    without = ~label.isin(record["classes"]) & ~none
    assert without.sum() == 24 == record["cells_without_label"]
    np.testing.assert_array_equal(out.obs[f"{KEY}_fold"] == "", without)


def test_the_record_says_what_was_done(probed, model):
    record = probed.uns[KEY]
    assert (record["model"], record["model_hash"], record["neighbours"]) == ("tiny", model.hash, 2)
    assert (*record["left_out"], *record["left_out_cells"]) == ("rare", 3)
    assert not record["leaking"] and record["split"] == "4 x 4 spatial blocks in 3 folds, margin 2"
    assert record["cells_unknown"] == 2
    assert record["baseline"]["name"] == "own expression + mean of 2"
    for name in ("accuracy", "macro_f1", "ece"):
        of, base, gain = (
            part[name] for part in (record["scores"], record["baseline"]["scores"], record["difference"])
        )
        assert gain["value"] == pytest.approx(of["value"] - base["value"])
        assert gain["low"] < gain["value"] < gain["high"]
    folds = record["folds"]
    assert list(folds["name"]) == ["0", "1", "2"] and folds["test_cells"].sum() == record["cells_scored"]
    # The types of the simulated tissue are its expression.
    assert (folds["baseline_macro_f1"] > 0.4).all()


def test_the_mean_of_neighbours_stands_beside_a_cell_embedded_alone(tissue, stored, model, tmp_path):
    adata = tissue.copy()
    probe(adata, model, "cell_type", way="mean", neighbours=3, **SETTINGS)
    alone = embedding(model.with_neighbours(0), stored, tmp_path)
    alone = np.where(np.isfinite(alone), alone, np.nanmean(alone, axis=0))
    near = stored.corpus.neighbours(np.arange(159), 3)
    x = np.hstack([alone, alone[near].mean(1)])
    _, train, test = stored.folds()[1]
    got = adata.obsm["cell_type_mean_probabilities"][stored.rows[test]]
    asked = np.isfinite(got).all(1)
    answers = regressed(x, stored.code, train, test)
    assert min(np.abs(answer - got)[asked].max() for answer in answers) < 1e-4
    assert adata.uns["cell_type_mean"]["baseline"]["name"] == "own expression + mean of 3"


def test_a_random_split_leaks_and_a_head_reads_neighbours(tissue, model):
    adata = tissue.copy()
    split = FoldsConfig(by="random", blocks=4, n_folds=2, margin=2)
    settings = {**SETTINGS, "split": split, "way": "neighbourhood", "key_added": "mine"}
    with pytest.warns(DataWarning, match="adata: neighbours of test cells are trained on"):
        probe(adata, model, "cell_type", **settings)
    assert adata.uns["mine"]["leaking"] and adata.uns["mine"]["way"] == "neighbourhood"
    np.testing.assert_allclose(np.nansum(adata.obsm["mine_probabilities"], 1).round(5) % 1, 0)
    assert list(adata.obs) == ["cell_type", "mine", "mine_fold"]


def test_fine_tuning_in_one_fold_answers_for_what_it_has_not_learnt_from(tissue, stored, model):
    adata, before = tissue.copy(), model.hash
    with pytest.warns(DataWarning, match="adata: 5 blocks are scored, intervals are too narrow"):
        tuned = finetune(adata, model, "cell_type", settings=FinetuneConfig(epochs=2), fold=1, **SETTINGS)
    assert model.hash == before and tuned.config.way == "lora" and tuned.config.neighbours == 2
    _, _, test = stored.folds()[1]
    asked = np.concatenate([test, np.flatnonzero(stored.code < 0)])
    said = pd.Series(adata.obs["cell_type_lora_fold"].to_numpy()[stored.rows] == "1")
    seen = stored.rows != np.flatnonzero(adata.obs_names == f"slide1-{UNKNOWN}")
    np.testing.assert_array_equal(said, np.isin(np.arange(159), asked) & seen)
    with corpus_of(adata, model, **READING) as corpus:
        everyone = tuned.predict(corpus, np.arange(corpus.n_cells))
        rows = corpus.column("source_row")
    got = adata.obsm["cell_type_lora_probabilities"]
    there = np.isfinite(got[rows]).all(1)
    np.testing.assert_allclose(everyone[there], got[rows[there]], atol=1e-5)
    record = adata.uns["cell_type_lora"]
    assert record["cells_scored"] == len(test) and list(record["folds"]["name"]) == ["1"]
    assert record["stored_bytes"] == tuned.stored_bytes == 4 * record["trained_parameters"]


def test_fine_tuning_in_all_folds_gives_the_model_of_all_labelled_cells(tissue, model):
    adata = tissue.copy()
    settings = FinetuneConfig(epochs=2, batch_size=16)
    tuned = finetune(adata, model, "cell_type", way="head", settings=settings, **SETTINGS)
    assert set(adata.obs["cell_type_head_fold"].dropna()) == {"0", "1", "2", ""}
    with corpus_of(adata, model, **READING) as corpus:
        everyone = tuned.predict(corpus, np.arange(corpus.n_cells))
        rows = corpus.column("source_row")
    got = adata.obsm["cell_type_head_probabilities"][rows]
    without = (adata.obs["cell_type_head_fold"] == "").to_numpy()[rows]
    np.testing.assert_allclose(everyone[without], got[without], atol=1e-5)
    assert np.abs(everyone[~without] - got[~without]).max() > 1e-3


def test_a_donor_is_held_out_and_one_block_is_no_sample(tissue, model, tmp_path):
    adata = tissue.copy()
    adata.obs["donor"] = np.where(adata.obsm["spatial"][:, 0] < 8, "a", "b")
    adata.write_h5ad(tmp_path / "donors.h5ad")
    source = Source(str(tmp_path / "donors.h5ad"), section="donor", **READING)
    split = FoldsConfig(by="column", column="donor", margin=0)
    limits: dict[str, Any] = {"missing": MISSING, "min_cells": 5, "min_blocks": 1}
    with open_file(source, {}, LabelConfig("cell_type", 2, split, **limits), "key") as cells:
        donor = adata.obs["donor"].to_numpy()[cells.rows]
        for fold, (held_out, others) in zip(cells.folds.folds, ("ab", "ba"), strict=True):
            assert fold.name == held_out
            assert set(donor[fold.test]) == {held_out} and set(donor[fold.train]) == {others}
    one = FoldsConfig(by="slides", groups=("adata/a",), blocks=1, margin=0)
    settings = {**SETTINGS, **limits, "split": one, "section": "donor"}
    with pytest.raises(
        InputError, match=r"adata: all cells to be scored lie in one block; raise split.blocks"
    ):
        finetune(adata, model, "cell_type", **settings)


def renamed(adata: anndata.AnnData, kept: int) -> anndata.AnnData:
    adata.var_names = [name if n < kept else f"other{n}" for n, name in enumerate(adata.var_names)]
    return adata


def relabelled(adata: anndata.AnnData, name: Any) -> anndata.AnnData:
    adata.obs["cell_type"] = name
    return adata


MAP = ClassMap("map.toml [mine]", ("a", "b"), {"type0": "a", "typo": "b"})


@pytest.mark.parametrize(
    ("change", "more", "told"),
    [
        (None, {"label": "region"}, r"adata: no label 'region'; use one of cell_type"),
        (lambda adata: relabelled(adata, "one"), {}, "adata: label 'cell_type' has 'one' alone"),
        (None, {"min_cells": 500}, "adata: label 'cell_type' has no class in 500 cells"),
        (None, {"min_blocks": 17}, "adata: label 'cell_type' has no class in 5 cells and 17 blocks"),
        (None, {"key_added": "cell_type"}, "adata: cannot keep predictions as 'cell_type'"),
        (None, {"key_added": "a/b"}, "adata: cannot keep predictions as 'a/b'"),
        (None, {"neighbours": 300}, "adata: neighbours is 300, out of range; give 0 to 256"),
        (None, {"split": FoldsConfig(margin=300)}, "adata: split.margin is 300, out of range; give 0 to 256"),
        (None, {"class_map": MAP}, r"map.toml \[mine\]: maps 'typo', which the labels lack"),
        (None, {"split": FoldsConfig(by="slides")}, "adata: split.by slides finds one group"),
        (None, {"split": FoldsConfig(blocks=4, margin=64)}, "adata: margin 64 .* lower margin"),
        (lambda adata: renamed(adata, 2), {}, "adata: tiny knows 2 of its 23 genes; give gene tables"),
    ],
)
def test_bad_input_leaves_the_adata_as_it_is(tissue, model, change, more, told):
    adata = tissue.copy() if change is None else change(tissue.copy())
    settings = {**SETTINGS, "label": "cell_type", **more}
    with pytest.raises(InputError, match=told):
        probe(adata, model, **settings)
    assert list(adata.obs) == ["cell_type"] and list(adata.obsm) == ["spatial"] and not adata.uns


def test_a_fold_without_labels_or_without_a_number_is_refused(tissue, stored, model):
    adata = tissue.copy()
    _, _, test = stored.folds()[2]
    adata.obs.iloc[stored.rows[test], 0] = np.nan
    embedded = []
    with pytest.raises(InputError, match="adata, fold 2: has no labelled test cell; use fewer folds"):
        probe(adata, model, "cell_type", progress=lambda done, _: embedded.append(done), **SETTINGS)
    assert not embedded
    with pytest.raises(InputError, match="adata: has no fold 3; give one from 0 to 2"):
        finetune(adata, model, "cell_type", fold=3, **SETTINGS)


def test_a_model_that_knows_under_half_of_the_genes_is_warned_of(tissue, model):
    adata = renamed(tissue.copy(), 8)
    with (
        pytest.warns(DataWarning, match="^adata: tiny knows 8 of its 23 genes$"),
        pytest.raises(InputError, match="adata: has no fold 9"),
    ):
        finetune(adata, model, "cell_type", fold=9, **SETTINGS)
