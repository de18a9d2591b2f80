"""Other loaders of single-cell data, each at its best documented settings, for tools/bench_data.py.

    python tools/data_rivals.py make FILE.h5ad [--cells 200000 --genes 20000 --nonzeros 800 --panel 1000]
    python tools/data_rivals.py prepare FILE.h5ad STORE.zarr --rival annbatch [--no-shuffle]
    python tools/data_rivals.py read FILE_OR_STORE --rival NAME --block 64 --pool 256 --batch 64 --cells 99999

`make` simulates the benchmark's file. `prepare` writes what a rival reads, and names it. `read` times a rival
and prints one line of JSON; `--rival scfm_jax` does so with a corpus of ours. The others run in an
environment of their own:

    python3.12 -m venv V && V/bin/pip install "annbatch[zarrs]" scdataset anndata h5py scipy torch==2.13.0

Only scdataset needs torch and only annbatch needs Python 3.12, so scdataset may have an environment of its
own, with a Python for which a build of torch without CUDA is at hand. What each documentation asks for:

annbatch
    Sharded zarr by its `DatasetCollection`, all defaults: chunks of 64 cells, shards of 1 GB, lz4. Shuffled
    on disk by default; `--no-shuffle` is its `shuffle=False`, for files whose neighbours must stay together.
    Codecs run in zarrs ("necessary for local filesystem performance") on one thread per core, its default;
    `direct_io` stays off, being meant for data 20 times the memory. Batches are SciPy CSR, which annbatch
    makes before any conversion. The loader is given X alone and brings row numbers (`return_index`), cheaper
    than the pandas rows of obs. block = `chunk_size`, pool = `preload_nchunks`.
scdataset
    `BlockShuffling(block)`, `fetch_factor` = block * pool / batch. `fetch_callback`, its hook, reads a backed
    CSR by a Boolean mask: anndata then takes a block in one piece, where with integers, as in the examples of
    the documentation, it goes row by row. `adata_to_mindex`, its ready-made transform, makes cells dense.
    `--workers` is the DataLoader of its quick start, with `prefetch_factor` = `fetch_factor` + 1.
backed
    `anndata.read_h5ad(backed="r")`; the rows of a batch are drawn from all cells, sorted, and read at once.
scfm_jax
    `CellBatches`, through Grain, from a corpus built with `--labels type --section slide`; block is 64.
ram
    X in memory as SciPy CSR and the same random rows: what copying rows costs when nothing is read.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import resource
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

SLIDES, TYPES, PATCHES, FIELDS = 48, 30, 20, 8
COLUMNS = ("slide", "type")
POOLED = ("scfm_jax", "annbatch", "scdataset")
PACKAGES = {
    "scfm_jax": "scfm_jax",
    "annbatch": "annbatch",
    "scdataset": "scDataset",
    "backed": "anndata",
    "ram": "scipy",
}


class Reader(NamedTuple):
    """A rival, opened: `start` begins an epoch of (row numbers, CSR) batches."""

    start: Callable[[], Iterator[tuple[np.ndarray, Any]]]
    codes: dict[str, np.ndarray]
    settings: dict[str, Any]


def prepare(arguments: argparse.Namespace) -> None:
    started = time.perf_counter()
    made = arguments.file
    if arguments.rival == "annbatch":
        made = arguments.folder
        if made.exists():
            raise SystemExit(f"{made}: it exists, and annbatch would add to it; give another name")
        zarr_at_its_best()
        from annbatch import DatasetCollection

        shuffle, random = not arguments.no_shuffle, np.random.default_rng(arguments.seed)
        DatasetCollection(made).add_adatas([arguments.file], shuffle=shuffle, rng=random)
    seconds = time.perf_counter() - started
    report(arguments, read=str(made), bytes=sum(path.stat().st_size for path in files(made)), seconds=seconds)


def read(arguments: argparse.Namespace) -> None:
    reader = RIVALS[arguments.rival](arguments)
    paths = files(arguments.file)
    n_cells = len(reader.codes[COLUMNS[0]])
    # A pool is read at once: stopping inside one would charge the rival for cells that it did not hand out.
    pool = arguments.block * arguments.pool if arguments.rival in POOLED else arguments.batch
    wanted = min(-(-arguments.cells // pool) * pool, n_cells)
    (forget if arguments.cold else touch)(paths)
    cached = resident(paths)
    batches, rows, nonzeros, cells = reader.start(), [], 0, 0
    cpu, started = cpu_seconds(), time.perf_counter()
    for of_batch, matrix in batches:
        assert matrix.format == "csr"
        nonzeros += matrix.data.size
        cells += len(of_batch)
        rows.append(of_batch)
        if cells >= wanted:
            break
    seconds = time.perf_counter() - started
    # The time of worker processes counts only once they have ended.
    del batches
    cpu = cpu_seconds() - cpu
    random = np.random.default_rng(arguments.seed)
    independent = [random.integers(0, n_cells, arguments.batch) for _ in rows]
    report(
        arguments,
        settings={"batch": arguments.batch, **reader.settings},
        cold=arguments.cold,
        cached_before=cached,
        cells=cells,
        nonzeros=nonzeros,
        seconds=seconds,
        cells_per_second=cells / seconds,
        cpu_seconds=cpu,
        entropy=entropies(reader.codes, rows, arguments.batch),
        entropy_independent=entropies(reader.codes, independent, arguments.batch),
    )


def report(arguments: argparse.Namespace, **figures: Any) -> None:
    """One line of JSON; memory is the peak of this process, in bytes."""
    rival = {"rival": arguments.rival, "version": version(PACKAGES[arguments.rival])}
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({**rival, **figures, "peak_memory": memory}))


def entropies(codes: dict[str, np.ndarray], rows: list[np.ndarray], batch: int) -> dict[str, float]:
    """Mean over whole batches of the Shannon entropy, in bits, of the codes [cells] of their rows."""
    found = {}
    for name, code in codes.items():
        size = code.max() + 1
        share = (
            np.stack([np.bincount(code[part], minlength=size) for part in rows if len(part) == batch]) / batch
        )
        found[name] = float(-(share * np.log2(np.where(share > 0, share, 1))).sum(1).mean())
    return found


def zarr_at_its_best() -> None:
    import zarr

    zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline", "threading.max_workers": None})


def open_annbatch(arguments: argparse.Namespace) -> Reader:
    zarr_at_its_best()
    import anndata
    from annbatch import DatasetCollection, Loader

    collection = DatasetCollection(arguments.file, mode="r")
    obs = collection.obs(columns=list(COLUMNS))
    loader: Any = Loader(
        chunk_size=arguments.block,
        preload_nchunks=arguments.pool,
        batch_size=arguments.batch,
        shuffle=True,
        return_index=True,
        rng=np.random.default_rng(arguments.seed),
    )
    loader.add_datasets([anndata.io.sparse_dataset(group["X"]) for group in collection])
    batches = ((batch["index"], batch["X"]) for batch in loader)
    codes = {name: np.unique(obs[name].astype(str), return_inverse=True)[1] for name in COLUMNS}
    return Reader(lambda: batches, codes, {"chunk_size": arguments.block, "preload_nchunks": arguments.pool})


def open_scdataset(arguments: argparse.Namespace) -> Reader:
    import anndata
    from scdataset import BlockShuffling, scDataset

    codes = codes_of(arguments.file)
    cells = np.arange(len(codes[COLUMNS[0]]))
    opened: dict[int, Any] = {}

    def fetch(_: Any, rows: np.ndarray) -> tuple[np.ndarray, Any]:
        # A worker opens the file for itself: HDF5's handles do not survive a fork.
        if os.getpid() not in opened:
            opened[os.getpid()] = anndata.io.sparse_dataset(h5py.File(arguments.file)["X"])
        return rows, opened[os.getpid()][np.isin(cells, rows, assume_unique=True)]

    factor = arguments.block * arguments.pool // arguments.batch
    dataset: Any = scDataset(
        cells,
        BlockShuffling(block_size=arguments.block),
        batch_size=arguments.batch,
        fetch_factor=factor,
        fetch_callback=fetch,
        batch_callback=lambda fetched, chosen: (fetched[0][chosen], fetched[1][chosen]),
        seed=arguments.seed,
    )
    if arguments.workers:
        from torch.utils.data import DataLoader

        options = {"num_workers": arguments.workers, "prefetch_factor": factor + 1}
        dataset = DataLoader(dataset, batch_size=None, collate_fn=lambda batch: batch, **options)
    settings = {"block_size": arguments.block, "fetch_factor": factor, "num_workers": arguments.workers}
    return Reader(lambda: iter(dataset), codes, settings)


def open_anndata(arguments: argparse.Namespace) -> Reader:
    import anndata

    backed = arguments.rival == "backed"
    if arguments.cold and not backed:
        raise SystemExit("--cold: ram reads nothing from a file; leave it out")
    matrix = anndata.read_h5ad(arguments.file, backed="r" if backed else None).X
    return Reader(lambda: at_random(matrix, arguments), codes_of(arguments.file), {})


def at_random(matrix: Any, arguments: argparse.Namespace) -> Iterator[tuple[np.ndarray, Any]]:
    """Batches of one permutation of all cells."""
    order = np.random.default_rng(arguments.seed).permutation(matrix.shape[0])
    for start in range(0, order.size, arguments.batch):
        rows = np.sort(order[start : start + arguments.batch])
        yield rows, matrix[rows]


class Csr(NamedTuple):
    """Rows as three arrays."""

    indptr: np.ndarray
    indices: np.ndarray
    data: np.ndarray
    format: str = "csr"


def open_scfm(arguments: argparse.Namespace) -> Reader:
    from scfm_jax.corpus import Corpus
    from scfm_jax.data.cells import CellBatches

    corpus = Corpus.open(arguments.file)
    everything = np.arange(corpus.n_cells)
    batches = CellBatches(
        corpus, everything, batch_size=arguments.batch, pool_blocks=arguments.pool, seed=arguments.seed
    )
    codes = {"slide": corpus.slide_of(everything), "type": corpus.labels("type")[0]}
    steps = corpus.n_cells // arguments.batch

    def start() -> Iterator[tuple[np.ndarray, Any]]:
        for batch in batches.iterate(0, steps):
            yield batch.index, Csr(batch.cells.offsets, batch.cells.genes, batch.cells.counts)

    return Reader(start, codes, {"pool_blocks": arguments.pool})


RIVALS = {
    "scfm_jax": open_scfm,
    "annbatch": open_annbatch,
    "scdataset": open_scdataset,
    "backed": open_anndata,
    "ram": open_anndata,
}


def codes_of(path: Path) -> dict[str, np.ndarray]:
    with h5py.File(path) as file:
        return {name: file["obs"][name]["codes"][:] for name in COLUMNS}


def files(path: Path) -> list[Path]:
    """The file, or all files of the store."""
    return sorted(part for part in path.rglob("*") if part.is_file()) if path.is_dir() else [path]


def touch(paths: list[Path]) -> None:
    """Bring every byte into the page cache."""
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


def forget(paths: list[Path]) -> None:
    """Drop the files from the page cache; pages not yet on disk cannot be dropped, hence fsync."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def resident(paths: list[Path]) -> float:
    """Share of the files' pages in the page cache, by mincore."""
    libc, flags = ctypes.CDLL(None), []
    for path in paths:
        if not (size := path.stat().st_size):
            continue
        # ctypes takes the address of a writable map only; a private one writes nothing back.
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as pages:
            flag, first = np.zeros(-(-size // mmap.PAGESIZE), np.uint8), ctypes.c_char.from_buffer(pages)
            address = ctypes.c_void_p(ctypes.addressof(first))
            if libc.mincore(address, ctypes.c_size_t(size), ctypes.c_void_p(flag.ctypes.data)):
                raise SystemExit(f"{path}: mincore failed")
            del first
        flags.append(flag & 1)
    return float(np.concatenate(flags).mean())


def cpu_seconds() -> float:
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(part.ru_utime + part.ru_stime for part in spent)


def make(arguments: argparse.Namespace) -> None:
    """Write a CSR h5ad of simulated counts, part by part, for any number of cells in little memory.

    Every cell draws molecules from the profile of its type, a Zipf law over genes tilted by the type. Slides
    are runs of cells; in a slide cells stand field of view by field of view; a type holds patches of tissue.
    """
    random = np.random.default_rng(arguments.seed)
    n_cells, n_genes = arguments.cells, arguments.panel or arguments.genes
    slides = np.arange(n_cells) * SLIDES // n_cells
    spatial, types = tissue(slides, random)
    names = np.sort(random.permutation(arguments.genes)[:n_genes])
    write_frame(arguments.file, slides, types, spatial, names)

    popularity = 1 / (20 + random.permutation(n_genes))
    profiles = popularity * random.lognormal(0, 0.7, (TYPES, n_genes))
    profiles /= profiles.sum(1, keepdims=True)
    spread = 0.5
    wanted = arguments.nonzeros * random.lognormal(-(spread**2) / 2, spread, n_cells)
    molecules = molecules_for(np.clip(wanted, 5, 0.8 * n_genes), profiles.mean(0))
    table = inverse_table(profiles)
    with h5py.File(arguments.file, "r+") as file:
        group = file.create_group("X")
        group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0"})
        group.attrs["shape"] = np.array([n_cells, n_genes])
        # h5py makes chunks for the size it is told; told the final one, about, they are as if written whole.
        room = (int(n_cells * arguments.nonzeros * 1.2),)
        options: dict[str, Any] = {"maxshape": (None,), "compression": "gzip" if arguments.gzip else None}
        data = group.create_dataset("data", room, np.float32, **options)
        indices = group.create_dataset("indices", room, np.int32, **options)
        lengths = np.zeros(n_cells + 1, np.int64)
        end = 0
        for start in range(0, n_cells, 2048):
            part = slice(start, min(start + 2048, n_cells))
            genes, counts, found = draw(types[part], molecules[part], table, n_genes, random)
            lengths[part.start + 1 : part.stop + 1] = found
            data[end : end + genes.size], indices[end : end + genes.size] = counts, genes
            end += genes.size
        data.resize((end,)), indices.resize((end,))
        group.create_dataset("indptr", data=lengths.cumsum().astype(np.int32), **options)


def tissue(slides: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Places [cells, 2] in micrometres and types [cells] of cells in the order of the file."""
    spatial, types = np.empty((slides.size, 2)), np.empty(slides.size, np.int8)
    for slide in range(SLIDES):
        rows = slides == slide
        place = random.random((rows.sum(), 2))
        field = np.floor(place * FIELDS).astype(int)
        column = np.where(field[:, 0] % 2, FIELDS - 1 - field[:, 1], field[:, 1])
        place = place[np.argsort(field[:, 0] * FIELDS + column, kind="stable")]
        centres = random.random((PATCHES, 2))
        nearest = ((place[:, None] - centres) ** 2).sum(-1).argmin(1)
        types[rows] = random.integers(0, TYPES, PATCHES)[nearest]
        spatial[rows] = place * 1000
    return spatial, types


def write_frame(
    path: Path, slides: np.ndarray, types: np.ndarray, spatial: np.ndarray, names: np.ndarray
) -> None:
    """All of the file but X."""
    import anndata
    import pandas

    labels = {
        name: pandas.Categorical.from_codes(
            codes, pandas.Index([f"{name}_{code:02d}" for code in range(size)])
        )
        for name, codes, size in (("slide", slides, SLIDES), ("type", types, TYPES))
    }
    index = pandas.Index([f"cell_{row:07d}" for row in range(slides.size)], dtype=object)
    obs = pandas.DataFrame(labels, index=index)
    var = pandas.DataFrame(index=pandas.Index([f"GENE{name:05d}" for name in names], dtype=object))
    anndata.AnnData(obs=obs, var=var, obsm={"spatial": spatial}).write_h5ad(path)


def molecules_for(nonzeros: np.ndarray, profile: np.ndarray) -> np.ndarray:
    """Draws [cells] from the profile [genes] that hit so many distinct genes, on average."""
    grid = np.geomspace(1, 1e5, 200)
    return np.interp(nonzeros, -np.expm1(-grid[:, None] * profile).sum(1), grid).astype(np.int64)


def inverse_table(profiles: np.ndarray, size: int = 1 << 19) -> np.ndarray:
    """Genes [types, size], each as often as its share of a profile [types, genes]: a draw is a look-up."""
    levels = (np.arange(size) + 0.5) / size
    return np.stack([np.searchsorted(profile.cumsum()[:-1], levels) for profile in profiles]).astype(np.int32)


def draw(
    types: np.ndarray, molecules: np.ndarray, table: np.ndarray, n_genes: int, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Genes and counts of some cells, one cell after the other with genes ascending, and nonzeros [cells]."""
    cell = np.repeat(np.arange(types.size), molecules)
    genes = table[types[cell], random.integers(0, table.shape[1], cell.size)]
    keys = np.sort(cell * n_genes + genes)
    first = np.flatnonzero(np.diff(keys, prepend=-1))
    counts = np.diff(first, append=keys.size)
    cell, genes = np.divmod(keys[first], n_genes)
    return genes.astype(np.int32), counts.astype(np.float32), np.bincount(cell, minlength=types.size)


def main() -> None:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(required=True)
    for run in (make, prepare, read):
        command = commands.add_parser(run.__name__)
        command.set_defaults(run=run)
        command.add_argument("file", type=Path)
        command.add_argument("--seed", type=int, default=0)
        if run is make:
            command.add_argument("--cells", type=int, default=200_000)
            command.add_argument("--genes", type=int, default=20_000, help="genes of the species")
            command.add_argument("--nonzeros", type=int, default=800, help="of a cell, about, on average")
            command.add_argument("--panel", type=int, help="measure only so many of the genes")
            command.add_argument("--gzip", action="store_true")
            continue
        command.add_argument("--rival", choices=list(RIVALS), required=True)
        if run is prepare:
            command.add_argument("folder", type=Path)
            command.add_argument("--no-shuffle", action="store_true", help="keep the order of the file")
        else:
            command.add_argument("--block", type=int, default=64, help="contiguous cells read together")
            command.add_argument("--pool", type=int, default=256, help="blocks shuffled together")
            command.add_argument("--batch", type=int, default=64)
            command.add_argument("--cells", type=int, default=1 << 62, help="rounded up to whole pools")
            command.add_argument("--workers", type=int, default=0, help="processes, scdataset only")
            command.add_argument("--cold", action="store_true", help="drop the files from the page cache")
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
