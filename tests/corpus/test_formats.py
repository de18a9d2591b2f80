"""Each format gives the corpus that the h5ad of the same cells gives."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
from cell_files import (
    as_csc,
    as_dense,
    in_raw,
    write_10x,
    write_cosmx,
    write_spatialdata,
    write_xenium,
    write_zarr,
    xenium_cells,
)
from scipy import sparse

from scfm_jax.cli import main
from scfm_jax.corpus import Corpus, build_corpus, matrix, read_sources
from scfm_jax.corpus.counts_file import CountsFile
from scfm_jax.errors import DataWarning, InputError

WRITERS = {
    "zarr v2": lambda data, folder: write_zarr(data, folder / "tissue.zarr", 2),
    "zarr v3": lambda data, folder: write_zarr(data, folder / "tissue.zarr", 3),
    "zarr csc": lambda data, folder: write_zarr(as_csc(data), folder / "tissue.zarr"),
    "zarr dense": lambda data, folder: write_zarr(as_dense(data), folder / "tissue.zarr"),
    "zarr raw": lambda data, folder: write_zarr(in_raw(data), folder / "tissue.zarr"),
    "a slash at the end": lambda data, folder: replace(
        write_zarr(data, folder / "tissue.zarr"), path=f"{folder}/tissue.zarr/"
    ),
    "SpatialData": lambda data, folder: write_spatialdata({"cells": data}, folder / "tissue.zarr"),
    "one of two tables": lambda data, folder: write_spatialdata(
        {"cells": data, "nuclei": data[:9].copy()}, folder / "tissue.zarr", table="cells"
    ),
    "Xenium parquet": lambda data, folder: write_xenium(data, folder / "run"),
    "Xenium csv.gz": lambda data, folder: write_xenium(data, folder / "run", "cells.csv.gz"),
    "Xenium table named": lambda data, folder: write_xenium(
        data, folder / "run", "mine.csv", cells=str(folder / "run/mine.csv")
    ),
    "CosMx": lambda data, folder: write_cosmx(data, folder / "run"),
    "CosMx as squidpy names cells": lambda data, folder: write_cosmx(data, folder / "run", "{cell}_{fov}"),
}


@pytest.mark.parametrize("form", WRITERS)
def test_every_format_gives_the_cells_of_the_h5ad(tissue, write, tmp_path, monkeypatch, form):
    monkeypatch.setattr(matrix, "ENTRIES", 100)
    build_corpus(tmp_path / "plain", [write(tissue, labels=("type",))])
    source = WRITERS[form](tissue, tmp_path)
    report = build_corpus(tmp_path / "other", [source])
    excluded = {"Blank Codeword": 3, "Negative Control Probe": 2} if "Xenium" in form else {}
    assert report["files"][0]["excluded"] == excluded and report["files"][0]["warnings"] == []
    plain, other = Corpus.open(tmp_path / "plain"), Corpus.open(tmp_path / "other")
    assert [slide.name for slide in other.slides] == [slide.name for slide in plain.slides]
    assert other.vocabulary.ids == plain.vocabulary.ids and other.n_cells == plain.n_cells
    every = np.arange(plain.n_cells)
    got, wanted = other.cells(every), plain.cells(every)
    for part in ("genes", "counts", "offsets"):
        np.testing.assert_array_equal(getattr(got, part), getattr(wanted, part))
    for name in ("source_row", "x", "y", "total_raw", "total_matched"):
        np.testing.assert_array_equal(other.column(name), plain.column(name))
    np.testing.assert_array_equal(other.neighbours(every, 16), plain.neighbours(every, 16))
    np.testing.assert_array_equal(other.labels("type")[0], plain.labels("type")[0])
    assert other.labels("type")[1] == plain.labels("type")[1]


def test_a_10x_file_without_a_cell_table_is_dissociated(tissue, tmp_path):
    source = write_xenium(tissue, tmp_path / "run", "", spatial=False, section=None, labels=())
    build_corpus(tmp_path / "out", [source])
    corpus = Corpus.open(tmp_path / "out")
    rows = corpus.column("source_row")
    cells = corpus.cells(np.arange(300))
    got = sparse.csr_array((cells.counts, cells.genes, cells.offsets), (300, 40)).toarray()
    np.testing.assert_array_equal(got, tissue[:, list(corpus.vocabulary.ids)].X.toarray()[rows])
    assert [slide.name for slide in corpus.slides] == ["tissue"]


def test_other_coordinates_of_a_cell_table(tissue, tmp_path):
    source = write_xenium(tissue, tmp_path / "run", coordinates=("y_centroid", "x_centroid"))
    np.testing.assert_array_equal(CountsFile(source).coordinates, tissue.obsm["spatial"][:, ::-1])


def test_ids_that_are_bytes(tissue, tmp_path):
    source = write_xenium(tissue, tmp_path / "run")
    table = xenium_cells(tissue)
    table["cell_id"] = table["cell_id"].str.encode("utf-8")
    table.to_parquet(tmp_path / "run/cells.parquet")
    np.testing.assert_array_equal(CountsFile(source).coordinates, tissue.obsm["spatial"])


def test_cells_without_a_barcode_are_warned_of(tissue, tmp_path):
    source = write_xenium(tissue, tmp_path / "run")
    write_10x(tissue[:280], tmp_path / "run/cell_feature_matrix.h5")
    with pytest.warns(DataWarning, match=r"20 of 300 cells in cells\.parquet have no barcode"):
        build_corpus(tmp_path / "out", [source])


def test_regions_of_a_table_in_one_section_are_warned_of(tissue, tmp_path):
    tissue.obs["sample_of"] = tissue.obs["section"]
    del tissue.obs["section"]
    source = write_spatialdata({"table": tissue}, tmp_path / "tissue.zarr", "sample_of", section=None)
    with pytest.warns(DataWarning, match=r"obs\['sample_of'\] has 2 values in one section"):
        build_corpus(tmp_path / "out", [source])


def test_names_and_cell_tables_in_a_sources_toml(tissue, tmp_path):
    for name in ("one", "two"):
        write_xenium(tissue, tmp_path / name, "mine.parquet")
    (tmp_path / "sources.toml").write_text(
        "".join(
            f'[[source]]\npath = "{name}/cell_feature_matrix.h5"\nname = "{name}"\n'
            f'cells = "{name}/mine.parquet"\nspecies = "human"\ntechnology = "xenium"\n'
            for name in ("one", "two")
        )
    )
    sources = read_sources(tmp_path / "sources.toml")
    assert [source.cells for source in sources] == [
        f"{tmp_path}/{name}/mine.parquet" for name in ("one", "two")
    ]
    assert [source.stem for source in sources] == ["one", "two"]


@pytest.mark.filterwarnings("ignore::scfm_jax.errors.DataWarning")
def test_the_command_says_what_it_excludes(tissue, tmp_path, capsys):
    source = write_xenium(tissue, tmp_path / "run", "mine.csv")
    words = [
        "corpus",
        "build",
        str(tmp_path / "out"),
        source.path,
        "--species",
        "human",
        "--technology",
        "xenium",
    ]
    assert main([*words, "--cells", str(tmp_path / "run/mine.csv"), "--name", "breast"]) == 0
    assert "excluded features: 3 Blank Codeword, 2 Negative Control Probe" in capsys.readouterr().out
    assert [slide.name for slide in Corpus.open(tmp_path / "out").slides] == ["breast"]


ROWS = {
    "none": np.array([], np.int64),
    "first and last": np.array([0, 299]),
    "a run": np.arange(70, 90),
    "two runs": np.r_[3:9, 200:230],
    "all": np.arange(300),
    "every third": np.arange(0, 300, 3),
}


@pytest.mark.parametrize("gap", [0, 40, 1 << 16])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("form", ["csr", "csc", "dense", "zarr", "zarr csc", "10x"])
def test_rows_that_are_asked_for_are_those_of_scipy(tissue, write, tmp_path, monkeypatch, form, rows, gap):
    monkeypatch.setattr(matrix, "GAP", gap)
    monkeypatch.setattr(matrix, "ENTRIES", 30)
    data = tissue
    data.X = sparse.csr_matrix(data.X.toarray() * (np.arange(300) % 5 > 0)[:, None])
    source = {
        "csr": lambda: write(data),
        "csc": lambda: write(as_csc(data)),
        "dense": lambda: write(as_dense(data)),
        "zarr": lambda: write_zarr(data, tmp_path / "tissue.zarr"),
        "zarr csc": lambda: write_zarr(as_csc(data), tmp_path / "tissue.zarr"),
        "10x": lambda: write_xenium(data, tmp_path / "run"),
    }[form]()
    found = list(CountsFile(source).entries(ROWS[rows]))
    got = sum(
        (sparse.coo_array((e.values, (e.rows, e.columns)), data.shape).tocsr() for e in found),
        sparse.csr_array(data.shape, dtype=np.int32),
    )
    wanted = np.zeros(data.shape)
    wanted[ROWS[rows]] = data.X.toarray()[ROWS[rows]]
    np.testing.assert_array_equal(got.toarray(), wanted)
    if form == "csr":
        assert (np.diff(np.concatenate([np.zeros(0), *(entry.rows for entry in found)])) >= 0).all()


def test_of_a_csr_matrix_only_what_is_near_the_rows_is_read(tissue, write, monkeypatch):
    monkeypatch.setattr(matrix, "GAP", 10)
    file = CountsFile(write(tissue))
    read = []
    inside = file.matrix._node["data"]

    class Watched:
        shape, chunks = inside.shape, inside.chunks

        def __getitem__(self, places):
            read.append(places.stop - places.start)
            return inside[places]

    file.matrix._node = {**file.matrix._node, "data": Watched()}
    wanted = np.array([5, 6, 150])
    entries = list(file.entries(wanted))
    assert sum(read) == tissue.X[wanted].nnz == sum(len(e.values) for e in entries) and len(read) == 2


def test_totals_are_those_of_numpy(tissue, write):
    target = np.where(np.arange(40) % 4, np.arange(40), -1)
    totals = CountsFile(write(tissue)).totals(target)
    dense = tissue.X.toarray()
    np.testing.assert_array_equal(totals.cell_raw, dense.sum(1))
    np.testing.assert_array_equal(totals.cell_matched, dense[:, target >= 0].sum(1))
    np.testing.assert_array_equal(totals.cell_entries, (dense[:, target >= 0] > 0).sum(1))
    np.testing.assert_array_equal(totals.gene, dense.sum(0))


@pytest.mark.parametrize("value", [2.0**31, -(2.0**31), 2.0**40, np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_numbers_beyond_32_bits_are_no_counts(tissue, write, value, dtype):
    tissue.X = tissue.X.astype(dtype)
    tissue.X.data[-1] = value
    with pytest.raises(InputError, match="in cell 'cell299', no raw counts"):
        list(CountsFile(write(tissue, layer="X")).entries())


@pytest.mark.parametrize("form", ["h5ad", "zarr", "xenium"])
def test_a_fingerprint_changes_with_what_was_read(tissue, write, tmp_path, form):
    source, file = {
        "h5ad": lambda: (write(tissue), tmp_path / "tissue.h5ad"),
        "zarr": lambda: (
            write_zarr(tissue, tmp_path / "tissue.zarr"),
            tmp_path / "tissue.zarr/X/data/zarr.json",
        ),
        "xenium": lambda: (write_xenium(tissue, tmp_path / "run"), tmp_path / "run/cells.parquet"),
    }[form]()
    before = CountsFile(source).fingerprint()
    assert CountsFile(source).fingerprint() == before
    shutil.copyfile(file, tmp_path / "copy")
    shutil.copyfile(tmp_path / "copy", file)
    assert CountsFile(source).fingerprint() != before
