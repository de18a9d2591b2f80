"""The same tissue written in each format, with anndata, h5py, zarr and pandas alone."""

from __future__ import annotations

import warnings
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import zarr
from scipy import sparse

from scfm_jax.corpus import Source

FIELDS = {"species": "human", "technology": "sim", "section": "section", "labels": ("type",)}


def write_zarr(data: ad.AnnData, path: Path, version: int = 3, **more: object) -> Source:
    with ad.settings.override(zarr_write_format=version), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data.write_zarr(path)
    return Source(**{"path": str(path), **FIELDS, **more})


def write_spatialdata(tables: dict[str, ad.AnnData], path: Path, region: str = "", **more: object) -> Source:
    """The folder that SpatialData writes, as far as its tables go."""
    zarr.open_group(path, mode="w").create_group("tables")
    for name, data in tables.items():
        data = data.copy()
        if region:
            data.uns["spatialdata_attrs"] = {"region_key": region}
        write_zarr(data, path / "tables" / name)
    return Source(**{"path": str(path), **FIELDS, **more})


def write_10x(data: ad.AnnData, path: Path, others: dict[str, int] | None = None) -> None:
    """Cell Ranger's layout, with features that are no genes between the genes."""
    types = ["Gene Expression"] * data.n_vars
    names = list(data.var_names)
    dense = data.X.toarray().astype(np.int32)
    for number, (kind, n) in enumerate((others or {}).items()):
        types[number:number] = [kind] * n
        names[number:number] = [f"{kind} {i}" for i in range(n)]
        dense = np.insert(dense, [number] * n, 7, axis=1)
    stored = sparse.csc_matrix(dense.T)
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix")
        for part in ("data", "indices", "indptr"):
            group.create_dataset(part, data=getattr(stored, part), chunks=True, compression="gzip")
        group["shape"] = np.array(stored.shape, np.int32)
        group["barcodes"] = np.array(data.obs_names, "S")
        group["features/id"] = np.array([f"ENSG{i:011d}" for i in range(len(names))], "S")
        group["features/name"] = np.array(names, "S")
        group["features/feature_type"] = np.array(types, "S")


def xenium_cells(data: ad.AnnData) -> pd.DataFrame:
    """The table as Xenium writes it, and more columns; its rows in another order."""
    xy = data.obsm["spatial"]
    table = data.obs[["type", "section"]].assign(x_centroid=xy[:, 0], y_centroid=xy[:, 1])
    table.insert(0, "cell_id", data.obs_names)
    return table.sample(frac=1, random_state=0)


def cosmx_cells(data: ad.AnnData) -> tuple[pd.DataFrame, list[str]]:
    """The table as CosMx writes it, and the names of its cells."""
    xy, number = data.obsm["spatial"], np.arange(data.n_obs)
    table = data.obs[["type", "section"]].assign(
        fov=number // 100 + 1,
        cell_ID=number % 100 + 1,
        CenterX_local_px=0.0,
        CenterX_global_px=xy[:, 0],
        CenterY_global_px=xy[:, 1],
    )
    return table, [f"{fov}_{cell}" for fov, cell in zip(table["fov"], table["cell_ID"])]


def write_xenium(data: ad.AnnData, folder: Path, beside: str = "cells.parquet", **more: object) -> Source:
    folder.mkdir(exist_ok=True)
    write_10x(data, folder / "cell_feature_matrix.h5", {"Negative Control Probe": 2, "Blank Codeword": 3})
    if beside.endswith(".parquet"):
        xenium_cells(data).to_parquet(folder / beside)
    elif beside:
        xenium_cells(data).to_csv(folder / beside, index=False)
    return Source(**{"path": str(folder / "cell_feature_matrix.h5"), "name": "tissue", **FIELDS, **more})


def write_cosmx(data: ad.AnnData, folder: Path, join: str = "{fov}_{cell}", **more: object) -> Source:
    folder.mkdir(exist_ok=True)
    table, _ = cosmx_cells(data)
    named = data.copy()
    named.obs_names = [join.format(fov=fov, cell=cell) for fov, cell in zip(table["fov"], table["cell_ID"])]
    write_10x(named, folder / "tissue.h5")
    table.to_csv(folder / "S0_metadata_file.csv.gz", index=False)
    return Source(**{"path": str(folder / "tissue.h5"), **FIELDS, **more})


def as_csc(data: ad.AnnData) -> ad.AnnData:
    return ad.AnnData(data.X.tocsc(), data.obs, data.var, obsm=data.obsm)


def as_dense(data: ad.AnnData) -> ad.AnnData:
    return ad.AnnData(data.X.toarray(), data.obs, data.var, obsm=data.obsm)


def in_raw(data: ad.AnnData) -> ad.AnnData:
    out = data.copy()
    out.raw = data
    out = out[:, :7].copy()
    out.X = out.X.log1p()
    return out
