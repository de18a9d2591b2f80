"""Each bad file of a format other than h5ad is one line that names the file, the field and the mend."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import zarr
from cell_files import (
    cosmx_cells,
    write_10x,
    write_cosmx,
    write_spatialdata,
    write_xenium,
    write_zarr,
    xenium_cells,
)

from scfm_jax.corpus import Source, build_corpus
from scfm_jax.corpus.counts_file import CountsFile
from scfm_jax.errors import InputError


def fails(source: Source, *told: str) -> None:
    with pytest.raises(InputError) as error:
        file = CountsFile(source)
        file.totals(np.zeros(len(file.gene_names), np.int32))
    message = str(error.value)
    assert all(text in message for text in told), message
    assert "\n" not in message and error.value.mend


def plain(path: Path, **more: object) -> Source:
    return Source(**{"path": str(path), "species": "human", "technology": "sim", **more})


def test_no_such_folder(tmp_path):
    fails(plain(tmp_path / "none.zarr"), "none.zarr: there is no such file; give the path of an .h5ad, .zarr")


def test_an_unknown_extension(tmp_path):
    (tmp_path / "a.loom").touch()
    fails(plain(tmp_path / "a.loom"), "a.loom: .loom is no known format; give an .h5ad, .zarr or 10x .h5")


def test_a_folder_that_is_no_zarr(tmp_path):
    fails(plain(tmp_path), "it is a folder, but no zarr group; give an AnnData or SpatialData .zarr")


def test_a_zarr_of_something_else(tmp_path):
    zarr.open_group(tmp_path / "a.zarr", mode="w").create_array("numbers", data=np.arange(3))
    fails(plain(tmp_path / "a.zarr"), "a.zarr: it cannot be read as an AnnData zarr folder")


@pytest.mark.parametrize("part", ["zarr.json", "X/zarr.json", "X/data/zarr.json", "obs/_index/zarr.json"])
def test_damaged_metadata_of_a_zarr(tissue, tmp_path, part):
    source = write_zarr(tissue, tmp_path / "tissue.zarr")
    content = (tmp_path / "tissue.zarr" / part).read_bytes()
    (tmp_path / "tissue.zarr" / part).write_bytes(content[: len(content) // 2])
    fails(source, "tissue.zarr: it cannot be read as", "write or copy it again")


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("part", ["X/data", "X/indices", "X/indptr", "obsm/spatial"])
def test_a_lost_chunk_of_a_zarr_is_no_zeros(tissue, tmp_path, part, version):
    source = write_zarr(tissue, tmp_path / "tissue.zarr", version)
    for chunk in (tmp_path / "tissue.zarr" / part).rglob("[0-9]*"):
        if chunk.is_file():
            chunk.unlink()
    fails(source, "tissue.zarr: ", "1 of 1 chunks of", "are missing", "write or copy it again")


@pytest.mark.parametrize("version", [2, 3])
def test_a_damaged_chunk_of_a_zarr(tissue, tmp_path, version):
    source = write_zarr(tissue, tmp_path / "tissue.zarr", version, layer="X")
    chunks = [chunk for chunk in (tmp_path / "tissue.zarr/X/data").rglob("[0-9]*") if chunk.is_file()]
    chunks[0].write_bytes(chunks[0].read_bytes()[:50])
    fails(source, "tissue.zarr: X cannot be read, the file is damaged", "write or copy it again")


def test_several_tables(tissue, tmp_path):
    source = write_spatialdata({"a": tissue, "b": tissue}, tmp_path / "tissue.zarr")
    fails(source, "tissue.zarr: it holds 2 tables; give table, one of a, b")


def test_a_table_that_is_not_there(tissue, tmp_path):
    source = write_spatialdata({"a": tissue, "b": tissue}, tmp_path / "tissue.zarr", table="c")
    fails(source, "table 'c' is not there; use one of a, b")


def test_spatialdata_without_tables(tmp_path):
    fails(
        write_spatialdata({}, tmp_path / "tissue.zarr"),
        "it is a SpatialData folder without tables; leave it out",
    )


def test_a_table_without_coordinates(tissue, tmp_path):
    del tissue.obsm["spatial"]
    fails(
        write_spatialdata({"a": tissue}, tmp_path / "tissue.zarr"),
        "obsm['spatial']: no coordinates (obsm: empty)",
    )


@pytest.mark.parametrize("form", ["h5ad", "zarr", "10x"])
def test_a_table_where_there_are_none(tissue, write, tmp_path, form):
    source = {
        "h5ad": lambda: write(tissue, table="a"),
        "zarr": lambda: write_zarr(tissue, tmp_path / "tissue.zarr", table="a"),
        "10x": lambda: write_xenium(tissue, tmp_path / "run", table="a"),
    }[form]()
    fails(source, "table is 'a', but it is no SpatialData folder; leave it out")


@pytest.mark.parametrize("form", ["h5ad", "zarr"])
def test_a_cell_table_where_there_is_none(tissue, write, tmp_path, form):
    source = {
        "h5ad": lambda: write(tissue, cells="cells.csv"),
        "zarr": lambda: write_zarr(tissue, tmp_path / "tissue.zarr", cells="cells.csv"),
    }[form]()
    fails(source, "cells is 'cells.csv', but", "has its cells in obs; leave it out")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9])
def test_a_truncated_10x_file(tissue, tmp_path, share):
    source = write_xenium(tissue, tmp_path / "run")
    content = Path(source.path).read_bytes()
    Path(source.path).write_bytes(content[: int(len(content) * share)])
    fails(source, "cell_feature_matrix.h5: it cannot be read as a 10x .h5 file, or is truncated")


def spoil(source: Source, part: str, change) -> None:
    """Replace a part of a 10x file by what `change` makes of it, or leave it out."""
    with h5py.File(source.path, "r+") as file:
        changed = change(file[part])
        del file[part]
        if changed is not None:
            file[part] = changed


CASES = [
    ("matrix", lambda node: None, "it has no group 'matrix'; give what Cell Ranger 3"),
    ("matrix/features", lambda node: None, "its matrix lacks features/name, features/feature_type"),
    ("matrix/indptr", lambda node: None, "its matrix lacks indptr; write or copy it again"),
    (
        "matrix/features/name",
        lambda node: node[:-1],
        "its matrix is 45 x 300, but there are 44 feature names",
    ),
    ("matrix/barcodes", lambda node: node[1:], "45 feature types and 299 barcodes"),
    ("matrix/barcodes", lambda node: np.r_[node[:1], node[:-1]], "barcodes holds 'cell0' twice"),
    (
        "matrix/features/feature_type",
        lambda node: np.array(["Antibody Capture"] * 45, "S"),
        "no feature is Gene Expression (there are: Antibody Capture); leave the file out",
    ),
    ("matrix/indptr", lambda node: node[:-1], "indptr, indices and data do not fit 300 csr rows"),
    ("matrix/data", lambda node: node[:-1], "indptr, indices and data do not fit 300 csr rows"),
    ("matrix/indptr", lambda node: node[:][::-1], "indptr does not ascend from 0"),
    ("matrix/indices", lambda node: node[:] + 1, "indices reach from 1 to 45 of 45"),
    ("matrix/data", lambda node: node[:] * 0.5, "X has negative or fractional values, no raw counts"),
]


@pytest.mark.parametrize(("part", "change", "told"), CASES)
def test_a_10x_file_that_is_not_as_it_should_be(tissue, tmp_path, part, change, told):
    source = write_xenium(tissue, tmp_path / "run")
    spoil(source, part, change)
    fails(source, "cell_feature_matrix.h5: ", told)


def test_a_10x_file_without_its_cell_table(tissue, tmp_path):
    source = write_xenium(tissue, tmp_path / "run", "")
    fails(
        source,
        "no cell table with coordinates is beside it",
        "give cells, or give spatial = false for dissoc",
    )


def test_a_cell_table_that_is_not_there(tissue, tmp_path):
    source = write_xenium(tissue, tmp_path / "run", cells=str(tmp_path / "none.csv"))
    fails(source, "none.csv: cells: there is no such file; give the path of the cell table")


def test_several_cell_tables(tissue, tmp_path):
    source = write_cosmx(tissue, tmp_path / "run")
    shutil.copy(tmp_path / "run/S0_metadata_file.csv.gz", tmp_path / "run/S1_metadata_file.csv.gz")
    fails(
        source,
        "several cell tables are beside it: S0_metadata_file.csv.gz, S1_meta",
        "give cells, one of them",
    )


def test_a_cell_table_of_another_kind(tissue, tmp_path):
    (tmp_path / "cells.xlsx").touch()
    source = write_xenium(tissue, tmp_path / "run", cells=str(tmp_path / "cells.xlsx"))
    fails(source, "cells.xlsx: it is no known kind of cell table; give a .parquet, .csv or .csv.gz")


@pytest.mark.parametrize("name", ["cells.parquet", "cells.csv.gz"])
def test_a_truncated_cell_table(tissue, tmp_path, name):
    source = write_xenium(tissue, tmp_path / "run", name)
    content = (tmp_path / "run" / name).read_bytes()
    (tmp_path / "run" / name).write_bytes(content[: len(content) // 2])
    fails(source, f"{name}: it cannot be read as a table", "write or copy it again")


def test_parquet_without_pyarrow(tissue, tmp_path, monkeypatch):
    source = write_xenium(tissue, tmp_path / "run")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    fails(source, "cells.parquet: pyarrow is needed to read it; pip install 'scfm_jax[xenium]'")


def test_cells_of_another_run(tissue, tmp_path):
    source = write_xenium(tissue, tmp_path / "run")
    table = xenium_cells(tissue)
    table["cell_id"] = "other-" + table["cell_id"]
    table.to_parquet(tmp_path / "run/cells.parquet")
    fails(
        source,
        "300 of 300 barcodes are not in its cell_id, first 'cell0'; give the cell table of the same run",
    )


def test_a_cell_table_with_a_cell_too_few(tissue, tmp_path):
    source = write_xenium(tissue, tmp_path / "run")
    xenium_cells(tissue).drop("cell7").to_parquet(tmp_path / "run/cells.parquet")
    fails(source, "1 of 300 barcodes are not in its cell_id, first 'cell7'")


def test_a_cell_table_without_ids(tissue, tmp_path):
    source = write_xenium(tissue, tmp_path / "run")
    xenium_cells(tissue).drop(columns="cell_id").to_parquet(tmp_path / "run/cells.parquet", index=False)
    fails(source, "no column cell_id, nor fov and cell_ID (there are: type, section, x_centroid, y_centroid)")


def test_a_cell_twice_in_its_table(tissue, tmp_path):
    source = write_xenium(tissue, tmp_path / "run")
    table = xenium_cells(tissue)
    pd.concat([table, table[:1]]).to_parquet(tmp_path / "run/cells.parquet")
    fails(source, "cells.parquet: cell_id holds ", "twice; give every cell a row of its own")


def test_ids_that_can_be_read_both_ways(tissue, tmp_path):
    square = tissue[:4].copy()
    source = write_cosmx(square, tmp_path / "run")
    table, _ = cosmx_cells(square)
    table["fov"], table["cell_ID"] = [1, 1, 2, 2], [1, 2, 1, 2]
    table.to_csv(tmp_path / "run/S0_metadata_file.csv.gz", index=False)
    square.obs_names = ["1_1", "1_2", "2_1", "2_2"]
    write_10x(square, tmp_path / "run/tissue.h5")
    fails(
        source, "the barcodes are in its fov_cell_ID and in its cell_ID_fov, in another order; add a column"
    )


def test_cell_table_without_coordinates(tissue, tmp_path):
    source = write_xenium(tissue, tmp_path / "run")
    xenium_cells(tissue).drop(columns="x_centroid").to_parquet(tmp_path / "run/cells.parquet")
    fails(source, "obsm['spatial']: no coordinates (obsm: empty); give coordinates, or spatial = false")


def test_coordinates_that_are_missing_in_a_cell_table(tissue, tmp_path):
    source = write_xenium(tissue, tmp_path / "run")
    table = xenium_cells(tissue)
    table.loc["cell9", "x_centroid"] = np.nan
    table.to_parquet(tmp_path / "run/cells.parquet")
    fails(source, "obs['x_centroid'], obs['y_centroid'] is not finite in 1 cells, first 'cell9'")


def test_two_runs_without_names(tissue, tmp_path):
    sources = [replace(write_xenium(tissue, tmp_path / name), name=None) for name in ("one", "two")]
    with pytest.raises(InputError, match=r"would come from .*one.* too; give one of them a name"):
        build_corpus(tmp_path / "out", sources)


@pytest.mark.parametrize("name", ["", "  ", "a/b"])
def test_a_name_that_is_none(name):
    with pytest.raises(InputError, match=r"name is '.*'; name the name, without a slash"):
        plain(Path("a.h5ad"), name=name)
