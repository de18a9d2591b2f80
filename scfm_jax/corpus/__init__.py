"""The corpus on disk: built from AnnData files, opened lazily, read as ragged rows, verified."""

from scfm_jax.corpus.build import build_corpus
from scfm_jax.corpus.reader import BLOCK, Cells, Corpus, Slide, corpus_info
from scfm_jax.corpus.sources import Source, read_sources
from scfm_jax.corpus.verify import verify_corpus

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
