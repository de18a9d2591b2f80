"""The verbs ``scfm corpus ...``, each thin."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from scfm_jax.errors import InputError
from scfm_jax.flags import GeneTables, Reading, Workers


def corpus_build(
    out: Positional[Annotated[str, arg(metavar="CORPUS")]],
    files: Positional[Annotated[tuple[Path, ...], arg(metavar="FILE ...")]],
    /,
    reading: Annotated[Reading, arg(name="")],
    tables: Annotated[GeneTables, arg(name="")],
    sharing: Annotated[Workers, arg(name="")],
    vocabulary: Annotated[Path | None, arg(metavar="FILE")] = None,
    min_counts: int = 1,
    neighbours: int = 64,
    codec: Literal["lz4", "zstd"] = "lz4",
    json: bool = False,
) -> None:
    """Build a corpus from files of cells, or from one sources.toml that lists them.

    Parameters
    ----------
    out
        The new corpus: a folder, gs://BUCKET/PREFIX or s3://BUCKET/PREFIX.
    files
        Raw counts as .h5ad, .zarr (AnnData or SpatialData) or 10x .h5, or one sources.toml.
    vocabulary
        Genes to align to (.tsv, .csv, .json, or the var of an .h5ad). Built from the files if not given.
    min_counts
        Cells with fewer counts of vocabulary genes are dropped, and counted.
    neighbours
        Nearest neighbours to store for each cell.
    codec
        lz4 reads fastest, zstd takes a quarter less space.
    json
        Print the report as JSON.
    """
    from scfm_jax.corpus import build_corpus
    from scfm_jax.corpus.place import Place
    from scfm_jax.corpus.store import StoreOptions
    from scfm_jax.genes import Vocabulary

    given, sources = tables.read(), _sources(files, reading)
    chosen = Vocabulary.read(vocabulary, gene_names=given["gene_names"]) if vocabulary else None
    _write(
        build_corpus,
        out,
        sources,
        json,
        vocabulary=chosen,
        min_counts=min_counts,
        n_neighbours=neighbours,
        options=StoreOptions.suited_to(Place(out), codec),
        **sharing.read(sources),
        **given,
    )


def corpus_add(
    corpus: Positional[Annotated[str, arg(metavar="CORPUS")]],
    files: Positional[Annotated[tuple[Path, ...], arg(metavar="FILE ...")]],
    /,
    reading: Annotated[Reading, arg(name="")],
    tables: Annotated[GeneTables, arg(name="")],
    sharing: Annotated[Workers, arg(name="")],
    json: bool = False,
) -> None:
    """Add files of cells to a corpus; what it holds is not touched.

    Parameters
    ----------
    corpus
        A corpus; its vocabulary and settings hold for the new slides.
    files
        As of scfm corpus build.
    json
        Print the report as JSON.
    """
    from scfm_jax.corpus import add_sources

    sources = _sources(files, reading)
    _write(add_sources, corpus, sources, json, **sharing.read(sources), **tables.read())


def corpus_remove(
    corpus: Positional[Annotated[str, arg(metavar="CORPUS")]],
    slides: Positional[Annotated[tuple[str, ...], arg(metavar="SLIDE ...")]],
    /,
) -> None:
    """Remove slides from a corpus.

    Parameters
    ----------
    corpus
        A corpus.
    slides
        Names of slides, as scfm corpus info lists them.
    """
    from scfm_jax.corpus import remove_slides

    remove_slides(corpus, slides)
    _say_size(corpus)


def corpus_merge(
    out: Positional[Annotated[str, arg(metavar="OUT")]],
    corpora: Positional[Annotated[tuple[str, ...], arg(metavar="CORPUS ...")]],
    /,
) -> None:
    """Make one corpus of several without copying a cell: it points to their slides.

    Parameters
    ----------
    out
        The new corpus.
    corpora
        Corpora of one vocabulary; the new one needs them to stay where they are.
    """
    from scfm_jax.corpus import merge_corpora

    merge_corpora(out, corpora)
    _say_size(out)


def corpus_info(corpus: Positional[Annotated[str, arg(metavar="CORPUS")]], /, json: bool = False) -> None:
    """Say what a corpus holds.

    Parameters
    ----------
    corpus
        A corpus.
    json
        Print JSON.
    """
    from scfm_jax.console import print_json
    from scfm_jax.corpus import Corpus, corpus_info

    info = corpus_info(Corpus.open(corpus))
    if json:
        print_json(info)
        return
    slides = info.pop("slides")
    for name, value in info.items():
        shown = f"{value:,}" if isinstance(value, int) else value
        print(f"{name.replace('_', ' ')}: {shown}")
    for slide in slides:
        print("  " + "  ".join(f"{name}={value}" for name, value in slide.items()))


def corpus_verify(corpus: Positional[Annotated[str, arg(metavar="CORPUS")]], /) -> int:
    """Read every byte of a corpus against its checksums; exit 1 where something is damaged.

    Parameters
    ----------
    corpus
        A corpus.
    """
    from scfm_jax.corpus import verify_corpus

    problems = verify_corpus(corpus)
    for problem in problems:
        print(problem)
    print(f"{corpus}: " + (f"{len(problems)} problems" if problems else "whole"))
    return 1 if problems else 0


VERBS: dict[str, Callable[..., Any]] = {
    "corpus build": corpus_build,
    "corpus add": corpus_add,
    "corpus remove": corpus_remove,
    "corpus merge": corpus_merge,
    "corpus info": corpus_info,
    "corpus verify": corpus_verify,
}


def _sources(files: tuple[Path, ...], reading: Reading) -> list[Any]:
    from scfm_jax.corpus import read_sources

    if not files:
        raise InputError("corpus", "no file is given", "name files of cells or one sources.toml")
    if [path.suffix for path in files] == [".toml"]:
        return read_sources(files[0])
    return [reading.source(path) for path in files]


def _write(function: Callable[..., Any], corpus: str, sources: list[Any], json: bool, **options: Any) -> None:
    from scfm_jax.console import Bar, print_build, print_json

    with Bar("building", quiet=json) as bar:
        report = function(
            corpus, sources, progress=lambda what, done, total: bar.update(done, total, what), **options
        )
    if json:
        print_json(report)
        return
    print_build(report)
    _say_size(corpus)


def _say_size(path: str) -> None:
    from scfm_jax.corpus import Corpus

    corpus = Corpus.open(path)
    print(
        f"{corpus.n_cells:,} cells of {len(corpus.vocabulary):,} genes in {len(corpus.slides)} slides: {path}"
    )
