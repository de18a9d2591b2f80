from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from cell_files import in_raw
from scipy import sparse

from scfm_jax.corpus import Corpus, build_corpus, matrix, spool, store, verify_corpus
from scfm_jax.corpus.slide import write_slide
from scfm_jax.errors import DataWarning, InputError
from scfm_jax.genes import Vocabulary


def as_matrix(corpus: Corpus) -> sparse.csr_matrix:
    """All cells of a corpus, in its order."""
    cells = corpus.cells(np.arange(corpus.n_cells))
    return sparse.csr_matrix(
        (cells.counts, cells.genes, cells.offsets), (corpus.n_cells, len(corpus.vocabulary))
    )


def in_vocabulary_order(data: ad.AnnData, corpus: Corpus) -> np.ndarray:
    return data[:, list(corpus.vocabulary.ids)].X.toarray()


def unsorted_with_duplicates_and_zeros(matrix: sparse.csr_matrix) -> sparse.csr_matrix:
    """The same matrix, written untidily: columns descending, the first count in two parts, a stored zero."""
    rows = []
    for row in matrix.toarray():
        columns = np.flatnonzero(row)[::-1]
        last = columns[-1]
        values = row[columns]
        rows.append((np.r_[columns, last, 5], np.r_[values[:-1], values[-1] - 1, 1, 0]))
    indptr = np.cumsum([0, *(len(columns) for columns, _ in rows)])
    columns, values = (np.concatenate(part) for part in zip(*rows))
    return sparse.csr_matrix((values.astype(np.float32), columns, indptr), matrix.shape)


def in_layer(data: ad.AnnData) -> ad.AnnData:
    out = data.copy()
    out.layers["counts"] = data.X.astype(np.int64)
    out.X = data.X.log1p()
    return out


def with_matrix(convert):
    def change(data: ad.AnnData) -> ad.AnnData:
        return ad.AnnData(convert(data.X), data.obs, data.var, obsm=data.obsm)

    return change


FORMS = {
    "csc": with_matrix(lambda m: m.tocsc()),
    "dense": with_matrix(lambda m: m.toarray()),
    "uint16": with_matrix(lambda m: m.astype(np.uint16)),
    "int64 dense": with_matrix(lambda m: m.toarray().astype(np.int64)),
    "untidy": with_matrix(unsorted_with_duplicates_and_zeros),
    "layer": in_layer,
    "raw": in_raw,
}


@pytest.mark.parametrize("at_once", [50, 1 << 20])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_same_counts_gives_the_same_corpus(
    tissue, write, tmp_path, monkeypatch, form, at_once
):
    build_corpus(tmp_path / "plain", [write(tissue)])
    monkeypatch.setattr(matrix, "ENTRIES", at_once)
    monkeypatch.setattr(matrix, "DENSE_ELEMENTS", at_once)
    monkeypatch.setattr(spool, "BAND_ENTRIES", 2 * at_once)
    build_corpus(tmp_path / "other", [write(FORMS[form](tissue))])
    assert Corpus.open(tmp_path / "other").hash == Corpus.open(tmp_path / "plain").hash


def test_cells_are_the_rows_of_the_file(tissue, write, tmp_path):
    build_corpus(tmp_path / "out", [write(tissue)])
    corpus = Corpus.open(tmp_path / "out")
    assert [slide.name for slide in corpus.slides] == ["tissue/s1", "tissue/s2"]
    rows = corpus.column("source_row")
    assert sorted(rows.tolist()) == list(range(tissue.n_obs))
    np.testing.assert_array_equal(as_matrix(corpus).toarray(), in_vocabulary_order(tissue, corpus)[rows])
    np.testing.assert_array_equal(corpus.column("x"), tissue.obsm["spatial"][rows, 0].astype(np.float32))
    np.testing.assert_array_equal(corpus.column("y"), tissue.obsm["spatial"][rows, 1].astype(np.float32))
    sections = np.array([slide.section for slide in corpus.slides])[
        corpus.slide_of(np.arange(corpus.n_cells))
    ]
    np.testing.assert_array_equal(sections, tissue.obs["section"].to_numpy()[rows])


