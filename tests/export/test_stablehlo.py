"""The serialised embedding, run in a process that cannot import this package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from scfm_jax.corpus import Corpus
from scfm_jax.data.tokens import SampleReader
from scfm_jax.downstream.embed import embed_cells
from scfm_jax.downstream.model import open_model
from scfm_jax.export.stablehlo import export_embedding

ALONE = """
import sys
sys.modules["scfm_jax"] = None
import jax, json, numpy as np
from pathlib import Path
folder = Path(sys.argv[1])
function = jax.export.deserialize(bytearray((folder / "embed.stablehlo").read_bytes()))
given = np.load(sys.argv[2])
names = json.loads((folder / "inputs.json").read_text())
np.save(sys.argv[3], function.call(*(given[name] for name in names)))
"""
TISSUE = ("genes", "counts", "cells", "totals", "offsets", "target_sum")
SENTENCE = ("tokens", "positions", "segments", "lengths")
FILES = {"embed.stablehlo", "inputs.json", "vocabulary.json", "README.md"}


def embedded_alone(folder: Path, given: dict[str, np.ndarray], scratch: Path) -> np.ndarray:
    """What the function says of `given` in a fresh process."""
    np.savez(scratch / "given.npz", **given)
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(folder), str(scratch / "given.npz"), str(scratch / "out.npy")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-1000:]
    return np.load(scratch / "out.npy")


def test_a_fresh_process_embeds_the_same(finished: Path, corpus_path: Path, tmp_path: Path) -> None:
    assert export_embedding(finished, tmp_path / "function") > 1_000
    assert {path.name for path in (tmp_path / "function").iterdir()} == FILES
    corpus, model = Corpus.open(corpus_path), open_model(finished)
    for cells in (np.arange(5), np.arange(100, 103)):  # two batches, two lengths
        samples = SampleReader(corpus, model.config.data.sample).read(cells)
        length = int(samples.tokens.lengths.max())
        batch = samples.collate(np.arange(len(cells)), length, int(samples.decoder.lengths.max()), len(cells))
        alone = embedded_alone(
            tmp_path / "function", {name: getattr(batch, name) for name in TISSUE}, tmp_path
        )
        np.testing.assert_allclose(alone, embed_cells(model, corpus, cells), atol=1e-5)


def test_a_fresh_process_embeds_sentences_with_niches(
    run_with_niche: Path, corpus_path: Path, tmp_path: Path
) -> None:
    """The form for what no published one holds; with it goes what makes the sentences."""
    assert export_embedding(run_with_niche, tmp_path / "function") > 1_000
    own = {"vocab.json", "scfm_jax.json", "technology_means"}
    assert {path.name for path in (tmp_path / "function").iterdir()} == FILES | own
    corpus, model = Corpus.open(corpus_path), open_model(run_with_niche)
    for cells in (np.arange(5), np.arange(100, 103)):
        read = model.config.nicheformer()[1].reader(corpus).read(cells)
        batch = read.collate(np.arange(len(cells)), int(read.tokens.lengths.max()), 1, len(cells))
        assert (batch.segments == 1).any()
        alone = embedded_alone(
            tmp_path / "function", {name: getattr(batch, name) for name in SENTENCE}, tmp_path
        )
        np.testing.assert_allclose(alone, embed_cells(model, corpus, cells), atol=1e-5)
