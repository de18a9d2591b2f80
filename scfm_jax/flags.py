"""Flags that several verbs of the command line share."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import arg

from scfm_jax.errors import InputError

_LARGE = 1 << 28
MOST_DRAWS = 100_000  # of a bootstrap, whose draws lie in memory at once
Labels = Annotated[str, arg(metavar="COLUMN,...")]
Values = Annotated[str, arg(metavar="VALUE,...")]


def check_count(flag: str, value: int, least: int, most: int | None = None) -> None:
    """Raise InputError for a whole number that is out of range."""
    if value < least:
        raise InputError(flag, f"{value} is too low", f"give {least} or more")
    if most is not None and value > most:
        raise InputError(flag, f"{value} is too high", f"give {most:,} or less")


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
                    path,
                    f"--{field} is not given",
                    f"add --{field} NAME, or give corpus build a sources.toml",
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


@dataclasses.dataclass
class Split:
    """How labelled cells become folds."""

    by: Literal["blocks", "slides", "column", "technology", "random"] = "blocks"
    """Spatial blocks with a margin, whole slides, values of a column (a donor), or cells at random: a random
    split leaks."""
    groups: tuple[str, ...] = ()
    """With slides: patterns on their names, one fold each (*/animal1.*); with column: its values. All if not
    given."""
    column: str = ""
    """The obs column of split.by column, one value in each slide."""
    blocks: int = 8
    """Blocks along each side of a slide."""
    n_folds: int = 5
    """Folds that the blocks are dealt to."""
    margin: int = 64
    """Neighbours of test cells that nothing is learnt from."""
    context: Literal["separate", "shared"] = "separate"
    """Whether training and test cells may share neighbours outside both."""
    together: tuple[str, ...] = ()
    """Patterns of slides that overlie each other."""
    min_kept: float = 0.2
    """The least share of cells that margins must leave to learn from."""
    seed: int = 0
    """Decides the folds."""

    def read(self) -> Any:
        from scfm_jax.downstream.folds import FoldsConfig

        return FoldsConfig(**vars(self))


@dataclasses.dataclass
class Labelling:
    """Which label, and what counts as one."""

    label: str
    """The obs column to predict."""
    missing: Values = "nan,None,NA"
    """Values that count as no label, beside a real NaN; add Ambiguous where a file has it."""
    min_cells: int = 50
    """A class in fewer cells is left out, and listed."""
    min_blocks: int = 5
    """A class in fewer spatial blocks is left out, and listed."""
    class_map: Path | None = None
    """A file of class maps (.toml), which makes few classes of many."""
    side: str | None = None
    """The side of the class map; the file's stem if not given."""
    neighbours: int | None = None
    """k, of the model and of the baseline; the model's own if not given."""

    def read(self, file: Path, model: Any, split: Split) -> Any:
        from scfm_jax.downstream.annotate import neighbours_of
        from scfm_jax.downstream.class_maps import read_class_map
        from scfm_jax.downstream.cross_fitting import LabelConfig

        return LabelConfig(
            label=self.label,
            neighbours=neighbours_of(model, self.neighbours),
            split=split.read(),
            missing=tuple(filter(None, self.missing.split(","))),
            min_cells=self.min_cells,
            min_blocks=self.min_blocks,
            class_map=read_class_map(self.class_map, self.side or file.stem) if self.class_map else None,
        )


@dataclasses.dataclass
class Lora:
    """Adapters."""

    rank: int = 8
    """Inner size of a change of a kernel."""
    alpha: float = 16.0
    """Its weight: it counts alpha / rank."""


@dataclasses.dataclass
class Tuning:
    """What is trained, and how."""

    way: Literal["lora", "full", "head"] = "lora"
    """Adapters and a head, all weights that encode and a head, or a head alone."""
    head: Literal["linear", "max_linear", "mean_tanh"] = "linear"
    """Mean and linear; maximum and linear (AIDO.Tissue); mean, linear, tanh, dropout, linear."""
    lora: Lora = dataclasses.field(default_factory=Lora)
    epochs: int = 20
    """Most passes over the training cells."""
    patience: int = 5
    """Passes without a better validation score that end it."""
    batch_size: int = 32
    """Cells of a step."""
    base_rate: float | None = None
    """Peak learning rate of adapters (5e-4 if not given) or weights (1e-4)."""
    head_rate: float = 5e-3
    """Peak learning rate of the head."""
    max_train_cells: int = 0
    """Cells drawn to learn from, in proportion to their classes; 0 takes all."""
    refit: bool = False
    """Train again on the validation cells too, for as many passes as were best."""

    def read(self) -> Any:
        from scfm_jax.downstream.finetuned import FinetuneConfig
        from scfm_jax.models.heads import HeadConfig
        from scfm_jax.models.lora import LoraConfig

        try:
            given = vars(self) | {"head": HeadConfig(self.head), "lora": LoraConfig(**vars(self.lora))}
            return FinetuneConfig(**given)
        except ValueError as error:
            raise InputError("finetune", str(error), "choose another value") from error