def test_neighbours_are_the_nearest_kept_cells_of_the_section(tissue, write, tmp_path):
    dense = tissue.X.toarray()
    dense[::3] = 0
    tissue.X = sparse.csr_matrix(dense)
    report = build_corpus(tmp_path / "out", [write(tissue)], n_neighbours=9)
    assert report["files"][0]["dropped"] == {"no counts": 100, "under min_counts": 0}
    corpus = Corpus.open(tmp_path / "out")
    rows = corpus.column("source_row")
    assert not (rows % 3 == 0).any() and corpus.n_cells == 200
    xy, section = tissue.obsm["spatial"][rows], tissue.obs["section"].to_numpy()[rows]
    distance = np.sqrt(((xy[:, None] - xy[None]) ** 2).sum(-1))
    distance[(section[:, None] != section[None]) | np.eye(200, dtype=bool)] = np.inf
    expected = np.argsort(distance, axis=1, kind="stable")[:, :9]
    np.testing.assert_array_equal(corpus.neighbours(np.arange(200), 9), expected)
    np.testing.assert_allclose(
        corpus.distances(np.arange(200), 9), np.take_along_axis(distance, expected, 1), rtol=1e-6
    )


def test_max_radius_is_in_um(tissue, write, tmp_path):
    build_corpus(tmp_path / "out", [write(tissue, um_per_unit=0.5, max_radius=3.0)])
    corpus = Corpus.open(tmp_path / "out")
    found, distance = (f(np.arange(corpus.n_cells), 64) for f in (corpus.neighbours, corpus.distances))
    assert (found == -1).any() and (found >= 0).any()
    assert ((found == -1) == np.isinf(distance)).all()
    assert distance[found >= 0].max() <= 6.0
    xy = np.stack([corpus.column("x"), corpus.column("y")], 1)
    slide = corpus.slide_of(np.arange(corpus.n_cells))
    near = np.sqrt(((xy[:, None] - xy[None]) ** 2).sum(-1)) <= 6.0
    near &= slide[:, None] == slide[None]
    np.testing.assert_array_equal((found >= 0).sum(1), near.sum(1) - 1)


def test_totals_and_min_counts_follow_the_vocabulary(tissue, write, tmp_path):
    genes = [f"GENE{i}" for i in range(5, 30)]
    vocabulary = Vocabulary.from_names([(genes, "human")])
    inside = np.asarray(tissue[:, genes].X.sum(1)).ravel()
    with pytest.warns(DataWarning, match="of counts are lost"):
        report = build_corpus(tmp_path / "out", [write(tissue)], vocabulary=vocabulary, min_counts=14)
    corpus = Corpus.open(tmp_path / "out")
    rows = corpus.column("source_row")
    assert sorted(rows.tolist()) == np.flatnonzero(inside >= 14).tolist()
    np.testing.assert_array_equal(corpus.column("total_matched"), inside[rows])
    np.testing.assert_array_equal(corpus.column("total_raw"), np.asarray(tissue.X.sum(1)).ravel()[rows])
    np.testing.assert_array_equal(corpus.column("n_genes"), as_matrix(corpus).getnnz(1))
    (file,) = report["files"]
    assert file["dropped"]["under min_counts"] == (inside < 14).sum() == file["n_cells"] - file["n_kept"]
    assert file["genes"]["n_matched"] == 25 and file["genes"]["n_unmatched"] == 15
    assert file["genes"]["share_lost"] == pytest.approx(1 - inside.sum() / tissue.X.sum())
    assert file["warnings"] and corpus.report == report
    for slide in corpus.slides:
        assert slide.panel.tolist() == list(range(25))
        own = inside[rows[slide.start : slide.start + slide.n_cells]]
        assert slide.median_total == np.median(own)


