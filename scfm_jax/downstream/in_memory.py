"""AnnData in memory, or one file, opened as a corpus or a cohort, whose folder goes when it is closed."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anndata

from scfm_jax.corpus import Corpus, Source, build_corpus
from scfm_jax.downstream.cohort import Cohort, open_cohort
from scfm_jax.downstream.model import TrainedModel
from scfm_jax.errors import InputError


@contextmanager
def corpus_of(adata: anndata.AnnData, model: TrainedModel, **source: Any) -> Iterator[Corpus]:
    """A corpus of the cells of `adata` with the model's genes and neighbours, for as long as it is open.

    Raises
    ------
    InputError
        What `build_corpus` finds wrong.
    """
    with _stored(adata) as path:
        build_corpus(
            path.parent / "corpus",
            [Source(str(path), **source)],
            vocabulary=model.vocabulary,
            n_neighbours=max(model.config.data.sample.stored_neighbours, 1),
        )
        yield Corpus.open(path.parent / "corpus")


@contextmanager
def cohort_of(adata: anndata.AnnData, tables: dict[str, Any], **source: Any) -> Iterator[Cohort]:
    """A cohort of the cells of `adata`, for as long as it is open; `tables` as of `open_cohort`.

    Raises
    ------
    InputError
        What `build_corpus` finds wrong.
    """
    with _stored(adata) as path:
        yield open_cohort(path.parent, [Source(str(path), **source)], **tables)


@contextmanager
def cohort_of_file(source: Source, tables: dict[str, Any]) -> Iterator[Cohort]:
    """A cohort of one file, for as long as it is open.

    Raises
    ------
    InputError
        What `build_corpus` finds wrong.
    """
    with tempfile.TemporaryDirectory() as folder, _said_of(source.path, folder):
        yield open_cohort(Path(folder), [source], **tables)


@contextmanager
def _stored(adata: anndata.AnnData) -> Iterator[Path]:
    """What a corpus reads of `adata`, as a file; what is said of it is said of ``adata``."""
    slim = anndata.AnnData(
        adata.X, adata.obs.copy(), adata.var[[]], obsm=dict(adata.obsm), layers=dict(adata.layers)
    )
    if adata.raw is not None:
        slim.raw = adata.raw.to_adata()
    with tempfile.TemporaryDirectory() as folder, _said_of("adata", folder):
        path = Path(folder) / "adata.h5ad"
        with _warned_of("adata", path):
            slim.write_h5ad(path)
            yield path


@contextmanager
def _said_of(where: str, folder: str) -> Iterator[None]:
    """Errors that name a file of `folder`, which the user has never seen, name `where`."""
    try:
        yield
    except InputError as error:
        if folder not in error.where:
            raise
        raise InputError(where, error.problem, error.mend) from error


@contextmanager
def _warned_of(where: str, path: Path) -> Iterator[None]:
    """Warnings that name `path` name `where`; they are given at the end."""
    caught: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            yield
    finally:
        for warning in caught:
            text = str(warning.message).replace(str(path), where)
            warnings.warn_explicit(text, warning.category, warning.filename, warning.lineno)
