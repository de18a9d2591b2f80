"""Nicheformer trained, resumed and opened: what a family of its own must do in the same loop."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest

from scfm_jax.corpus import Corpus, Source
from scfm_jax.downstream.embed import EmbeddingConfig, embed_cells, embed_file
from scfm_jax.downstream.model import TrainedModel, open_model
from scfm_jax.errors import InputError
from scfm_jax.training.config import RunConfig, override
from scfm_jax.training.metrics import read_metrics
from scfm_jax.training.run import read_run
from scfm_jax.training.train import train


@pytest.fixture(scope="module")
def model(run_with_niche: Path) -> TrainedModel:
    return open_model(run_with_niche)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    rows = read_metrics(folder / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name != "tokens_per_second"} for row in rows]


def test_its_rows_and_config(run_with_niche: Path, ranks: RunConfig) -> None:
    held_out = [row for row in rows_of(run_with_niche) if "held_out_loss" in row]
    assert [row["step"] for row in held_out] == [2, 4, 6]
    assert all(np.isfinite(row["held_out_loss"]) for row in held_out)
    assert all(0 <= row["held_out_top1_error"] <= 1 for row in held_out)
    assert held_out[-1]["held_out_loss"] < held_out[0]["held_out_loss"]
    assert read_run(run_with_niche)[0] == ranks


def test_resumed_it_goes_on_bit_for_bit(ranks: RunConfig, run_with_niche: Path, tmp_path: Path) -> None:
    first = dataclasses.replace(ranks, optimiser=dataclasses.replace(ranks.optimiser, steps=6))
    stopped = dataclasses.replace(first, evaluate_every=2)

    shutil.copytree(run_with_niche, tmp_path / "again")
    for step in (5, 6):
        shutil.rmtree(tmp_path / "again" / "checkpoints" / str(step), ignore_errors=True)
    assert train(stopped, tmp_path / "again", resume=True) == 6
    assert rows_of(tmp_path / "again") == rows_of(run_with_niche)


@pytest.mark.parametrize("over", ["genes", "context"])
@pytest.mark.parametrize("layer", [None, 0])
def test_embeddings_of_a_file(
    model: TrainedModel, corpus_path: Path, tmp_path: Path, over: Any, layer: int | None
) -> None:
    """Ranked against the means that the run was trained with, whatever the file's own are."""
    source = Source(str(corpus_path.parent / "slide1.h5ad"), "human", "simseq", um_per_unit=1.0)
    config = EmbeddingConfig("mean", over, layer)
    embed_file(model, source, tmp_path / "out.h5ad", config=config)
    out = anndata.read_h5ad(tmp_path / "out.h5ad")
    corpus = Corpus.open(corpus_path)
    cells = np.flatnonzero(corpus.slide_of(np.arange(corpus.n_cells)) == 1)
    direct = embed_cells(model, corpus, cells, config=config)
    np.testing.assert_allclose(
        out.obsm["X_nicheformer"][corpus.column("source_row", cells)], direct, atol=1e-5
    )
    assert np.unique(direct.round(5), axis=0).shape[0] == len(cells)
    assert out.uns["X_nicheformer"]["over"] == over


def test_the_means_of_the_run_are_the_corpus_s(run_with_niche: Path, corpus_path: Path) -> None:
    corpus = Corpus.open(corpus_path)
    for technology in ("simscope", "simseq"):
        stored = np.load(run_with_niche / "technology_means" / f"{technology}.npy")
        np.testing.assert_array_equal(stored, corpus.technology_means(technology))


def test_what_does_not_go_together_is_an_error(
    ranks: RunConfig, config: RunConfig, model: TrainedModel, finished: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="NicheformerConfig does not go with SampleConfig"):
        dataclasses.replace(ranks, data=config.data)
    with pytest.raises(InputError, match=r"sentences of 20 tokens, model.positions is 8"):
        train(override(ranks, ["--model.positions", "8"], "flags"), tmp_path / "short")
    with pytest.raises(InputError, match=r"model.niche is off"):
        train(override(ranks, ["--model.niche", "false"], "flags"), tmp_path / "off")
    with pytest.raises(InputError, match=r"the assay 'simseq' has no token"):
        train(override(ranks, ["--data.sample.extra_assays", "simscope"], "flags"), tmp_path / "assay")
    assert not list(tmp_path.iterdir())
    corpus = Corpus.open(ranks.corpus)
    with pytest.raises(InputError, match="has no layer 2"):
        embed_cells(model, corpus, np.arange(3), config=EmbeddingConfig(layer=2))
    with pytest.raises(InputError, match="reads niches"):
        embed_cells(model, corpus, np.arange(3), config=EmbeddingConfig(over="padding"))
    with pytest.raises(InputError, match="pools the last layer over genes alone"):
        embed_cells(open_model(finished), corpus, np.arange(3), config=EmbeddingConfig(over="context"))


def test_a_config_of_either_family_is_read_back(ranks: RunConfig, config: RunConfig) -> None:
    from scfm_jax.training.config import from_dict

    for whole in (ranks, config):
        plain = json.loads(json.dumps(dataclasses.asdict(whole)))
        assert from_dict(RunConfig, plain, "test") == whole
    with pytest.raises(InputError, match=r"has no field 'model.laters'; did you mean 'layers'"):
        override(ranks, ["--model.laters", "3"], "flags")