def test_rows_of_the_same_gene_are_summed(tissue, write, tmp_path):
    names = tissue.var_names.to_numpy(object)
    names[:4] = ["ENSG00000000003.1", "ENSG00000000003.2", "ENSG00000000005.9", "GENE9"]
    tissue.var_names = pd.Index(names)
    counts = tissue.X.toarray()
    source = write(tissue)
    report = build_corpus(tmp_path / "out", [source])
    assert report["files"][0]["genes"]["n_merged"] == 2
    corpus = Corpus.open(tmp_path / "out")
    ids = [name.split(".")[0] for name in corpus.vocabulary.ids]
    got, rows = as_matrix(corpus).toarray(), corpus.column("source_row")
    np.testing.assert_array_equal(got[:, ids.index("ENSG00000000003")], counts[rows][:, :2].sum(1))
    np.testing.assert_array_equal(got[:, ids.index("GENE9")], counts[rows][:, [3, 9]].sum(1))
    assert got.sum() == counts.sum()


def test_counts_over_16_bits_survive(tissue, write, tmp_path):
    dense = tissue.X.toarray().astype(np.int32)
    dense[[3, 70, 71, 299], [0, 5, 6, 39]] = [65534, 65535, 65536, 2_000_000]
    tissue.X = sparse.csr_matrix(dense)
    build_corpus(tmp_path / "out", [write(tissue)])
    corpus = Corpus.open(tmp_path / "out")
    np.testing.assert_array_equal(
        as_matrix(corpus).toarray(), in_vocabulary_order(tissue, corpus)[corpus.column("source_row")]
    )


def test_arrays_of_many_shards_hold_the_same(tissue, write, tmp_path, monkeypatch):
    source, index = write(tissue), np.random.default_rng(0).permutation(tissue.n_obs)

    def read(name):
        corpus = Corpus.open(tmp_path / name)
        columns = [corpus.column(column) for column in ("x", "total_raw", "source_row", "n_genes")]
        return [
            as_matrix(corpus).toarray(),
            corpus.cells(index).counts,
            corpus.neighbours(index, 64),
            *columns,
        ]

    build_corpus(tmp_path / "one", [source])
    expected = read("one")
    small = {name: replace(how, chunk=min(how.chunk, 16), shard=64) for name, how in store.LAYOUTS.items()}
    small["entries"] = replace(store.LAYOUTS["entries"], shard=1)
    monkeypatch.setattr(store, "LAYOUTS", small)
    build_corpus(tmp_path / "many", [source])
    for array in ("entries", "neighbours", "source_row"):
        shards = (tmp_path / "many").glob(f"slides/*s1*/{array}/c/**/*")
        assert len([path for path in shards if path.is_file()]) > 2
    for one, other in zip(read("many"), expected, strict=True):
        np.testing.assert_array_equal(one, other)
    assert verify_corpus(tmp_path / "many") == []


def test_dissociated_cells_are_shuffled_and_have_no_space(tissue, write, tmp_path):
    del tissue.obsm["spatial"]
    source = write(tissue, spatial=False, section=None)
    build_corpus(tmp_path / "out", [source])
    corpus = Corpus.open(tmp_path / "out")
    rows = corpus.column("source_row")
    assert sorted(rows.tolist()) == list(range(300)) and np.abs(np.diff(rows)).mean() > 50
    assert np.isnan(corpus.column("x")).all() and np.isnan(corpus.column("y", np.array([1]))).all()
    assert (corpus.neighbours(np.arange(300), 64) == -1).all()
    assert np.isinf(corpus.distances(np.arange(300), 64)).all()
    (slide,) = corpus.slides
    assert slide.name == "tissue" and not slide.spatial


def test_coordinates_from_obs_columns(tissue, write, tmp_path):
    build_corpus(tmp_path / "out", [write(tissue, coordinates=("px", "py"))])
    corpus = Corpus.open(tmp_path / "out")
    np.testing.assert_array_equal(
        corpus.column("x"), tissue.obs["px"].to_numpy(np.float32)[corpus.column("source_row")]
    )


