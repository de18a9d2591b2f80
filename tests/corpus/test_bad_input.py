"""Each bad input is one line that names the file, the field and the mend, and leaves nothing on disk."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pytest
from scipy import sparse

from scfm_jax.corpus import Source, build_corpus
from scfm_jax.errors import InputError
from scfm_jax.genes import Vocabulary


def fractional(data: ad.AnnData) -> None:
    data.X = data.X.log1p()


def fractional_at_the_end(data: ad.AnnData) -> None:
    data.X.data[-1] = 0.5


def negative(data: ad.AnnData) -> None:
    data.X.data[7] = -1


def not_a_number(data: ad.AnnData) -> None:
    data.X = data.X.toarray()
    data.X[3, 2] = np.nan


def raw_elsewhere(data: ad.AnnData) -> None:
    data.layers["spliced"] = data.X.copy()
    data.X = data.X.log1p()


def no_coordinates(data: ad.AnnData) -> None:
    data.obsm["elsewhere"] = data.obsm.pop("spatial")


def nan_coordinates(data: ad.AnnData) -> None:
    data.obsm["spatial"][5, 1] = np.nan


def one_coordinate(data: ad.AnnData) -> None:
    data.obsm["spatial"] = data.obsm["spatial"][:, :1]


def double_names(data: ad.AnnData) -> None:
    names = data.obs_names.to_list()
    data.obs_names = [names[0], *names[:-1]]


def missing_section(data: ad.AnnData) -> None:
    data.obs.loc[data.obs_names[4], "section"] = None


def all_zero(data: ad.AnnData) -> None:
    data.X = sparse.csr_matrix(data.shape, dtype=np.float32)


def unchanged(data: ad.AnnData) -> None:
    pass


CASES = [
    (
        fractional,
        {},
        "X has negative or fractional values, no raw counts; give the file its raw integer counts",
    ),
    (fractional_at_the_end, {"layer": "X"}, "X holds 0.5 in cell 'cell299', no raw counts"),
    (negative, {"layer": "X"}, "X holds -1.0 in cell 'cell0', no raw counts"),
    (not_a_number, {"layer": "X"}, "X holds nan in cell 'cell3', no raw counts"),
    (raw_elsewhere, {}, "spliced looks raw: give layer = 'spliced'"),
    (raw_elsewhere, {"layer": "X"}, "spliced looks raw: give layer = 'spliced'"),
    (unchanged, {"layer": "umi"}, "layer 'umi' is not there; use one of X"),
    (
        no_coordinates,
        {},
        "obsm['spatial']: no coordinates (obsm: elsewhere); give coordinates, or spatial = false",
    ),
    (
        unchanged,
        {"coordinates": ("px", "pz")},
        "obs has no column 'pz'; use one of its columns: type, section",
    ),
    (unchanged, {"coordinates": ("px", "type")}, "obs['px'], obs['type'] is not numeric"),
    (nan_coordinates, {}, "obsm['spatial'] is not finite in 1 cells, first 'cell5'; leave these cells out"),
    (one_coordinate, {}, "obsm['spatial'] has shape (300, 1); give x and y"),
    (double_names, {}, "obs_names holds 'cell0' twice; call obs_names_make_unique()"),
    (missing_section, {}, "obs['section'] has missing values; give every cell its section"),
    (unchanged, {"section": "slice"}, "section: obs has no column 'slice'; use one of its columns"),
    (unchanged, {"labels": ("celltype",)}, "labels: obs has no column 'celltype'; use one of its columns"),
    (all_zero, {}, "X: no cell has 1 counts in the vocabulary; lower min_counts, or leave the file out"),
]


@pytest.mark.parametrize(("spoil", "fields", "told"), CASES, ids=lambda value: getattr(value, "__name__", ""))
@pytest.mark.filterwarnings("ignore:Observation names are not unique")
def test_a_bad_file_beside_a_good_one(tissue, write, tmp_path, spoil, fields, told):
    good = write(tissue, "good")
    bad = tissue.copy()
    spoil(bad)
    fails(tmp_path, [good, write(bad, "bad", **fields)], "bad.h5ad", told)


def fails(tmp_path: Path, sources: list[Source], where: str, told: str, **options: object) -> None:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError) as error:
        build_corpus(tmp_path / "out", sources, **options)
    message = str(error.value)
    assert where in message and told in message and "\n" not in message and error.value.mend
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("shape", [(0, 40), (300, 0)])
@pytest.mark.parametrize("form", [sparse.csr_matrix, sparse.csc_matrix, np.asarray])
def test_an_empty_file(tissue, write, tmp_path, shape, form):
    empty = tissue[: shape[0], : shape[1]].copy()
    empty.X = form(np.zeros(shape, np.float32))
    fails(
        tmp_path,
        [write(empty)],
        "tissue.h5ad",
        f"X is empty ({shape[0]} cells x {shape[1]} genes); leave the file out",
    )


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_a_truncated_file(tissue, write, tmp_path, share):
    source = write(tissue)
    content = Path(source.path).read_bytes()
    Path(source.path).write_bytes(content[: int(len(content) * share)])
    fails(tmp_path, [source], "tissue.h5ad", "cannot be read as an AnnData file, or is truncated")


def test_a_file_damaged_inside(tissue, write, tmp_path):
    source = write(tissue)
    with h5py.File(source.path, "r+") as file:
        values = file["X/data"][:]
        del file["X/data"]
        data = file["X"].create_dataset("data", data=values, chunks=(len(values),), compression="gzip")
        where = data.id.get_chunk_info(0).byte_offset
    with Path(source.path).open("r+b") as file:
        file.seek(where)
        file.write(b"\xff" * 64)
    fails(tmp_path, [source], "tissue.h5ad", "write or copy it again")


def test_a_file_of_another_kind_and_no_file(write, tissue, tmp_path):
    with h5py.File(tmp_path / "other.h5ad", "w") as file:
        file["numbers"] = np.arange(3)
    source = Source(str(tmp_path / "other.h5ad"), "human", "sim")
    fails(tmp_path, [source], "other.h5ad", "cannot be read as an AnnData file")
    fails(
        tmp_path, [Source(str(tmp_path / "none.h5ad"), "human", "sim")], "none.h5ad", "there is no such file"
    )
    fails(tmp_path, [], "out", "no source file is given; give at least one .h5ad")


def test_no_gene_in_the_vocabulary(tissue, write, tmp_path):
    vocabulary = Vocabulary.from_names([(["OTHER1", "OTHER2"], "human")])
    told = "var_names: no gene is in the vocabulary; check the species"
    fails(tmp_path, [write(tissue)], "tissue.h5ad", told, vocabulary=vocabulary)


def test_an_existing_output_is_not_touched(tissue, write, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep me")
    fails(
        tmp_path,
        [write(tissue)],
        "out",
        "it exists already and is no corpus; remove it or choose another name",
    )


def test_two_files_of_one_name(tissue, write, tmp_path):
    (tmp_path / "deeper").mkdir()
    fails(
        tmp_path,
        [write(tissue), write(tissue, "deeper/tissue")],
        "deeper/tissue.h5ad",
        "slide 'tissue/s1' would",
    )


def test_settings_out_of_range(tissue, write, tmp_path):
    fails(tmp_path, [write(tissue)], "out", "n_neighbours is 0", n_neighbours=0)
    fails(tmp_path, [write(tissue)], "out", "min_counts -1", min_counts=-1)


@pytest.mark.parametrize(
    "fields", [{"max_radius": 50.0}, {"um_per_unit": -1.0}, {"um_per_unit": float("nan")}]
)
def test_lengths_that_make_no_sense(fields):
    with pytest.raises(InputError, match=r"a\.h5ad: .*um_per_unit"):
        Source("a.h5ad", "human", "sim", **fields)
