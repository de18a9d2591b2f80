"""Labels: missing names, limits and class maps, against pandas."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix

from scfm_jax.corpus import Corpus, Source, build_corpus
from scfm_jax.downstream.class_maps import ClassMap
from scfm_jax.downstream.labels import Labels, read_labels
from scfm_jax.errors import InputError

NAMES = ["b"] * 5 + ["a"] * 4 + ["NA"] * 3 + ["Ambiguous"] * 2 + ["c"]
BLOCK = np.array([0, 0, 1, 1, 2, 0, 0, 0, 0, 1, 1, 3, 2, 2, 2])


@pytest.fixture
def obs() -> pd.DataFrame:
    order = np.random.default_rng(0).permutation(len(NAMES))
    labels = pd.Series([*NAMES, None], dtype="category")
    return pd.DataFrame({"type": labels, "one": "x", "block": [*BLOCK, 0]}).iloc[[*order, len(NAMES)]]


def names(labels: Labels) -> list[str | None]:
    return [labels.classes[code] if code >= 0 else None for code in labels.codes]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Corpus, anndata.AnnData]:
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("labelled")
    kind = pd.Categorical(rng.choice(["t", "NA", "s", "u"], 90)).remove_categories("u")
    adata = anndata.AnnData(
        csr_matrix(rng.poisson(2, (90, 6)).astype(np.float32)),
        obs=pd.DataFrame({"kind": kind}, index=[f"c{n}" for n in range(90)]),
        var=pd.DataFrame(index=[f"G{n}" for n in range(6)]),
        obsm={"spatial": rng.uniform(0, 90, (90, 2))},
    )
    adata.write_h5ad(folder / "a.h5ad")
    source = Source(str(folder / "a.h5ad"), "human", "merfish", labels=("kind",))
    build_corpus(folder / "corpus", [source], n_neighbours=2)
    return Corpus.open(folder / "corpus"), adata


def test_a_corpus_and_its_file_say_the_same(corpus):
    opened, adata = corpus
    of_file, of_corpus = read_labels(adata, "kind"), read_labels(opened, "kind")
    assert of_corpus.classes == of_file.classes == ["s", "t"]
    np.testing.assert_array_equal(of_corpus.codes, of_file.codes[opened.column("source_row")])
    stated = adata.obs["kind"].where(adata.obs["kind"] != "NA").value_counts()
    assert np.bincount(of_file.codes[of_file.codes >= 0]).tolist() == [stated["s"], stated["t"]]
    assert of_corpus.missing == of_file.missing == 90 - stated.sum()


def test_missing_names_have_no_class(obs):
    labels = read_labels(obs, "type", missing=("NA", "Ambiguous"))
    expected = obs["type"].astype(object).replace({"NA": None, "Ambiguous": None})
    assert names(labels) == [None if pd.isna(name) else name for name in expected]
    assert labels.codes.dtype == np.int64
    assert (labels.classes, labels.missing, labels.left_out) == (["a", "b", "c"], 6, {})
    assert read_labels(obs, "type").classes == ["Ambiguous", "a", "b", "c"]


def test_classes_under_the_limits_are_listed(obs):
    few_cells = read_labels(obs, "type", min_cells=4)
    assert (few_cells.classes, few_cells.left_out) == (["a", "b"], {"Ambiguous": 2, "c": 1})
    few_blocks = read_labels(obs, "type", min_blocks=2, block=obs["block"].to_numpy(), missing=())
    assert (few_blocks.classes, few_blocks.left_out) == (["NA", "b"], {"Ambiguous": 2, "a": 4, "c": 1})


def test_limits_look_at_what_the_map_made(obs):
    to = {"a": "X", "c": "X", "b": "Y", "Ambiguous": None}
    labels = read_labels(obs, "type", min_cells=5, class_map=ClassMap("map", ("Z", "Y", "X"), to))
    assert labels.classes == ["Y", "X"]
    assert names(labels) == [
        to.get(name) if isinstance(name, str) else None for name in obs["type"].astype(object)
    ]
    assert labels.left_out == {"Ambiguous": 2}
    merged = labels.among(["X", "W", "Y"])
    assert (merged.codes[merged.codes >= 0] == 1).sum() == 0
    assert names(merged) == names(labels)
    assert labels.among(["X", "W"]).left_out == {"Ambiguous": 2, "Y": 5}


def test_a_map_may_name_what_is_missing(obs):
    to = {"a": "X", "c": "X", "b": "Y", "Ambiguous": "Y"}
    labels = read_labels(obs, "type", missing=("NA", "Ambiguous"), class_map=ClassMap("map", ("X", "Y"), to))
    assert np.bincount(labels.codes[labels.codes >= 0]).tolist() == [5, 5]


@pytest.mark.parametrize(
    ("column", "settings", "message"),
    [
        ("typo", {}, "obs: no label 'typo'; use one of type, one, block"),
        ("one", {}, "label 'one' has 'x' alone"),
        ("type", {"min_cells": 5}, "'b' alone in 5 cells and 0 blocks or more; lower min_cells"),
        ("type", {"min_cells": 9}, "no class in 9 cells"),
        ("one", {"where": "a.h5ad"}, "a.h5ad: label 'one'"),
        ("type", {"min_blocks": 2}, "no block is given"),
        ("type", {"missing": ["a", "b", "c", "Ambiguous", "NA"]}, "has no class alone"),
        (
            "type",
            {"class_map": ClassMap("map", ("X",), {"a": "X"})},
            "map: says nothing of 'Ambiguous', 'b', 'c'",
        ),
        ("type", {"class_map": ClassMap("map", ("X",), {"q": "X"})}, "map: maps 'q', which the labels lack"),
    ],
)
def test_bad_input_is_one_line(obs, column, settings, message):
    with pytest.raises(InputError, match=message) as caught:
        read_labels(obs, column, **settings)
    assert "\n" not in str(caught.value)


def test_a_label_that_the_corpus_lacks(corpus):
    with pytest.raises(InputError, match="no label 'typo'; use one of kind"):
        read_labels(corpus[0], "typo")