def test_labels_are_one_list_for_all_files_and_missing_ones_are_minus_one(tissue, write, tmp_path):
    other = tissue.copy()
    other.obs["type"] = pd.Categorical(np.where(np.arange(300) % 2, "Alpha", "T"))
    plain = tissue.copy()
    del plain.obs["type"]
    sources = [
        write(tissue, "a", labels=("type",)),
        write(other, "b", labels=("section", "type")),
        write(plain, "c"),
    ]
    build_corpus(tmp_path / "out", sources)
    corpus = Corpus.open(tmp_path / "out")
    codes, classes = corpus.labels("type")
    assert classes == ("Alpha", "B", "NK", "T") and set(corpus.label_names) == {"type", "section"}
    named = np.array([*classes, None], object)[codes]
    source = np.array([slide.source for slide in corpus.slides], object)[corpus.slide_of(np.arange(900))]
    rows = corpus.column("source_row")
    given = tissue.obs["type"].astype(object)
    given = given.where(given.isin(["T", "B", "NK"]), None).to_numpy()
    np.testing.assert_array_equal(named[source == "a.h5ad"], given[rows[source == "a.h5ad"]])
    np.testing.assert_array_equal(
        named[source == "b.h5ad"], other.obs["type"].to_numpy()[rows[source == "b.h5ad"]]
    )
    assert (codes[source == "c.h5ad"] == -1).all()
    some = np.array([899, 5, 5, 301])
    np.testing.assert_array_equal(corpus.labels("type", some)[0], codes[some])


def test_a_section_column_that_was_not_given_is_warned_of(tissue, write, tmp_path):
    tissue.obs["Slide_ID"] = tissue.obs["section"]
    with pytest.warns(DataWarning) as caught:
        report = build_corpus(tmp_path / "flat", [write(tissue, section=None)])
    said = [str(warning.message) for warning in caught]
    assert said == report["files"][0]["warnings"] and len(said) == 2
    assert "obs['section'] has 2 values" in said[0] and "obs['Slide_ID'] has 2 values" in said[1]
    # What is constant within each section needs no warning: here a DataWarning would be an error.
    assert build_corpus(tmp_path / "given", [write(tissue)])["files"][0]["warnings"] == []


def test_a_subsampled_section_is_warned_of(tissue, write, tmp_path):
    with pytest.warns(DataWarning, match="subsampled") as caught:
        build_corpus(tmp_path / "out", [write(tissue, um_per_unit=20.0)])
    assert {str(w.message).split(":")[0] for w in caught} == {"tissue/s1", "tissue/s2"}
    assert any("nearest neighbour" in str(w.message) for w in caught)


KILLED = """
import os, sys
from scfm_jax.corpus import Source, build_corpus, write

whole = write.write_slide

def die_at_the_second(folder, content, *rest, **more):
    slide = whole(folder, content, *rest, **more)
    return slide if content.name == "tissue/s1" else os._exit(9)

write.write_slide = die_at_the_second
source = Source(sys.argv[1], "human", "sim", section="section", labels=("type",))
build_corpus(sys.argv[2], [source])
"""


