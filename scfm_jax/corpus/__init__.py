"""The corpus on disk: built from AnnData files, opened lazily, read as ragged rows, verified."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from scfm_jax.corpus.reader import BLOCK, Cells, Corpus, Slide, corpus_info
from scfm_jax.corpus.sources import Source, read_sources
from scfm_jax.corpus.verify import verify_corpus

if TYPE_CHECKING:
    from scfm_jax.corpus.build import add_sources, build_corpus
    from scfm_jax.corpus.edit import merge_corpora, remove_slides

__all__ = [
    "BLOCK",
    "Cells",
    "Corpus",
    "Slide",
    "Source",
    "add_sources",
    "build_corpus",
    "corpus_info",
    "merge_corpora",
    "read_sources",
    "remove_slides",
    "verify_corpus",
]


_ELSEWHERE = {
    "add_sources": "build",
    "build_corpus": "build",
    "merge_corpora": "edit",
    "remove_slides": "edit",
}


def __getattr__(name: str) -> Any:
    # Building needs anndata, whose import takes longer than opening a corpus of any size.
    if name in _ELSEWHERE:
        return getattr(importlib.import_module(f"scfm_jax.corpus.{_ELSEWHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
