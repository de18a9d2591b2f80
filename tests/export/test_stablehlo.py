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
import jax, numpy as np
from pathlib import Path
function = jax.export.deserialize(bytearray(Path(sys.argv[1], "embed.stablehlo").read_bytes()))
given = np.load(sys.argv[2])
names = ("genes", "counts", "cells", "totals", "offsets", "target_sum")
np.save(sys.argv[3], function.call(*(given[name] for name in names)))
"""


def test_a_fresh_process_embeds_the_same(finished: Path, corpus_path: Path, tmp_path: Path) -> None:
    exported = export_embedding(finished, tmp_path / "function")
    assert exported > 1_000
    assert {path.name for path in (tmp_path / "function").iterdir()} == {
        "embed.stablehlo",
        "inputs.json",
        "vocabulary.json",
        "README.md",
    }
    corpus, model = Corpus.open(corpus_path), open_model(finished)
    for cells in (np.arange(5), np.arange(100, 103)):  # two batches, two lengths
        samples = SampleReader(corpus, model.config.data.sample).read(cells)
        length = int(samples.tokens.lengths.max())
        batch = samples.collate(np.arange(len(cells)), length, int(samples.decoder.lengths.max()), len(cells))
        given, out = tmp_path / "given.npz", tmp_path / "out.npy"
        names = ("genes", "counts", "cells", "totals", "offsets", "target_sum")
        np.savez(given, **{name: getattr(batch, name) for name in names})
        done = subprocess.run(
            [sys.executable, "-c", ALONE, str(tmp_path / "function"), str(given), str(out)],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-1000:]
        np.testing.assert_allclose(np.load(out), embed_cells(model, corpus, cells), atol=1e-5)
