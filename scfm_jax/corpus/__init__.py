"""The corpus on disk: built from AnnData files, opened lazily, read as ragged rows, verified."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from scfm_jax.corpus.reader import BLOCK, Cells, Corpus, Slide, corpus_info
from scfm_jax.corpus.sources import Source, read_sources
from scfm_jax.corpus.verify import verify_corpus

if TYPE_CHECKING:
    from scfm_jax.corpus.build import build_corpus

__all__ = [
    "BLOCK",
    "Cells",
    "Corpus",
    "Slide",
    "Source",
    "build_corpus",
    "corpus_info",
    "read_sources",
    "verify_corpus",
]


def __getattr__(name: str) -> Any:
    # Building needs anndata, whose import takes longer than opening a corpus of any size.
    if name == "build_corpus":
        from scfm_jax.corpus.build import build_corpus

        return build_corpus
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
