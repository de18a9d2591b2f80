"""Flags that several verbs of the command line share."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import arg

from scfm_jax.errors import InputError

_LARGE = 1 << 28
Labels = Annotated[str, arg(metavar="COLUMN,...")]


@dataclasses.dataclass
class GeneTables:
    """Tables that let gene names meet."""

    gene_names: Path | None = None
    """Ensembl id and symbol, .csv or .tsv: lets files named by ids meet vocabularies named by symbols."""
    orthologs: Path | None = None
    """Human and mouse symbol, .csv or .tsv: lets mouse files meet human vocabularies."""
    aliases: Path | None = None
    """Alias and name, .csv or .tsv."""

    def read(self) -> dict[str, Any]:
        from scfm_jax import genes

        return {
            "gene_names": self.gene_names and genes.read_gene_names(self.gene_names),
            "orthologs": self.orthologs and genes.read_orthologs(self.orthologs),
            "aliases": self.aliases and genes.read_aliases(self.aliases),
        }


@dataclasses.dataclass
class Reading:
    """How the files are to be read (a sources.toml says it for each file apart)."""

    species: str = ""
    """human, mouse, ..."""
    technology: str = ""
    """merfish, xenium, cosmx, ..."""
    section: str | None = None
    """obs column, where a file holds several pieces of tissue."""
    labels: Labels = ""
    """obs columns to carry along."""
    layer: str | None = None
    """Where the raw counts are: X, raw, or the name of a layer. Found by itself if not given."""
    coordinates: str = "spatial"
    """obsm key, or two obs columns as X,Y."""
    um_per_unit: float | None = None
    """Size of a coordinate unit in um."""
    max_radius: float | None = None
    """Neighbours farther than this (um) do not count."""
    dissociated: bool = False
    """The cells have no coordinates."""
    modality: Literal["", "spatial", "dissociated"] = ""
    """What the technology measures, where that is not what having coordinates says."""
    tissue: str = ""
    """brain, breast, ...: for sampling weights."""
    table: str | None = None
    """The table of a SpatialData folder, where it has several."""
    cells: Path | None = None
    """The table of cells of a 10x .h5, where it is not beside it under its usual name."""
    name: str | None = None
    """Name of the slide, in place of the file's stem."""

    def source(self, path: Path) -> Any:
        from scfm_jax.corpus import Source

        for field in ("species", "technology"):
            if not getattr(self, field):
                raise InputError(
                    path, f"--{field} is not given", f"add --{field} NAME, or use a sources.toml"
                )
        columns = tuple(self.coordinates.split(","))
        return Source(
            path=str(path),
            species=self.species,
            technology=self.technology,
            layer=self.layer,
            spatial=not self.dissociated,
            tissue=self.tissue,
            modality=self.modality,
            coordinates=(columns[0], columns[1]) if len(columns) == 2 else self.coordinates,
            section=self.section,
            labels=tuple(filter(None, self.labels.split(","))),
            um_per_unit=self.um_per_unit,
            max_radius=self.max_radius,
            table=self.table,
            cells=None if self.cells is None else str(self.cells),
            name=self.name,
        )


@dataclasses.dataclass
class Workers:
    """Who does the work."""

    workers: int = 0
    """Processes. If 0, one for each core where the files hold over 256 MiB, else one."""
    scheduler: str | None = None
    """Address of a Dask scheduler whose workers share the work out (extra: dask)."""

    def read(self, sources: Sequence[Any]) -> dict[str, Any]:
        from scfm_jax.corpus.workers import n_cores

        if self.workers < 0:
            raise InputError("--workers", f"{self.workers} is no number of processes", "give 1 or more, or 0")
        paths = [Path(source.path) for source in sources]
        files = [file for path in paths for file in (path.rglob("*") if path.is_dir() else [path])]
        size = sum(file.stat().st_size for file in files if file.is_file())
        return {
            "workers": self.workers or (n_cores() if size > _LARGE else 1),
            "scheduler": self.scheduler,
        }
