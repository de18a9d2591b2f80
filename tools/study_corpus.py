"""The corpus of the scaling study: four spatial files over all their own genes, every cell with a cell type.

    python tools/study_corpus.py DATA GENE_MAPS runs/study_corpus

The study exchanges neighbours within cell types. Two files name them; cells of the other two are clustered
here (12 of k-means on 30 principal components of log counts), as ``cluster``.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import anndata
import numpy as np
import tyro
from scipy import sparse
from sklearn.cluster import KMeans
from sklearn.decomposition import TruncatedSVD

from scfm_jax.corpus import Source, build_corpus
from scfm_jax.errors import InputError
from scfm_jax.genes import read_gene_names, read_orthologs

CLUSTERS, COMPONENTS = 12, 30
# Those without labels are clustered.
FILES = (
    Source(
        "merfish_mouse_hypothalamus.h5ad",
        species="mouse",
        technology="merfish",
        name="merfish",
        section="section",
        labels=("cell_type",),
        um_per_unit=1.0,
    ),
    Source(
        "seqfish_mouse_embryo2.h5ad",
        species="mouse",
        technology="seqfish",
        name="seqfish",
        section="z",
        labels=("cell_type",),
    ),
    Source(
        "cosmx_human_nsclc_lung5_rep3.h5ad",
        species="human",
        technology="cosmx",
        name="cosmx",
        um_per_unit=0.18,
    ),
    Source(
        "extra_xenium_human_breast_34k_unlabelled.h5ad",
        species="human",
        technology="xenium",
        name="xenium34k",
        section="part",
        um_per_unit=1.0,
    ),
)


@dataclass
class Arguments:
    """Cluster what has no cell types, and build the corpus."""

    data: Annotated[Path, tyro.conf.Positional]
    """Folder of the files."""
    gene_maps: Annotated[Path, tyro.conf.Positional]
    """Folder of the gene tables."""
    out: Annotated[Path, tyro.conf.Positional]


def main(arguments: Arguments) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        sources = []
        for file in FILES:
            path = arguments.data / file.path
            if not path.is_file():
                raise InputError(path, "there is no such file", "name the folder that holds it first")
            if file.labels:
                sources.append(replace(file, path=str(path)))
                continue
            adata = anndata.read_h5ad(path)
            adata.obs["cluster"] = [f"cluster {number}" for number in clusters(adata)]
            adata.write_h5ad(Path(scratch) / file.path)
            sources.append(replace(file, path=str(Path(scratch) / file.path), labels=("cluster",)))
        build_corpus(
            arguments.out,
            sources,
            n_neighbours=80,
            gene_names=read_gene_names(arguments.gene_maps / "GENCODEv44_Gene_id2name.csv"),
            orthologs=read_orthologs(arguments.gene_maps / "Ensembl105_Human2Mouse_Genes.csv"),
        )


def clusters(adata: anndata.AnnData) -> np.ndarray:
    """A cluster of every cell; cells without counts are alike."""
    counts = sparse.csr_array(adata.X, dtype=np.float64)
    total = np.asarray(counts.sum(1)).ravel()
    scaled = sparse.diags_array(np.median(total) / np.maximum(total, 1)) @ counts
    components = TruncatedSVD(COMPONENTS, random_state=0).fit_transform(scaled.log1p())
    return KMeans(CLUSTERS, n_init=4, random_state=0).fit_predict(components)


if __name__ == "__main__":
    try:
        main(tyro.cli(Arguments))
    except InputError as error:
        print(f"study_corpus: {error}", file=sys.stderr)
        sys.exit(2)