def test_a_killed_build_goes_on_from_its_finished_slides(tissue, write, tmp_path):
    source = write(tissue, labels=("type",))
    build_corpus(tmp_path / "whole", [source])
    out = tmp_path / "out"
    killed = subprocess.run([sys.executable, "-c", KILLED, source.path, str(out)], check=False)
    assert killed.returncode == 9
    with pytest.raises(InputError, match="did not finish: run it again"):
        Corpus.open(out)
    (finished,) = (out / "slides").iterdir()
    written = (finished / "slide.json").stat()
    build_corpus(out, [source])
    again = (out / "slides" / finished.name / "slide.json").stat()
    assert (again.st_ino, again.st_mtime_ns) == (written.st_ino, written.st_mtime_ns)
    assert Corpus.open(out).hash == Corpus.open(tmp_path / "whole").hash
    assert verify_corpus(out) == []
    names = {path.relative_to(out) for path in out.rglob("*")}
    assert names == {path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*")}


def test_a_finished_slide_is_not_taken_over_when_the_build_is_another(tissue, write, tmp_path):
    source = write(tissue, labels=("type",))
    out = tmp_path / "out"
    subprocess.run([sys.executable, "-c", KILLED, source.path, str(out)], check=False)
    build_corpus(out, [source], n_neighbours=5)
    build_corpus(tmp_path / "whole", [source], n_neighbours=5)
    assert Corpus.open(out).hash == Corpus.open(tmp_path / "whole").hash and verify_corpus(out) == []


def test_a_failed_write_leaves_nothing_unless_a_slide_is_finished(tissue, write, tmp_path, monkeypatch):
    source = write(tissue)
    out = tmp_path / "out"

    def full_after(number):
        def write_some(folder, content, *rest, **more):
            nonlocal number
            number -= 1
            if number < 0:
                raise OSError("disk full")
            return write_slide(folder, content, *rest, **more)

        return write_some

    monkeypatch.setattr("scfm_jax.corpus.write.write_slide", full_after(0))
    with pytest.raises(OSError, match="disk full"):
        build_corpus(out, [source])
    assert not out.exists()
    monkeypatch.setattr("scfm_jax.corpus.write.write_slide", full_after(1))
    with pytest.raises(OSError, match="disk full"):
        build_corpus(out, [source])
    assert sorted(path.name for path in (out / "building").iterdir()) == ["counted", "finished"]
    assert len(list((out / "building" / "finished").iterdir())) == 1
    with pytest.raises(InputError, match="run it again"):
        Corpus.open(out)


def write_large(path, form: str, n_cells: int, n_genes: int, nnz: int) -> None:
    """An h5ad with evenly spread entries, written piece by piece."""
    obs = pd.DataFrame(index=[f"c{i}" for i in range(n_cells)])
    var = pd.DataFrame(index=[f"G{i}" for i in range(n_genes)])
    spatial = np.random.default_rng(0).random((n_cells, 2))
    ad.AnnData(obs=obs, var=var, obsm={"spatial": spatial}).write_h5ad(path)
    n_major, n_minor = (n_cells, n_genes) if form == "csr" else (n_genes, n_cells)
    each = nnz // n_major
    with h5py.File(path, "r+") as file:
        file.pop("X", None)
        group = file.create_group("X")
        group.attrs["encoding-type"], group.attrs["encoding-version"] = f"{form}_matrix", "0.1.0"
        group.attrs["shape"] = (n_cells, n_genes)
        group["indptr"] = np.arange(n_major + 1, dtype=np.int64) * each
        group.create_dataset("data", (nnz,), np.float32, chunks=(1 << 16,), fillvalue=3)
        indices = group.create_dataset("indices", (nnz,), np.int32, chunks=(1 << 16,))
        step = (1 << 22) // each
        for start in range(0, n_major, step):
            major = np.arange(start, min(start + step, n_major))
            minor = np.sort((major[:, None] + n_minor // each * np.arange(each)) % n_minor, axis=1)
            indices[start * each : (start + len(major)) * each] = minor.ravel()


MEASURED = """
import resource, sys
from scfm_jax.corpus import Source, build_corpus
build_corpus(sys.argv[2], [Source(sys.argv[1], "human", "sim")])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
@pytest.mark.parametrize("form", ["csr", "csc"])
def test_memory_stays_under_2_gib_on_200_000_cells_of_20_000_genes(tmp_path, form):
    write_large(tmp_path / "large.h5ad", form, 200_000, 20_000, 160_000_000)
    command = [sys.executable, "-c", MEASURED, str(tmp_path / "large.h5ad"), str(tmp_path / "out")]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    assert int(run.stdout) * 1024 < 2 << 30
    corpus = Corpus.open(tmp_path / "out")
    assert corpus.n_cells == 200_000 and corpus.cells(np.arange(10)).counts.tolist() == [3] * 8_000
