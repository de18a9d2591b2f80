"""Folds of four slides: two animals in two technologies, with names that hold a pattern's signs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest

from scfm_jax.corpus import Corpus, Source, build_corpus
from scfm_jax.corpus.split import SplitConfig, split_cells
from scfm_jax.downstream.folds import FoldsConfig, all_cells, make_folds
from scfm_jax.errors import InputError

BLOCKS = FoldsConfig(blocks=4, n_folds=4, margin=3, min_kept=0.0)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder, rng, sources = tmp_path_factory.mktemp("folds"), np.random.default_rng(0), []
    for name, technology, animals in (("a", "merfish", ("m1", "m1")), ("b", "starmap", ("m[2]*", "m3"))):
        section = np.repeat([f"{animal}.{place}" for place, animal in enumerate(animals)], 120)
        obs = {"section": section, "animal": [s[:-2] for s in section], "side": rng.choice(["l", "r"], 240)}
        data = anndata.AnnData(
            rng.integers(1, 5, (240, 6)).astype(np.float32),
            obs=pd.DataFrame(obs, index=[f"cell{cell}" for cell in range(240)]),
            var=pd.DataFrame(index=[f"GENE{gene}" for gene in range(6)]),
        )
        data.obsm["spatial"] = rng.random((240, 2)) * 100
        data.write_h5ad(folder / f"{name}.h5ad")
        path = str(folder / f"{name}.h5ad")
        sources.append(Source(path, "mouse", technology, section="section", labels=("animal", "side")))
    build_corpus(folder / "corpus", sources, n_neighbours=4)
    return Corpus.open(folder / "corpus")


def slides_of(corpus, cells):
    return {corpus.slides[slide].name for slide in corpus.slide_of(cells)}


def test_blocks_are_those_of_the_split_in_every_fold(corpus):
    folds = make_folds(corpus, BLOCKS)
    assert [fold.name for fold in folds.folds] == ["0", "1", "2", "3"] and not folds.leaking
    for number, fold in enumerate(folds.folds):
        split = split_cells(corpus, SplitConfig(blocks=4, n_folds=4, margin=3, min_kept=0.0, fold=number))
        assert np.array_equal(fold.train, split.train) and np.array_equal(fold.test, split.test)
        assert np.array_equal(folds.block, split.block)
        beside = corpus.neighbours(fold.train, 3)
        assert not np.isin(beside[beside >= 0], fold.test).any()
    tested = np.concatenate([fold.test for fold in folds.folds])
    assert np.array_equal(np.sort(tested), np.arange(corpus.n_cells))
    assert folds.description == "4 x 4 spatial blocks in 4 folds, margin 3"


def test_random_folds_are_marked_as_leaking(corpus):
    folds = make_folds(corpus, replace(BLOCKS, by="random"))
    assert folds.leaking and folds.description.endswith("leaking")
    for fold in folds.folds:
        assert len(fold.test) == 120 and len(np.intersect1d(fold.train, fold.test)) == 0
        assert len(fold.train) == 360 and len(np.unique(folds.block[fold.test])) > 32
    tested = np.concatenate([fold.test for fold in folds.folds])
    assert np.array_equal(np.sort(tested), np.arange(corpus.n_cells))
    other = make_folds(corpus, replace(BLOCKS, by="random", seed=1))
    # A margin that would leave no cell to learn from does not lie around random cells.
    wide = replace(BLOCKS, by="random", margin=64, min_kept=0.9)
    assert np.array_equal(make_folds(corpus, wide).folds[0].train, folds.folds[0].train)
    assert not np.array_equal(other.folds[0].test, folds.folds[0].test)


def test_every_slide_is_a_fold_whatever_is_in_its_name(corpus):
    names = ["a/m1.0", "a/m1.1", "b/m3.1", "b/m[2]*.0"]
    assert sorted(slide.name for slide in corpus.slides) == names
    folds = make_folds(corpus, FoldsConfig(by="slides"))
    assert [slides_of(corpus, fold.test) for fold in folds.folds] == [{s.name} for s in corpus.slides]
    for fold in folds.folds:
        assert slides_of(corpus, fold.train) == set(names) - slides_of(corpus, fold.test)


def test_animals_are_patterns_on_slides(corpus):
    groups = ("*/m1.*", "*/m[[]2[]]?.*")
    folds = make_folds(corpus, FoldsConfig(by="slides", groups=groups))
    assert [fold.name for fold in folds.folds] == list(groups)
    first, second = (slides_of(corpus, fold.test) for fold in folds.folds)
    assert first == {"a/m1.0", "a/m1.1"} and second == {"b/m[2]*.0"}
    assert slides_of(corpus, folds.folds[0].train) == {"b/m3.1", "b/m[2]*.0"}
    assert folds.description == "one of slides held out at a time (*/m1.*, */m[[]2[]]?.*)"


@pytest.mark.parametrize(
    ("config", "names", "sizes"),
    [
        (FoldsConfig(by="column", column="animal"), ["m1", "m3", "m[2]*"], [240, 120, 120]),
        (FoldsConfig(by="column", column="animal", groups=("m[2]*",)), ["m[2]*"], [120]),
        (FoldsConfig(by="technology"), ["merfish", "starmap"], [240, 240]),
        (FoldsConfig(by="technology", groups=("starmap",)), ["starmap"], [240]),
    ],
)
def test_values_of_a_column_and_technologies(corpus, config, names, sizes):
    folds = make_folds(corpus, config)
    assert [fold.name for fold in folds.folds] == names
    assert [len(fold.test) for fold in folds.folds] == sizes
    for fold in folds.folds:
        assert np.array_equal(fold.train, np.setdiff1d(np.arange(480), fold.test))
        if config.by == "technology":
            assert {corpus.slides[s].technology for s in corpus.slide_of(fold.test)} == {fold.name}
        else:
            codes, classes = corpus.labels("animal", fold.test)
            assert {classes[code] for code in codes} == {fold.name}


def test_one_fold_of_everything(corpus):
    folds = all_cells(corpus, 4)
    (fold,) = folds.folds
    assert fold.name == "" and np.array_equal(fold.train, fold.test) and len(fold.test) == 480
    assert np.array_equal(folds.block, make_folds(corpus, BLOCKS).block)


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (FoldsConfig(by="column", column="side"), r"split.column 'side' is not one value in slide 'a/m1.0'"),
        (FoldsConfig(by="column", column="donor"), r"no label 'donor'"),
        (FoldsConfig(by="technology", groups=("cosmx",)), r"split.groups 'cosmx' is not there; use some of"),
        (FoldsConfig(by="slides", groups=("c/*",)), r"split.held_out 'c/\*' matches no slide"),
        (FoldsConfig(by="slides", groups=("*",)), r"matches all slides"),
        (replace(BLOCKS, n_folds=1), r"split.n_folds is 1"),
        (replace(BLOCKS, blocks=200, n_folds=20_000), r"fold \d+ holds no cell"),
        (replace(BLOCKS, margin=4, blocks=8, min_kept=0.9), r"keeps \d+% of the cells to train on"),
        (replace(BLOCKS, margin=5), r"split.margin is 5"),
    ],
)
def test_bad_input_says_what_to_mend(corpus, config, problem):
    with pytest.raises(InputError, match=problem) as error:
        make_folds(corpus, config)
    assert "\n" not in str(error.value)


def test_one_group_is_no_split(corpus, tmp_path: Path):
    data = anndata.read_h5ad(Path(corpus.path).parent / "a.h5ad")
    del data.obs["section"]
    data.write_h5ad(tmp_path / "a.h5ad")
    alone = tmp_path / "alone"
    build_corpus(alone, [Source(str(tmp_path / "a.h5ad"), "mouse", "merfish")], n_neighbours=4)
    for by in ("technology", "slides"):
        with pytest.raises(InputError, match=f"split.by {by} finds one group"):
            make_folds(Corpus.open(alone), FoldsConfig(by=by))
